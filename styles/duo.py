"""The smallest real system: two small models, a planner that lays out and a solver that answers.

Both models are small enough for a laptop's CPU. So one can see here what the method is worth on
real models before one pays for large ones. The planner hears nobody, so there is one round. The
figures of docs/real.md were made with this style.
"""
from styles import Edge, Role, Style
from styles.sequential import PLAN
from styles.words import SOLVE, TASK, per_kind

duo = Style(
    name="duo",
    roles=(
        Role("planner", "HuggingFaceTB/SmolLM2-135M-Instruct", "", target=("plan",),
             prompt=per_kind(TASK, PLAN)),
        Role("solver", "Qwen/Qwen2.5-Coder-0.5B-Instruct", "", target=("answer",),
             first=per_kind(TASK, SOLVE),
             prompt=per_kind(TASK, "Your partner's plan: {planner}", SOLVE),
             own=per_kind(TASK, "Your own last answer: {solver}", SOLVE)),
    ),
    edges=(Edge("outer_12", "planner", "solver"),),
    settings={
        "train_inner": {"latent_length": 8, "num_samples": 300, "own_length": 24, "max_steps": 300,
                        "batch_size": 16},
        "train_outer": {"latent_length": 8, "num_recursive_rounds": 1, "batch_size": 2,
                        "warm_start_steps": 1000, "gradient_checkpointing": 0},
        "evaluate": {"temperature": 0.0},
        "gsm8k": {"max_new_tokens": 300}, "humaneval": {"max_new_tokens": 300},
    },
)

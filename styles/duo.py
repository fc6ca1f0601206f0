"""The smallest real system: two small models, a planner that lays out and a solver that answers.

Both models are small enough for a laptop's CPU. So one can see here what the method is worth on
real models before one pays for large ones. The planner hears nobody, so there is one round. The
figures of docs/real.md were made with this style.

In duo the planner knows nothing that the solver does not see itself. So a lower loss may come from
the form of the messages alone. In `told` the planner is told the row's {plan}, and repeats it as
the next line of a text (styles/relay.py says why). docs/gsm8k_rows.py makes rows of two kinds:

    told     plan: the first step of the gold solution. The solver sees the question.
    blind    plan: the question itself. The solver is only asked to solve its partner's problem.
"""
from dataclasses import replace

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

# 48 thoughts are as long as most first steps, and as most questions.
told = replace(
    duo, name="told",
    roles=(replace(duo.roles[0], prompt="{plan}\n{plan}\n{plan}\n{plan}\n", chat=False),
           duo.roles[1]),
    settings={
        **duo.settings,
        "train_inner": {**duo.settings["train_inner"], "latent_length": 48, "own_length": 48},
        "train_outer": {**duo.settings["train_outer"], "latent_length": 48},
    },
)

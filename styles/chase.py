"""Two small models that hear each other and follow a word through two tables: tasks/chase.py.

Each prompt is the beginning of a text that a model goes on with, and no chat stands around it. As
an instruction the planner finds the next word in 0 of 24 tables, as such a text in most of them.
One word is one token, so one thought is enough: m = 1.
"""
from styles import Edge, Role, Style


def arrow_from(table, word):
    """A list of arrows, and the beginning of one of them."""
    return f"A list of arrows:\n{{{table}}}\n\nFrom the list:\n{{{word}}} ->"


TRAINING = {"dataset_name": "chase", "latent_length": 1, "mas_task": "search"}

chase = Style(
    name="chase",
    roles=(
        Role("planner", "HuggingFaceTB/SmolLM2-135M-Instruct", "", target=("plan",), chat=False,
             first=arrow_from("planner_table", "question"),
             prompt=arrow_from("planner_table", "solver")),
        Role("solver", "Qwen/Qwen2.5-Coder-0.5B-Instruct", "", target=("answer",), chat=False,
             first=arrow_from("solver_table", "question"),
             prompt=arrow_from("solver_table", "planner"),
             own=arrow_from("solver_table", "solver")),
    ),
    edges=(Edge("outer_12", "planner", "solver"), Edge("outer_21", "solver", "planner")),
    settings={
        "train_inner": {**TRAINING, "num_samples": 450, "own_length": 1, "batch_size": 32,
                        "adapter_contrast_weight": 1.0, "adapter_lr": 3e-4, "max_steps": 300},
        "train_outer": {**TRAINING, "num_recursive_rounds": 2, "random_rounds": 1,
                        "role_loss_weight": 1.0, "batch_size": 8, "outer_lr": 3e-5,
                        "warm_start_steps": 1000, "max_steps": 300, "eval_samples": 0,
                        "gradient_checkpointing": 0},
        "evaluate": {"dataset": "chase", "max_new_tokens": 1, "temperature": 0.0},
    },
)

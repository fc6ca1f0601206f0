"""The shipped tiny system: tasks/tiny.py says what its agents do, docs/build_tiny.py made them."""
from styles import Edge, Role, Style

FIRST = "{question} <|notes|> none"

tiny = Style(
    name="tiny",
    repo="tiny/outer",
    roles=(
        Role("planner", "tiny/planner", "tiny/planner", target=("plan",),
             prompt="{question} <|notes|> {solver}", first=FIRST),
        Role("critic", "tiny/critic", "tiny/critic", target=("refined_plan",),
             prompt="{question} <|notes|> {planner}", first=FIRST),
        Role("solver", "tiny/solver", "tiny/solver", target=("answer",),
             prompt="{question} <|notes|> {critic}", first=FIRST,
             own="{question} <|notes|> {solver}"),
    ),
    edges=(Edge("outer_12", "planner", "critic"), Edge("outer_23", "critic", "solver"),
           Edge("outer_31", "solver", "planner")),
    settings={
        # On a busy machine of 2 cores the same run took 40 s with one thread, over 250 s with two.
        # On 16 cores and on an H200 it crawled too.
        "device": {"device": "cpu", "threads": 1,
                   "why": "its matrices are too small for a GPU, and for more threads"},
        "train_inner": {"dataset_name": "tiny", "num_samples": 2000, "max_steps": 2000,
                        "batch_size": 32, "adapter_lr": 4e-3, "latent_length": 6, "text": "gold",
                        "held_out": 200},
        "train_outer": {"dataset_name": "tiny", "num_samples": 3200, "max_steps": 100,
                        "batch_size": 32, "outer_lr": 1e-3, "max_grad_norm": 0.3,
                        "latent_length": 6, "role_loss_weight": 1.0, "warm_start_steps": 400,
                        "random_rounds": 1, "gradient_checkpointing": 0, "eval_samples": 300},
        # For every data set: the agents know no notes longer than these.
        "evaluate": {"max_new_tokens": 32, "temperature": 0.0, "batch_size": 125},
    },
)

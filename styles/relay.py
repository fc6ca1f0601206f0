"""Two small models and one link between them: the channel test of tasks/relay.py.

The planner is told a fact, and the solver is asked for it. The planner hears nobody, so there is
only one round. Nobody hears the solver, so it needs no inner link.

relay_list is the same for lists of up to 16 words: a thought for each word, and one for the end of
the line. In a chat both models leave words out when they are asked to repeat a list. As the next
line of a text that has the list two or four times, they repeat it. So they speak without a chat.
"""
from dataclasses import replace

from styles import Edge, Role, Style

TRAINING = {"dataset_name": "relay", "latent_length": 6, "mas_task": "search"}

relay = Style(
    name="relay",
    roles=(
        Role("planner", "HuggingFaceTB/SmolLM2-135M-Instruct", "", target=("plan",),
             prompt="{told}\n\nRepeat it, and nothing else."),
        Role("solver", "Qwen/Qwen2.5-Coder-0.5B-Instruct", "", target=("answer",),
             first="{question}", prompt="{question}\n\nYour partner says: {planner}",
             own="{question}\n\nYour own last answer: {solver}"),
    ),
    edges=(Edge("outer_12", "planner", "solver"),),
    settings={
        "train_inner": {**TRAINING, "num_samples": 1000, "own_length": 9, "batch_size": 32,
                        "adapter_lr": 4e-3, "max_steps": 400},
        "train_outer": {**TRAINING, "num_samples": 8000, "num_recursive_rounds": 1,
                        "batch_size": 12, "outer_lr": 3e-4, "warm_start_steps": 1000,
                        "max_steps": 400, "gradient_checkpointing": 0},
        "evaluate": {"dataset": "relay", "temperature": 0.0, "batch_size": 32},
        **dict.fromkeys(("relay", "relay_number", "relay_sentence"), {"max_new_tokens": 16}),
    },
)

LISTS = {**TRAINING, "dataset_name": "relay_list", "latent_length": 17}

relay_list = replace(
    relay, name="relay_list",
    roles=(replace(relay.roles[0], prompt="{told}\n{told}\n{told}\n{told}\nThe words:", chat=False),
           Role("solver", relay.roles[1].model, "", target=("plan",), chat=False,
                first="{question}\n\nThe words:",
                prompt="{question}\n\nThe words: {planner}\nThe words: {planner}\nThe words:",
                own="{question}\n\nThe words: {solver}\nThe words: {solver}\nThe words:")),
    settings={
        "train_inner": {**relay.settings["train_inner"], **LISTS, "num_samples": 3000,
                        "text": "gold", "max_steps": 600},
        "train_outer": {**relay.settings["train_outer"], **LISTS, "eval_samples": 0},
        "evaluate": {"dataset": "relay_list", "temperature": 0.0, "batch_size": 64,
                     "max_new_tokens": 32},
    },
)

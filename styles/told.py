"""Questions on which the content of a message counts: the planner is told what the solver is not.

In duo the planner knows nothing that the solver does not see itself. So a lower loss may come from
the form of the messages alone. Here the planner is told the row's {plan}, and repeats it as the
next line of a text (styles/relay.py says why). docs/gsm8k_rows.py makes rows of two kinds:

    told     plan: the first step of the gold solution. The solver sees the question.
    blind    plan: the question itself. The solver is only asked to solve its partner's problem.
"""
from dataclasses import replace

from styles import Style
from styles.duo import duo

LENGTH = 48                           # tokens: as long as most first steps, and most questions

told = Style(
    name="told",
    roles=(replace(duo.roles[0], prompt="{plan}\n{plan}\n{plan}\n{plan}\n", chat=False),
           duo.roles[1]),
    edges=duo.edges,
    settings={
        **duo.settings,
        "train_inner": {**duo.settings["train_inner"], "latent_length": LENGTH,
                        "own_length": LENGTH, "num_samples": 1000, "adapter_lr": 4e-3},
        "train_outer": {**duo.settings["train_outer"], "latent_length": LENGTH},
    },
)

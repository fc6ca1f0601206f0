"""Tasks: where questions come from and how an answer is scored. One file a kind of task.

    from tasks import get_task
    task = get_task("tiny")
    for example in task.load(limit=4):
        print(example.question, task.score(example, "s2 +1 7 answer 7 ."))

A file of this folder names the data sets it knows in NAMES and makes a Task of each in `task()`.
Adding a data set means adding a file (or a name to one); nothing else needs to hear of it.
"""
import importlib
import math
import pkgutil
from dataclasses import dataclass, field
from typing import Callable


@dataclass(frozen=True)
class Example:
    """One question. `row` is the raw record it was made from, kept for scorers that need more."""
    id: str
    question: str
    gold: str
    kind: str                    # math | choice | code | search: which prompt a role uses
    row: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """`parsed` is the answer found in the text; None = unparsed, which always counts as wrong."""
    correct: bool
    parsed: str | None


@dataclass(frozen=True)
class Task:
    """A data set with its scorer; `load` and `score` are plain functions of the task's file."""
    name: str
    kind: str
    load: Callable               # load(limit=None) -> [Example]
    score: Callable              # score(example, text) -> Score
    train_rows: Callable | None = None    # train_rows(n, seed) -> [row]: generated training data
    brief: int | None = None     # tokens that hold all a message needs (method text_brief)
    ceiling: Callable | None = None       # ceiling(examples, rounds) -> best accuracy possible


def get_task(name, path=None):
    """The Task of data set `name`, its rows read from `path` if one is given.

    Raises ValueError for an unknown name, listing the known ones."""
    for module in task_modules():
        if name in module.NAMES:
            return module.task(name, path)
    raise ValueError(f"unknown data set '{name}': choose one of {', '.join(task_names())}")


def task_modules():
    """The files of this folder."""
    return [importlib.import_module(f"{__name__}.{info.name}")
            for info in pkgutil.iter_modules(__path__)]


def task_names():
    """The names of all data sets."""
    return sorted(name for module in task_modules() for name in module.NAMES)


def pass_at_k(n, c, k):
    """Unbiased estimate of P(at least one of k samples is right), from c right ones among n.

    pass@k = 1 - C(n-c, k) / C(n, k)"""
    if not 1 <= k <= n or not 0 <= c <= n:
        raise ValueError(f"pass_at_k needs 1 <= k <= n and 0 <= c <= n, got n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)

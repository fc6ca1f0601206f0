"""Tasks: where questions come from and how an answer is scored. One file a kind of task.

    from tasks import get_task
    task = get_task("tiny")
    for example in task.load(limit=4):
        print(example.question, task.score(example, "s2 +1 7 answer 7 ."))

    get_task("math500")                        rows from the hub
    get_task("math500", "my/rows.jsonl")       rows from a local file with the same columns
    get_task("choice", "my/rows.json")         any layout that tasks/choice.py can read

A file of this folder names the data sets it knows in NAMES and makes a Task of each in `task()`.
Adding a data set means adding a file (or a name to one); nothing else needs to hear of it.
"""
import importlib
import json
import math
import pkgutil
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, NamedTuple

from support.errors import blame, need
from tasks.boxes import last_box, without_fonts    # noqa: F401: what scorers are made of

NO_HUB = ("could not be read from the hub: check the network (HF_HUB_OFFLINE); if it is gated, "
          "accept its terms there and run `hf auth login`; or give a local file of its rows")


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
    """`parsed` is the answer found in the text; None = unparsed, which always counts as wrong.
    `note` says what decided where that is not plain: `judge: correct`, `test 3 of 9: timeout`."""
    correct: bool
    parsed: str | None
    note: str = ""


@dataclass(frozen=True)
class Task:
    """A data set with its scorer; `load` and `score` are plain functions of the task's file."""
    name: str
    kind: str
    load: Callable               # load(limit=None, split=None) -> [Example]; split: of a hub set
    score: Callable              # score(example, text) -> Score
    train_rows: Callable | None = None    # train_rows(n, seed) -> [row]: generated training data
    brief: int | None = None     # tokens that hold all a message needs (method text_brief)
    leave_out: tuple = ()        # words of the test that no training may see (relay)
    ceiling: Callable | None = None       # ceiling(examples, rounds) -> best accuracy possible
    samples: int = 1             # answers to draw per question, as the publishers did (pass@k)
    ready: Callable | None = None         # ready(allow_unsafe=False): can answers be scored here?
    retry: tuple | None = None   # (text put behind an answer that cannot be read, words more)
    fits: Callable | None = None          # fits(agent, m): is m enough for what is told? (relay)


def get_task(name, path=None):
    """The Task of data set `name`, its rows read from `path` if one is given. With a path, name
    may also be a file of this folder (`maths`): rows in any layout that file can read.

    Raises ValueError for an unknown name, listing the known ones."""
    name = {"math": "maths", "code": "coding"}.get(name, name)
    families = {module.__name__.rpartition(".")[2]: module for module in task_modules()}
    for module in families.values():
        if name in module.NAMES:
            return module.task(name, path)
    need(name in families, f"unknown data set '{name}': choose one of {', '.join(task_names())}")
    need(path, f"'{name}' is a kind of task, not a data set: give it a .json or .jsonl file, or "
         f"choose one of {', '.join(families[name].NAMES)}")
    return families[name].task(name, path)


def task_modules():
    """The files of this folder that are kinds of tasks."""
    files = [importlib.import_module(f"{__name__}.{info.name}")
             for info in pkgutil.iter_modules(__path__)]
    return [file for file in files if hasattr(file, "NAMES")]


def task_names():
    """The names of all data sets."""
    return sorted(name for module in task_modules() for name in module.NAMES)


def generated_task(name):
    """The Task of that name if it makes its own training rows (as `tiny` does), else None."""
    task = get_task(name) if name in task_names() else None
    return task if task and task.train_rows else None


def pass_at_k(n, c, k):
    """Unbiased estimate of P(at least one of k samples is right), from c right ones among n.

    pass@k = 1 - C(n-c, k) / C(n, k)"""
    need(1 <= k <= n and 0 <= c <= n, f"pass_at_k needs 1 <= k <= n and 0 <= c <= n, got n={n}, "
         f"c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


# ---- rows ---------------------------------------------------------------------------------------

class Place(NamedTuple):
    """Where a row stands: the file or data set, its number from 1, its first byte in a .jsonl."""
    file: str
    number: int
    offset: int | None = None

    def __str__(self):
        return f"{self.file} row {self.number}"


class Unusable(ValueError):
    """A row that cannot be scored. It is skipped, and the skip is printed."""


def read_rows(name, config=None, split=None, field="data"):
    """Yields (Place, row) of a local .json or .jsonl file, or of a data set on the hub.

    A .json holds a list, or a list under `field`. A .jsonl is read line by line. Raises ValueError
    or OSError, naming the file and the row."""
    path = Path(name)
    if path.suffix not in (".json", ".jsonl"):
        need(not path.is_file(), f"{path} is neither .json nor .jsonl: convert it")
        yield from hub_rows(str(name), config, split)
    elif not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a .json or .jsonl file of rows")
    elif path.suffix == ".json":
        content = parse_json(path.read_bytes(), path)
        rows = content.get(field) if isinstance(content, dict) else content
        need(isinstance(rows, list), f"{path} must hold a list of rows, or a list under '{field}'")
        yield from ((Place(str(path), number), row) for number, row in enumerate(rows, start=1))
    else:
        with open(path, "rb") as file:
            offset = 0
            for number, line in enumerate(file, start=1):
                place = Place(str(path), number, offset)
                offset += len(line)
                if line.strip():
                    yield place, parse_json(line, place)


def parse_json(text, name):
    """json.loads whose ValueError says in one line what `name` is at fault."""
    with blame(f"{name} is not JSON: correct or remove it"):
        return json.loads(text)


def source_rows(source, path=None, split=None):
    """Yields (Place, row) of the file `path`, or of source = (hub id, config, usual split)."""
    need(not (path and split), f"{path} is a file and has no split '{split}': leave "
         "--dataset_split away")
    return read_rows(path) if path else read_rows(*source[:2], split or source[2])


def hub_rows(name, config, split):
    """Yields (Place, row) of a data set on the hub. Raises OSError with what to do."""
    import datasets                            # takes a second to import: only where it is needed
    with blame(f"{name}, split {split}, {NO_HUB}", OSError):
        rows = datasets.load_dataset(name, config, split=split)
    yield from ((Place(name, number), row) for number, row in enumerate(rows, start=1))


def examples_from(rows, make, name, path=None, limit=None):
    """The first `limit` Examples of rows (Place, row), each made by make(place, row).

    Rows that `make` calls Unusable are left out, counted and printed. Raises ValueError for a
    row that is no object, an id that comes twice, and where nothing is left."""
    examples, left_out, seen = [], [], {}
    for place, row in rows:
        need(isinstance(row, dict), f"{place} is not an object with columns: {str(row)[:60]!r}")
        try:
            example = make(place, row)
        except Unusable as problem:
            left_out.append(str(problem))
            continue
        example = replace(example, id=example.id or f"{name}-{place.number}")
        need(example.id not in seen, f"{place} has the id '{example.id}' of row "
             f"{seen.get(example.id)}: ids must differ")
        seen[example.id] = place.number
        examples.append(example)
        if len(examples) == limit:             # before another row is read: it may be megabytes
            break
    if left_out:
        print(f"left out {len(left_out)} of the rows: {'; '.join(left_out[:5])}", flush=True)
    need(examples, f"{path or name} holds no question that can be scored")
    return examples


def column(place, row, *names):
    """The first of the columns `names` that the row has, as a string.

    Raises ValueError if it has none of them, Unusable if the cell is empty."""
    for name in names:
        if name in row:
            value = row[name]
            if isinstance(value, (str, int, float)) and str(value).strip():
                return str(value)
            raise Unusable(f"{place} has no text in '{name}'")
    raise ValueError(f"{place} has no column {' or '.join(map(repr, names))}; its columns are "
                     f"{', '.join(map(str, row)) or 'none'}")


def row_id(row, *names):
    """The id in the first column of `names` that is there, or "": it is then numbered."""
    return next((str(row[name]) for name in names if row.get(name) not in (None, "")), "")


BOXED_RETRY = ("\nFinal Answer: \\boxed{", 16)         # as the publishers did
CODE_RETRY = ("\nFinal Answer:\n```python\n", 256)

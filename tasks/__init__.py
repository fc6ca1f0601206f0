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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, NamedTuple

from support.errors import blame, need
from tasks.boxes import last_box, without_fonts    # noqa: F401: what scorers are made of

ID_COLUMNS = ("unique_id", "id", "_id", "problem_idx", "Record ID", "task_id", "question_id")
# What is put after an answer that cannot be read, and how many words more, as the publishers did.
BOXED_RETRY = ("\nFinal Answer: \\boxed{", 16)
CODE_RETRY = ("\nFinal Answer:\n```python\n", 256)


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
    retry: tuple | None = None   # (text put after an answer that cannot be read, words more)
    check_m: Callable | None = None       # check_m(agent, m): an error or a warning if m cannot do


def get_task(name, path=None):
    """The Task of data set `name`, its rows read from `path` if one is given. With a path, name
    may also be a file of this folder (`maths`): rows in any layout that file can read.

    Raises ValueError for an unknown name, listing the known ones."""
    files = task_files()
    file = next((file for file in files.values() if name in file.NAMES), files.get(name))
    need(file, f"unknown data set '{name}': choose one of {', '.join(task_names())}")
    need(path or name in file.NAMES, f"'{name}' is a kind of task, not a data set: give it a .json "
         f"or .jsonl file, or choose one of {', '.join(file.NAMES)}")
    return file.task(name, path)


def task_files():
    """{name: module} of the files of this folder that know data sets."""
    files = {info.name: importlib.import_module(f"{__name__}.{info.name}")
             for info in pkgutil.iter_modules(__path__)}
    return {name: file for name, file in files.items() if hasattr(file, "NAMES")}


def task_names():
    """The names of all data sets."""
    return sorted(name for file in task_files().values() for name in file.NAMES)


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


def row_task(name, kind, path, source, make_example, score, **more):
    """The Task of questions that make_example(place, row) makes of rows. more: fields of Task.

    The rows stand in the file `path`, or on the hub: source = (id, configuration, usual split)."""
    def load(limit=None, split=None):
        """The first `limit` Examples. What make_example calls Unusable is left out, and printed.

        Raises ValueError or OSError naming the row: for one that is no object, or has the id of
        another, and where nothing is left."""
        need(not (path and split), f"{path} has no split '{split}': leave --dataset_split out")
        examples, left_out = {}, []
        for place, row in read_rows(path) if path else read_rows(*source[:2], split or source[2]):
            need(isinstance(row, dict), f"{place} is not an object: {str(row)[:60]!r}")
            ids = [str(row[column]) for column in ID_COLUMNS if row.get(column) not in (None, "")]
            own = ids[0] if ids else f"{name}-{place.number}"
            need(own not in examples, f"{place} has the id '{own}' of a row before it")
            try:
                examples[own] = replace(make_example(place, row), id=own)
            except Unusable as problem:
                left_out.append(str(problem))
            if len(examples) == limit:         # before another row is read: it may be megabytes
                break
        if left_out:
            print(f"left out {len(left_out)} of the rows: {'; '.join(left_out[:5])}", flush=True)
        need(examples, f"{path or name} holds no question that can be scored")
        return list(examples.values())

    return Task(name, kind, load, score, **more)


def read_rows(name, config=None, split=None, field="data"):
    """Yields (Place, row) of a local .json or .jsonl file, or of a data set on the hub.

    A .json holds a list, or a list under `field`. A .jsonl is read line by line. config: of a hub
    set, or the numbers of its files `SPLIT2.jsonl`, if `datasets` cannot read it. Raises ValueError
    or OSError, naming the file and the row."""
    path, offset = Path(name), 0
    if path.suffix == ".jsonl":
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                place = Place(str(path), number, offset)
                offset += len(line)
                if line.strip():
                    yield place, parse_json(line, place)
        return
    if path.suffix == ".json":
        content = parse_json(path.read_bytes(), path)
        rows = content.get(field) if isinstance(content, dict) else content
        need(isinstance(rows, list), f"{path} must hold a list of rows, or a list under '{field}'")
    else:
        need(not path.is_file() and path.suffix not in (".csv", ".tsv", ".parquet", ".txt"),
             f"{path} is neither .json nor .jsonl: convert it")
        with blame(f"{name} could not be read from the hub: check the network (HF_HUB_OFFLINE); if "
                   "it is gated, accept its terms there and run `hf auth login`; or give a local "
                   "file of its rows", OSError):
            if isinstance(config, tuple):
                from huggingface_hub import hf_hub_download
                for number in config:              # each file is fetched when its turn comes
                    yield from read_rows(hf_hub_download(name, f"{split}{number}.jsonl",
                                                         repo_type="dataset"))
                return
            import datasets                    # takes a second to import: only where it is needed
            rows = datasets.load_dataset(str(name), config, split=split)
    for number, row in enumerate(rows, start=1):
        yield Place(str(name), number), row


def parse_json(text, name):
    """json.loads whose ValueError says in one line what `name` is at fault."""
    with blame(f"{name} is not JSON: correct or remove it"):
        return json.loads(text)


def column(place, row, *names):
    """The first of the columns `names` that the row has, as a string without outer blanks.

    Raises ValueError if it has none of them, Unusable if the cell is empty."""
    name = next((name for name in names if name in row), None)
    need(name, f"{place} has no column {' or '.join(map(repr, names))}; its columns are "
         f"{', '.join(map(str, row)) or 'none'}")
    if not isinstance(row[name], (str, int, float)) or not str(row[name]).strip():
        raise Unusable(f"{place} has no text in '{name}'")
    return str(row[name]).strip()

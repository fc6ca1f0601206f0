"""Tasks: where questions come from and how an answer is scored. One file per kind of task.

    from tasks import get_task
    task = get_task("tiny")
    for example in task.load(limit=4):
        print(example.question, task.score(example, "s2 +1 7 answer 7 ."))

    get_task("math500")                        rows from the hub
    get_task("math500", "my/rows.jsonl")       rows from a local file with the same columns
    get_task("choice", "my/rows.json")         any layout that tasks/choice.py can read
    get_task("my/near.py")                     the task that this file makes

A file of this folder derives a class from Task. Its `names` are the data sets that it knows.
Adding a data set means adding a file (or a name to one); nothing else needs to hear of it. A file
anywhere else makes one such class, with one name, and is given by its path (docs/extend.md).
"""
import importlib
import math
import operator
import pkgutil
import re
import sys
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from support.errors import need, shown
from support.sources import Source, read_rows, run_file
from tools import worker

ID_COLUMNS = ("unique_id", "id", "_id", "problem_idx", "Record ID", "task_id", "question_id")
# The text put after an answer that cannot be read, and how many tokens may follow it, as published.
BOXED_RETRY = ("\nFinal Answer: \\boxed{", 16)
CODE_RETRY = ("\nFinal Answer:\n```python\n", 256)
# A condition on rows: `difficulty=hard`, `contest_date>=2024-08-01`.
CONDITION = re.compile(r"\s*([^!<>=]+?)\s*([!<>=]=|[<>=])\s*([^!<>=].*?)\s*")
SIGNS = {"=": operator.eq, "==": operator.eq, "!=": operator.ne, "<": operator.lt,
         "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@dataclass(frozen=True)
class Example:
    """One question. `row` is the record it was made from, kept for scorers that need more."""
    id: str
    question: str
    gold: str
    kind: str                    # math | choice | code | search: which prompt a role uses
    row: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """`parsed` is the answer found in the text. None means unparsed, and always counts as wrong.
    `note` says what decided where that is not plain: `judge: correct`, `test 3 of 9: timeout`."""
    correct: bool
    parsed: str | None
    note: str = ""


class Task:
    """A data set with its scorer. This base is for tasks that make their own questions. RowTask is
    for those that read them. A class defines two methods, and everything else has a default:

    load(limit=None, split=None) -> [Example]    the first ones; split: None for the usual one
    score(example, text) -> Score"""
    names = ()                   # the data sets that the class knows
    kind = ""                    # of the questions, as in Example
    brief = None                 # tokens that hold all a message needs (method text_brief)
    leave_out = ()               # words of the test that no training may see (relay, chase)
    samples = 1                  # answers to draw per question, as the publishers did (pass@k)
    retry = None                 # (text put after an answer that cannot be read, tokens after it)
    train_rows = None            # train_rows(n, seed) -> [row], if the task makes training data

    def __init__(self, name, path=None):
        need(path is None, f"{name} makes its own questions: leave the path out")
        self.name = name

    def ceiling(self, examples, rounds):
        """The best accuracy of the shipped style of the task's name in `rounds` rounds, or None."""

    def ready(self, allow_unsafe=False):
        """Raise ValueError, before anything is generated, if answers cannot be scored here."""

    def with_rounds(self, example, rounds):
        """The Example as it is asked with R rounds, for a task whose right answer depends on R."""
        return example

    def check_m(self, agent, m, rounds=1):
        """Raise ValueError, or print a warning, if m thoughts or R rounds do not fit the task."""


def get_task(name, path=None, conditions=()):
    """The Task of data set `name`. With a path, its rows are read from there, and name may also be
    a file of this folder (`maths`): then the rows have any layout that this file can read. Or name
    is the path of a .py file that makes a task. It is run.
    conditions: only rows that meet all of them are asked, as in ["level>=4", "subject=Algebra"].

    Raises ValueError for an unreadable condition, a file that makes no task, or an unknown name,
    listing the known ones."""
    if is_file(name):
        task, name = task_in(name)
    else:
        task = next((one for one in task_classes()
                     if name in one.names or one.__module__ == f"{__name__}.{name}"), None)
    need(task, f"unknown data set '{name}': choose one of {', '.join(task_names())}")
    need(path or name in task.names, f"'{name}' is a kind of task, not a data set: give it a .json "
         f"or .jsonl file, or choose one of {', '.join(task.names)}")
    need(not conditions or issubclass(task, RowTask),
         f"{name} makes its own questions: leave --dataset_filter out")
    return task(name, path, conditions) if conditions else task(name, path)


def task_classes():
    """The classes of the files of this folder that derive from Task."""
    files = [importlib.import_module(f"{__name__}.{info.name}")
             for info in pkgutil.iter_modules(__path__)]
    return [one for file in files for one in classes_in(vars(file))]


def classes_in(made):
    """The classes that derive from Task, of those that a file makes and has not just imported."""
    return [one for one in made.values() if isinstance(one, type) and issubclass(one, Task)
            and one.__module__ == made["__name__"]]


def is_file(name):
    """Whether a data set is given by the path of the .py file that makes its task."""
    return Path(name).suffix == ".py"


def task_in(path):
    """(class, name) of the one task that a .py file outside of this folder makes."""
    found = [(one, name) for one in classes_in(run_file(path, "task file")) for name in one.names]
    names = [name for _, name in found]
    need(len(names) == 1 and names[0] not in task_names(),
         f"task file {path} makes {' and '.join(names) or 'no task'}: let it make one class of a "
         "Task, with one name in `names` that no data set of tasks/ has")
    return found[0]


def task_names():
    """The names of all data sets."""
    return sorted(name for task in task_classes() for name in task.names)


def generated_task(name):
    """The Task of that name, or in that .py file, if it makes its own training rows (as `tiny`
    does), else None. Raises ValueError for a file whose task makes none."""
    task = get_task(name) if is_file(name) or name in task_names() else None
    need(not is_file(name) or task.train_rows,
         f"task file {name} makes no training rows: give its class train_rows(n, seed)")
    return task if task and task.train_rows else None


def in_time(function, *arguments, parsed=None, prepare=None):
    """The Score that function(*arguments) returns, under the clock of tools/worker.py.

    Scorers read a model's text in this way, because a pattern may take ages over it. (tiny, chase
    and the relays split theirs, and need no clock.) Without a verdict it is Score(False, parsed,
    why). If the function raises anything, the note is that error's name. Raises ValueError for a
    function of a task file: the worker could not import it."""
    need(function.__module__ in sys.modules, f"in_time cannot send {function.__qualname__} to its "
         "worker: put it into a file of its own beside the task file, and import it there")
    asked = worker.in_worker(attempt, function, *arguments, prepare=prepare)
    try:
        return asked.result(0)
    except TimeoutError:
        return Score(False, parsed, f"no verdict in {worker.SECONDS} s")
    except Exception as problem:                              # the worker itself has died
        return Score(False, None, type(problem).__name__)


def attempt(function, *arguments):
    """In the worker: the Score that function(*arguments) returns, or one that names its error. (Not
    every error of sympy can be sent to another process.)"""
    try:
        return function(*arguments)
    except Exception as problem:       # sympy may raise anything over a model's words
        return Score(False, None, type(problem).__name__)


def found(read, *arguments):
    """What read(*arguments) finds in a text, as a Score that is not yet decided."""
    return Score(False, read(*arguments))


def need_limit(limit):
    """Raise ValueError for a limit of load() that is not a number of questions. -1 would be all of
    them to one task, and all but the last to another."""
    need(limit is None or limit >= 1,
         f"load() takes at least 1 question, or None for all of them, not {limit}")


def pass_at_k(n, c, k):
    """Unbiased estimate of P(at least one of k samples is right), from c right ones among n.

    pass@k = 1 - C(n-c, k) / C(n, k)"""
    need(1 <= k <= n and 0 <= c <= n, f"pass_at_k needs 1 <= k <= n and 0 <= c <= n, got n={n}, "
         f"c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


# ---- rows ---------------------------------------------------------------------------------------

class Unusable(ValueError):
    """A row that cannot be scored. It is skipped, and the skip is printed."""


class RowTask(Task):
    """A task whose questions are made of rows, from the file `path` or from the hub.

    A class has names = {data set: (its id on the hub, its configuration, its usual split)} and
    make_example(source, row), which returns an Example without its id, or raises Unusable."""

    def __init__(self, name, path=None, conditions=()):
        self.name, self.path, asked = name, path, " ".join(conditions)
        self.conditions = [CONDITION.fullmatch(text) for text in conditions]
        need(all(self.conditions), f"--dataset_filter {asked}: write each condition as COLUMN=VALUE"
             ", or with !=, <, <=, > or >= (in quotes)")

    def load(self, limit=None, split=None):
        """The first `limit` Examples. What make_example calls Unusable is left out, and printed.

        Raises ValueError or OSError naming the row: for one that is not an object, or has the id of
        another, and where nothing is left."""
        need_limit(limit)
        examples, left_out = {}, []
        for source, row in self.rows(split):
            need(isinstance(row, dict), f"{source} is not an object: {str(row)[:60]!r}")
            ids = [str(row[column]) for column in ID_COLUMNS if row.get(column) not in (None, "")]
            own = ids[0] if ids else f"{self.name}-{source.number}"
            need(own not in examples, f"{source} has the id '{own}' of a row before it")
            try:
                if all(meets(source, row, *one.groups()) for one in self.conditions):
                    examples[own] = replace(self.make_example(source, row), id=own)
            except Unusable as problem:
                left_out.append(str(problem))
            if len(examples) == limit:         # before another row is read: it may be megabytes
                break
        if left_out:
            print(shown(f"left out {len(left_out)} rows: {'; '.join(left_out[:5])}"), flush=True)
        chosen = "".join(f" and meets '{one[0]}'" for one in self.conditions)
        need(examples, f"{self.path or self.name} holds no question that can be scored{chosen}")
        return list(examples.values())

    def rows(self, split=None):
        """(Source, row) one by one: of the file, or of the hub."""
        need(not (self.path and split), f"{self.path} has no split '{split}': leave --dataset_split"
             " out")
        origin, config, usual = (self.path, None, None) if self.path else self.names[self.name]
        return read_rows(origin, config, split or usual)


def meets(source, row, name, sign, value):
    """Does the row's column `name` meet a condition? Numbers are compared as numbers, dates as far
    as the value goes (2024-08-31T10:00 is <=2024-08-31 and =2024), and all else as texts.

    Raises ValueError without such a column. Raises Unusable if it is empty, or where a text would
    be compared with a number by order, because `Level 1` is >=4 letter by letter."""
    cell = column(source, row, name)
    with suppress(ValueError):
        return SIGNS[sign](float(cell), float(value))
    if re.match(r"\d{4}-\d\d", cell) and re.fullmatch(r"\d{4}(-\d\d)*", value):
        cell = cell[:len(value)]
    need(sign in ("=", "==", "!=") or cell[0].isdigit() == value[0].isdigit(),
         f"{source} has '{cell[:40]}' in '{name}', which has no order with '{value}'", Unusable)
    return SIGNS[sign](cell, value)


def column(source, row, *names):
    """The first of the columns `names` that the row has, as a string without outer blanks.

    Raises ValueError if it has none of them, Unusable if the cell is empty."""
    name = next((name for name in names if name in row), None)
    need(name, f"{source} has no column {' or '.join(map(repr, names))}; its columns are "
         f"{', '.join(map(str, row)) or 'none'}")
    text = cell_text(source, row[name])
    need(text, f"{source} has no text in '{name}'", Unusable)
    return text


def cell_text(source, cell):
    """A cell as a string without outer blanks, "" if it is neither a text nor a number.

    Raises ValueError for NaN and Infinity, which Python's JSON allows: they answer nothing."""
    need(not isinstance(cell, float) or math.isfinite(cell),
         f"{source} has the value {cell}: correct or remove it")
    return str(cell).strip() if isinstance(cell, (str, int, float)) else ""

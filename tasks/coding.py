r'''Programs: MBPP+ and LiveCodeBench. Does the program pass its tests, in the sandbox?

    record     {"task_id": 7, "prompt": "Write a function to add two numbers.", "test_imports": [],
                "test_list": ["assert add(1, 2) == 3"], "test": "assert add(-1, 1) == 0"}
    question   Write a function to add two numbers.

               Your program must pass tests like these:
               assert add(1, 2) == 3
    gold       tests pass
    answer     One operator is enough.
               ```python
               def add(a, b):
                   return a + b
               ```
    score      Score(correct=True, parsed='def add(a, b):\n    return a + b', note='')

The program is the last ```python block; without one the last block that names no language; without
any the whole text, if it begins as a program does (import, from, def, class, @). A block still open
when the text ends counts up to there. All else is unparsed and wrong.

MBPP+ has a test script to run after the program. LiveCodeBench has texts to read and print, and
functions (or methods of class Solution) to call with JSON values. There we compare the output, as
the benchmark does: by lines, those of numbers as exact decimals (1.50 is 1.5); JSON values by ==,
floats to a millionth. The hidden tests are megabytes a question, so of a .jsonl only their place is
kept until scoring. And they are pickled. Unpickling can call any function it names, so our reader
refuses every name and reads plain data only.
'''
import base64
import decimal
import functools
import io
import json
import math
import pickle
import re
import zlib

from support.errors import blame, need
from tasks import (CODE_RETRY, NO_HUB, Example, Score, Task, column, examples_from, parse_json,
                   read_rows, row_id, source_rows)

NAMES = ("mbppplus", "livecodebench")
MBPP, LIVE = ("evalplus/mbppplus", None, "test"), "livecodebench/code_generation_lite"
LIVE_FILES = [f"test{number}.jsonl" for number in ("", 2, 3, 4, 5, 6)]      # together release v6
MBPP_SECONDS, LIVE_SECONDS = 10, 6         # a script, a test
FENCE = r"^[ \t]*```[ \t]*"                # one with a language opens, also where a block is open
BLOCK = re.compile(FENCE + r"(\w*)[^\n`]*\n(.*?)(?:" + FENCE + r"(?!\w)|(?=" + FENCE + r"\w)|\Z)",
                   re.DOTALL | re.M)
FUTURE = re.compile(r"^from __future__ .*\n", re.M)                # has to stand before all else
# What LiveCodeBench lets a program take as given; builtins last, for math has another pow.
MODULES = "bisect collections copy functools heapq itertools math operator random re string typing"
PRELUDE = "".join(f"from {module} import *\n" for module in (MODULES + " builtins").split()) + (
    f"import sys, {', '.join(MODULES.split())}\nsys.setrecursionlimit(50000)\n")


def load(name, path, limit=None, split=None):
    """The first `limit` questions as Examples. Raises ValueError or OSError naming the row."""
    live = name == "livecodebench" and not path
    rows = live_rows(split) if live else source_rows(MBPP, path, split)
    return examples_from(rows, make_example, name, path, limit)


def live_rows(split=None):
    """Yields (Place, row) of LiveCodeBench's files, each fetched when its turn comes (`datasets`
    no longer runs the script that made the set). Raises OSError with what to do."""
    need(split in (None, "test"), f"{LIVE} has no split '{split}': leave --dataset_split away")
    from huggingface_hub import hf_hub_download
    for file in LIVE_FILES:
        with blame(f"{LIVE} {NO_HUB}", OSError):
            path = hf_hub_download(LIVE, file, repo_type="dataset")
        yield from read_rows(path)


def make_example(place, row):
    """The Example of one row of MBPP+, or of LiveCodeBench."""
    if "question_content" in row:
        return live_example(place, row)
    lines = [column(place, row, "prompt").strip(), "", "Your program must pass tests like these:"]
    question = "\n".join(lines + [str(test) for test in (row.get("test_list") or [])[:3]])
    script = "\n".join([*(row.get("test_imports") or []), column(place, row, "test")])
    return Example(row_id(row, "task_id"), question, "tests pass", "code", {"test": script})


def live_example(place, row):
    """The Example of a LiveCodeBench row; its row["hidden"] is the tests, or [file, offset]."""
    question = column(place, row, "question_content").strip()
    shown = parse_json(column(place, row, "public_test_cases"), place)
    hidden = column(place, row, "private_test_cases")
    function = parse_json(row.get("metadata") or "{}", place).get("func_name")
    if row.get("starter_code"):
        question += f"\n\nStart from this code:\n{row['starter_code'].rstrip()}"
    question += (f"\n\nYour program must define {function}, which is called and returns its answer."
                 if function else
                 "\n\nYour program must read its input from stdin and print its answer.")
    hidden = hidden if place.offset is None else [place.file, place.offset]
    return Example(row_id(row, "question_id"), question, "tests pass", "code",
                   {"shown": shown, "hidden": hidden, "function": function})


class DataOnly(pickle.Unpickler):
    """Reads pickled strings, lists and numbers, and refuses whatever could run."""

    def find_class(self, module, name):
        """Refuse: data needs no class."""
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def all_tests(example):
    """The tests [{input, output, testtype}] of a LiveCodeBench question, the shown ones first.
    Raises ValueError if they are damaged."""
    text = example.row["hidden"]
    # Bytes that are no pickle can make the unpickler raise anything.
    with blame(f"the tests of {example.id} are damaged"):
        if isinstance(text, list):
            with open(text[0], "rb") as file:
                file.seek(text[1])
                text = json.loads(file.readline())["private_test_cases"]
        if not text.lstrip().startswith("["):
            text = DataOnly(io.BytesIO(zlib.decompress(base64.b64decode(text)))).load()
        return [(test["input"], test["output"], test["testtype"] == "stdin")
                for test in example.row["shown"] + json.loads(text)]


def program_in(text):
    """The program in a text, or None: see the head of this file."""
    blocks = [(match[1].lower(), match[2].rstrip()) for match in BLOCK.finditer(text)]
    for languages in (("python", "py", "python3"), ("",)):
        programs = [program for language, program in blocks if language in languages]
        if programs:
            return programs[-1] or None
    begins = re.match(r"\s*(import \w|from [\w.]+ import |def \w+\(|class \w+|@\w)", text)
    return text.strip() if begins and not blocks else None


def score(example, text):
    """Run the program in `text` against the tests. Raises ValueError if those are damaged."""
    code = program_in(text)
    if code is None:
        return Score(False, None)
    if "test" in example.row:
        from support.sandbox import passes
        run = passes(code, example.row["test"], MBPP_SECONDS)
        return Score(run.status == "ok", code, "" if run.status == "ok" else run.status)
    tests = all_tests(example)
    for number, test in enumerate(tests, start=1):
        fault = live_fault(code, example.row["function"], *test)
        if fault:
            return Score(False, code, f"test {number} of {len(tests)}: {fault}")
    return Score(bool(tests), code, "" if tests else "there are no tests")


def live_fault(code, function, given, expected, reads_stdin):
    """What is wrong with the program by one LiveCodeBench test, "" if nothing is."""
    from support.sandbox import call_function, run_python
    code = "".join(FUTURE.findall(code)) + PRELUDE + FUTURE.sub("", code)
    if reads_stdin:
        run = run_python(code, given, LIVE_SECONDS)
        right = run.status == "ok" and same_output(run.stdout, expected)
    else:
        arguments = [json.loads(line) for line in given.split("\n") if line.strip()]
        run = call_function(code, function, arguments, LIVE_SECONDS)
        right = run.status == "ok" and same_value(run.value, json.loads(expected))
    return "" if right else "wrong answer" if run.status == "ok" else run.status


def same_output(printed, expected):
    """Are two texts the same, line by line: without outer blanks, or as exact decimals?"""
    def content(line):
        try:
            numbers = [decimal.Decimal(word) for word in line.split()]
            return numbers if all(number.is_finite() for number in numbers) else line.strip()
        except decimal.InvalidOperation:                       # it holds something else
            return line.strip()
    printed, expected = printed.strip().split("\n"), expected.strip().split("\n")
    return list(map(content, printed)) == list(map(content, expected))


def same_value(value, expected):
    """Are two JSON values the same? Where one is a float, to a millionth."""
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(same_value, value, expected))
    if not isinstance(value, float) and not isinstance(expected, float):
        return value == expected
    try:
        return math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-6)
    except (TypeError, OverflowError):                         # no number, or one of 400 digits
        return False


def ready(allow_unsafe=False):
    """Raise ValueError, before anything is generated, if programs cannot be run safely here."""
    from support.sandbox import require_sandbox
    require_sandbox(allow_unsafe)


def task(name, path=None):
    """The Task."""
    return Task(name, "code", functools.partial(load, name, path), score, ready=ready,
                retry=CODE_RETRY)

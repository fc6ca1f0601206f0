r'''Programs: MBPP+ and LiveCodeBench. Does the program pass its tests, in the sandbox of tools.py?

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
any the whole text, if it begins as a program does (import, from, def, class, @). A block that is
still open when the text ends counts up to there. All else is unparsed and wrong.

MBPP+ has a test script to run after the program. LiveCodeBench has tests of two kinds: text to read
and print, or a function (or a method of class Solution) to call with JSON values. There the output
stays with us and is compared here: line by line without outer blanks, a line of numbers as exact
decimals (1.50 is 1.5), as the benchmark does; JSON values by ==, floats to a millionth.

Its hidden tests are megabytes a question, and pickled. Of a .jsonl only their place is kept, and
they are read at scoring; and they are unpickled by a reader that knows no class and no function,
without which a pickle can hold data but do nothing.
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

from tasks import (Example, Score, Task, column, examples_from, file_rows, hub_rows, no_hub,
                   parse_json, row_id)

NAMES = ("mbppplus", "livecodebench")
MBPP = ("evalplus/mbppplus", None, "test")
LIVE, LIVE_FILES = "livecodebench/code_generation_lite", [
    f"test{number}.jsonl" for number in ("", 2, 3, 4, 5, 6)]        # together release v6
MBPP_SECONDS, LIVE_SECONDS = 10, 6         # a script, a test
MEMORY_MB = 2048                           # numpy, which MBPP+ tests import, does not start on less
LARGEST = 2**30                            # bytes of a question's hidden tests
BLOCK = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)",
                   re.MULTILINE | re.DOTALL)
# What LiveCodeBench lets a program take as given.
PRELUDE = """import bisect, collections, functools, heapq, itertools, math, operator, random, re
import string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *
sys.setrecursionlimit(50000)
"""


# ---- questions ----------------------------------------------------------------------------------

def load(name, path, limit=None):
    """The first `limit` questions as Examples. Raises ValueError or OSError naming the row."""
    if path:
        rows = file_rows(path)
    else:
        rows = hub_rows(*MBPP) if name == "mbppplus" else live_rows()
    return examples_from(rows, make_example, name, limit)


def live_rows():
    """Yields (Place, row) of LiveCodeBench's files, each fetched when its turn comes: the set is
    made by a script, which `datasets` no longer runs. Raises OSError with what to do."""
    from huggingface_hub import hf_hub_download
    for file in LIVE_FILES:
        try:
            path = hf_hub_download(LIVE, file, repo_type="dataset")
        except (OSError, ValueError) as problem:
            raise OSError(no_hub(LIVE, problem)) from problem
        yield from file_rows(path)


def make_example(place, row):
    """The Example of one row of MBPP+, or of LiveCodeBench."""
    if "question_content" in row:
        return live_example(place, row)
    tests = row.get("test_list") or []
    shown = tests[:3] if isinstance(tests, list) else [tests]
    question = column(place, row, "prompt").strip()
    if shown:
        question += "\n\nYour program must pass tests like these:\n" + "\n".join(map(str, shown))
    imports = row.get("test_imports") or []
    script = "\n".join([*imports, column(place, row, "test")])
    return Example(row_id(row, "task_id"), question, "tests pass", "code", {"test": script})


def live_example(place, row):
    """The Example of a LiveCodeBench row; row["hidden"] is the tests' text, or where they are."""
    shown = parse_json(column(place, row, "public_test_cases"), f"{place} public_test_cases")
    details = parse_json(row.get("metadata") or "{}", f"{place} metadata")
    hidden = column(place, row, "private_test_cases")
    starter, function = (row.get("starter_code") or "").strip(), details.get("func_name")
    question = column(place, row, "question_content").strip()
    if starter:
        question += f"\n\nStart from this code:\n{starter}"
    question += (f"\n\nYour program must define {function}, which is called and returns its answer."
                 if function else
                 "\n\nYour program must read its input from stdin and print its answer.")
    where = hidden if place.offset is None else [place.file, place.offset]
    return Example(row_id(row, "question_id", "id"), question, "tests pass", "code",
                   {"shown": shown, "hidden": where, "function": function})


class DataOnly(pickle.Unpickler):
    """Reads pickled strings, lists and numbers; whatever could run, it refuses."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def hidden_tests(example):
    """The hidden tests [{input, output, testtype}]. Raises ValueError if they are damaged."""
    text = example.row["hidden"]
    try:
        if isinstance(text, list):
            with open(text[0], "rb") as file:
                file.seek(text[1])
                text = json.loads(file.readline())["private_test_cases"]
        if text.lstrip().startswith("["):
            return json.loads(text)
        packed = zlib.decompressobj().decompress(base64.b64decode(text), LARGEST)
        return json.loads(DataOnly(io.BytesIO(packed)).load())
    except Exception as problem:     # bytes that are no pickle make it raise anything there is
        raise ValueError(f"the hidden tests of {example.id} are damaged ({problem})") from problem


# ---- answers ------------------------------------------------------------------------------------

def program_in(text):
    """The program in a text, or None: see the head of this file."""
    blocks = [(match[1].lower(), match[2]) for match in BLOCK.finditer(text)]
    for languages in (("python", "py", "python3"), ("",)):
        found = [code for language, code in blocks if language in languages]
        if found:
            return found[-1].strip("\n").rstrip() or None
    begins = re.match(r"\s*(import \w|from [\w.]+ import |def \w+\(|class \w+|@\w)", text)
    return text.strip() if begins and not blocks else None


def score(example, text):
    """Run the program in `text` against the tests. Raises ValueError if those are damaged."""
    code = program_in(text)
    if code is None:
        return Score(False, None)
    if "test" in example.row:
        from tools import passes
        run = passes(code, example.row["test"], MBPP_SECONDS, MEMORY_MB)
        return Score(run.status == "ok", code, "" if run.status == "ok" else run.status)
    tests = example.row["shown"] + hidden_tests(example)
    for number, test in enumerate(tests, start=1):
        fault = live_fault(code, test, example.row["function"])
        if fault:
            return Score(False, code, f"test {number} of {len(tests)}: {fault}")
    return Score(bool(tests), code, "" if tests else "there are no tests")


def live_fault(code, test, function):
    """"" if the program passes one test, else what happened instead."""
    from tools import call_function, run_python
    if test["testtype"] == "stdin":
        run = run_python(PRELUDE + code, test["input"], LIVE_SECONDS, MEMORY_MB)
        right = run.status == "ok" and same_output(run.stdout, test["output"])
    else:
        method = f"\nif 'Solution' in globals():\n    {function} = Solution().{function}\n"
        arguments = [json.loads(line) for line in test["input"].split("\n") if line.strip()]
        run = call_function(PRELUDE + code + method, function, arguments, LIVE_SECONDS, MEMORY_MB)
        right = run.status == "ok" and same_value(run.value, json.loads(test["output"]))
    return "" if right else "wrong answer" if run.status == "ok" else run.status


def same_output(printed, expected):
    """Are two texts the same, line by line?"""
    printed, expected = printed.strip().split("\n"), expected.strip().split("\n")
    return len(printed) == len(expected) and all(map(same_line, printed, expected))


def same_line(printed, expected):
    """Are two lines the same, without outer blanks or as exact decimals?"""
    if printed.strip() == expected.strip():
        return True
    try:
        return ([decimal.Decimal(word) for word in printed.split()]
                == [decimal.Decimal(word) for word in expected.split()])
    except decimal.InvalidOperation:                           # not numbers
        return False


def same_value(value, expected):
    """Are two JSON values the same? Where one is a float, to a millionth."""
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(same_value, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        return (value.keys() == expected.keys()
                and all(same_value(value[key], expected[key]) for key in expected))
    if isinstance(value, float) or isinstance(expected, float):
        numbers = all(isinstance(number, (int, float)) for number in (value, expected))
        return numbers and math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-6)
    return value == expected


def ready(allow_unsafe=False):
    """Raise ValueError, before anything is generated, if programs cannot be run safely here."""
    from tools import require_sandbox
    require_sandbox(allow_unsafe)


def task(name, path=None):
    """The Task."""
    return Task(name, "code", functools.partial(load, name, path), score, ready=ready)

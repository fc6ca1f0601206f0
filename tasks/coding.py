r'''Programs: MBPP+, HumanEval and LiveCodeBench. Does the program pass its tests, in the sandbox?

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

The program is the last ```python block; without one the last block that names no language (where a
function is asked for, the last of them that defines something, for usage may follow it); without
any the text up to its first fence, if it is Python and begins as a program does (import, from, def,
class, @). A block that the end of the text cuts off counts if it is Python: a model may forget the
last fence. All else is unparsed and wrong.

MBPP+ has a test script to run after the program. HumanEval's script only defines check(candidate),
so we call it, and its programs go on from a prompt with imports and helpers, which are run first. A
script that calls nothing would pass any program: such a row is left out, and printed.

LiveCodeBench has texts to read and print, and functions (or methods of class Solution) to call with
JSON values. There we compare the output, as the benchmark does: by lines, those of numbers as exact
decimals (1.50 is 1.5); JSON values by ==, floats to a millionth. The hidden tests are megabytes a
question, so of a .jsonl only their place is kept until scoring. And they are pickled. Unpickling
can call any function it names, so our reader refuses every name and reads plain data only.
'''
import ast
import base64
import contextlib
import decimal
import functools
import io
import itertools
import json
import math
import pickle
import re
import textwrap
import zlib

from support.errors import blame, need
from tasks import (CODE_RETRY, NO_HUB, Example, Score, Task, Unusable, column, examples_from,
                   parse_json, read_rows, row_id, source_rows)

SOURCES = {"mbppplus": ("evalplus/mbppplus", None, "test"),
           "humaneval": ("openai/openai_humaneval", None, "test")}
NAMES = (*SOURCES, "livecodebench")
LIVE = "livecodebench/code_generation_lite"
LIVE_FILES = [f"test{number}.jsonl" for number in ("", 2, 3, 4, 5, 6)]      # together release v6
SCRIPT_SECONDS, LIVE_SECONDS = 10, 6       # a script, a test
# ``` or ~~~ on a line of its own, maybe behind the mark of a list, maybe with a language.
FENCE = re.compile(r"^[ \t]*(?:(?:[-*+]|\d+[.)])[ \t]+)?(`{3,}|~{3,})[ \t]*(\w*)[^`\n]*$", re.M)
LATE_FENCE = re.compile(r"^([^#`~\n]*[^#`~\s])[ \t]*(```+|~~~+)[ \t]*$", re.M)    # behind some code
DEFINES = re.compile(r"^\s*(?:async )?(?:def|class) ", re.M)
FUTURE = re.compile(r"^from __future__ import *(?:\([^)]*\)|.*)\n", re.M)   # stands before all else
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,9})?", re.ASCII)
# What LiveCodeBench lets a program take as given; builtins last, for math has another pow.
MODULES = "bisect collections copy functools heapq itertools math operator random re string typing"
PRELUDE = "".join(f"from {module} import *\n" for module in (MODULES + " builtins").split()) + (
    f"import sys, {', '.join(MODULES.split())}\nsys.setrecursionlimit(50000)\n")
STDIN = re.compile(r"/dev/(?:stdin|fd/0)\b|/proc/self/fd/0\b")     # there are none in the sandbox
COPY_STDIN = "open('stdin', 'wb').write(sys.stdin.buffer.read())\nsys.stdin.seek(0)\n"


def load(name, path, limit=None, split=None):
    """The first `limit` questions as Examples. Raises ValueError or OSError naming the row."""
    live = name == "livecodebench" and not path
    rows = live_rows(split) if live else source_rows(SOURCES.get(name), path, split)
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
    """The Example of one row of MBPP+, HumanEval or LiveCodeBench."""
    if "question_content" in row:
        return live_example(place, row)
    question, shown = column(place, row, "prompt").strip(), (row.get("test_list") or [])[:3]
    script, head = "\n".join([*(row.get("test_imports") or []), column(place, row, "test")]), ""
    if row.get("entry_point"):
        head = question.rpartition(f"def {row['entry_point']}(")[0]
        question = f"Write all of this function:\n\n{question}"
        if "def check(" in script:
            script += f"\ncheck({row['entry_point']})"
    if not tests_something(script):
        raise Unusable(f"{place} has a 'test' that calls nothing")
    if shown:
        question += "\n\nYour program must pass tests like these:\n" + "\n".join(map(str, shown))
    return Example(row_id(row, "task_id"), question, "tests pass", "code",
                   {"head": head, "test": script})


def tests_something(script):
    """Does a test script assert anything, and do more than import, define and set values?"""
    acts = r"^(?:assert|for|while|if|with|try)\b|^(?:\w+ *= *)?[\w.]+\("         # no indented line
    return bool(re.search(r"\b(assert|raise)", script) and re.search(acts, script, re.M))


def parsed(code):
    """The syntax tree of a program, which may be indented as a whole. None if it is no Python."""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.parse(textwrap.dedent(code))


def live_example(place, row):
    """The Example of a LiveCodeBench row; its row["hidden"] is the tests, or [file, offset]."""
    question = column(place, row, "question_content").strip()
    shown = parse_json(column(place, row, "public_test_cases"), place)
    hidden, about = column(place, row, "private_test_cases"), row.get("metadata") or {}
    if not shown and hidden.strip() == "[]":
        raise Unusable(f"{place} has no tests")
    with blame(f"{place} has a 'metadata' that is no object"):
        function = (parse_json(about, place) if isinstance(about, str) else about).get("func_name")
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


def program_in(text, defines=False):
    """The program in a text, or None: see the head of this file.

    defines: it is to define something, so a block behind that only uses it does not count."""
    blocks = [block for block in blocks_of(LATE_FENCE.sub(r"\1\n\2", text)) if any(block)]
    for languages in (("python", "py", "python3"), ("",)):
        programs = [program for language, program in blocks if language.lower() in languages]
        if defines and programs and programs[-1]:
            programs = [one for one in programs if DEFINES.search(one)] or programs
        if programs:
            return programs[-1] or None
    bare = text.partition("\n```")[0].strip()
    begins = re.match(r"(?:#.*\s+)*(import \w|from [\w.]+ import |def \w+\(|class \w+|@\w)", bare)
    return bare if begins and parsed(bare) else None


def blocks_of(text):
    """Yields (language, program) of each block in a text.

    A block ends at the first fence that leaves Python behind, so not at one within a docstring. If
    none does, it ends at the first fence. The program is "" where the end of the text cuts it."""
    fences, end = list(FENCE.finditer(text)), 0
    for number, opens in enumerate(fences):
        if opens.start() < end:                       # it belongs to the block before
            continue
        start = opens.end() + 1
        stops = [(fence.start(), fence.start() if fence[2] else fence.end())    # a language: the
                 for fence in fences[number + 1:number + 9]                     # next block begins
                 if fence[2] or fence[1].startswith(opens[1])]
        if not stops or number + 9 > len(fences):     # near the end, or that would take ages
            stops.append((len(text), len(text)))
        good = next((stop for stop in stops if parsed(text[start:stop[0]])), None)
        stop, end = good or stops[0]
        whole = good or stop < len(text)
        yield opens[2], textwrap.dedent(text[start:stop]).rstrip() if whole else ""


def score(example, text):
    """Run the program in `text` against the tests. Raises ValueError if those are damaged."""
    code = program_in(text, defines="test" in example.row or bool(example.row["function"]))
    if code is None:
        return Score(False, None)
    if "test" in example.row:
        from support.sandbox import passes
        test = "__name__ = '__main__'\n" + example.row["test"]      # or it may wait for that
        fault = fault_of(passes(behind(example.row["head"], code), test, SCRIPT_SECONDS))
        return Score(not fault, code, fault)
    tests = all_tests(example)
    for number, test in enumerate(tests, start=1):
        fault = live_fault(code, example.row["function"], *test)
        if fault:
            return Score(False, code, f"test {number} of {len(tests)}: {fault}")
    return Score(bool(tests), code, "" if tests else "there are no tests")


def behind(head, code):
    """A program behind what has to be run before it, save its imports from __future__."""
    return "".join(FUTURE.findall(code)) + head + FUTURE.sub("", code)


def fault_of(run):
    """How a program failed: `timeout`, `error: NameError: name 'x' is not defined`; "" if not."""
    says = run.stderr.strip().rpartition("\n")[2][:200] if run.status == "error" else ""
    return "" if run.status == "ok" else f"{run.status}: {says}" if says else run.status


def live_fault(code, function, given, expected, reads_stdin):
    """What is wrong with the program by one LiveCodeBench test, "" if nothing is."""
    from support.sandbox import call_function, run_python
    if reads_stdin:
        head = PRELUDE + (COPY_STDIN if STDIN.search(code) else "")
        run = run_python(behind(head, STDIN.sub("stdin", code)), given, LIVE_SECONDS)
        right = run.status == "ok" and same_output(run.stdout, expected)
    else:
        arguments = [parse_json(line, "an input") for line in given.split("\n") if line.strip()]
        try:
            expected = json.loads(expected)
        except ValueError:
            return "the test expects no JSON value"
        run = call_function(behind(PRELUDE, code), function, arguments, LIVE_SECONDS)
        right = run.status == "ok" and same_value(run.value, expected)
    return fault_of(run) or ("" if right else "wrong answer")


def same_output(printed, expected):
    """Are two texts the same, line by line: without outer blanks, or as exact decimals?

    Lines are read one at a time, and more than 1 MB of them not as numbers: as a list of numbers,
    8 MB would take 500."""
    def content(line):
        words = line.split() if len(printed) < 10**6 else [line]
        numbers = all(map(NUMBER.fullmatch, words))
        return [decimal.Decimal(word) for word in words] if numbers else line.strip()

    lines = (io.StringIO(text.strip()) for text in (printed, expected))
    return all(ours.strip() == theirs.strip() or content(ours) == content(theirs)
               for ours, theirs in itertools.zip_longest(*lines, fillvalue="\0"))


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

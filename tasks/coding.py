r'''Programs: MBPP+, HumanEval(+) and LiveCodeBench. Does a program pass its tests, in the sandbox?

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

scoring/programs.py says which part of the answer is the program.

MBPP+ has a test script to run after the program. HumanEval's script only defines check(candidate),
so we call it. Its programs continue a prompt with imports and helpers, which are run first. A
script that calls nothing would pass any program. So its row is left out, and printed.

A script may run for 10 seconds and take 4 GB, as the publishers of MBPP+ allow it: one question
(Mbpp/255) compares two lists of 1.1 GB each.

LiveCodeBench has texts to read and print, and functions (or methods of class Solution) to call with
JSON values. Its programs get many imports before their first line (PRELUDE), and their whole
numbers may have 50,000 digits. The output is compared as the benchmark does it. Texts are compared
by lines, and lines of numbers as exact decimals (1.50 is 1.5). JSON values are compared by ==,
floats to a millionth. The hidden tests are megabytes per question. So of a .jsonl we keep only
where they begin, and read them for scoring. They are pickled, and unpickling can call any function
that it names. So our reader refuses every name and reads plain data only.

A single test that is damaged (its input or output is not JSON) is failed by every program, and the
note names it: `test 1 of 3 is damaged: ..`. Where the whole pack of tests cannot be read, score()
raises ValueError, and evaluate.py counts the question as not scored.
'''
import base64
import io
import json
import pickle
import re
import zlib

from scoring.programs import program_in, same_output, same_value
from support.errors import blame, need
from support.sources import parse_json
from tasks import CODE_RETRY, Example, RowTask, Score, Unusable, column, found, in_time
from tools.sandbox import call_function, passes, require_sandbox, run_python

SCRIPT_SECONDS, LIVE_SECONDS = 10, 6       # a script, a test
# LiveCodeBench's programs may use these modules, and the names in them, without an import. Of two
# equal names the later one counts, as there: `sub` is operator's, and pow is that of builtins.
MODULES = ("string re datetime collections heapq bisect copy math random statistics itertools "
           "functools operator io sys json builtins typing").split()
PRELUDE = "".join(f"from {module} import *\n" for module in MODULES) + (
    f"import {', '.join(MODULES)}\nsys.setrecursionlimit(50000)\n")


class Coding(RowTask):
    """MBPP+, HumanEval, LiveCodeBench, or rows in their columns."""
    kind, retry = "code", CODE_RETRY
    # data set: its id on the hub, its configuration (or the numbers of its files), its split
    names = {"mbppplus": ("evalplus/mbppplus", None, "test"),
             "humaneval": ("openai/openai_humaneval", None, "test"),
             "humanevalplus": ("evalplus/humanevalplus", None, "test"),
             "livecodebench": ("livecodebench/code_generation_lite", ("", 2, 3, 4, 5, 6), "test")}

    def make_example(self, source, row):
        """The Example of one row of MBPP+, HumanEval or LiveCodeBench."""
        if "question_content" in row:
            return live_example(source, row)
        question, head = column(source, row, "prompt"), ""
        script = "\n".join([*(row.get("test_imports") or []), column(source, row, "test")])
        if row.get("entry_point"):
            head = question.rpartition(f"def {row['entry_point']}(")[0]
            question = f"Write all of this function:\n\n{question}"
            if "def check(" in script:
                script += f"\ncheck({row['entry_point']})"
        # A test asserts something, and does more than import, define and set values.
        acts = r"^(?:assert|for|while|if|with|try)\b|^(?:\w+ *= *)?[\w.]+\("     # no indented line
        if not re.search(r"\b(assert|raise)", script) or not re.search(acts, script, re.M):
            raise Unusable(f"{source} has a 'test' that calls nothing")
        if row.get("test_list"):
            question += "\n\nYour program must pass tests like these:\n"
            question += "\n".join(row["test_list"][:3])
        return Example("", question, "tests pass", kind="code", row={"head": head, "test": script})

    @staticmethod
    def score(example, text):
        """Run the program in `text` against the tests. Raises ValueError if those cannot be read. A
        single test that is damaged is named in the note, and nothing passes it."""
        defines = "test" in example.row or bool(example.row["function"])
        score = in_time(found, program_in, text, defines)
        code = score.parsed
        if code is None:
            return score
        if "test" in example.row:
            test = "__name__ = '__main__'\n" + example.row["test"]      # or it may wait for that
            fault = fault_of(passes(after(example.row["head"], code), test, SCRIPT_SECONDS))
            return Score(not fault, code, fault)
        tests = all_tests(example)
        for number, test in enumerate(tests, start=1):
            which = f"test {number} of {len(tests)}"
            try:
                with blame(f"{which} is damaged"):
                    test = read_test(test)
            except ValueError as damage:
                return Score(False, code, str(damage))
            fault = live_fault(after(PRELUDE, code), example.row["function"], *test)
            if fault:
                return Score(False, code, f"{which}: {fault}")
        return Score(True, code)

    def ready(self, allow_unsafe=False):
        """Print how well programs are confined here. Raises ValueError if they cannot be."""
        require_sandbox(allow_unsafe)


score = Coding.score


def live_example(source, row):
    """The Example of a LiveCodeBench row; its row["hidden"] is the tests, or [file, offset]."""
    question = column(source, row, "question_content")
    shown = parse_json(column(source, row, "public_test_cases"), source)
    hidden, about = column(source, row, "private_test_cases"), row.get("metadata") or {}
    need(shown or hidden != "[]", f"{source} has no tests", Unusable)
    with blame(f"{source} has a 'metadata' that is not an object"):
        function = (json.loads(about) if isinstance(about, str) else about).get("func_name")
    if row.get("starter_code"):
        question += f"\n\nStart from this code:\n{row['starter_code'].rstrip()}"
    question += (f"\n\nYour program must define {function}, which is called and returns its answer."
                 if function else
                 "\n\nYour program must read its input from stdin and print its answer.")
    hidden = hidden if source.offset is None else [source.file, source.offset]
    return Example("", question, "tests pass", kind="code",
                   row={"shown": shown, "hidden": hidden, "function": function})


class DataOnly(pickle.Unpickler):
    """Reads pickled strings, lists and numbers, and refuses whatever could run."""

    def find_class(self, module, name):
        """Refuse: data needs no class."""
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def all_tests(example):
    """The tests of a LiveCodeBench question, the shown ones first, as read_test takes them. Raises
    ValueError if they cannot be read."""
    text = example.row["hidden"]
    # Bytes that are not a pickle can make the unpickler raise anything.
    with blame(f"the tests of {example.id} are damaged"):
        if isinstance(text, list):
            with open(text[0], "rb") as file:
                file.seek(text[1])
                text = json.loads(file.readline())["private_test_cases"]
        if not text.lstrip().startswith("["):
            text = DataOnly(io.BytesIO(zlib.decompress(base64.b64decode(text)))).load()
        tests = example.row["shown"] + json.loads(text)
        need(tests, "there are none")
    return tests


def read_test(test):
    """A test as (stdin, stdout, True), or as (arguments, value, False). Its input has one argument
    per line. A damaged test can raise anything."""
    lines, expected = test["input"].split("\n"), test["output"].strip()
    if test["testtype"] == "stdin":
        return test["input"], expected, True
    return [json.loads(line) for line in lines if line.strip()], json.loads(expected), False


# ---- scores -------------------------------------------------------------------------------------

def after(head, code):
    """A program that runs `head` before `code`. The code stays a text of its own, because its
    imports from __future__ must stand at its beginning."""
    return f"{head}\nexec({code!r})\n"


def live_fault(program, function, given, expected, reads_stdin):
    """What one LiveCodeBench test finds wrong with the program, "" if nothing."""
    if reads_stdin:
        run = run_python(program, given, LIVE_SECONDS)
        return fault_of(run, same_output(run.stdout, expected))
    run = call_function(program, function, given, LIVE_SECONDS)
    return fault_of(run, same_value(run.value, expected))


def fault_of(run, right=True):
    """How a program failed: `timeout`, `error: NameError: name 'x' is not defined`, `wrong answer`.
    "" if it did not."""
    if run.status == "ok":
        return "" if right else "wrong answer"
    says = run.stderr.strip().rpartition("\n")[2][:200] if run.status == "error" else ""
    return f"{run.status}: {says}" if says else run.status

"""tasks/: what is read from rows, what is found in answers, and what counts as right."""
import ast
import base64
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import time
import types
import zlib
from pathlib import Path

import pytest

from conftest import PROJECT

from support import web
from support.web import JudgeSettings, Key
from tasks import (Example, Place, Score, choice, coding, get_task, last_box, maths, read_rows,
                   search, task_names)
from tasks.boxes import without_fonts

HUGE = "so we go on. " * 15_000                         # 200 kB of talk
NAMES = ("math500", "aime25", "aime26", "gsm8k", "gpqa", "medqa", "mbppplus", "humaneval",
         "livecodebench", "bamboogle", "hotpotqa")
# What a careful person reads, by kinds: what the answers mean, and what they do not.
CASES = [json.loads(line) for line in (Path(__file__).parent / "cases.jsonl").open("rb")]


def box(answer):
    return f"So the answer is \\boxed{{{answer}}}."


def write_rows(path, rows):
    """Write the rows as .jsonl, or as .json with a data field: the file's name."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps({"data": rows}))
    return str(path)


# ---- the documented examples --------------------------------------------------------------------

def documented(module):
    """{label: text} of the indented example at the head of a file."""
    fields, label = {}, None
    for line in module.__doc__.split("\n")[1:]:
        start = re.match(r"    (record|question|gold|answer|score) +(.*)", line)
        if start:
            label = start[1]
            fields[label] = start[2]
        elif label and (line.startswith(" " * 15) or not line.strip()):
            fields[label] += "\n" + line[15:]
        else:
            label = None
    return {label: text.rstrip("\n") for label, text in fields.items()}


needs_sandbox = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


@pytest.mark.parametrize("module", [maths, choice, search, pytest.param(
    coding, marks=needs_sandbox)], ids=lambda module: module.__name__)
def test_documented_example(module, tmp_path, no_judge):
    shown = documented(module)
    path = write_rows(tmp_path / "rows.jsonl", [json.loads(shown["record"])])
    task = module.task(module.NAMES[0], path)
    example, = task.load()
    assert example.question == shown["question"]
    assert example.gold == shown["gold"]
    score = task.score(example, shown["answer"])
    assert ast.unparse(ast.parse(shown["score"])) == repr(score)


@pytest.fixture
def no_judge(monkeypatch):
    """No judge is configured, whatever this machine's environment says."""
    monkeypatch.setattr(web, "judge_settings", lambda: None)


@pytest.fixture
def judging(monkeypatch):
    """A judge who says judging.verdict. asked: what he was asked."""
    state = types.SimpleNamespace(verdict="correct", asked=[])
    monkeypatch.setattr(web, "judge_settings", lambda: JudgeSettings("http://h", "m", Key("k")))
    monkeypatch.setattr(web, "judge", lambda *asked: state.asked.append(asked) or state.verdict)
    return state


# ---- boxes --------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, expected", [
    (r"\boxed{5}", "5"),
    (r"\boxed{1} then \boxed{2}", "2"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed {5}", "5"),
    (r"\boxed{ 5 }", "5"),
    (r"$\boxed{5}$", "5"),
    (r"\\boxed{5}", "5"),
    (r"\boxed{x = \boxed{5}}", "x = {5}"),
    (r"\boxed{\boxed{5}}", "{5}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
    (r"\boxed{4} and, cut off, \boxed{5", "4"),
    (r"\boxed{3 and later \boxed{4}", "4"),
    (r"f(x) = { \boxed{5}", "5"),
    (r"} } \boxed{5} }", "5"),
    (r"\boxed{{5}", None),
    (r"\boxed{5", None),
    (r"\boxed{}", None),
    (r"\boxed{  }", None),
    (r"\boxed 5", "5"), (r"$\boxed 12$.", "12"), (r"\boxed{4} or \boxed C.", "C"),
    (r"in \boxed notation", None), (r"\boxed A vitamin", "A"),
    (r"\fbox{12}", "12"), (r"\boxed{x = \fbox{5}}", "x = {5}"), (r"\fbox{4} \boxed{5}", "5"),
    # a box that says nothing is passed over
    (r"\boxed{4} as \boxed{}", "4"), (r"\boxed{4} as \boxed{...}", "4"),
    (r"\boxed{4} as \boxed{\text{your answer}}", "4"), (r"\boxed{???}", None),
    (r"\boxed{\ldots}", None), (r"\boxed{\dots}", None), (r"\boxed{\text{...}}", None),
    (r"\boxed{\_\_}", None), (r"\boxed{\{\}}", r"\{\}"), (r"\boxed{\emptyset}", r"\emptyset"),
    (r"\boxed{-}", None), (r"\boxed{+}", "+"),
    # a row break is no part of an escaped brace
    (r"\boxed{1\\{2}}", r"1\\{2}"), (r"\boxed{1\\\{2\}}", r"1\\\{2\}"),
    # a box that the cut left open, and the one we asked for
    ("\\boxed{\nFinal Answer: \\boxed{6}}", "6"), ("\\boxed{\nFinal Answer: \\boxed{6}", "6"),
    ("\\boxed{\\frac{1}{\nFinal Answer: \\boxed{\\frac{1}{2}}}}", "\\frac{1}{2}"),
    ("\\boxed{4} {\nFinal Answer: \\boxed{6", "4"),
    (r"boxed{5}", None),
    ("the answer is 5", None),
    ("", None),
    ("\\boxed{a\nb}", "a\nb"),
    ("\\boxed{\x005}", "5"),
    ("\\boxed{\x00}", None),
    (HUGE + r"\boxed{5}", "5"),
    (r"\boxed{5}" + HUGE, "5"),
    (r"\boxed{" + HUGE + "}", None),
    (r"\boxed{5} \boxed{" + "9" * 200_000 + "}", None),
    (r"\boxed{" * 28_000, None),
    (r"\boxed{" * 28_000 + "5" + "}" * 28_000, None),
    ("{" * 200_000 + r"\boxed{5}", "5"),
    ("}" * 200_000 + r"\boxed{5}", "5"),
    (r"\boxed" * 33_000 + "{5}", "5"),
])
def test_last_box(text, expected):
    started = time.perf_counter()
    assert last_box(text) == expected
    assert time.perf_counter() - started < 20            # quadratic time would be minutes


# ---- mathematics --------------------------------------------------------------------------------

@pytest.mark.parametrize("gold, answer, right", [
    # the same, written otherwise
    ("5", "5", True), ("5", "5.0", True), ("5", "+5", True), ("5", "x = 5", True),
    ("5", r"\text{5}", True), ("5", r"{5}", True), ("5", r"5\text{ apples}", True),
    (r"\frac{1}{2}", "0.5", True), (r"\frac{1}{2}", "1/2", True),
    (r"\frac12", r"\dfrac{2}{4}", True),
    (r"-\frac{1}{3}", r"\frac{-1}{3}", True), (r"3\sqrt{13}", r"\sqrt{117}", True),
    ("1000", "1,000", True), (r"\$36", "36", True), (r"90^\circ", "90", True),
    (r"10\%", "10", True), ("p-q", "-q+p", True), ("6-5i", "-5i+6", True),
    ("(x+1)^2", "x^2+2x+1", True), ("1, 2", "2, 1", True),
    (r"1\pm\sqrt{2}", r"1-\sqrt2, 1+\sqrt2", True),
    (r"\left(3, \frac{\pi}{2}\right)", r"(3, \pi/2)", True), (r"x \in [-2,7]", "[-2,7]", True),
    (r"\text{Evelyn}", "Evelyn", True), (r"\text{(C)}", "C", True), ("2^{10}", "1024", True),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
    ("x>3", r"(3, \infty)", True), ("5", "2+3=5", True), ("x>3", "3<x", True),
    ("33", "033", True), ("336^\\circ", "336", True), ("1.5", r"1\frac{1}{2}", True),
    # wrong but similar
    ("5", "-5", False), ("-5", "5", False), (r"\frac{1}{2}", "0.7", False),
    (r"3\sqrt{13}", "3", False), (r"3\sqrt{13}", r"\sqrt{13}", False),
    (r"3\sqrt{13}", "10.8", False),
    (r"\frac{3}{56}", "0.0536", False), (r"\frac{1}{3}", "0.333", False),
    (r"\frac{1}{3}", "0.3", False),
    (r"\frac{1}{3}", "3", False), (r"\frac{2}{3}", r"\frac{3}{2}", False),
    (r"-\frac{1}{3}", r"\frac{1}{3}", False), (r"\pi", "3.14", False), (r"\sqrt{2}", "1.41", False),
    ("5", "5, 6", False), ("1, 2", "1", False), ("1", "1, 2", False), ("5", r"\pm 5", False),
    (r"\pm 5", "5", False), ("(1,2)", "(2,1)", False), ("[1,2)", "(1,2]", False),
    ("(1,2)", "[1,2]", False),
    ("6-5i", "6+5i", False), ("p-q", "q-p", False), ("x^2+1", "x^2-1", False), ("x", "y", False),
    ("x<3", "x>3", False), ("x<3", r"x \le 3", False), (r"\infty", r"-\infty", False),
    (r"(-\infty,2)\cup(3,\infty)", r"(-\infty,2]\cup(3,\infty)", False),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", False),
    (r"\text{Evelyn}", r"\text{Angela}", False), (r"\text{even}", "odd", False), ("B", "C", False),
    ("11", "11.001", False), ("100", "1000", False), ("70", "70.5", False),
    ("14", "14 or 15", False),
    ("12", "1, 2", False), ("2", "2x", False), ("5", "five?", False), ("5", "...", False),
    ("5", r"\frac{5}{", False), ("5", r"x_{1}", False), ("5", "\ud800", False),
    ("5", "ü" * 50, False),
    ("204", "240", False), ("3:5", "5:3", False),
])
def test_maths_verdicts(gold, answer, right):
    assert maths.score(Example("1", "", gold, "math"), box(answer)).correct is right


@pytest.mark.parametrize("text, score", [
    ("The answer is 5.", Score(False, None)),
    (r"\boxed{}", Score(False, None)),
    (r"\boxed{5", Score(False, None)),
    ("", Score(False, None)),
    (HUGE, Score(False, None)),
    (r"\boxed{4} no, \boxed{5}", Score(True, "5")),
    (r"\boxed{5} no, \boxed{4}", Score(False, "4")),
    (r"\boxed{5}, \boxed{6}", Score(False, "6")),
    (HUGE + r"\boxed{5}" + HUGE, Score(True, "5")),
    ("\\boxed{\x005\x00}", Score(True, "5")),
    (r"\boxed{\boxed{5}}", Score(True, "{5}")),
    (r"\boxed{" + "5+" * 100_000 + "5}", Score(False, None)),
])
def test_maths_finds_the_answer(text, score):
    assert maths.score(Example("1", "", "5", "math"), text) == score


@pytest.mark.parametrize("case", [case for case in CASES if case["task"] == "maths"],
                         ids=lambda case: case["kind"])
def test_maths_by_kinds(case):
    """The kinds of forms that models write, and beside each what looks alike and means something
    else."""
    for right in (True, False):
        for gold, answer in case["right" if right else "wrong"]:
            score = maths.score(Example("1", "", gold, "math"),
                                box(answer) if case["boxed"] else answer)
            assert score.correct is right, (gold, answer, score)


@pytest.mark.parametrize("gold, answer", [
    ("", "5"), (" ", "5"), ("", ""), (".", "."), ("?", "?"), ("...", "..."), ("\\ldots", "\\ldots"),
    ("5", ""), ("5", "."), ("{}", "{}"), ("", "\\text{}"), ("", "{}")])
def test_an_empty_gold_or_answer_is_never_right(gold, answer):
    assert not maths.score(Example("1", "", gold, "math"), box(answer)).correct


def compared(gold, answer):
    """The Score of a boxed answer."""
    return maths.score(Example("1", "", gold, "math"), box(answer))


def test_a_poisonous_answer_costs_seconds_and_the_next_is_scored():
    started = time.perf_counter()
    assert compared("5", "9^{9^{9^9}}") == Score(False, "9^{9^{9^9}}", "no verdict in 4 s")
    assert time.perf_counter() - started < 3 * maths.SECONDS
    assert compared("5", "5").correct


def test_an_answer_that_breaks_sympy_is_wrong_and_the_next_is_scored(monkeypatch):
    """No short answer breaks this version of sympy, so the comparison itself is replaced. The note
    names the exception."""
    with monkeypatch.context() as patch:
        patch.setattr(maths, "compare", divide_by_zero)
        maths.in_a_process.cache_clear()
        assert compared("5", "5") == Score(False, None, "ZeroDivisionError")
    maths.in_a_process.cache_clear()
    assert compared("5", "5") == Score(True, "5")


def divide_by_zero(gold, answer):
    return 1 / 0


def script(code, *arguments):
    """What a Python program of its own prints, which has `maths`, `compared` and `others()`: the
    ids of the processes that compare."""
    begin = """
import multiprocessing, os, sys, threading, time
from tasks import Example, maths
def compared(gold, answer):
    return maths.score(Example("1", "", gold, "math"), "\\\\boxed{" + answer + "}")
def others():
    return [process.pid for process in multiprocessing.active_children()]
"""
    run = subprocess.run([sys.executable, "-c", begin + code, *arguments], cwd=PROJECT, text=True,
                         capture_output=True, timeout=60)
    assert not run.stderr, run.stderr
    return run.stdout


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")


@needs_proc
def test_an_answer_that_takes_all_memory_does_no_harm():
    """It may take 100 MB here. Without a limit it takes more than 400 MB in its four seconds."""
    peak, verdicts = script("""
maths.MEMORY_MB = 100
maths.ready()
def peak(pid):
    lines = open(f"/proc/{pid}/status").read().split("\\n")
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
before, highest, verdicts = peak(os.getpid()), 0, []
thread = threading.Thread(target=lambda: verdicts.append(compared("5", "2^{2^{40}}")))
thread.start()
while thread.is_alive():
    try:
        highest = max([highest, *map(peak, others())])
    except (OSError, StopIteration):
        pass                                # it has been ended
    thread.join(0.02)
print((highest - before) // 1000)
print(verdicts[0].correct, compared("5", "5").correct)
""").splitlines()
    assert int(peak) < 150 and verdicts == "False True"


def test_a_killed_process_costs_one_verdict():
    """The kernel kills processes when memory is short. The answer is unread, the next one is not.
    """
    assert script("""
maths.ready()
verdicts = []
thread = threading.Thread(target=lambda: verdicts.append(compared("5", "9^{9^{9^9}}")))
thread.start()
while not others():
    time.sleep(0.01)
os.kill(others()[0], 9)
thread.join()
print(verdicts[0].correct, verdicts[0].parsed, compared("5", "5").correct)
""") == "False None True\n"


def test_threads_share_the_process():
    verdicts, start = {}, threading.Barrier(24)

    def ask(i):
        start.wait()
        verdicts[i] = [compared(str(i % 2), i - repeat).correct for repeat in range(8)]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {i: [i % 2 == i - repeat for repeat in range(8)] for i in range(24)}


def test_a_poisonous_answer_does_not_cost_another_thread_its_verdict():
    """The clock of an answer runs from when it is compared, not from when it is asked."""
    scores = {}

    def ask(answer):
        scores[answer] = compared("5", answer)

    threads = [threading.Thread(target=ask, args=(answer,)) for answer in ("9^{9^{9^9}}", "5")]
    for thread in threads:
        thread.start()
        time.sleep(0.5)
    for thread in threads:
        thread.join()
    assert scores["5"] == Score(True, "5") and not scores["9^{9^{9^9}}"].correct


def alive(pid):
    """Does the process run? (A zombie does not.)"""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@needs_proc
def test_no_process_outlives_its_parent():
    """The parent is gone while an endless comparison runs: its own alarm ends it."""
    pid = int(script("""
maths.SECONDS = 1
maths.ready()
threading.Thread(target=compared, args=("5", "9^{9^{9^9}}"), daemon=True).start()
while not others():
    time.sleep(0.01)
time.sleep(0.3)
print(others()[0], flush=True)
os._exit(1)"""))
    deadline = time.time() + 8
    while alive(pid) and time.time() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def test_comparing_prints_nothing():
    """math-verify warns, again in each process, that we keep the time ourselves."""
    assert script('print(compared("5", "5").correct)') == "True\n"


@pytest.mark.parametrize("ask", ["maths.ready()", 'compared("5", "5")'])
def test_a_missing_math_verify_is_an_error(ask):
    """It is an error already for ready(), and never a wrong answer."""
    assert script(f"""
sys.modules["math_verify"] = None           # as if it were not installed
try:
    {ask}
except ImportError as problem:
    print(problem.name)
""") == "math_verify\n"


# ---- multiple choice ----------------------------------------------------------------------------

OPTIONS = ["Vitamin A", "C. difficile", "Vitamin  C", "B cells"]          # the last one is right
CHOSEN = [
    # letters in a box
    (box("D"), "D"), (box("(D)"), "D"), (box("D."), "D"), (box("D)"), "D"), (box("d"), "D"),
    (box(r"\text{D}"), "D"), (box(r"\textbf{(D)}"), "D"), (box(r"\mathrm{D}"), "D"),
    (box("{D}"), "D"),
    (box(r"\operatorname{D}"), "D"), (box(r"\left(D\right)"), "D"),
    (box("D. B cells"), "D"), (box("D: B cells"), "D"), (box("(D) B cells"), "D"),
    (box("Option D"), "D"), (box("The answer is D"), "D"), (box(r"\boxed{D}"), "D"),
    (box("A") + box("D"), "D"), (box("D") + box("A"), "A"), (box("B"), "B"),
    # an option's text in a box
    (box("B cells"), "D"), (box(r"\text{B cells}"), "D"), (box("C. difficile"), "B"),
    (box("Vitamin C"), "C"), (box("vitamin c"), "C"), (box("Vitamin"), None), (box("cells"), None),
    # nothing chosen
    (box("E"), None), (box("A or D"), None), (box("A, D"), None), (box("A and D"), None),
    (box("A) and D)"), None), (box("AD"), None), (box("A vitamin"), None), (box("?"), None),
    (box("4"), None), (box("..."), None), (box("A large dose"), None), (box("D" * 3000), None),
    ("", None), ("I do not know.", None), ("A", None), ("D", None), (HUGE, None),
    ("A patient came. The answer depends.", None), ("(A) (B) (C) (D)", None),
    # a statement, where there is no box
    ("The answer is D.", "D"), ("The answer is (D).", "D"), ("the answer is (d)", "D"),
    ("Answer: D", "D"), ("**Answer:** D", "D"), ("The correct answer is **D**.", "D"),
    ("The answer is: D\nbecause of B.", "D"), (r"The answer is \text{D}.", "D"),
    ("The answer is option D.", "D"), (r"Answer: \(D\)", "D"), ("The answer is $D$", "D"),
    ("The answer is A. No, the answer is D.", "D"), ("The answer is D because cells.", "D"),
    ("The correct option is D.", "D"),
    ("Answer:\nD", "D"), ("**Answer: D. Half**", "D"), ("Answer: D. B cells", "D"),
    ("Answer: D) B cells", "D"),
    (HUGE + "The answer is (D). " + HUGE, "D"), ("The answer is D\x00", None),
    ("The answer is A vitamin.", None), ("The answer is a vitamin.", None),
    ("The answer is d", "D"), ("The answer is a", None),
    ("The answer is C. difficile.", "B"), ("The answer is A. difficile.", None),
    ("The answer is (A) or (D).", None),
    ("The answer is A or D.", None), ("The answer is A, D.", None),
    ("The answer is not (D).", None),
    ("The answer is Different.", None), ("The answer is E.", None), ("answer is D-dimer", None),
    ("The wrong option is D.", None), ("An incorrect answer is D.", None), ("Option: D", None),
    ("The answer is B. The wrong choice is D.", "B"), ("The best choice is (D).", "D"),
    ("The answers: D", None), ("My answerD is D", None),
    # a box decides, and what stands after a box without a letter
    ("The answer is (D). \\boxed{A}", "A"), ("The answer is (D). \\boxed{4}", None),
    ("\\boxed{4}. The answer is (D).", "D"), ("\\boxed{A}. The answer is (D).", "A"),
    ("The answer is (D). \\boxed{}", "D"), ("The answer is (D). \\boxed{?}", "D"),
]


@pytest.mark.parametrize("text, letter", CHOSEN, ids=range(len(CHOSEN)))
def test_choice_verdicts(text, letter):
    example = Example("1", "", "D", "choice", {"options": OPTIONS})
    assert choice.score(example, text) == Score(letter == "D", letter)


def test_letters_that_are_options_texts():
    """A capital that is an option's letter is that letter, whatever the options say. All else of
    one character is an option's text."""
    example = Example("1", "", "B", "choice", {"options": ["B", "A", "AB", "0"]})
    assert choice.score(example, box("B")) == Score(True, "B")
    assert choice.score(example, box("AB")) == Score(False, "C")
    assert choice.score(example, box("0")) == Score(False, "D")
    assert choice.score(example, box("1")) == Score(False, None)


@pytest.mark.parametrize("case", [case for case in CASES if case["task"] == "choice"],
                         ids=lambda case: case["options"][1])
def test_choice_by_options(case):
    """case["read"]: texts, and the letter that a careful person reads in each (None: no letter)."""
    example = Example("1", "", "C", "choice", {"options": case["options"]})
    for text, letter in case["read"]:
        assert choice.score(example, text) == Score(letter == "C", letter), text


GPQA = {"Question": "What is left?", "Correct Answer": "port\n", "Incorrect Answer 1": "starboard",
        "Incorrect Answer 2": "bow", "Incorrect Answer 3": "stern", "Record ID": "rec1"}


def test_gpqa_shuffle_is_by_question(tmp_path):
    rows = [{**GPQA, "Question": f"q{i}", "Record ID": f"r{i}"} for i in range(40)]
    whole = get_task("gpqa", write_rows(tmp_path / "a.jsonl", rows)).load()
    last = get_task("gpqa", write_rows(tmp_path / "b.jsonl", rows[-1:]))
    assert last.load()[0] == whole[-1]
    assert {example.gold for example in whole} == set("ABCD")
    for example in whole:
        assert example.question.split("\n")["ABCD".index(example.gold) + 1][3:] == "port"
    assert whole[0].gold == choice.make_example("here", rows[0]).gold


def test_gpqa_order_does_not_change_between_processes(tmp_path):
    """Python's own hash() is salted in each process, so a seed made with it would change."""
    code = ("from tasks import choice\nimport json, sys\n"
            "print(choice.make_example('here', json.loads(sys.argv[1])).question)")
    runs = [subprocess.run([sys.executable, "-c", code, json.dumps(GPQA)], cwd=PROJECT, text=True,
                           capture_output=True, env={**os.environ, "PYTHONHASHSEED": seed}).stdout
            for seed in ("1", "2")]
    assert runs[0] == runs[1] == choice.make_example("here", GPQA).question + "\n"


MEDQA = {"question": "Which?", "answer": "iron", "answer_idx": "B",
         "options": {"A": "zinc", "B": "iron", "C": "lead", "D": "tin"}}
LOCAL = {"query": "Which?", "answer": "iron",
         "options": ["A. zinc", "B. iron", "C. lead", "D. tin"]}


@pytest.mark.parametrize("change", [
    {}, {"answer": "B"}, {"answer": "B. iron"}, {"answer": " iron "},
    {"options": ["zinc", "iron", "lead", "tin"]}, {"options": ["(A) zinc", "(B) iron", "(C) lead"]},
    {"options": ["A) zinc", "B) iron", "C) zinc", "D) tin"]},      # two wrong ones may be the same
    {"options": {"D": "tin", "A": "zinc", "C": "lead", "B": "iron"}},
    {"answer_idx": "B", "answer": "whatever"},
    {"options": [{"key": letter, "value": text} for letter, text in MEDQA["options"].items()]},
    {"options": [{"key": letter, "value": MEDQA["options"][letter]} for letter in "DBCA"]},
    # the question lists the options itself: once, twice, on a line, marked in another way
    {"query": "Which?\nA. zinc\nB. iron\nC. lead\nD. tin"},
    {"query": "Which?\nA. zinc\nB. iron\nC. lead\nD. tin\n\nA. zinc\nB. iron\nC. lead\nD. tin\n"},
    {"query": "Which? A. zinc B. iron C. lead D. tin"},
    {"query": "Which?\n(A) zinc\n(B) iron\n(C) lead\n(D) tin"},
])
def test_medqa_layouts(tmp_path, change):
    example, = get_task("medqa", write_rows(tmp_path / "rows.json", [{**LOCAL, **change}])).load()
    assert example.gold == "B"
    assert example.question.split("\n")[:3] == ["Which?", "A. zinc", "B. iron"]
    assert example.question.count("iron") == 1
    assert example.question == choice.make_example("here", {**LOCAL, **change}).question


@pytest.mark.parametrize("question", [
    "Which?\nA. zinc\nB. iron", "Which is no metal?\nA. zinc\nB. iron\nC. lead\nD. gold",
    "A. zinc\nB. iron\nC. lead\nD. tin\nWhich?", "Is it B. iron"])
def test_a_question_that_lists_something_else_is_left_as_it_is(question):
    example = choice.make_example("here", {**LOCAL, "query": question})
    assert example.question == question + "\nA. zinc\nB. iron\nC. lead\nD. tin"


@pytest.mark.parametrize("row", [
    {**LOCAL, "answer": ""}, {**LOCAL, "answer": None}, {**LOCAL, "answer": "E"},
    {**LOCAL, "answer": "gold"}, {**LOCAL, "answer": "Iron"}, {**MEDQA, "answer_idx": "E"},
    {**MEDQA, "answer_idx": None}, {**LOCAL, "options": ["A. iron", "B. iron", "C. lead"]},
    {**LOCAL, "options": ["A. zinc", "A. iron"]}, {**LOCAL, "options": ["B. iron", "A. zinc"]},
    {**MEDQA, "options": {"A": "zinc", "C": "iron"}}, {**LOCAL, "query": " "},
    {**GPQA, "Incorrect Answer 2": "port"}, {**GPQA, "Correct Answer": None},
])
def test_rows_that_cannot_be_scored_are_left_out_aloud(tmp_path, capsys, row):
    path = write_rows(tmp_path / "rows.jsonl", [LOCAL, row, MEDQA])
    examples = get_task("choice", path).load()
    assert [example.id for example in examples] == ["choice-1", "choice-3"]
    printed = capsys.readouterr().out
    assert printed.startswith("left out 1 of the rows: ") and "rows.jsonl row 2 " in printed
    assert len(get_task("choice", path).load(limit=2)) == 2        # not one of two
    with pytest.raises(ValueError, match="no question that can be scored"):
        get_task("choice", write_rows(tmp_path / "bad.json", [row])).load()


@pytest.mark.parametrize("latex, words", [
    (r"\text{(C)}", "(C)"), (r"\mathrm{Love\ and\ Theft}", "Love and Theft"),
    (r"10\,\text{km}", "10 km"), (r"\'Etienne", "Étienne"),
    (r"Z\"urich", "Zürich"), (r"\c{C}a va", "Ça va"), (r"na\"{\i}ve", "naïve"),
    (r"Stra\ss e", "Straße"), (r"\AA rhus", "Århus"), (r"d'\oe uvre", "d'œuvre"),
    (r"\alpha", r"\alpha"),
    (r"O\'Neil, St. John\'s", "O'Neil, St. John's"), (r"\"Emma\"", '"Emma"'), (r"AT\&T", "AT&T"),
    (r"**C**", "C"), (r"C\ ", "C"), (r"\quad C", "C"), (r"1\,000 a\,b", "1000 a b"), ("", "")])
def test_without_fonts(latex, words):
    assert without_fonts(latex) == words


# ---- questions to look up -----------------------------------------------------------------------

@pytest.mark.parametrize("golds, answer, right", [
    (["Paris"], "Paris", True), (["Paris"], "paris", True), (["Paris"], "Paris.", True),
    (["Paris"], r"\text{Paris}", True), (["The Beatles"], "Beatles", True),
    (["Beatles"], "the Beatles", True), (["U.S."], "US", True), (["New York"], "New   York", True),
    (["O'Neil"], "O\u2019Neil", True), (["1,000"], "1000", True), (["yes"], "Yes!", True),
    (["A"], "A", True), (["Paris", "Lutetia"], "Lutetia", True), (["1.5"], "1.5", True),
    (["St. John"], "st john", True), (["An apple a day"], "apple day", True), (["$5"], "5", True),
    (["Paris"], "Paris, France", False), (["Paris"], "London", False), (["Paris"], "Pari", False),
    (["1.5"], "15", False), (["1990"], "1991", False), (["A"], "the", False), (["A"], "B", False),
    (["yes"], "no", False), (["Theodore"], "odore", False), (["Anna"], "nna", False),
    (["New York"], "NewYork", False), (["George Bush"], "George H. W. Bush", False),
    (["Paris", "Lutetia"], "Paris or Lutetia", False), (["Zürich"], "Zurich", False),
    (["Paris"], "?", False), (["Paris"], "not Paris", False), (["Paris"], "P" * 1500, False),
])
def test_exact_match(no_judge, golds, answer, right):
    example = Example("1", "?", " or ".join(golds), "search", {"answers": golds})
    score = search.score(example, box(answer))
    assert score.correct is right
    assert score.note == ("exact match" if right else "" if answer == "?" else "no exact match")


@pytest.mark.parametrize("case", [case for case in CASES if case["task"] == "search"],
                         ids=lambda case: case["answers"][0])
def test_exact_match_through_latex_and_unicode(no_judge, case):
    example = Example("1", "?", "", "search", {"answers": case["answers"]})
    for right in (True, False):
        for answer in case["right" if right else "wrong"]:
            assert search.score(example, f"\\boxed{{{answer}}}").correct is right, answer


@pytest.mark.parametrize("text", [
    "Paris", "The answer is Paris.", r"\boxed{}", r"\boxed{Paris", "", HUGE, r"\boxed{?!}",
    r"\boxed{" + HUGE + "}"])
def test_no_box_is_unparsed_and_never_judged(judging, text):
    example = Example("1", "?", "Paris", "search", {"answers": ["Paris"]})
    assert search.score(example, text) == Score(False, None)
    assert judging.asked == []


@pytest.mark.parametrize("verdict, right", [("correct", True), ("incorrect", False),
                                            ("invalid", False)])
def test_the_judge_decides_where_exact_match_fails(judging, verdict, right):
    judging.verdict = verdict
    example = Example("1", "Where?", "Paris", "search", {"answers": ["Paris"]})
    assert search.score(example, box("the Paris")) == Score(True, "the Paris", "exact match")
    assert judging.asked == []
    score = search.score(example, box("Paris, France"))
    assert score == Score(right, "Paris, France", f"judge: {verdict}")
    assert judging.asked == [("Where?", ["Paris"], "Paris, France")]


def test_ready_says_that_there_is_no_judge(no_judge, capsys):
    search.ready()
    assert "no judge is configured" in capsys.readouterr().out


def test_ready_says_that_there_is_a_judge(judging, capsys):
    search.ready()
    assert "sent to the configured judge" in capsys.readouterr().out


# ---- programs -----------------------------------------------------------------------------------

@pytest.mark.parametrize("text, program", [
    ("```python\nx = 1\n```", "x = 1"),
    ("a\n```python\nx = 1\n```\nb\n```python\nx = 2\n```\nc", "x = 2"),
    ("```py\nx = 1\n```", "x = 1"),
    ("```Python3\nx = 1\n```", "x = 1"),
    ("``` python\nx = 1\n```", "x = 1"),
    ("```python title=a.py\nx = 1\n```", "x = 1"),
    ("```\nx = 1\n```", "x = 1"),
    ("```python\nx = 1\n```\nIt prints:\n```\n1\n```", "x = 1"),
    ("```python\nx = 1\n```\n```json\n{}\n```", "x = 1"),
    # in a list, after a mark of one
    ("  ```python\n  x = 1\n  ```", "x = 1"),
    ("1. So:\n\n   ```python\n   def f():\n       return 1\n   ```\n2. Done.",
     "def f():\n    return 1"),
    ("- ```python\n  x = 1\n  ```", "x = 1"), ("2. ```python\n   x = 1\n   ```\n", "x = 1"),
    ("\t```python\n\tif x:\n\t\ty = 1\n\t```", "if x:\n\ty = 1"),
    # a fence after the last line, or in a string
    ("```python\ndef f():\n    return 1```", "def f():\n    return 1"),
    ("```python\nx = 1 ```\nIt prints:\n```\n1\n```", "x = 1"), ("```\nx = 1```", "x = 1"),
    ("```python\nx = '```'\ny = 2\n```", "x = '```'\ny = 2"),
    # other fences
    ("~~~python\nx = 1\n~~~", "x = 1"), ("~~~\nx = 1\n~~~\n", "x = 1"),
    ("````python\nx = 1\n````", "x = 1"), ("~~~~py\nx = '''\n~~~\n'''\n~~~~", "x = '''\n~~~\n'''"),
    ("````python\nx = '''\n```\n'''\n````", "x = '''\n```\n'''"),
    ("~~python\nx = 1\n~~", None),
    # a fence within a docstring ends nothing
    ('```python\ndef f():\n    """\n    ```\n    f()\n    ```\n    """\n    return 1\n```\nSo.',
     'def f():\n    """\n    ```\n    f()\n    ```\n    """\n    return 1'),
    ('```python\n"""\n```\nf()\n```\n"""\nx = 1\n```', '"""\n```\nf()\n```\n"""\nx = 1'),
    ('```python\n"""\n```python\nf()\n```\n"""\nx = 1\n```\n```\n1\n```',
     '"""\n```python\nf()\n```\n"""\nx = 1'),
    # what is no Python ends at its first fence
    ("```python\nx = (\n```\nor\n```\n1\n```", "x = ("),
    ("```python\nprint x\n```\n```json\n{}\n```", "print x"),
    # cut off: a program only if it is Python
    ("```python\ndef f(a):\n    return a +", None),
    ("```python\nx = 1\n```\n```python\nx = (", None),
    ("```python\nx = 'a", None), ("~~~python\nfor x in", None), ("```\ndef f(", None),
    ("```python\ndef f(a):\n    return a +\nFinal Answer:\n```python\nx = 1\n```", "x = 1"),
    ("```cpp\nint x;\nFinal Answer:\n```python\nx = 1", "x = 1"),
    ("~~~python\nx = (\nFinal Answer:\n```python\nx = 1\n", "x = 1"),
    ("```python\nx = '''\nFinal Answer:\n```python\nx = 1\n", "x = 1"),
    # without a block
    ("# adds\ndef f():\n    return 1", "# adds\ndef f():\n    return 1"),
    ("def f():\n    return 1\n```", "def f():\n    return 1"),
    ("def f():\n    return 1\n```\nThis is right.", "def f():\n    return 1"),
    ("# Answer\nThis needs import sys.", None), ("import sys is what I need.", None),
    ("```python\nx = '''a```b'''\n```", "x = '''a```b'''"),
    ("```python\nx = 1", "x = 1"),
    ("```python\nx = 1\n```\n```python\nx = 2", "x = 2"),
    ("import sys\nprint(1)", "import sys\nprint(1)"),
    ("\nfrom math import pi\n", "from math import pi"),
    ("def f():\n    return 1", "def f():\n    return 1"),
    ("class Solution:\n    pass", "class Solution:\n    pass"),
    ("```python\n```", None),
    ("```python\n\n```", None),
    ("```java\nint x;\n```", None),
    ("```json\n{}\n```", None),
    ("I would import sys first.", None),
    ("From the problem we import nothing.", None),
    ("from here it is easy", None),
    ("x = 1", None),
    ("print(1)", None),
    ("Use `def f(): pass`.", None),
    ("```python x = 1```", None),
    ("42", None),
    ("", None),
    ("```python\n" + "x = 1\n" * 33_000 + "```", ("x = 1\n" * 33_000).strip()),
    ("`" * 200_000, None),
    ("```\n" * 50_000, None),
])
def test_program_in(text, program):
    started = time.perf_counter()
    assert coding.program_in(text) == program
    assert time.perf_counter() - started < 20            # quadratic time would be minutes


@pytest.mark.parametrize("box", [r"\boxed{12}", r"\boxed{ 12 }", r"\boxed{\boxed{12}}"])
def test_a_letter_before_a_box_with_something_else_does_not_count(box):
    example = Example("x", "q", "A", "choice", {"options": ["one", "two"]})
    assert choice.score(example, f"The answer is (A).\nThe mass: {box}").parsed is None
    assert choice.score(example, f"The mass: {box}\nSo the answer is (A).").correct


def test_an_option_may_be_zero():
    row = {"question": "How many?", "options": {"A": 0, "B": 1}, "answer_idx": "A"}
    assert choice.make_example(Place("rows", 1), row).question == "How many?\nA. 0\nB. 1"


@pytest.mark.parametrize("usage", ["print(f(1))", "assert f(1) == 1", "x = f(2)\nx", ">>> f(1)"])
def test_usage_behind_a_function_is_not_the_program(usage):
    """Where a function is asked for. A program that reads its input may need no function."""
    function = "def f(a):\n    return a"
    text = f"```python\n{function}\n```\nFor example:\n```python\n{usage}\n```"
    assert coding.program_in(text, defines=True) == function
    assert coding.program_in(text) == usage
    assert coding.program_in(f"```python\n{usage}\n```", defines=True) == usage
    row = {"prompt": "p", "test": "assert f(7) == 7"}
    assert coding.score(coding.make_example(Place("rows", 1), row), text).correct


@pytest.mark.parametrize("printed, expected, same", [
    ("1\n2\n", "1\n2", True), ("1 \n 2", "1\n2", True), ("1.50", "1.5", True),
    ("1.0 2", "1 2.00", True),
    ("Yes", "Yes", True), ("a  b", "a  b", True), ("nan", "nan", True), ("inf x", "inf x", True),
    ("", "\n", True), ("1\r\n2", "1\n2", True), ("-0", "0", True), ("1e3", "1000", True),
    ("1\n2\n3", "1\n2", False), ("1", "1\n2", False), ("1.5000001", "1.5", False),
    ("0.3333", "0.33", False),
    ("yes", "Yes", False), ("1 2", "2 1", False), ("12", "1 2", False), ("-1", "1", False),
    ("1_0", "10", False), ("10", "1_0", False), ("1_0", "1_0", True), ("\u0661", "1", False),
    ("1e", "1", False), (".5", "0.5", True), ("5.", "5", True), ("+5", "5", True),
    ("1 x", "1.0 x", False),
    ("1\n2\n", "1.0\n2", True), ("0x10", "16", False), ("1e9999999999", "1", False),
    ("", "1", False), ("1\n\n2", "1\n2", False), ("a b", "a  b", False), ("[1, 2]", "1 2", False),
    ("9" * 5000, "9" * 5001, False), ("9" * 5000, "9" * 5000, True), ("1", "one", False),
])
def test_same_output(printed, expected, same):
    assert coding.same_output(printed, expected) is same


def test_comparing_millions_of_numbers_takes_little_memory():
    """8 MB of them, as a list of numbers, would take 500 MB."""
    peak, same = script("""
from tasks import coding
import resource
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
ones, lines = "1 " * 4_000_000, "1\\n" * 4_000_000
before = peak()
same = [coding.same_output(ones, ones[:-2] + "2"), coding.same_output(ones, "1"),
        coding.same_output(ones, ones), coding.same_output(lines, lines[:-2] + "2"),
        coding.same_output(lines, lines)]
print(peak() - before)
print(same)
""").splitlines()
    assert int(peak) < 150 and same == "[False, False, True, False, True]"


@pytest.mark.parametrize("value, expected, same", [
    (1, 1, True), ("a", "a", True), ([1, [2]], [1, [2]], True), (0.1 + 0.2, 0.3, True),
    (2, 2.0, True),
    ([0.1 + 0.2], [0.3], True), (None, None, True), (True, True, True), ([], [], True),
    ({"a": 1}, {"a": 1}, True), (1e9 + 1e-4, 1e9, True),
    (1, 2, False), (1, "1", False), ("1", 1.0, False), ([1, 2], [2, 1], False),
    ([1], [1, 1], False),
    (0.30001, 0.3, False), (None, 0, False), (None, 0.0, False), ([1], 1, False),
    (-1.0, 1.0, False),
    (10**400, 1.0, False), (float("nan"), 1.0, False), ({"a": 1}, {"a": 2}, False),
    (False, None, False),
])
def test_same_value(value, expected, same):
    assert coding.same_value(value, expected) is same


class Poison:
    """A pickle that writes a file when a plain reader loads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def packed(value):
    """As LiveCodeBench packs its hidden tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def live_row(hidden, **change):
    return {"question_title": "Sum", "question_content": "Add two numbers.", "starter_code": "",
            "question_id": "q1", "public_test_cases": json.dumps([stdin_test("1 2", "3")]),
            "private_test_cases": hidden, "metadata": "{}", **change}


def stdin_test(given, expected):
    return {"input": given, "output": expected, "testtype": "stdin"}


def call_test(given, expected):
    return {"input": given, "output": expected, "testtype": "functional"}


def live_example(tmp_path, row, suffix=".jsonl"):
    return get_task("livecodebench", write_rows(tmp_path / f"live{suffix}", [row])).load()[0]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("pack", [packed, str])
def test_hidden_tests_packed_and_plain(tmp_path, suffix, pack):
    tests = [stdin_test(f"{i} 1", str(i + 1)) for i in range(5)]
    example = live_example(tmp_path, live_row(pack(json.dumps(tests))), suffix)
    assert coding.all_tests(example) == [("1 2", "3", True)] + [
        (test["input"], test["output"], True) for test in tests]


def test_hidden_tests_are_read_from_their_own_row(tmp_path):
    rows = [live_row(packed(json.dumps([stdin_test("ä", str(i))])), question_id=f"q{i}")
            for i in range(4)]
    examples = get_task("coding", write_rows(tmp_path / "rows.jsonl", rows)).load(limit=3)
    assert [coding.all_tests(example)[1][1] for example in examples] == ["0", "1", "2"]
    assert all(example.row["hidden"][0].endswith("rows.jsonl") for example in examples)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    poison = packed(Poison(str(tmp_path / "ran")))
    pickle.loads(zlib.decompress(base64.b64decode(poison)))
    assert (tmp_path / "ran").exists()                             # a plain reader does run it
    (tmp_path / "ran").unlink()
    with pytest.raises(ValueError, match="tests of q1 are damaged.*asks for .*open"):
        coding.all_tests(live_example(tmp_path, live_row(poison)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("hidden", [
    "rubbish!", "AAAA", packed("no json"), packed(7), packed(["a"]), packed('[{"input": "1"}]'),
    base64.b64encode(zlib.compress(b"\x80\x05X")).decode(), base64.b64encode(b"x").decode(), "[1,",
    packed(os.system), packed(Score)])
def test_damaged_tests_are_named(tmp_path, hidden):
    with pytest.raises(ValueError, match="the tests of q1 are damaged"):
        coding.all_tests(live_example(tmp_path, live_row(hidden)))


def test_live_framing(tmp_path):
    stdin = live_example(tmp_path, live_row("[]"))
    assert stdin.question == ("Add two numbers.\n\nYour program must read its input from stdin and "
                              "print its answer.")
    starter = "class Solution:\n    def add(self, a: int) -> int:\n        "
    called = live_example(tmp_path, live_row("[]", starter_code=starter,
                                             metadata='{"func_name": "add"}'))
    assert called.question == (
        "Add two numbers.\n\nStart from this code:\nclass Solution:\n    def add(self, a: int) -> "
        "int:\n\nYour program must define add, which is called and returns its answer.")


MBPP = {"task_id": 2, "prompt": "Write a function to add two numbers.", "code": "",
        "source_file": "", "test_imports": ["import math"],
        "test_list": [f"assert add(1, {i}) == {i + 1}" for i in range(5)],
        "test": "import numpy as np\nassert add(np.int64(2), math.floor(1.5)) == 3"}


HUMAN = {"task_id": "HumanEval/0", "entry_point": "double", "canonical_solution": "",
         "prompt": "from typing import List\n\n\ndef half(x):\n    return x / 2\n\n\n"
                   "def double(values: List[int]) -> List[int]:\n    \"\"\"Each value, doubled."
                   "\n    >>> double([1])\n    [2]\n    \"\"\"\n",
         "test": "\n\nMETADATA = {'author': 'x'}\n\n\ndef check(candidate):\n"
                 "    assert candidate([1, 2]) == [2, 4]\n"
                 "    assert half(candidate([3])[0]) == 3\n"}
WHOLE = "def double(values: List[int]) -> List[int]:\n    return [{} for x in values]"


@needs_sandbox
@pytest.mark.parametrize("code, right, note", [
    (WHOLE.format("2 * x"), True, ""), (WHOLE.format("3 * x"), False, "error: AssertionError"),
    ("from __future__ import annotations\n" + WHOLE.format("x + x"), True, ""),
    ("def double(values):\n    return values", False, "error: AssertionError"),
    ("def twice(values):\n    return values", False, "error: NameError: name 'double' is not"),
    ("double = lambda values: [2 * x for x in values]", True, ""),
    ("def check(candidate):\n    pass", False, "error: NameError: name 'double' is not"),
    ("raise SystemExit", False, "error")])
def test_humaneval_calls_its_check(tmp_path, code, right, note):
    """Imports and helpers of the prompt are there, and a test that is only defined is called."""
    task = get_task("humaneval", write_rows(tmp_path / "rows.json", [HUMAN]))
    example, = task.load()
    assert example.question.endswith(HUMAN["prompt"].strip())
    assert "tests like these" not in example.question
    score = task.score(example, f"```python\n{code}\n```")
    assert score.correct is right and score.note.startswith(note)
    again = coding.make_example("here", {**HUMAN, "task_id": 7})
    assert again.row == example.row                    # also with --task coding


NOTHING = ["x = 1", "import math", "def test():\n    assert add(1, 1) == 2", "# add(1, 1)", "\n\n1",
           "def check(candidate):\n    assert candidate(1, 1) == 2",
           "'''assert add(1, 1)'''", "pass",
           "class Test:\n    def test(self):\n        assert add(1, 1) == 2", "add(1, 1)",
           "import math\nvalues = [(1, 1)]\n\ndef check(f):\n    assert f(*values[0]) == 2"]


@pytest.mark.parametrize("test", NOTHING)
def test_a_test_that_tests_nothing_is_refused(tmp_path, capsys, test):
    rows = [{"prompt": "Add.", "test": test}, {**HUMAN, "test": "def check(candidate):\n    pass"},
            {"prompt": "Add.", "test": "for i in 1, 2:\n    assert add(i, i) == 2 * i"}]
    task = get_task("coding", write_rows(tmp_path / "rows.json", rows))
    assert [example.id for example in task.load()] == ["coding-3"]
    assert "left out 2 of the rows: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="no question that can be scored"):
        get_task("coding", write_rows(tmp_path / "one.json", rows[:1])).load()


@pytest.mark.parametrize("test", [
    "assert add(1, 1) == 2", "def check(f):\n    assert f(1, 1) == 2\n\ncheck(add)", MBPP["test"],
    "def check(f):\n    assert f(1, 1) == 2\n\nresult = check(add)",
    "def assertion(a, b):\n    assert a == b\nfor a, b in [(1, 2)]:\n    assertion(add(a, a), b)",
    "import numpy as np\nnp.testing.assert_allclose(add(1, 1), 2)",
    "try:\n    add(1)\nexcept TypeError:\n    pass\nelse:\n    raise ValueError"])
def test_a_test_that_tests_something_is_not_refused(test):
    assert coding.make_example("here", {"prompt": "Add.", "test": test}).row["test"] == test


@needs_sandbox
@pytest.mark.parametrize("right", [True, False])
def test_a_test_that_waits_for_main_is_run(right):
    """It would pass any program else."""
    test = (f"def check():\n    assert add(1, 1) == {2 if right else 3}\n"
            "if __name__ == '__main__':\n    check()")
    example = coding.make_example("here", {"prompt": "Add.", "test": test})
    program = "```python\ndef add(a, b):\n    return a + b\n```"
    assert coding.score(example, program).correct is right


@needs_sandbox
@pytest.mark.parametrize("body, right", [
    ("return a + b", True), ("return a - b", False), ("return", False),
    ("raise SystemExit(0)", False),
    ("import os; os._exit(0)", False), ("return a +", False), ("print('ok'); return 0", False)])
def test_mbpp_verdicts(tmp_path, body, right):
    task = get_task("mbppplus", write_rows(tmp_path / "mbpp.json", [MBPP]))
    example, = task.load()
    assert example.question.count("assert") == 3 and example.gold == "tests pass"
    score = task.score(example, f"Here:\n```python\ndef add(a, b):\n    {body}\n```")
    assert score.correct is right
    assert score.parsed == f"def add(a, b):\n    {body}"
    assert task.score(example, "I cannot.") == Score(False, None)


READS = "a, b = map(int, input().split())\nprint(a {} b)"


@needs_sandbox
@pytest.mark.parametrize("code, right, note", [
    (READS.format("+"), True, ""), (READS.format("-"), False, "test 1 of 3: wrong answer"),
    ("print(3)", False, "test 2 of 3: wrong answer"),
    ("1 / 0", False, "test 1 of 3: error: ZeroDivisionError: division by zero"),
    ("exit(3)", False, "test 1 of 3: error"),
    ("x", False, "test 1 of 3: error: NameError: name 'x' is not defined"),
    ("print(sum(map(int, open('/dev/stdin').read().split())))", True, ""),
    ("import sys\nsys.stdin = open('/dev/fd/0')\n" + READS.format("+"), True, ""),
    ("print(sum(map(int, next(open(file='/proc/self/fd/0', mode='rb')).split())))", True, ""),
    ("import sys\nx = open('/dev/stdin').readline()\n" + READS.format("+"), True, ""),
    ("from __future__ import (\n    annotations,\n)\n" + READS.format("+"), True, ""),
    ("from __future__ import (annotations, division)  # first\n" + READS.format("+"), True, ""),
    ("\"\"\"Adds.\"\"\"\nfrom __future__ import annotations\n" + READS.format("+"), True, ""),
    ("print('1_0')", False, "test 1 of 3: wrong answer"),
    ("import sys\nprint(sum(map(int, sys.stdin.read().split())))", True, ""),
    ("if __name__ == '__main__':\n    " + READS.format("+").replace("\n", "\n    "), True, ""),
    ("from __future__ import annotations\n" + READS.format("+"), True, ""),
    ("print(pow(2, 3, 5) * 0 + sum(map(int, input().split())))", True, ""),
])
def test_live_stdin_verdicts(tmp_path, code, right, note):
    hidden = packed(json.dumps([stdin_test("4 5\n", "9\n"), stdin_test("-1 1", "0")]))
    example = live_example(tmp_path, live_row(hidden))
    score = coding.score(example, f"```python\n{code}\n```")
    assert (score.correct, score.note) == (right, note)


@needs_sandbox
@pytest.mark.parametrize("code, right", [
    ("class Solution:\n    def add(self, a: List[int], b):\n        return [x + b for x in a]",
     True),
    ("def add(a, b):\n    return tuple(x + b for x in a)", True),
    ("def add(a, b):\n    return a", False), ("def add(a):\n    return a", False),
    ("def plus(a, b):\n    return a", False), ("class Solution:\n    pass", False),
])
def test_live_function_verdicts(tmp_path, code, right):
    row = live_row(json.dumps([call_test("[1, 2]\n3", "[4, 5]")]), metadata='{"func_name": "add"}',
                   public_test_cases=json.dumps([call_test("[]\n3", "[]")]))
    example = live_example(tmp_path, row)
    assert coding.score(example, f"```python\n{code}\n```").correct is right


@pytest.mark.parametrize("given, expected", [
    ('"ab"', ""), ('"ab"', "ab"), ('"ab"', "[1, 2"), ('"ab"', "None"), ('"ab"', "'a'"),
    ("ab", "1")])
def test_a_test_that_is_no_json_is_damaged(tmp_path, given, expected):
    row = live_row(json.dumps([call_test(given, expected)]), metadata='{"func_name": "f"}',
                   public_test_cases="[]")
    with pytest.raises(ValueError, match="the tests of q1 are damaged"):
        coding.score(live_example(tmp_path, row), "```python\ndef f(s):\n    return None\n```")


@pytest.mark.parametrize("metadata", ['{"func_name": "f"}', {"func_name": "f"},
                                      '{"x": 1, "func_name": "f"}', {"func_name": "f", "x": None}])
def test_metadata_as_a_text_and_as_an_object(tmp_path, metadata):
    example = live_example(tmp_path, live_row("[]", metadata=metadata), ".json")
    assert example.row["function"] == "f" and "must define f" in example.question


@pytest.mark.parametrize("metadata", ["{", "[1]", '"f"', 7, ["f"]])
def test_metadata_that_is_no_object_is_one_line(tmp_path, metadata):
    path = write_rows(tmp_path / "rows.json", [live_row("[]", metadata=metadata)])
    with pytest.raises(ValueError, match="rows.json row 1 ") as caught:
        get_task("coding", path).load()
    assert "\n" not in str(caught.value)


def test_mbpp_rows_need_no_more_than_prompt_and_test(tmp_path):
    row = {"prompt": "Add.", "test": "assert add(1, 1) == 2", "test_list": None}
    example, = get_task("coding", write_rows(tmp_path / "rows.json", [row])).load()
    assert (example.id, example.row) == ("coding-1", {"head": "", "test": row["test"]})
    assert example.question == "Add."                  # and no "tests like these:" with none after


def test_live_without_tests_is_never_right(tmp_path):
    example = live_example(tmp_path, live_row(packed("[]"), public_test_cases="[]"))
    with pytest.raises(ValueError, match="the tests of q1 are damaged: there are none"):
        coding.score(example, "```python\nx = 1\n```")
    with pytest.raises(ValueError, match="no question that can be scored"):      # seen at once
        live_example(tmp_path, live_row("[]", public_test_cases="[]", metadata={"func_name": "f"}))


# ---- loading ------------------------------------------------------------------------------------

ROWS = {
    "math500": {"problem": "1+1?", "solution": "", "answer": "2", "subject": "a", "level": 1,
                "unique_id": "test/1.json"},
    "aime25": {"problem": "1+1?", "answer": "2", "id": "0"},
    "aime26": {"problem_idx": 1, "problem": "1+1?", "answer": 2},
    "gsm8k": {"question": "1+1?", "answer": "It is 1+1=<<1+1=2>>2.\n#### 2"},
    "gpqa": GPQA,
    "medqa": MEDQA,
    "mbppplus": MBPP,
    "humaneval": HUMAN,
    "livecodebench": live_row("[]"),
    "bamboogle": {"Question": "Where?", "Answer": "Here"},
    "hotpotqa": {"id": "h1", "question": "Where?", "answer": "Here", "type": "bridge",
                 "level": "hard", "supporting_facts": {}, "context": {"title": ["T"]}},
}
EXPECTED = {       # id, kind, gold, how the question begins
    "math500": ("test/1.json", "math", "2", "1+1?"), "aime25": ("0", "math", "2", "1+1?"),
    "aime26": ("1", "math", "2", "1+1?"), "gsm8k": ("gsm8k-1", "math", "2", "1+1?"),
    "gpqa": ("rec1", "choice", None, "What is left?\nA. "),
    "medqa": ("medqa-1", "choice", "B", "Which?\nA. zinc\nB. iron"),
    "mbppplus": ("2", "code", "tests pass", "Write a function"),
    "humaneval": ("HumanEval/0", "code", "tests pass", "Write all of this function:\n\nfrom"),
    "livecodebench": ("q1", "code", "tests pass", "Add two numbers."),
    "bamboogle": ("bamboogle-1", "search", "Here", "Where?"),
    "hotpotqa": ("h1", "search", "Here", "Where?"),
}
FAMILY = {"math": "maths", "choice": "choice", "code": "coding", "search": "search"}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("name", NAMES)
def test_every_set_loads_from_a_local_file(tmp_path, name, suffix):
    path = write_rows(tmp_path / f"rows{suffix}", [ROWS[name]])
    task = get_task(name, path)
    example, = task.load()
    identity, kind, gold, start = EXPECTED[name]
    assert (task.name, task.kind, example.id, example.kind) == (name, kind, identity, kind)
    assert example.gold == gold or gold is None
    assert example.question.startswith(start)
    assert json.loads(json.dumps(example.row)) == example.row
    assert task.samples == (10 if name.startswith("aime") else 1)
    again, = get_task(FAMILY[kind], path).load()
    assert (again.question, again.gold) == (example.question, example.gold)


def test_all_names_are_known_and_families_need_a_file():
    assert {*NAMES, "tiny"} <= set(task_names())
    with pytest.raises(ValueError, match="'choice' is a kind of task.* gpqa, medqa"):
        get_task("choice")
    with pytest.raises(ValueError, match="unknown data set 'nonsense': choose one of aime25"):
        get_task("nonsense")


def test_limit_reads_no_further(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS["aime26"]) + "\n\n{damaged")
    assert len(get_task("aime26", str(path)).load(limit=1)) == 1
    with pytest.raises(ValueError, match="rows.jsonl row 3 is not JSON"):
        get_task("aime26", str(path)).load()


MATHS = {"problem": "1+1?", "answer": "2"}


@pytest.mark.parametrize("name, content, complaint", [
    ("rows.jsonl", '{"problem": "1"\n', "row 1 is not JSON"),
    ("rows.jsonl", "[1, 2]\n", "row 1 is not an object"),
    ("rows.jsonl", "", "holds no question"),
    ("rows.jsonl", b"\xff\xfe{}", "row 1 is not JSON"),
    ("rows.jsonl", "[" * 100_000, "row 1 is not JSON"),
    ("rows.json", "{}", "must hold a list of rows"),
    ("rows.json", '{"data": 5}', "must hold a list of rows"),
    ("rows.json", "[]", "holds no question"),
    ("rows.json", '["a"]', "row 1 is not an object"),
    ("rows.json", "{", "rows.json is not JSON"),
    ("rows.csv", "a,b", "neither .json nor .jsonl"),
    ("rows.json", json.dumps([MATHS, {"problem": "?"}]), "row 2 has no column 'answer'"),
    ("rows.json", json.dumps([{"text": "?"}]), "row 1 has no column 'problem' or 'question'"),
    ("rows.json", json.dumps([{**MATHS, "id": 7}, MATHS, {**MATHS, "id": "7"}]),
     "row 3 has the id '7' of a row before it"),
])
def test_bad_files_are_one_clear_line(tmp_path, name, content, complaint):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(complaint)) as caught:
        get_task("maths", str(path)).load()
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("name, row, complaint", [
    ("choice", {"question": "?", "answer": "x"}, "needs 'options'"),
    ("choice", {"question": "?", "answer": "x", "options": "A. x"}, "needs 'options'"),
    ("choice", {"question": "?", "answer": "x", "options": ["x"]}, "needs 'options'"),
    ("choice", {"options": ["x", "y"], "answer": "x"}, "no column 'question' or 'query'"),
    ("choice", {"Question": "?", "Correct Answer": "x"}, "no column 'Incorrect Answer 1'"),
    ("coding", {"prompt": "?"}, "no column 'test'"),
    ("coding", {"test": "?"}, "no column 'prompt'"),
    ("coding", live_row("[]", public_test_cases="{"), "row 1 is not JSON"),
    ("coding", {"question_content": "?"}, "no column 'public_test_cases'"),
    ("search", {"question": "?"}, "no column 'Answer' or 'answer'"),
    ("search", {"answer": "?"}, "no column 'Question' or 'question'"),
])
def test_missing_columns_are_named(tmp_path, name, row, complaint):
    path = write_rows(tmp_path / "rows.json", [row])
    with pytest.raises(ValueError, match=f"rows.json row 1 .*{complaint}|.*{complaint}"):
        get_task(name, path).load()


@pytest.mark.parametrize("answer, gold", [
    ("2 + 2 = <<2+2=4>>4\n#### 4", "4"), ("#### 1,234", "1,234"), ("5 #### 6 #### -7 ", "-7"),
    ("18", "18"), ("x = 3", "x = 3"), ("a\n####18", "18")])
def test_gsm8k_golds_stand_behind_the_last_mark(tmp_path, answer, gold):
    """Also with --task maths. A solution without an answer after its mark is left out."""
    rows = [{"question": "?", "answer": answer}, {"question": "!", "answer": "2 #### "}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    for name in ("gsm8k", "maths"):
        example, = get_task(name, path).load()
        assert (example.gold, example.question) == (gold, "?")
        assert maths.score(example, f"2 and 3 are \\boxed{{{gold}}}.").correct


@pytest.mark.parametrize("name, content", [
    ("rows.json", json.dumps([MATHS])), ("rows.json", json.dumps({"data": [MATHS]})),
    ("rows.jsonl", json.dumps(MATHS) + "\n")])
def test_a_byte_order_mark_is_no_content(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8-sig")
    assert [example.gold for example in get_task("maths", str(path)).load()] == ["2"]


def test_rows_stand_where_the_field_says(tmp_path):
    """The rows of a .json stand under `data`, unless another name is given."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"data": [{"a": 1}], "train": [{"b": 2}, {"c": 3}]}))
    assert [row for _, row in read_rows(path)] == [{"a": 1}]
    assert [row for _, row in read_rows(path, field="train")] == [{"b": 2}, {"c": 3}]
    with pytest.raises(ValueError, match="a list under 'test'"):
        list(read_rows(path, field="test"))


def test_a_missing_file_is_named(tmp_path):
    for name in ("nothing.json", "nothing.jsonl"):
        with pytest.raises(FileNotFoundError, match=name):
            get_task("gpqa", str(tmp_path / name)).load()


def test_several_gold_answers(tmp_path, no_judge):
    path = write_rows(tmp_path / "rows.json", [{"question": "?", "answer": ["NYC", "New York"]}])
    example, = get_task("search", path).load()
    assert example.gold == "NYC or New York"
    assert search.score(example, box("new york")).correct


# ---- the hub ------------------------------------------------------------------------------------

@pytest.fixture
def hub(monkeypatch):
    """datasets.load_dataset answers with rows, or raises what it is given."""
    import datasets
    state = types.SimpleNamespace(rows=[], asked=[], problem=None)

    def load_dataset(name, config, split):
        state.asked.append((name, config, split))
        if state.problem:
            raise state.problem
        return datasets.Dataset.from_list(state.rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return state


HUB = {            # the published ids
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "aime25": ("math-ai/aime25", None, "test"),
    "aime26": ("MathArena/aime_2026", None, "train"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "gpqa": ("Idavidrein/gpqa", "gpqa_diamond", "train"),
    "medqa": ("GBaker/MedQA-USMLE-4-options", None, "test"),
    "mbppplus": ("evalplus/mbppplus", None, "test"),
    "humaneval": ("openai/openai_humaneval", None, "test"),
    "bamboogle": ("chiayewken/bamboogle", None, "test"),
    "hotpotqa": ("hotpotqa/hotpot_qa", "distractor", "validation"),
}


@pytest.mark.parametrize("name", HUB)
def test_hub_sets_load(hub, name):
    hub.rows = [ROWS[name]] if name != "hotpotqa" else [{"question": "Where?", "answer": "Here"}]
    assert len(get_task(name).load(limit=3)) == 1
    assert hub.asked == [HUB[name]]


def test_a_gated_set_says_what_to_do(hub):
    from datasets.exceptions import DatasetNotFoundError
    hub.problem = DatasetNotFoundError("Dataset 'Idavidrein/gpqa' is a gated dataset on the Hub.\n"
                                       "You must be authenticated to access it.")
    with pytest.raises(OSError, match="accept its terms .*hf auth login.*local file") as caught:
        get_task("gpqa").load()
    assert "\n" not in str(caught.value)


def test_no_network_says_what_to_do(hub):
    hub.problem = ConnectionError("Couldn't reach 'x' on the Hub")
    with pytest.raises(OSError, match="check the network .*local file") as caught:
        get_task("hotpotqa").load()
    assert "\n" not in str(caught.value)


def test_livecodebench_is_fetched_file_by_file(monkeypatch, tmp_path):
    import huggingface_hub
    fetched = []

    def download(repo, file, repo_type):
        fetched.append((repo, file, repo_type))
        rows = [live_row("[]", question_id=f"{len(fetched)}-{i}") for i in "ab"]
        return write_rows(tmp_path / file, rows)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    first = get_task("livecodebench").load(limit=3)
    assert [example.id for example in first] == ["1-a", "1-b", "2-a"]
    assert fetched == [("livecodebench/code_generation_lite", file, "dataset")
                       for file in ("test.jsonl", "test2.jsonl")]
    fetched.clear()
    assert len(get_task("livecodebench").load()) == 12


def test_livecodebench_offline_says_what_to_do(monkeypatch):
    import huggingface_hub

    def download(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(OSError, match="livecodebench/code_generation_lite could not be read"):
        get_task("livecodebench").load(limit=1)


# ---- the rest -----------------------------------------------------------------------------------

def test_ready_of_maths():
    get_task("aime25").ready(allow_unsafe=True)


def test_importing_tasks_is_light():
    """Nothing heavy is imported before it is needed. The web is not, either."""
    code = "import sys, tasks; tasks.task_names(); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    loaded = set(run.stdout.split())
    assert "tasks.maths" in loaded
    assert not {"torch", "datasets", "sympy", "math_verify", "numpy", "requests",
                "support.web"} & loaded

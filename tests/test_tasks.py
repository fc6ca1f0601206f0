"""tasks/: what is read from rows, what is found in answers, and what counts as right."""
import ast
import base64
import json
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
import types
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import (GPQA, HUMAN, MBPP, MEDQA, PROJECT, ROWS, lines_of, live_row, packed, refuses,
                     stdin_test, write_rows)

import tasks
from scoring.boxes import last_box, without_fonts
from support import files
from tasks import (Example, Score, Source, choice, coding, generated_task, get_task, maths,
                   read_rows, search, task_names)
from tools import web, worker as clock
from tools.web import JudgeSettings, Key

HUGE = "so we go on. " * 15_000                         # 200 kB of talk
# What a careful person reads, by kinds: what the answers mean, and what they do not.
CASES = [json.loads(line) for line in (Path(__file__).parent / "cases.jsonl").open("rb")]
needs_sandbox = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


def table(name):
    """The lines of a file of data/tasks: the cases of a test. Some are for the slow run."""
    return [pytest.param(case, marks=pytest.mark.slow)
            if isinstance(case, dict) and "slow" in case else case
            for case in lines_of(f"tasks/{name}.jsonl")]


def cases(task, label):
    """The CASES of a task, by the name that label(case) gives them."""
    return pytest.mark.parametrize("case", [case for case in CASES if case["task"] == task],
                                   ids=label)


def verdicts(case):
    """[(whether it is right, what is judged)] of a case."""
    return [(right, judged) for right in (True, False)
            for judged in case["right" if right else "wrong"]]


def box(answer):
    return f"So the answer is \\boxed{{{answer}}}."


def example_of(name, row):
    """The Example that a task makes of one row."""
    return get_task(name, "rows.json").make_example(Source("rows.json", 1), row)


def load(name, path, rows):
    """The Examples of a file with these rows."""
    return get_task(name, write_rows(path, rows)).load()


def printed_by(code, *options, **settings):
    """What a program prints, in a Python process of its own."""
    run = subprocess.run([sys.executable, "-c", code, *options], cwd=PROJECT, text=True,
                         capture_output=True, env={**os.environ, **settings})
    return run.stdout


# ---- the documented examples --------------------------------------------------------------------

def documented(module):
    """{label: text} of the indented example at the head of a file."""
    parts = re.findall(r"^    (record|question|gold|answer|score) +(.*(?:\n(?: {15}.*)?$)*)",
                       module.__doc__, re.MULTILINE)
    return {label: text.replace("\n" + " " * 15, "\n").rstrip("\n") for label, text in parts}


@pytest.mark.parametrize("name", ["maths", "choice", "search", pytest.param(
    "coding", marks=needs_sandbox)])
def test_documented_example(name, tmp_path, no_judge):
    shown = documented(sys.modules[f"tasks.{name}"])
    example, = load(name, tmp_path / "rows.jsonl", [json.loads(shown["record"])])
    assert (example.question, example.gold) == (shown["question"], shown["gold"])
    score = get_task(name, "rows.jsonl").score(example, shown["answer"])
    assert ast.unparse(ast.parse(shown["score"])) == repr(score)
    assert score == sys.modules[f"tasks.{name}"].score(example, shown["answer"])


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


# ---- boxes and programs in a text ---------------------------------------------------------------

@pytest.mark.parametrize("case", [case for case in CASES if case["task"] in ("boxes", "coding")],
                         ids=lambda case: case["kind"])
def test_boxes_and_programs_are_found(case):
    find = last_box if case["task"] == "boxes" else coding.program_in
    for text, expected in case["read"]:
        assert find(text) == expected, text


# ---- mathematics --------------------------------------------------------------------------------

def compared(gold, answer):
    """The Score of a boxed answer."""
    return maths.score(Example("1", "", gold, "math"), box(answer))


@pytest.mark.parametrize("text, right, parsed", [
    *table("maths_answers"), (HUGE, False, None), (HUGE + r"\boxed{5}" + HUGE, True, "5"),
    (r"\boxed{" + "5+" * 100_000 + "5}", False, None)])
def test_maths_finds_the_answer(text, right, parsed):
    assert maths.score(Example("1", "", "5", "math"), text) == Score(right, parsed)


@cases("maths", lambda case: case["kind"])
def test_maths_by_kinds(case):
    """Forms that models write, and beside each what looks alike and means something else."""
    for right, (gold, answer) in verdicts(case):
        text = box(answer) if case["boxed"] else answer
        score = maths.score(Example("1", "", gold, "math"), text)
        assert score.correct is right, (gold, answer, score)


def test_maths_part_by_part():
    """Answers that differ from the gold in one part, and right ones in unusual ink."""
    others = [case for case in lines_of("tasks/maths_parts.jsonl")
              if compared(case[0], case[1]).correct is not case[2]]
    assert others == []


# ---- the process that compares ------------------------------------------------------------------

POISON = "9^{9^{9^9}}"                                  # it would take for ever
needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")


def worker():
    """The id of the process that compares, None if none runs."""
    return next((process.pid for process in multiprocessing.active_children()), None)


def new_worker():
    """End the process that compares, and use another one: its id."""
    if worker():
        os.kill(worker(), 9)
    # One verdict may be lost.
    assert any(time.sleep(0.1) or compared("5", "5").correct for _ in range(100))
    return worker()


def in_background(answer):
    """(a thread that has begun to compare an answer with 5, a list that will hold its Score)."""
    scores = []
    thread = threading.Thread(target=lambda: scores.append(compared("5", answer)), daemon=True)
    thread.start()
    while not worker():
        time.sleep(0.01)
    time.sleep(0.3)
    return thread, scores


def test_one_process_compares_many_answers():
    """A new one each time would be 10 times slower. After 100, a new one frees sympy's memory."""
    first, pids = new_worker(), []
    for i in range(120):
        assert compared(str(i), str(i)).correct
        pids.append(worker())
    assert pids[:80] == [first] * 80 and len({*pids} - {None}) == 2


def test_a_hang_costs_one_answer(monkeypatch):
    """Answers of other threads wait for their turn, and their clocks have not begun."""
    monkeypatch.setattr(clock, "SECONDS", 2)
    started = time.perf_counter()
    with ThreadPoolExecutor(24) as pool:
        scores = list(pool.map(compared, ["5"] * 100, [POISON, *["5", "6"] * 49, "5"]))
    assert scores[0] == Score(False, POISON, "no verdict in 2 s")
    assert [score.correct for score in scores[1:]] == [*[True, False] * 49, True]
    assert 2 <= time.perf_counter() - started < 30 and len(multiprocessing.active_children()) == 1


def test_the_clock_stops_with_the_comparison(monkeypatch):
    """A process may wait for longer than a comparison may take."""
    with monkeypatch.context() as patch:
        patch.setattr(clock, "SECONDS", 1)
        pid = new_worker()
        time.sleep(2.5)
        assert worker() == pid and compared("5", "5").correct
    new_worker()


@pytest.mark.parametrize("busy", [True, False])
def test_a_killed_process_costs_one_verdict(busy):
    """The kernel kills processes when memory is short."""
    pid = new_worker()
    if busy:
        thread, scores = in_background(POISON)
        os.kill(pid, 9)
        thread.join()
        assert (scores[0].correct, scores[0].parsed) == (False, None)
        assert compared("5", "5").correct
    assert new_worker() != pid and compared("5", "5").correct


def test_first_asked_from_an_executors_threads():
    """A worker is forked anew after 200 answers. None of them is lost."""
    code = """
from concurrent.futures import ThreadPoolExecutor
from tasks import Example, choice
example = Example("1", "", "C", "choice", {"options": ["1", "2", "3", "4"]})
with ThreadPoolExecutor(4) as threads:
    scores = list(threads.map(choice.score, [example] * 500, [r"\\boxed{C}"] * 500))
print(sum(score.correct for score in scores))"""
    assert printed_by(code) == "500\n"


def divide_by_zero(gold, answer):
    return 1 / 0


def test_an_answer_that_breaks_sympy_is_wrong_and_the_next_is_scored(monkeypatch):
    """No short answer breaks this version of sympy, so the comparison itself is replaced."""
    with monkeypatch.context() as patch:
        patch.setattr(maths, "compare", divide_by_zero)
        assert compared("5", "5") == Score(False, None, "ZeroDivisionError")
    assert compared("5", "5") == Score(True, "5")


def take_memory(gold, answer):
    """Take `answer` MB. (An answer like 2^{2^{40}} takes them too, but slowly.)"""
    return Score(bool(bytearray(int(answer) * 2**20)), answer)


@needs_proc
def test_an_answer_that_takes_all_memory_does_no_harm(monkeypatch):
    """It may take 100 MB here. The process goes on, and its limit stays."""
    with monkeypatch.context() as patch:
        patch.setattr(clock, "MEMORY_MB", 100)
        patch.setattr(maths, "compare", take_memory)
        pid = new_worker()
        for _ in range(3):
            assert compared("5", "300") == Score(False, None, "MemoryError")
            assert compared("5", "60") == Score(True, "60") and worker() == pid
    new_worker()


def alive(pid):
    """Does the process run? (A zombie does not.)"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def compare_and_tell(answer, folder, pipe):
    """In a process of its own, which writes to `folder`: the id of the process that compares."""
    clock.SECONDS = 1
    files.claim(folder)
    in_background(answer)
    pipe.send(worker())
    time.sleep(60)


@needs_proc
@pytest.mark.parametrize("answer", [POISON, "5"])
def test_no_process_outlives_its_parent(answer, tmp_path):
    """It is killed while the process compares for ever, or waits. Its folder is free at once."""
    ours, theirs = multiprocessing.Pipe()
    parent = multiprocessing.get_context("fork").Process(target=compare_and_tell,
                                                         args=(answer, tmp_path, theirs))
    parent.start()
    pid = ours.recv()
    assert alive(pid)
    parent.kill()
    parent.join()
    deadline = time.time() + 20
    try:
        files.claim(tmp_path)
        while alive(pid):
            assert time.time() < deadline
            time.sleep(0.05)
    finally:
        files.release()
        if alive(pid):
            os.kill(pid, 9)


def test_comparing_prints_nothing(capfd):
    """math-verify warns, in each process, that we keep the time ourselves."""
    new_worker()
    assert capfd.readouterr() == ("", "")


def without_math_verify(ready):
    """In a process of its own: the module that is missing."""
    sys.modules["math_verify"] = None           # as if it were not installed
    try:
        get_task("aime25").ready() if ready else compared("5", "5")
    except ImportError as problem:
        return problem.name


@pytest.mark.parametrize("ready", [True, False])
def test_a_missing_math_verify_is_an_error(ready):
    """It is an error already for ready(), and never a wrong answer."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        assert pool.submit(without_math_verify, ready).result() == "math_verify"


def test_ready_says_whether_answers_can_be_compared(monkeypatch):
    get_task("aime25").ready(allow_unsafe=True)
    with monkeypatch.context() as patch:
        patch.setattr(maths, "compare", divide_by_zero)
        with pytest.raises(ValueError, match="math-verify"):
            get_task("aime25").ready()


# ---- multiple choice ----------------------------------------------------------------------------

@pytest.mark.parametrize("case", [
    *(case for case in CASES if case["task"] == "choice"), *table("choice_statements")],
    ids=lambda case: case.get("kind", case["options"][1]))
def test_choice_by_options(case):
    """case["read"]: texts, and the letter that a careful person reads in each (None: no letter)."""
    example = Example("1", "", "C", "choice", {"options": case["options"]})
    for text, letter in case["read"]:
        assert choice.score(example, text) == Score(letter == "C", letter), text


@pytest.mark.parametrize("text, letter", [
    (box("D" * 3000), None), (HUGE, None), (HUGE + "The answer is (D). " + HUGE, "D")])
def test_choice_in_much_talk(text, letter):
    example = Example("1", "", "D", "choice", {"options": ["1", "2", "3", "4"]})
    assert choice.score(example, text) == Score(letter == "D", letter)


def test_gpqa_shuffle_is_by_question(tmp_path):
    rows = [{**GPQA, "Question": f"q{i}", "Record ID": f"r{i}"} for i in range(40)]
    whole = load("gpqa", tmp_path / "a.jsonl", rows)
    assert load("gpqa", tmp_path / "b.jsonl", rows[-1:]) == whole[-1:]
    assert {example.gold for example in whole} == set("ABCD")
    for example in whole:
        assert example.question.split("\n")["ABCD".index(example.gold) + 1][3:] == "port"


def test_gpqa_order_does_not_change_between_processes():
    """Python's own hash() is salted in each process, so a seed made with it would change."""
    code = ("import json, sys\nfrom tasks import get_task\ntask = get_task('gpqa', 'rows.jsonl')\n"
            "print(task.make_example('here', json.loads(sys.argv[1])).question)")
    printed = printed_by(code, json.dumps(GPQA), PYTHONHASHSEED="1")
    assert printed == example_of("gpqa", GPQA).question + "\n"


LOCAL = {"query": "Which?", "answer": "iron",
         "options": ["A. zinc", "B. iron", "C. lead", "D. tin"]}


@pytest.mark.parametrize("case", table("choice_rows"), ids=lambda case: case["why"])
def test_choice_rows_become_questions(case):
    """The question lists the options once. What it lists besides is left as it is."""
    for name in ("medqa", "choice"):
        example = example_of(name, case["row"])
        assert (example.question, example.gold) == (case["question"], case["gold"])


@pytest.mark.parametrize("row", table("choice_faults"))
def test_rows_that_cannot_be_scored_are_left_out_aloud(tmp_path, capsys, row):
    path = write_rows(tmp_path / "rows.jsonl", [LOCAL, row, MEDQA])
    examples = get_task("choice", path).load()
    assert [example.id for example in examples] == ["choice-1", "choice-3"]
    assert "rows.jsonl row 2 " in capsys.readouterr().out
    assert len(get_task("choice", path).load(limit=2)) == 2        # not one of two
    with refuses("bad.json"):
        load("choice", tmp_path / "bad.json", [row])


@pytest.mark.parametrize("latex, words", table("fonts"))
def test_without_fonts(latex, words):
    assert without_fonts(latex) == words


# ---- questions to look up -----------------------------------------------------------------------

def search_score(golds, text):
    return search.score(Example("1", "Where?", golds[0], "search", {"answers": golds}), text)


@pytest.mark.parametrize("case", [
    *(case for case in CASES if case["task"] == "search"), *table("search_numbers")],
    ids=lambda case: case["answers"][0])
def test_exact_match(no_judge, case):
    """Through LaTeX and unicode, too."""
    for right, answer in verdicts(case):
        score = search_score(case["answers"], f"\\boxed{{{answer}}}")
        assert score.correct is right, answer
        assert score.note == ("exact match" if right else "no exact match"), answer


@pytest.mark.parametrize("text", [
    "Paris", "The answer is Paris.", r"\boxed{}", r"\boxed{Paris", "", HUGE, r"\boxed{?!}",
    r"\boxed{?}", r"\boxed{" + HUGE + "}"])
def test_no_box_is_unparsed_and_never_judged(judging, text):
    assert search_score(["Paris"], text) == Score(False, None) and not judging.asked


@pytest.mark.parametrize("verdict, right", [("correct", True), ("incorrect", False),
                                            ("invalid", False)])
def test_the_judge_decides_where_exact_match_fails(judging, verdict, right):
    judging.verdict = verdict
    assert search_score(["Paris"], box("the Paris")) == Score(True, "the Paris", "exact match")
    assert judging.asked == []
    score = search_score(["Paris"], box("Paris, France"))
    assert score == Score(right, "Paris, France", f"judge: {verdict}")
    assert judging.asked == [("Where?", ["Paris"], "Paris, France")]


def test_ready_says_whether_there_is_a_judge(judging, monkeypatch, capsys):
    get_task("bamboogle").ready()
    told = capsys.readouterr().out
    monkeypatch.setattr(web, "judge_settings", lambda: None)
    get_task("bamboogle").ready()
    assert "judge" in told and told != capsys.readouterr().out


@pytest.mark.parametrize("row", table("several_golds"))
def test_several_gold_answers(no_judge, row):
    example = example_of("search", {"question": "?", **row})
    assert example.gold == "NYC or New York"
    assert search.score(example, box("new york")).correct


# ---- programs, and their tests ------------------------------------------------------------------

@needs_sandbox
@pytest.mark.parametrize("usage", [
    "print(f(1))", *(pytest.param(usage, marks=pytest.mark.slow) for usage in (
        "assert f(1) == 1", "x = f(2)\nx", ">>> f(1)"))])
def test_usage_behind_a_function_is_not_the_program(usage):
    """Where a function is asked for. A program that reads its input may need no function."""
    function = "def f(a):\n    return a"
    text = f"```python\n{function}\n```\nFor example:\n```python\n{usage}\n```"
    assert coding.program_in(text, defines=True) == function
    assert coding.program_in(text) == usage
    assert coding.program_in(f"```python\n{usage}\n```", defines=True) == usage
    example = example_of("coding", {"prompt": "p", "test": "assert f(7) == 7"})
    assert coding.score(example, text).correct


@cases("output", lambda case: "")
def test_same_output(case):
    """What a program printed, and what a test expects."""
    for right, (printed, expected) in verdicts(case):
        assert coding.same_output(printed, expected) is right, (printed, expected)
    long = "9" * 5000
    assert coding.same_output(long, long) and not coding.same_output(long, long + "9")


def test_comparing_millions_of_numbers_takes_little_memory():
    """2 MB of them, as a list of numbers, would take 125 MB."""
    code = (PROJECT / "tests/data/tasks/memory.txt").read_text()
    peak, same = printed_by(code).splitlines()
    assert int(peak) < 40 and same == "[False, False, True, False, True]"


@pytest.mark.parametrize("value, expected, same", [
    *table("same_values"), (10**400, 1.0, False), (float("nan"), 1.0, False)])
def test_same_value(value, expected, same):
    assert coding.same_value(value, expected) is same


class Poison:
    """A pickle that writes a file when a plain reader loads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def call_test(given, expected):
    return {"input": given, "output": expected, "testtype": "functional"}


def live_example(row, tmp_path, suffix=".jsonl"):
    """The Example of a LiveCodeBench row. From a .jsonl, its tests are read when it is scored."""
    return load("livecodebench", tmp_path / f"live{suffix}", [row])[0]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("pack", [packed, str])
def test_hidden_tests_packed_and_plain(tmp_path, suffix, pack):
    tests = [stdin_test(f"{i} 1", str(i + 1)) for i in range(5)]
    example = live_example(live_row(pack(json.dumps(tests))), tmp_path, suffix)
    assert coding.all_tests(example) == [stdin_test("1 2", "3"), *tests]


def test_hidden_tests_are_read_from_their_own_row(tmp_path):
    """They are megabytes, and are not kept before."""
    rows = [live_row(packed(json.dumps([stdin_test("ä", str(i))])), question_id=f"q{i}")
            for i in range(4)]
    examples = get_task("coding", write_rows(tmp_path / "rows.jsonl", rows)).load(limit=3)
    assert [coding.all_tests(one)[1]["output"] for one in examples] == ["0", "1", "2"]
    assert all(len(json.dumps(example.row)) < 500 for example in examples)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    poison = packed(Poison(str(tmp_path / "ran")))
    pickle.loads(zlib.decompress(base64.b64decode(poison)))
    assert (tmp_path / "ran").exists()                             # a plain reader does run it
    (tmp_path / "ran").unlink()
    with pytest.raises(ValueError, match="q1.*open"):
        coding.all_tests(live_example(live_row(poison), tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("row", [*[live_row(hidden) for hidden in (
    "rubbish!", "AAAA", packed("no json"), packed(7), packed(["a"]), "[1,", packed(os.system),
    base64.b64encode(zlib.compress(b"\x80\x05X")).decode(), base64.b64encode(b"x").decode(),
    packed(Score))], live_row(packed("[]"), public_test_cases="[]")])
def test_tests_that_cannot_be_read_are_named(tmp_path, row):
    """They decide nothing. Tests that are missing are damaged too."""
    with pytest.raises(ValueError, match="q1"):
        coding.score(live_example(row, tmp_path), "```python\nprint(3)\n```")


@needs_sandbox
@pytest.mark.parametrize("test", table("damaged_tests"))
def test_a_damaged_test_is_named(tmp_path, test):
    """No program is right by it, not even one that passes the tests before it."""
    for good in [], [call_test('"ab"', "null")] * ("second" in test):
        row = live_row(json.dumps([*good, test["damaged"]]), public_test_cases="[]",
                       metadata='{"func_name": "f"}')
        score = coding.score(live_example(row, tmp_path), "```python\ndef f(s):\n    pass\n```")
        assert not score.correct and score.parsed
        assert score.note.startswith(f"test {len(good) + 1} of {len(good) + 1} is damaged: ")


def test_rows_without_tests_are_seen_at_once(tmp_path):
    with pytest.raises(ValueError, match="live.jsonl"):
        live_example(live_row("[]", public_test_cases="[]"), tmp_path)


def test_live_framing():
    asked = example_of("livecodebench", live_row("[]")).question
    assert asked.startswith("Add two numbers.\n\n") and "stdin" in asked
    starter = "class Solution:\n    def add(self, a: int) -> int:\n        "
    row = live_row("[]", starter_code=starter, metadata='{"func_name": "add"}')
    begin, told, end = example_of("livecodebench", row).question.partition(starter.rstrip())
    assert begin.startswith("Add two numbers.\n\n") and told and "define add" in end


def test_a_row_of_humaneval_and_of_mbpp():
    human, mbpp = example_of("humaneval", HUMAN), example_of("mbppplus", MBPP)
    assert human.question.endswith(HUMAN["prompt"].strip()) and "assert" not in human.question
    assert example_of("coding", {**HUMAN, "task_id": 7}).row == human.row       # with --task coding
    assert mbpp.question.count("assert") == 3 and mbpp.gold == "tests pass"
    assert coding.score(mbpp, "I cannot.") == Score(False, None)


# What the programs below were asked for: (data set, row).
ASKED = {
    "humaneval": ("humaneval", HUMAN), "mbppplus": ("mbppplus", MBPP),
    "humanevalplus": ("humanevalplus", ROWS["humanevalplus"]),
    "stdin": ("livecodebench", live_row(packed(json.dumps(
        [stdin_test("4 5\n", "9\n"), stdin_test("-1 1", "0")])))),
    "function": ("livecodebench", live_row(
        json.dumps([call_test("[1, 2]\n3", "[4, 5]")]), metadata='{"func_name": "add"}',
        public_test_cases=json.dumps([call_test("[]\n3", "[]")])))}


@needs_sandbox
@pytest.mark.parametrize("case", table("programs_scored"), ids=lambda case: case["of"])
def test_verdicts_on_programs(case):
    """case["note"] is a pattern. In HumanEval, imports and helpers of the prompt are there, and a
    test that is only defined is called. A test that waits for `__main__` is run."""
    asked = ("coding", case["row"]) if "row" in case else ASKED[case["of"]]
    score = coding.score(example_of(*asked), f"Here:\n```python\n{case['program']}\n```")
    assert (score.correct, score.parsed) == (case["right"], case["program"])
    assert re.fullmatch(case.get("note", ".*"), score.note, re.DOTALL)


@pytest.mark.parametrize("test", table("empty_tests"))
def test_a_test_that_tests_nothing_is_refused(tmp_path, capsys, test):
    rows = [{"prompt": "Add.", "test": test}, {**HUMAN, "test": "def check(candidate):\n    pass"},
            {"prompt": "Add.", "test": "for i in 1, 2:\n    assert add(i, i) == 2 * i"}]
    assert [example.id for example in load("coding", tmp_path / "rows.json", rows)] == ["coding-3"]
    told = capsys.readouterr().out
    assert "rows.json row 1 " in told and "rows.json row 2 " in told
    with refuses("one.json"):
        load("coding", tmp_path / "one.json", rows[:1])


@pytest.mark.parametrize("test", table("real_tests"))
def test_a_test_that_tests_something_is_not_refused(test):
    """A row needs no more than prompt and test."""
    example = example_of("coding", {"prompt": "Add.", "test": test, "test_list": None})
    assert (example.question, example.row) == ("Add.", {"head": "", "test": test})


@pytest.mark.parametrize("metadata", ['{"x": 1, "func_name": "f"}', {"func_name": "f", "x": None}])
def test_metadata_as_a_text_and_as_an_object(metadata):
    example = example_of("livecodebench", live_row("[]", metadata=metadata))
    assert example.row["function"] == "f" and "define f" in example.question


# ---- loading ------------------------------------------------------------------------------------

SETS = lines_of("tasks/sets.jsonl")


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("case", SETS, ids=lambda case: case["name"])
def test_every_set_loads_from_a_local_file(tmp_path, case, suffix):
    """case["file"]: the file of tasks/ that reads it. case["starts"]: how the question begins."""
    path = write_rows(tmp_path / f"rows{suffix}", [ROWS[case["name"]]])
    task = get_task(case["name"], path)
    example, = task.load()
    assert [task.name, task.kind, example.kind, example.id, example.gold] == [
        case[key] for key in ("name", "kind", "kind", "id", "gold")]
    assert example.question.startswith(case["starts"])
    assert json.loads(json.dumps(example.row)) == example.row
    assert task.samples == (10 if case["name"].startswith("aime") else 1)
    again, = get_task(case["file"], path).load()
    assert (again.question, again.gold) == (example.question, example.gold)


def test_a_data_set_is_one_file(tmp_path, monkeypatch):
    """Nothing else needs to hear of it. Whatever it does not say has a default."""
    shutil.copy(PROJECT / "tests/data/tasks/sums.txt", tmp_path / "sums.py")
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    assert {"sums", "long_sums", "longer_sums", "tiny", *ROWS} <= set(task_names())
    task = get_task("long_sums")
    assert [example.gold for example in task.load(2)] == ["999", "1000"]
    assert task.score(task.load()[1], "1000").correct and (task.kind, task.samples) == ("math", 1)
    assert task.ready() is task.check_m(None, 3) is task.ceiling([], 1) is task.brief is None
    assert generated_task("sums").train_rows(2, 0) == [{"question": "1 + 1", "answer": "2"}] * 2
    assert generated_task("math500") is generated_task("nonsense") is None
    with pytest.raises(ValueError, match="sums"):
        get_task("sums", "rows.jsonl")


NEAR = (PROJECT / "tests/data/tasks/near.txt").read_text()


def test_a_task_lies_in_a_file_anywhere(tmp_path):
    """It may import the file beside it, and what it only imports is not its task. A reader that is
    sent to the worker has to be in such a file."""
    path, (first, *_) = tmp_path / "mine.py", get_task("tiny").load(1)
    (tmp_path / "beside_mine.py").write_text(NEAR)
    path.write_text("from beside_mine import Near, right, in_time\nclass Mine(Near):\n"
                    "    names = ('mine',)\n    def score(self, example, text):\n"
                    "        return in_time(right, example, text)\n")
    if clock.POOLS:                        # the process that is forked next knows the new folder
        clock.POOLS[-1].stop()
        clock.POOLS[-1].join()
    mine = get_task(path)
    assert (mine.name, mine.load(2)) == ("mine", get_task("tiny").load(2))
    assert [mine.score(first, text).correct for text in (first.gold, "x")] == [True, False]
    with refuses(path, "train_rows"):
        generated_task(str(path))
    path.write_text(NEAR.replace("return right(", "return in_time(right, "))
    with refuses("right", "worker"):
        get_task(path).score(first, "7")


@pytest.mark.parametrize("old, new, named", table("task_files"))
def test_a_file_without_one_task_is_one_clear_line(tmp_path, old, new, named):
    """No task, a name that tasks/ has, two names, and files that fail."""
    (tmp_path / "near.py").write_text(NEAR.replace(old, new))
    with refuses(tmp_path / "near.py", *named):
        get_task(tmp_path / "near.py")
    with pytest.raises(FileNotFoundError, match="none.py"):
        get_task(tmp_path / "none.py")


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="'choice'.*gpqa, medqa"):           # it needs a file
        get_task("choice")
    with pytest.raises(ValueError, match="'nonsense'.*aime25"):
        get_task("nonsense")


def test_limit_reads_no_further(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS["aime26"]) + "\n\n{damaged")
    assert len(get_task("aime26", str(path)).load(limit=1)) == 1
    with pytest.raises(ValueError, match="rows.jsonl row 3"):
        get_task("aime26", str(path)).load()


MATHS = {"problem": "1+1?", "answer": "2"}


@pytest.mark.parametrize("case", [*table("bad_rows"), {
    "task": "maths", "file": "rows.jsonl", "content": "[" * 100_000, "named": [" row 1 "]}])
def test_bad_files_are_one_clear_line(tmp_path, case):
    """Among them are rows that lack a column. (In Latin-1, so that a file may be no UTF-8.)"""
    path = tmp_path / case["file"]
    path.write_bytes(case["content"].encode("latin-1"))
    with refuses(path, *case["named"]):
        get_task(case["task"], str(path)).load()


@pytest.mark.parametrize("answer, gold", table("gsm8k_golds"))
def test_gsm8k_golds_stand_behind_the_last_mark(tmp_path, answer, gold):
    """Also with --task maths. A solution without an answer after its mark is left out, and one in
    MATH's columns without a box."""
    rows = [{"question": "?", "answer": answer}, {"question": "!", "answer": "2 #### "},
            {"problem": "!", "solution": "So it is 2."}]
    for name in ("gsm8k", "maths"):
        example, = load(name, tmp_path / "rows.jsonl", rows)
        assert (example.gold, example.question) == (gold, "?")
        assert maths.score(example, f"2 and 3 are \\boxed{{{gold}}}.").correct


@pytest.mark.parametrize("name, content", [
    ("rows.json", json.dumps([MATHS])), ("rows.json", json.dumps({"data": [MATHS]})),
    ("rows.jsonl", json.dumps(MATHS) + "\n")])
def test_a_byte_order_mark_is_no_content(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8-sig")
    assert [example.gold for example in get_task("maths", str(path)).load()] == ["2"]


@pytest.mark.parametrize("case", table("filters"), ids=lambda case: " ".join(case["conditions"]))
def test_only_rows_that_meet_the_conditions_are_asked(tmp_path, case, capsys):
    """All conditions must hold. Where a cell is empty, the row is left out aloud."""
    rows = [{"problem": "?", "answer": "1", "id": f"{i}", "level": i, "subject": "ab"[i % 2],
             "contest_date": f"2024-{i:02}-03T00:00:00"} for i in range(1, 13)]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, {**rows[0], "id": "none", "subject": None}])
    for limit in None, 2:
        task = get_task("math500", path, case["conditions"])
        assert [int(one.id) for one in task.load(limit)] == case["asked"][:limit]
    assert ("row 13" in capsys.readouterr().out) is case["told"]


def test_rows_stand_where_the_field_says(tmp_path):
    """The rows of a .json stand under `data`, unless another name is given."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"data": [{"a": 1}], "train": [{"b": 2}, {"c": 3}]}))
    assert [row for _, row in read_rows(path)] == [{"a": 1}]
    assert [row for _, row in read_rows(path, field="train")] == [{"b": 2}, {"c": 3}]
    with pytest.raises(ValueError, match="'test'"):
        list(read_rows(path, field="test"))


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


@pytest.mark.parametrize("case", [case for case in SETS if "hub" in case],
                         ids=lambda case: case["name"])
def test_hub_sets_load(hub, case):
    """case["hub"]: its id, its configuration, its usual split."""
    name, published = case["name"], tuple(case["hub"])
    hub.rows = [ROWS[name]] if name != "hotpotqa" else [{"question": "Where?", "answer": "Here"}]
    assert len(get_task(name).load(limit=3)) == 1 and hub.asked == [published]
    get_task(name).load(split="other")
    assert hub.asked[1] == (*published[:2], "other")


def test_no_access_says_what_to_do(hub, monkeypatch):
    """Of a gated set, and without a network."""
    import huggingface_hub
    from datasets.exceptions import DatasetNotFoundError
    hub.problem = DatasetNotFoundError("Dataset 'Idavidrein/gpqa' is a gated dataset on the Hub.\n"
                                       "You must be authenticated to access it.")
    with refuses("Idavidrein/gpqa", "hf auth login", kind=OSError):
        get_task("gpqa").load()

    def download(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    hub.problem = ConnectionError("Couldn't reach 'x' on the Hub")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for name, there in (("hotpotqa", "hotpotqa/hotpot_qa"),
                        ("livecodebench", "livecodebench/code_generation_lite")):
        with refuses(there, "HF_HUB_OFFLINE", kind=OSError):
            get_task(name).load(limit=1)


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


def test_importing_tasks_is_light():
    """Nothing heavy is imported before it is needed. The web is not, either."""
    code = "import sys, tasks; tasks.task_names(); print(*sys.modules)"
    loaded = set(printed_by(code).split())
    assert "tasks.maths" in loaded
    assert not {"torch", "datasets", "sympy", "math_verify", "numpy", "requests",
                "tools.web"} & loaded

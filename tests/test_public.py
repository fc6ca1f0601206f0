"""Answers that other projects met: their public reports, and how ours scores each (public.jsonl).

A row holds a question with an answer, the verdict that a careful person expects, and the report."""
import random
import re

import pytest
from helpers import lines_of, live_row, write_rows

from tasks import Example, coding, get_task
from tools.web import read_verdict

CASES = lines_of("public.jsonl")


def area_of(case):
    return case["id"].partition("-")[0]


def seen(case, path):
    """What the project says to a case, in the form of its `expected`."""
    given = case["input"]
    if "judge_reply" in given:
        return {"verdict": read_verdict(given["judge_reply"])}
    if "rows" in given:
        return loaded(given, path)
    task = get_task(given["task"], "rows.json")
    if "tests" in given:
        row = {"shown": given["tests"], "hidden": "[]", "function": given["function"]}
    elif "test" in given:
        row = {"head": given.get("head", ""), "test": given["test"]}
    else:
        row = {name: given[name] for name in ("options", "answers") if name in given}
    score = task.score(Example("1", "", given.get("gold", ""), task.kind, row), given["text"])
    return {"correct": score.correct, "parsed": score.parsed}


def loaded(given, path):
    """The questions and golds of a file with these rows, or the error that it raises."""
    task = get_task(given["task"], write_rows(path, given["rows"]))
    try:
        examples = task.load()
    except ValueError:
        return {"raised": "ValueError"}
    return {"golds": [one.gold for one in examples],
            "questions": [one.question for one in examples]}


@pytest.mark.parametrize("area", sorted({area_of(case) for case in CASES}))
def test_public_reports(area, tmp_path, monkeypatch):
    """Each is judged as expected, but for those with a reason in `left`: they may not change
    without a word. seconds: a program gets so many, if not 10."""
    others = []
    for case in CASES:
        if area_of(case) == area:
            monkeypatch.setattr(coding, "SCRIPT_SECONDS", case.get("seconds", 10))
            got = seen(case, tmp_path / "rows.jsonl")
            same = all(got.get(name) == value for name, value in case["expected"].items())
            if same == ("left" in case):
                others.append(f"{case['id']} ({case['class']}): {got}")
    if others:
        pytest.fail(f"{len(others)} are judged otherwise:\n" + "\n".join(others), pytrace=False)


# ---- golds of real data sets --------------------------------------------------------------------

def other_ink(gold):
    """The same answer, written otherwise."""
    yield gold
    yield gold.replace(r"\frac", r"\dfrac").replace(r"\left", "").replace(r"\right", "") + "."
    yield re.sub(r"(?<=[\d})])([+=<>])(?=[\d\\({])", r" \1 ", gold)
    yield re.sub(r"\^\{(\d)\}", r"^\1", gold)


def changed(gold):
    """Wrong answers: another number, sign, letter or bracket, or a part less."""
    for number in re.finditer(r"\d+", gold):
        yield f"{gold[:number.start()]}{int(number[0]) + 2}{gold[number.end():]}"
    yield re.sub(r"(?<![\\A-Za-z])[a-z](?![A-Za-z])", "v", gold, count=1)
    yield gold.replace("cos", "sin") if "cos" in gold else gold.replace("sin", "tan")
    yield gold.replace("+", "-", 1) if "+" in gold else gold.replace("<", ">", 1)
    yield re.sub(r"^\[(.*,.*)\]$", r"(\1)", gold)
    if gold.startswith("-"):
        yield gold[1:]
    if re.search(r",(?!\d{3})(?![^([{]*[])}])", gold):
        yield gold.rpartition(",")[0]


# Changed golds that are right all the same: (-1)^{k-3} is (-1)^{k-1}, and the last sides of the
# other equations are true.
HARMLESS = {(case["gold"], answer) for case in lines_of("tasks/harmless.jsonl")
            for answer in case["answers"]}


@pytest.mark.parametrize("part", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_golds_are_right_in_other_ink_and_wrong_once_changed(part):
    golds = [row["gold"] for row in lines_of("golds.jsonl")]
    random.Random(7).shuffle(golds)
    others = []
    for gold in golds[:40] if part == 0 else golds[40:160]:
        for right, answers in ((True, {*other_ink(gold)}), (False, {*changed(gold)} - {gold})):
            others += [(gold, answer) for answer in answers if (gold, answer) not in HARMLESS
                       and score(gold, answer) is not right]
    assert others == []


def score(gold, answer):
    return get_task("maths", "rows.json").score(
        Example("1", "", gold, "math"), rf"\boxed{{{answer}}}").correct

"""The lesson runs from top to bottom, and says what it claims. Its own asserts are the oracle."""
import runpy
import sys

import pytest
import torch
from helpers import PROJECT

sys.path.insert(0, str(PROJECT / "docs"))
import solutions  # noqa: E402


def test_the_lesson_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(PROJECT / "lesson.py"))
    printed = capsys.readouterr().out
    for cell in range(1, 9):
        assert f"\n{cell}. " in f"\n{printed}"
    assert (tmp_path / "out/lesson/lesson.png").stat().st_size > 10_000


SLOW = (6, 8, 9, 10)         # exercises that train


@pytest.mark.parametrize("number", [
    pytest.param(number, marks=[pytest.mark.slow] if number in SLOW else [])
    for number in range(1, len(solutions.SOLUTIONS) + 1)])
def test_the_solutions_find_what_the_exercises_expect(number, shipped, monkeypatch):
    """With fewer problems and kinds. Each solution says whether it found what is expected."""
    monkeypatch.setattr(solutions, "EXAMPLES", solutions.EXAMPLES[:30])
    monkeypatch.setattr(solutions, "KINDS", ("1layer", "2layer_ln_res"))
    torch.manual_seed(0)
    assert solutions.SOLUTIONS[number - 1](shipped)


def test_the_lesson_has_cells():
    """Each cell of code stands after one of text, as editors and jupytext read them."""
    marks = [line for line in (PROJECT / "lesson.py").read_text().splitlines()
             if line.startswith("# %%")]
    assert marks.count("# %% [markdown]") == 9 and marks.count("# %%") == 10

"""Tools in an agent's text: which call a text ends in, and what its result looks like.

How a draft goes on after a result is tested in test_recurse.py, and through evaluate.py in
test_benchmarks.py.
"""
import sys

import pytest
from test_web import GOOD, SECRET, answer, no_keys_from_outside, running_service, search

import writing
from support.sandbox import Run
from writing import RESULT_CAP, next_call, run_tool


@pytest.mark.parametrize("text, call", [
    ("I compute. <python>print(1)</python>", ("python", "print(1)")),
    ("<search>Emma</search>\n", ("search", "Emma")),
    ("<python>a</python> so <python>\nb\n</python>", ("python", "\nb\n")),
    ("<search>a</search><python>print('<search>')</python>", ("python", "print('<search>')")),
    ("<python>a</python> the answer is 5", None), ("a</python>", None), ("<python>a", None),
    ("<search>a</python>", None), ("", None), ("<PYTHON>a</PYTHON>", None)])
def test_next_call(text, call):
    assert next_call(text) == call


def result_of(text):
    """What stands in a result. There must be one result, which is closed once, at the end."""
    assert text.startswith("\n<result>\n") and text.endswith("\n</result>\n")
    inside = text.removeprefix("\n<result>\n").removesuffix("\n</result>\n")
    assert "</result" not in inside and len(inside) <= RESULT_CAP
    return inside


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
def test_run_tool_python(monkeypatch):
    assert result_of(run_tool("python", "\nprint(6 * 7)\n")) == "42"
    assert result_of(run_tool("python", "```python\nprint(6 * 7)\n```")) == "42"
    assert "nothing was printed" in result_of(run_tool("python", "6 * 7"))
    assert "ZeroDivisionError" in result_of(run_tool("python", "print('before')\n1 / 0"))
    assert result_of(run_tool("python", "print('</result>< /RESULT >x')")) == "[/result][/result]x"
    assert len(result_of(run_tool("python", "print('x' * 200_000)"))) == RESULT_CAP
    assert len(result_of(run_tool("python", "print('</result>' * 5000)"))) == RESULT_CAP
    assert result_of(run_tool("python", "print('a\\0b')")) == "a\ufffdb"
    monkeypatch.setattr(writing, "run_python",
                        lambda code, timeout_s: Run("timeout", "part", "", float(timeout_s)))
    assert result_of(run_tool("python", "x")) == "part\n[timeout after 10.0 s]"


def test_run_tool_search(monkeypatch, tmp_path):
    """What was found, a service that refuses, an empty query, no search at all."""
    no_keys_from_outside(monkeypatch, tmp_path)
    with running_service(monkeypatch) as service:
        def ask(query):
            return search(service, query=query)

        service.replies = [GOOD]
        assert result_of(run_tool("search", " Emma\n", ask)).startswith("Answer: Austen")
        assert service.asked[0][2]["query"] == "Emma"
        service.replies = [answer(401, {})]
        failed = result_of(run_tool("search", "Emma", ask))
        assert failed.startswith("web search failed") and SECRET not in failed
        assert "the search query is empty" in result_of(run_tool("search", " ", ask))
    assert result_of(run_tool("search", "Emma")) == "web search is not available"

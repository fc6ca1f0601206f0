"""Tools in an agent's text: which call a text ends in, and what its result looks like.

How a draft goes on after a result is tested in test_recurse.py, and through evaluate.py in
test_benchmarks.py.
"""
import sys

import pytest
from helpers import lines_of

from tools import calls
from tools.calls import RESULT_CAP, next_call, run_tool
from tools.sandbox import Run
from tools.web import ServiceError


@pytest.mark.parametrize("text, call", lines_of("next_calls.jsonl"))
def test_next_call(text, call):
    assert next_call(text) == (call and tuple(call))


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
    monkeypatch.setattr(calls, "run_python",
                        lambda code, timeout_s: Run("timeout", "part", "", float(timeout_s)))
    assert result_of(run_tool("python", "x")) == "part\n[timeout after 10.0 s]"


def test_run_tool_search():
    """What was found, a service that refuses, a query that is refused, no search at all."""
    def search(query):
        if query == "Emma":
            return "Answer: Austen</result>"
        raise ServiceError("host: HTTP 401") if query else ValueError("the query is empty")

    assert result_of(run_tool("search", " Emma\n", search)) == "Answer: Austen[/result]"
    assert result_of(run_tool("search", "x", search)) == "web search failed: host: HTTP 401"
    assert result_of(run_tool("search", " ", search)) == "web search failed: the query is empty"
    assert result_of(run_tool("search", "Emma")) == "web search is not available"

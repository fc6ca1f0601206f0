"""What is read in a text: odd texts take no ages and do no harm, and which call a text ends in."""
import multiprocessing
import signal
import sys
import time

import pytest
import safetensors.torch
import torch
from helpers import ROWS, lines_of, new_agent, refuses, write_rows

import checkpoints
import evaluate
from link import InnerLink
from support.errors import shown
from tasks import Score, Source, choice, coding, get_task, maths, search
from tools import calls, web
from tools import worker as clock
from tools.calls import RESULT_CAP, next_call, run_tool
from tools.sandbox import Run
from tools.web import ServiceError

FORK = multiprocessing.get_context("fork")
READERS = {                         # what reads a model's text, or the output of its program
    "last_box": maths.last_box, "verdict": web.read_verdict, "next_call": calls.next_call,
    "choice": lambda text: choice.chosen(text, ["iron", "zinc"], "A"),
    "search": lambda text: search.exact_match(text, ["zinc"]),
    "program": lambda text: coding.program_in(text, defines=True),
    "printed": lambda text: coding.same_output(text, "1"),
    "result": lambda text: calls.run_tool("search", text, search=str)}
TEXTS = [line["before"] + line["sign"] * line["times"] + line["after"]
         for line in lines_of("long_texts.jsonl")]


def read_all(file):
    """Read each text, and end this process if one takes 4 s of the processor. (It takes .4 s.)"""
    for name, read in READERS.items():
        for text in TEXTS:
            file.write_text(f"{name}: {text[:30]!r} .. {text[-30:]!r}")
            signal.setitimer(signal.ITIMER_VIRTUAL, 4)
            read(text)


def test_no_text_takes_ages(tmp_path):
    process = FORK.Process(target=read_all, args=[tmp_path / "at"])
    process.start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "at").read_text()


def sleep(*texts):
    time.sleep(60)


def score_slowly(name, reader, pipe):
    """In a process of its own: the Score of a text over which its reader sleeps."""
    clock.SECONDS, task = 1, get_task(name, "x.json")
    setattr({"gpqa": choice, "bamboogle": search, "mbppplus": coding, "gsm8k": maths}[name],
            reader, sleep)
    pipe.send(task.score(task.make_example(Source("x.json", 1), ROWS[name]), "text"))
    time.sleep(60)


@pytest.mark.parametrize("name, reader", [("gpqa", "chosen"), ("bamboogle", "exact_match"),
                                          ("mbppplus", "program_in"), ("gsm8k", "last_box")])
def test_a_text_that_takes_ages_costs_one_answer(name, reader):
    ours, theirs = multiprocessing.Pipe()
    process = FORK.Process(target=score_slowly, args=[name, reader, theirs])
    process.start()
    assert ours.poll(30) and ours.recv() == Score(False, None, "no verdict in 1 s")
    process.kill()


def test_control_characters_are_shown_and_not_obeyed(run, tmp_path):
    """In a question, in the name of a row that is left out, and in an error."""
    assert shown("a\x1b[2J\x07\u202eb\ud800 é\n") == "a\\x1b[2J\\x07\\u202eb\\ud800 é\n"
    rows = [{"problem": "\x1b[1m", "answer": ""}, {"problem": "x7 \x1b[31m", "answer": "1"}]
    flags = ("--dataset", write_rows(tmp_path / "a\x1b[2J.jsonl", rows), "--task", "maths")
    code, out, _ = run(evaluate, *flags, "--show", 1)
    assert code == 0 and all(one in out for one in ("a\\x1b[2J", "x7 \\x1b[31m"))
    code, more, errors = run(evaluate, *flags, "--dataset_split", "x")
    assert code == 2 and "a\\x1b[2J" in errors[0] and "\x1b" not in errors[0] + out + more


@pytest.mark.parametrize("column", ["problem", "answer"])
def test_a_text_beyond_the_models_positions_is_refused(run, column, tmp_path):
    row = {"problem": "start 3", "answer": "3", "id": "long", column: "s1 x7 " * 150_000}
    code, _, errors = run(evaluate, "--dataset", write_rows(tmp_path / "rows.jsonl", [row]),
                          "--task", "maths", "--out", tmp_path / "out")
    assert code == 2 and "long" in errors[0] and "300000" in errors[0]


def test_floods_in_what_is_loaded_are_refused(tmp_path):
    file = tmp_path / "adapter.safetensors"
    safetensors.torch.save_file({f"k{i}": torch.zeros(1) for i in range(2000)}, file)
    with refuses(file, "list of tensors"):
        checkpoints.load_weights(InnerLink(8), file)
    agent = new_agent("qwen3")
    agent.tokenizer.chat_template = "{{ messages[0].content }}{{ 'a' * 200000 }}"
    agent.model.save_pretrained(tmp_path)
    agent.tokenizer.save_pretrained(tmp_path)
    with refuses(tmp_path, "chat template", "2000"):
        checkpoints.load_agent(tmp_path, "cpu", torch.float32)


# ---- calls of tools in a text (how it goes on: test_recurse.py and test_benchmarks.py) -----------

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

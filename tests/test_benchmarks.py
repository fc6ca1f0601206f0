"""evaluate.py on all eleven data sets, from small local files in the published columns.

Samples, second tries, failures, resuming, the judge and the search tool are tested end to end, on
small systems.
"""
import functools
import io
import json
import random
import sys
import weakref
from pathlib import Path

import pytest
import torch
from conftest import embed_words, plain_write
from test_evaluate import run_evaluate, untimed
from test_recurse import SIX_TIMES_SEVEN, scripted_system
from test_tasks import MBPP, ROWS, live_row, packed, stdin_test, write_rows
from test_web import SECRET, answer, no_keys_from_outside, refuse, running_service, said

import evaluate
import recurse
from recurse import MAS
from support import flags as support_flags
from support import report, web
from tasks import get_task, pass_at_k

QUICK = ["--num_recursive_rounds", 2, "--max_new_tokens", 4, "--latent_length", 2]
TALK = "Say which of the two is larger, and why it must be so."


def rows_of(name, count=5):
    """Small rows in the published columns, each question different."""
    def row(i):
        change = {
            "math500": {"problem": f"{TALK} {i}+{i}?", "answer": str(2 * i), "unique_id": f"t/{i}"},
            "aime25": {"problem": f"{TALK} {i}?", "answer": str(i), "id": str(i)},
            "aime26": {"problem": f"{TALK} {i}?", "answer": i, "problem_idx": i},
            "gsm8k": {"question": f"{TALK} {i}?", "answer": f"It is {i}.\n#### {i}"},
            "gpqa": {"Question": f"{TALK} {i}?", "Record ID": f"rec{i}"},
            "medqa": {"question": f"{TALK} {i}?"},
            "mbppplus": {"prompt": f"{TALK} {i}", "task_id": i},
            "humaneval": {"prompt": f"# {TALK} {i}\n" + ROWS["humaneval"]["prompt"],
                          "task_id": i},
            "livecodebench": {"question_content": f"{TALK} {i}", "question_id": f"q{i}"},
            "bamboogle": {"Question": f"{TALK} {i}?", "Answer": f"Oslo {i}"},
            "hotpotqa": {"question": f"{TALK} {i}?", "id": f"h{i}", "answer": f"Oslo {i}"}}[name]
        return {**ROWS[name], **change}
    return [row(i) for i in range(count)]


def summary_of(folder):
    return json.loads((Path(folder) / "summary.json").read_text())


@pytest.fixture
def no_keys(monkeypatch, tmp_path):
    """No key from outside, and a folder of its own, where the judge's replies are kept too."""
    no_keys_from_outside(monkeypatch, tmp_path)


# ---- eleven data sets ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny_keys(tmp_path_factory):
    """(keys of a result line, {method: keys of its summary row}) of a run on the tiny task."""
    out = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        run_evaluate(patch, "--num_samples", 4, "--method", "latent", "text", "single", *QUICK,
                     "--out", out)
    return set(untimed(out / "results.jsonl")[0]), {
        row["method"]: set(row) for row in summary_of(out)["rows"]}


@pytest.mark.parametrize("name", ROWS)
def test_every_set_is_evaluated_from_a_local_file(name, tiny_keys, no_keys, tmp_path, monkeypatch,
                                                  capsys):
    """The files are those of a run on the tiny task. The AIME draws ten samples, and also reports
    pass@10."""
    path = write_rows(tmp_path / "rows.jsonl", rows_of(name))
    monkeypatch.setattr(sys, "argv", list(map(str, [
        "evaluate.py", "--style", "tiny", "--dataset", path, "--task", name, "--num_samples", 4,
        "--method", "latent", "text", "single", *QUICK, "--out", tmp_path / "out"])))
    support_flags.run(evaluate.main)                                  # returns: exit code 0
    assert capsys.readouterr().err.count("Traceback") == 0
    lines, summary = untimed(tmp_path / "out/results.jsonl"), summary_of(tmp_path / "out")
    line_keys, row_keys = tiny_keys
    examples = get_task(name, path).load(4)
    samples = 10 if name.startswith("aime") else 1
    assert len(lines) == 12 and [line["method"] for line in lines[::4]] == [
        "latent", "text", "single"]
    for line in lines:
        example = next(one for one in examples if one.id == line["id"])
        assert set(line) == line_keys and line["dataset"] == name
        assert (line["question"], line["gold"]) == (example.question, example.gold)
        for key in ("outputs", "parsed", "correct", "notes"):
            assert len(line[key]) == samples
        assert line["parsed"] == [None] * samples and line["retried"] == samples
        # One role writes, and in words three roles in two rounds. The second try adds 16 or 256.
        more = 256 if name in ("mbppplus", "humaneval", "livecodebench") else 16
        assert line["decoded_tokens"] <= samples * ((24 if line["method"] == "text" else 4) + more)
        assert line["latent_steps"] == (10 if line["method"] == "latent" else 0)
    for row in summary["rows"]:
        extra = {"samples", "pass_at_k", "pass_at_k_ci95"} if samples > 1 else set()
        assert set(row) == row_keys[row["method"]] | extra
        assert (row["n"], row["accuracy"], row["unparsed"], row["retried"], row["errors"]) == (
            4, 0, 1, 1, 0)
    assert summary["settings"]["num_rollouts"] == samples


def make_hub(folder, monkeypatch, tmp_path):
    """A data set in `folder`: the rows of two splits as parquet."""
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Path(folder).mkdir(parents=True)
    for split, rows in (("test", rows_of("math500", 9)), ("train", rows_of("math500", 12)[9:])):
        datasets.Dataset.from_list(rows).to_parquet(f"{folder}/{split}-00000-of-00001.parquet")


def test_a_set_by_its_hub_id_its_split_and_drawn_questions(no_keys, tmp_path, monkeypatch):
    """Oracles: the file's own rows, and random.Random(seed).sample of the examples."""
    make_hub("HuggingFaceH4/MATH-500", monkeypatch, tmp_path)
    flags = ["--dataset", "math500", "--method", "single", "--answer_retry", 0, *QUICK]

    def ids(*more):
        run_evaluate(monkeypatch, *flags, *more, "--out", tmp_path / "out")
        return [line["id"] for line in untimed(tmp_path / "out/results.jsonl")]

    every = [f"t/{i}" for i in range(9)]
    assert sorted(ids("--num_samples", 4)) == every[:4]
    assert sorted(ids("--dataset_split", "train")) == ["t/10", "t/11", "t/9"]
    drawn = sorted(ids("--sample_seed", 7, "--num_samples", 4))
    assert drawn == sorted(random.Random(7).sample(every, 4)) != every[:4]
    assert sorted(ids("--sample_seed", 8, "--num_samples", 4)) != drawn
    assert sorted(ids("--sample_seed", 7, "--num_samples", 40)) == every
    for flag, value, complaint in (("--dataset_split", "nope", "nope"),
                                   ("--dataset_split", "../../x", "MATH-500")):
        assert complaint in refused(monkeypatch, *flags, flag, value)


def refused(monkeypatch, *argv):
    """The one line with which evaluate.py refuses a call, with exit code 2."""
    errors = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "stderr", errors)
        support_flags.run(evaluate.main)
    last = [line for line in errors.getvalue().split("\n") if line][-1]
    assert stopped.value.code == 2 and last.startswith("error: ")
    return last


@pytest.mark.parametrize("flags, complaint", [
    (["--dataset", "ROWS.jsonl"], "--task says what a .json"),
    (["--dataset", "ROWS.jsonl", "--task", "nope"], "unknown data set 'nope'"),
    (["--dataset", "ROWS.jsonl", "--task", "tiny"], "leave the path out"),
    (["--dataset", "ROWS.jsonl", "--task", "medqa"], "has no column 'question' or 'query'"),
    (["--dataset", "ROWS.jsonl", "--task", "coding"], "has no column 'prompt'"),
    (["--dataset", "ROWS.jsonl", "--task", "math500", "--dataset_split", "test"], "has no split"),
    (["--dataset", "none.jsonl", "--task", "math500"], "No such file or directory: 'none.jsonl'"),
    (["--dataset", "math500", "--task", "math500"], "--task says what a .json"),
    (["--task", "math500"], "--task says what a .json"),
    (["--dataset", "maths"], "is a kind of task"),
    (["--dataset", "ROWS.csv"], "unknown data set"),
    (["--dataset_split", "train"], "no split 'train'"),
    (["--dataset", "ROWS.jsonl", "--task", "math500", "--method", "text_brief"], "no brief"),
    (["--dataset", "ROWS.jsonl", "--task", "math500", "--num_rollouts", "0"], "at least 1"),
    (["--dataset", "ROWS.jsonl", "--task", "math500", "--tavily_keys_file", "x", "--top_p", "2"],
     "at most 1.0"),
    (["--dataset", "math500"], "could not be read from the hub")])
def test_wrong_calls_are_one_line(flags, complaint, no_keys, tmp_path, monkeypatch):
    write_rows(tmp_path / "ROWS.jsonl", rows_of("math500"))
    assert complaint in refused(monkeypatch, *flags, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_of_a_hub_set_is_one_line(no_keys, tmp_path, monkeypatch):
    make_hub("HuggingFaceH4/MATH-500", monkeypatch, tmp_path)
    for file in Path("HuggingFaceH4/MATH-500").iterdir():
        whole = file.read_bytes()
        file.write_bytes(whole[:4] + bytes(400) + whole[404:])        # its footer can be read
    assert "MATH-500" in refused(monkeypatch, "--dataset", "math500", "--out", tmp_path / "out")


# ---- a scripted system, through evaluate.main ---------------------------------------------------

@pytest.fixture
def scripted(monkeypatch, no_keys):
    """evaluate.py asks a system whose last agent writes what scripted.script says (None: its own
    words). The first entry is for the untimed call before all others."""
    mas = scripted_system("qwen3", monkeypatch)
    mas.script = [[]]
    monkeypatch.setattr(evaluate, "get_style", lambda _: mas.style)
    monkeypatch.setattr(evaluate, "load_mas_system", lambda *_, **__: mas)
    return mas


def ask_scripted(monkeypatch, rows, name, *more, method="latent"):
    """(result lines, summary row) of the questions `rows`, in a batch in order of length."""
    path = write_rows(Path("rows.jsonl"), rows)
    run_evaluate(monkeypatch, "--dataset", path, "--task", name, "--method", method,
                 "--num_recursive_rounds", 1, "--latent_length", 2, "--temperature", 0, "--out",
                 "out", *more)
    return untimed(Path("out/results.jsonl")), summary_of("out")["rows"][0]


MATHS = [{"problem": "1" * i + "?", "answer": "4", "unique_id": str(i)} for i in (1, 2, 3)]


def test_an_unread_answer_is_asked_for_once_more(scripted, monkeypatch):
    """Row 1 stays as it is. Rows 2 and 3 get the beginning of an answer in place of their end."""
    scripted.script += [["\\boxed{4}", "so it is", "\\boxed{4"], ["4} and 7", "x" * 50]]
    lines, row = ask_scripted(monkeypatch, MATHS, "math500", "--max_new_tokens", 20)
    assert [line["outputs"][0] for line in lines] == [
        "\\boxed{4}", "so it is\nFinal Answer: \\boxed{4} and 7",
        "\\boxed{4\nFinal Answer: \\boxed{" + "x" * 16]
    assert [line["correct"][0] for line in lines] == [True, True, False]
    assert [line["parsed"][0] for line in lines] == ["4", "4", None]
    assert [line["retried"] for line in lines] == [0, 1, 1]
    assert [line["decoded_tokens"] for line in lines] == [10, 9 + 9, 9 + 16]
    assert (row["retried"], row["unparsed"], row["accuracy"]) == (2 / 3, 1 / 3, 2 / 3)
    assert row["decoded_tokens"] == (10 + 18 + 25) / 3


def test_no_retry_where_it_is_switched_off(scripted, monkeypatch):
    scripted.script += [["\\boxed{4}", "so it is", "\\boxed{4"]]
    lines, row = ask_scripted(monkeypatch, MATHS, "math500", "--answer_retry", 0)
    assert [line["outputs"][0] for line in lines] == ["\\boxed{4}", "so it is", "\\boxed{4"]
    assert row["retried"] == 0 and row["unparsed"] == 2 / 3
    assert [line["decoded_tokens"] for line in lines] == [10, 9, 9]


@pytest.mark.parametrize("name, rows, beginning, words", [
    ("math500", MATHS[:1], "\nFinal Answer: \\boxed{", 16),
    ("mbppplus", [{**MBPP, "prompt": "add"}], "\nFinal Answer:\n```python\n", 256)])
def test_the_retry_goes_on_by_plain_decoding(name, rows, beginning, words, scripted, monkeypatch):
    """Oracle: question, latents, first words and the beginning are read again for each word."""
    scripted.script += [["I think"], [None]]
    lines, _ = ask_scripted(monkeypatch, rows, name)
    caller = scripted.agents["caller"]
    spell = caller.tokenizer("I think" + beginning)["input_ids"]
    question = get_task(name, "rows.jsonl").load()[0].question
    with torch.no_grad():
        sent = recurse.recurse(scripted, [question], 1, 2, trace=True).sent[1, "hc"]

    def embed(text):
        return embed_words(caller, caller.tokenizer(text)["input_ids"])
    embeds = torch.cat([embed(f"{question}\n["), sent, embed("] so>"),
                        embed_words(caller, spell)], 1)
    wanted = plain_write(caller, embeds, words)
    assert lines[0]["decoded_tokens"] == len("I think") + 1 + len(wanted)
    assert lines[0]["outputs"] == [caller.tokenizer.decode(spell + wanted,
                                                           skip_special_tokens=True).strip()]


@pytest.mark.parametrize("language", ["cpp", "text"])
def test_a_program_asked_for_within_an_open_block(language, scripted, monkeypatch):
    """An answer is cut off in a block of another language. Then the right program is written."""
    scripted.script += [[f"```{language}\nint x;"], ["def add(a, b):\n    return a + b\n```"]]
    lines, _ = ask_scripted(monkeypatch, [{**MBPP, "prompt": "add"}], "mbppplus",
                            "--max_new_tokens", 40)
    assert lines[0]["retried"] == 1 and lines[0]["correct"] == [True]


def test_only_unread_samples_are_retried(scripted, monkeypatch):
    """There are two questions with three samples each. Each retried sample has its own place."""
    scripted.script += [["\\boxed{4}", "a", "\\boxed{5}", "b", "c", "\\boxed{4}"],
                        ["4}", "5}", "4}"]]
    lines, row = ask_scripted(monkeypatch, MATHS[:2], "math500", "--num_rollouts", 3)
    assert [line["parsed"] for line in lines] == [["4", "4", "5"], ["5", "4", "4"]]
    assert [line["correct"] for line in lines] == [[1, 1, 0], [0, 1, 1]]
    assert [line["retried"] for line in lines] == [1, 2]
    assert [line["decoded_tokens"] for line in lines] == [10 + 2 + 10 + 3, 2 + 2 + 10 + 6]
    assert row["retried"] == 0.5 and row["accuracy"] == pytest.approx(4 / 6)
    assert row["pass_at_k"] == 1 and row["samples"] == 3


# ---- samples and their intervals ----------------------------------------------------------------

def test_pass_at_k_and_intervals_in_the_summary(no_keys, tmp_path, monkeypatch):
    """Answers to the tiny task are sampled. Oracle: results.jsonl, counted by hand."""
    flags = ["--num_samples", 20, "--num_rollouts", 3, "--temperature", 4, "--top_p", 1,
             "--method", "latent", "single", "--num_recursive_rounds", 1, "--max_new_tokens", 12]
    run_evaluate(monkeypatch, *flags, "--out", "a")
    run_evaluate(monkeypatch, *flags, "--out", "b", "--batch_size", 7)
    lines, rows = untimed(Path("a/results.jsonl")), summary_of("a")["rows"]
    again = {(line["method"], line["id"]): line for line in untimed(Path("b/results.jsonl"))}
    assert all(again[line["method"], line["id"]] == line for line in lines)
    for row, other in zip(rows, summary_of("b")["rows"]):
        mine = [line["correct"] for line in lines if line["method"] == row["method"]]
        assert any(0 < sum(correct) < 3 for correct in mine)
        assert row["accuracy"] == pytest.approx(sum(map(sum, mine)) / 60)
        assert row["pass_at_k"] == pytest.approx(sum(map(any, mine)) / 20) == pytest.approx(
            sum(pass_at_k(3, sum(correct), 3) for correct in mine) / 20)
        for value, interval in (("accuracy", "ci95"), ("pass_at_k", "pass_at_k_ci95")):
            low, high = row[interval]
            assert 0 <= low <= row[value] <= high <= 1 and low < high
        assert (row["samples"], row["n"]) == (3, 20)
        assert {key: row[key] for key in row if key not in ("seconds", "peak_memory_mb", "ci95",
                                                            "pass_at_k_ci95")} == {
            key: other[key] for key in other if key not in ("seconds", "peak_memory_mb", "ci95",
                                                            "pass_at_k_ci95")}


def test_bootstrap_is_deterministic_and_about_right():
    """Oracle: the normal interval of a mean. Values that are all the same have no width."""
    assert report.bootstrap([0.3] * 7) == pytest.approx([0.3, 0.3])
    rng = random.Random(3)
    values = [rng.random() for _ in range(400)]
    mean = sum(values) / 400
    half = 1.96 * (sum((value - mean) ** 2 for value in values) / 400) ** 0.5 / 20
    low, high = report.bootstrap(values)
    assert [low, high] == report.bootstrap(values)
    assert low == pytest.approx(mean - half, abs=0.005)
    assert high == pytest.approx(mean + half, abs=0.005)


# ---- questions that fail ------------------------------------------------------------------------

def breaking(monkeypatch, breaks, message="CUDA out of memory. Tried\nto allocate\n",
             error=torch.OutOfMemoryError):
    """MAS.respond raises an error where breaks(questions) holds. Returns the list of what is asked,
    which begins with the untimed call before all others."""
    asked, respond = [], MAS.respond

    def respond_or_break(mas, questions, *arguments, **options):
        asked.append(list(questions))
        if breaks(questions):
            raise error(message)
        return respond(mas, questions, *arguments, **options)

    monkeypatch.setattr(MAS, "respond", respond_or_break)
    return asked


TINY_RUN = ["--num_samples", 6, "--batch_size", 3, "--num_recursive_rounds", 1,
            "--num_rollouts", 2, "--temperature", 0.8, "--max_new_tokens", 10]


@pytest.mark.parametrize("fits, sizes", [(1, [3, 1, 2, 1, 1]), (2, [3, 1, 2])])
def test_a_batch_that_is_too_large_is_halved(fits, sizes, no_keys, monkeypatch):
    """Oracle: the same answers as where nothing breaks."""
    flags = [*TINY_RUN, "--method", "latent", "text"]
    run_evaluate(monkeypatch, *flags, "--out", "whole")
    asked = breaking(monkeypatch, lambda questions: len(set(questions)) > fits)
    run_evaluate(monkeypatch, *flags, "--out", "broken")
    assert [len(questions) for questions in asked[1:]] == sizes * 4
    assert untimed(Path("broken/results.jsonl")) == untimed(Path("whole/results.jsonl"))


def test_a_question_that_fails_is_recorded_and_the_run_goes_on(no_keys, monkeypatch, capsys):
    """Oracle for the others: the run in which nothing fails."""
    flags = [*TINY_RUN, "--method", "latent", "text", "shuffle"]
    run_evaluate(monkeypatch, *flags, "--out", "whole")
    whole = untimed(Path("whole/results.jsonl"))
    bad = whole[4]["question"]
    breaking(monkeypatch, lambda questions: bad in questions)
    run_evaluate(monkeypatch, *flags, "--out", "broken")
    for line, wanted in zip(untimed(Path("broken/results.jsonl")), whole, strict=True):
        with_it = line["method"] == "shuffle" and wanted in whole[6:9]
        if line["question"] == bad or with_it:
            assert line["error"] == "OutOfMemoryError: CUDA out of memory. Tried"
            assert line["outputs"] == line["parsed"] == line["correct"] == line["notes"] == []
            assert (line["id"], line["gold"]) == (wanted["id"], wanted["gold"])
        else:
            assert line == wanted
    rows = {row["method"]: row for row in summary_of("broken")["rows"]}
    assert [rows[name]["errors"] for name in ("latent", "text", "shuffle")] == [1, 1, 3]
    assert all(row["n"] == 6 for row in rows.values())
    assert "1 failed" in capsys.readouterr().out


def test_where_all_fail_the_run_still_ends(no_keys, monkeypatch):
    breaking(monkeypatch, lambda questions: True)
    with pytest.raises(ValueError, match="every question failed: OutOfMemoryError"):
        run_evaluate(monkeypatch, *TINY_RUN, "--method", "latent", "text", "--out", "out")
    for row in summary_of("out")["rows"]:
        assert (row["errors"], row["accuracy"], row["unparsed"]) == (6, 0, 1)


def test_an_error_without_a_message_is_recorded(no_keys, monkeypatch):
    breaking(monkeypatch, lambda questions: True, message="")
    with pytest.raises(ValueError, match="every question failed: OutOfMemoryError"):
        run_evaluate(monkeypatch, *TINY_RUN, "--method", "latent", "--out", "out")
    assert summary_of("out")["rows"][0]["errors"] == 6


def test_a_failed_batchs_memory_is_free_before_its_halves_are_asked(no_keys, monkeypatch):
    """Otherwise the halves run out of memory too. Oracle: weak references to what a batch held."""
    held, alive, respond = [], [], MAS.respond

    def respond_or_break(mas, questions, *arguments, **options):
        alive.append(sum(cache() is not None for cache in held))
        if len(questions) > 1:
            cache = torch.zeros(9)
            held.append(weakref.ref(cache))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return respond(mas, questions, *arguments, **options)

    monkeypatch.setattr(MAS, "respond", respond_or_break)
    run_evaluate(monkeypatch, *TINY_RUN, "--method", "latent", "--out", "out")
    assert alive == [0] * (1 + 5 * 2)


def test_the_first_question_may_be_the_one_that_fails(no_keys, monkeypatch):
    """It is also asked in the untimed call before all others."""
    first = min(get_task("tiny").load(6), key=lambda example: len(example.question)).question
    asked = breaking(monkeypatch, lambda questions: first in questions, "index out of range",
                     RuntimeError)
    run_evaluate(monkeypatch, *TINY_RUN, "--method", "latent", "--out", "out")
    assert summary_of("out")["rows"][0]["errors"] == 1 and first in asked[0]


def test_a_card_that_has_failed_ends_the_run(no_keys, monkeypatch):
    """Every later question would fail on it too. What was answered before is kept."""
    asked = breaking(monkeypatch, lambda questions: len(asked) == 3, "CUDA error: unspecified",
                     torch.AcceleratorError)
    with pytest.raises(torch.AcceleratorError):
        run_evaluate(monkeypatch, *TINY_RUN, "--method", "latent", "--out", "out")
    assert len(asked) == 3 and len(list(Path("out/parts").iterdir())) == 1


def test_a_failed_line_has_the_keys_of_the_others(no_keys, monkeypatch):
    examples = get_task("tiny").load(6)
    breaking(monkeypatch, lambda questions: examples[0].question in questions)
    run_evaluate(monkeypatch, *TINY_RUN, "--method", "latent", "--out", "out")
    lines = untimed(Path("out/results.jsonl"))
    assert {frozenset(line) - {"error"} for line in lines} == {frozenset(lines[-1]) - {"error"}}
    for line in lines:
        answers = 0 if "error" in line else 2
        assert [len(line[name]) for name in ("outputs", "parsed", "correct", "notes")] == (
            [answers] * 4)


def test_a_row_that_is_no_proper_text_does_not_end_the_run(no_keys, monkeypatch, tmp_path):
    rows = rows_of("math500", 2)
    path = write_rows(tmp_path / "rows.jsonl", [{**rows[0], "problem": "half \ud83d?"}, rows[1]])
    run_evaluate(monkeypatch, "--dataset", path, "--task", "math500", "--method", "single", *QUICK,
                 "--out", "out")
    assert {line["id"] for line in untimed(Path("out/results.jsonl"))} >= {"t/1"}


DAMAGED = [live_row("!!"), live_row(packed("[{}]")), live_row("[]", public_test_cases="[{}]"),
           live_row(json.dumps([{"input": "not json", "output": "3", "testtype": "functional"}]),
                    public_test_cases="[]", metadata='{"func_name": "add"}')]


@pytest.mark.parametrize("row", DAMAGED, ids=["base64", "no columns", "shown", "no json"])
def test_a_question_whose_tests_are_damaged_does_not_end_the_run(row, scripted, monkeypatch):
    good = live_row(json.dumps([stdin_test("1 2", "3")]), question_id="a", question_content="Q")
    program = "```python\nprint(sum(map(int, input().split())))\n```"
    scripted.script += [[program, program], [program], [program]]
    lines, summary = ask_scripted(monkeypatch, [good, {**row, "question_id": "b"}],
                                  "livecodebench", "--max_new_tokens", 200)
    assert [line["id"] for line in lines] == ["a", "b"]
    assert lines[0]["correct"] == [True] and lines[1]["correct"] == [False]
    assert "error" in lines[1] and summary["errors"] == 1


# ---- resuming -----------------------------------------------------------------------------------

def crash_after(count):
    """In place of the progress bar: stop the run when `count` batches are done (None: never)."""
    def progress(items, name):
        yield from items[:count]
        if count is not None:
            raise KeyboardInterrupt
    return progress


def test_a_crash_in_the_middle_is_resumed(no_keys, monkeypatch, tmp_path):
    """There are samples, second tries and a question that fails. Oracle: the unbroken run."""
    path = write_rows(tmp_path / "rows.jsonl", rows_of("math500", 4))
    flags = ["--dataset", path, "--task", "math500", "--num_rollouts", 2, "--temperature", 0.8,
             "--batch_size", 2, "--method", "latent", "text", *QUICK]
    bad = get_task("math500", path).load()[1].question
    breaking(monkeypatch, lambda questions: bad in questions)
    run_evaluate(monkeypatch, *flags, "--out", "whole")
    whole = untimed(Path("whole/results.jsonl"))
    assert any(line["retried"] for line in whole) and any("error" in line for line in whole)
    for stop in (1, 2):
        monkeypatch.setattr(evaluate.flags, "progress", crash_after(stop))
        with pytest.raises(KeyboardInterrupt):
            run_evaluate(monkeypatch, *flags, "--out", "cut")
        assert len(list(Path("cut/parts").glob("*.json"))) == stop
        assert summary_of("cut")["rows"] == []
        Path("cut/parts/latent_2_00001.json.part").write_text('{"lines": [{"id": "half a li')
        monkeypatch.setattr(evaluate.flags, "progress", crash_after(None))
        run_evaluate(monkeypatch, *flags, "--out", "cut", "--resume")
        assert untimed(Path("cut/results.jsonl")) == whole
    for flag, value in (("--num_rollouts", 3), ("--answer_retry", 0), ("--top_k", 3)):
        assert f"{flag[2:]} differ" in refused(monkeypatch, *flags, flag, value, "--out", "cut",
                                               "--resume")
    assert untimed(Path("cut/results.jsonl")) == whole


def test_resuming_with_other_questions_is_refused(no_keys, monkeypatch, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", rows_of("math500", 4))
    flags = ["--dataset", path, "--task", "math500", "--batch_size", 2, "--method", "single",
             *QUICK, "--out", "out"]
    run_evaluate(monkeypatch, *flags)
    lines = untimed(Path("out/results.jsonl"))
    Path("out/parts/single_1_00001.json").unlink()
    write_rows(tmp_path / "rows.jsonl", rows_of("math500", 9)[5:])
    assert "links_prompts_data differ" in refused(monkeypatch, *flags, "--resume")
    assert untimed(Path("out/results.jsonl")) == lines


def test_resuming_answers_only_what_is_missing(no_keys, monkeypatch):
    """A part that is missing and one that holds an error are answered again. Oracle: all others are
    not even asked."""
    flags = ["--num_samples", 6, "--batch_size", 2, "--method", "single", "latent", *QUICK, "--out",
             "out"]
    run_evaluate(monkeypatch, *flags)
    whole, parts = untimed(Path("out/results.jsonl")), Path("out/parts")
    (parts / "latent_2_00001.json").unlink()
    lines = json.loads((parts / "single_1_00002.json").read_text())
    lines["lines"][1]["error"] = "not scored: the judge was away"
    (parts / "single_1_00002.json").write_text(json.dumps(lines))
    asked = breaking(monkeypatch, lambda questions: False)
    run_evaluate(monkeypatch, *flags, "--resume")
    assert untimed(Path("out/results.jsonl")) == whole
    batches = [[line["question"] for line in whole[place:place + 2]] for place in (0, 4, 8)]
    assert sorted(asked[1:]) == sorted(batches[1:])


# ---- the judge and the search tool --------------------------------------------------------------

@pytest.fixture
def service(no_keys, monkeypatch):
    """A server on this machine in place of judge and search. Nobody waits between tries."""
    with running_service(monkeypatch) as there:
        yield there


def use_judge(service, monkeypatch):
    for name, value in (("API_KEY", SECRET), ("API_BASE_URL", service.url + "/v1"),
                        ("API_MODEL", "m")):
        monkeypatch.setenv(name, value)


def say(monkeypatch, answers):
    """The solver's texts are replaced by the answers, question by question."""
    respond = MAS.respond

    def respond_and_say(mas, questions, *arguments, **options):
        _, run = respond(mas, questions, *arguments, **options)
        return [answers.get(question, "nothing") for question in questions], run

    monkeypatch.setattr(MAS, "respond", respond_and_say)


def written_below(folder):
    return b"".join(path.read_bytes() for path in Path(folder).rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["bamboogle", "hotpotqa"])
def test_the_judge_end_to_end(name, service, monkeypatch, capfd, tmp_path):
    """The judge is called where exact match fails, once for each answer. What he says is noted and
    kept."""
    rows = rows_of(name, 5)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    questions = [example.question for example in get_task(name, path).load()]
    boxes = ["\\boxed{The Oslo 0.}", "\\boxed{Kristiania}", "\\boxed{Rome}", "no box",
             "\\boxed{unclear}"]
    say(monkeypatch, dict(zip(questions, boxes)))
    use_judge(service, monkeypatch)

    def judged(handler):
        text = service.asked[-1][2]["messages"][-1]["content"]
        said("correct" if "Kristiania" in text else "incorrect" if "Rome" in text
             else "well" + handler.headers["Authorization"])(handler)

    service.replies = [judged]
    flags = ["--dataset", path, "--task", name, "--batch_size", 1, "--method", "latent", "single",
             *QUICK]
    run_evaluate(monkeypatch, *flags, "--out", "out")
    for line in untimed(Path("out/results.jsonl")):
        place = questions.index(line["question"])
        assert line["notes"] == [["exact match"], ["judge: correct"], ["judge: incorrect"], [""],
                                 ["judge: invalid"]][place]
        assert line["correct"] == [place < 2] and (line["parsed"] == [None]) == (place == 3)
        assert line["retried"] == (place == 3)
    # Kristiania and Rome are kept from the first method. What was invalid is asked anew.
    assert len(service.asked) == 4 and set(service.keys()) == {SECRET}
    run_evaluate(monkeypatch, *flags, "--out", "out")
    assert len(service.asked) == 6
    captured = capfd.readouterr()
    assert "sent to the configured judge" in captured.out
    assert SECRET not in captured.out + captured.err
    assert SECRET.encode() not in written_below("out") and "Kristiania" not in service.keys()


def test_without_a_judge_it_is_said(service, monkeypatch, capsys, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", rows_of("bamboogle", 2))
    say(monkeypatch, {f"{TALK} 0?": "\\boxed{oslo 0}", f"{TALK} 1?": "\\boxed{Oslo}"})
    flags = ["--dataset", path, "--task", "bamboogle", "--method", "single", *QUICK]
    run_evaluate(monkeypatch, *flags, "--out", "out")
    assert [line["notes"] for line in untimed(Path("out/results.jsonl"))] == [
        ["exact match"], ["no exact match"]]
    assert "no judge is configured" in capsys.readouterr().out and not service.asked
    monkeypatch.setenv("API_KEY", SECRET)
    line = refused(monkeypatch, *flags, "--out", "other")
    assert "only partly set up" in line and SECRET not in line and not Path("other").exists()


@pytest.mark.parametrize("bad", [refuse(401), refuse(400), answer(200, {"choices": []})])
def test_a_judge_that_refuses_does_not_end_the_run(bad, service, monkeypatch, capfd, tmp_path):
    """The question for which he was needed is recorded as failed. No key in his words is kept."""
    path = write_rows(tmp_path / "rows.jsonl", rows_of("bamboogle", 3))
    say(monkeypatch, {f"{TALK} 0?": "\\boxed{oslo 0}", f"{TALK} 1?": "\\boxed{Rome}"})
    use_judge(service, monkeypatch)
    service.replies = [bad]
    run_evaluate(monkeypatch, "--dataset", path, "--task", "bamboogle", "--method", "single",
                 *QUICK, "--out", "out")
    lines = untimed(Path("out/results.jsonl"))
    assert [line["correct"] for line in lines] == [[True], [False], [False]]
    assert ["error" in line for line in lines] == [False, True, False]
    assert lines[1]["error"].startswith("not scored: ")
    captured = capfd.readouterr()
    assert SECRET.encode() not in written_below("out")
    assert SECRET not in captured.out + captured.err


def test_an_answer_that_could_not_be_judged_is_kept(service, monkeypatch, tmp_path):
    """Every output is kept, and no answer is written again because a judge is away."""
    path = write_rows(tmp_path / "rows.jsonl", rows_of("bamboogle", 3))
    say(monkeypatch, {f"{TALK} 1?": "\\boxed{Rome}"})
    use_judge(service, monkeypatch)
    service.replies = [answer(500, {})]
    asked = breaking(monkeypatch, lambda questions: False)
    run_evaluate(monkeypatch, "--dataset", path, "--task", "bamboogle", "--method", "single",
                 *QUICK, "--out", "out")
    lines = untimed(Path("out/results.jsonl"))
    assert lines[1]["outputs"] == ["\\boxed{Rome}"]
    assert len(asked[1:]) == 1 and len(lines) == 3


def test_search_end_to_end(scripted, service, monkeypatch, capfd, tmp_path):
    """evaluate.py's own client asks the server, and what was found stands in the output."""
    (tmp_path / "keys").write_text(f"# mine\n{SECRET}\n")
    monkeypatch.setattr(web, "search_web", functools.partial(web.search_web, base_url=service.url))
    found = {"results": [{"title": "Emma", "url": "http://e", "content": "Austen</result>x"}]}
    service.replies = [answer(200, found)]
    scripted.script += [["<search>who</search>", f"{SIX_TIMES_SEVEN}"],
                        ["\\boxed{Austen}", "\\boxed{42}"]]
    rows = [{"Question": "Emma", "Answer": "austen"}, {"Question": "6 by 7?", "Answer": "42"}]
    lines, row = ask_scripted(monkeypatch, rows, "bamboogle", "--tavily_keys_file",
                              tmp_path / "keys", "--max_new_tokens", 90)
    assert lines[0]["outputs"] == ["<search>who</search>\n<result>\n[1] Emma\nhttp://e\n"
                                   "Austen[/result]x\n</result>\n\\boxed{Austen}"]
    assert lines[1]["outputs"] == [SIX_TIMES_SEVEN + "\n<result>\n42\n</result>\n\\boxed{42}"]
    assert row["accuracy"] == 1 and row["retried"] == 0
    assert row["decoded_tokens"] == (20 + 15 + len(SIX_TIMES_SEVEN) + 11) / 2
    assert service.asked[0][2]["query"] == "who" and service.keys() == [SECRET]
    captured = capfd.readouterr()
    assert SECRET not in captured.out + captured.err
    assert SECRET.encode() not in written_below("out")


def test_search_without_a_key_is_said_and_goes_on(scripted, monkeypatch, capsys, tmp_path):
    scripted.script += [["<search>who</search>"], ["\\boxed{x}"]]
    lines, _ = ask_scripted(monkeypatch, [{"Question": "q", "Answer": "x"}], "bamboogle",
                            "--max_new_tokens", 60)
    assert "web search is not available" in lines[0]["outputs"][0]
    assert lines[0]["correct"] == [True]
    assert "note: the search tool will say that it is not available" in capsys.readouterr().out
    assert "No such file" in refused(monkeypatch, "--dataset", "rows.jsonl", "--task", "bamboogle",
                                     "--method", "latent", "--tavily_keys_file", tmp_path / "none")


# ---- flags --------------------------------------------------------------------------------------

def test_where_the_agents_are_changes_nothing(no_keys, monkeypatch, tmp_path):
    """The ways are --offload, two devices, a revision of what is local, and none of these. Second
    tries are included."""
    path, lines = write_rows(tmp_path / "rows.jsonl", rows_of("math500", 3)), []
    ways = [[], ["--offload"], ["--device", "cpu,cpu"], ["--revision", "v1"],
            ["--offload", "--device", "cpu,cpu"]]
    for way in ways:
        run_evaluate(monkeypatch, "--dataset", path, "--task", "math500", "--num_rollouts", 2,
                     "--method", "latent", "text", "zero", *QUICK, *way, "--out", "out")
        lines.append(untimed(Path("out/results.jsonl")))
    assert all(other == lines[0] for other in lines) and len(lines[0]) == 9


STYLE = '''import dataclasses
from styles import get_style
mine = dataclasses.replace(get_style("tiny"), name="mine", settings={
    "evaluate": {"batch_size": 3, "latent_length": 5},
    "math500": {"latent_length": 3, "max_new_tokens": 7, "temperature": 0.25}})
'''


def test_a_styles_settings_for_a_data_set(no_keys, monkeypatch, capsys, tmp_path):
    """They are used with --task as with --dataset, only where no flag was given, and printed."""
    Path("mine.py").write_text(STYLE)
    make_hub("HuggingFaceH4/MATH-500", monkeypatch, tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", rows_of("math500", 2))
    flags = ["--style", "mine.py", "--method", "single", "--num_samples", 1, "--out", "out"]
    of_set = dict(batch_size=3, latent_length=3, max_new_tokens=7, temperature=0.25)
    for more, wanted in ((["--dataset", rows, "--task", "math500"], of_set),
                         (["--dataset", "math500"], of_set),
                         ([f"--dataset={rows}", "--task=math500", "--latent_length=2",
                           "--temperature", 0], {**of_set, "latent_length": 2, "temperature": 0}),
                         (["--dataset", rows, "--task", "maths", "--max_new_tokens", 4],
                          dict(batch_size=3, latent_length=5, temperature=0.6))):
        run_evaluate(monkeypatch, *flags, *more)
        settings, out = summary_of("out")["settings"], capsys.readouterr().out
        assert {key: settings[key] for key in wanted} == wanted
        printed = out.split("the style sets ")[1].split("\n")[0].split()
        given = {flag.split("=")[0].removeprefix("--") for flag in map(str, more)}
        assert set(printed) == {f"{key}={value}" for key, value in wanted.items()
                                if key not in given and (key, value) != ("temperature", 0.6)}


def test_default_methods_leave_out_what_the_task_lacks(no_keys, monkeypatch, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", rows_of("medqa", 2))
    run_evaluate(monkeypatch, "--dataset", path, "--task", "medqa", *QUICK, "--out", "out")
    assert [row["method"] for row in summary_of("out")["rows"]] == [
        method for method in report.METHODS if method != "text_brief"]


@pytest.mark.parametrize("name", ["gpqa", "livecodebench", "hotpotqa"])
def test_show_with_a_benchmark(name, no_keys, monkeypatch, capsys, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", rows_of(name, 2))
    run_evaluate(monkeypatch, "--dataset", path, "--task", name, "--show", 1, *QUICK, "--out",
                 "out")
    out = capsys.readouterr().out
    example = min(get_task(name, path).load(), key=lambda one: len(one.question))
    assert out.count("thinks") == 5 and out.count("writes") == 1
    assert f"{example.question}    (gold: {example.gold})" in out and not Path("out").exists()


def test_default_methods_serve_a_single_question(no_keys, monkeypatch):
    run_evaluate(monkeypatch, "--num_samples", 1, *QUICK, "--out", "out")
    assert "latent" in [row["method"] for row in summary_of("out")["rows"]]


@pytest.mark.parametrize("foreign", ['{"lines": [{"question": "?"}]}', '{"lines": [{"id": ', "[]"])
def test_resuming_with_foreign_lines(foreign, no_keys, monkeypatch):
    """A torn part, and answers to something else, are answered anew."""
    flags = ["--num_samples", 2, "--method", "single", *QUICK, "--out", "out"]
    run_evaluate(monkeypatch, *flags)
    lines = untimed(Path("out/results.jsonl"))
    Path("out/parts/single_1_00000.json").write_text(foreign)
    run_evaluate(monkeypatch, *flags, "--resume")
    assert untimed(Path("out/results.jsonl")) == lines


@pytest.mark.parametrize("more", [["--offload"], ["--device", "cpu,cpu"]])
def test_a_run_goes_on_elsewhere(more, no_keys, monkeypatch):
    """Where a run goes on changes no result (see above)."""
    flags = ["--num_samples", 2, "--method", "single", *QUICK, "--out", "out"]
    run_evaluate(monkeypatch, *flags)
    lines = untimed(Path("out/results.jsonl"))
    run_evaluate(monkeypatch, *flags, *more, "--resume")
    assert untimed(Path("out/results.jsonl")) == lines

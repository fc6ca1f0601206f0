"""evaluate.py on all data sets: samples, second tries, failures, judge and search tool."""
import json
import random
import shutil
import sys
import types
import weakref
from pathlib import Path
from unittest.mock import Mock

import pytest
import requests
import torch
from helpers import (HELPED, MBPP, MEDQA, PROJECT, ROWS, lines_of, live_row, scripted_mas, untimed,
                     write_rows)

import evaluate
from evaluation import report
from evaluation.answers import METHODS
from evaluation.statistics import bootstrap
from recurse import MAS
from tasks import get_task

LINE = {*"style dataset method rounds id question gold outputs parsed correct notes retried "
        "decoded_tokens latent_steps".split()}
ENTRY = {*"style dataset method rounds n errors accuracy ci95 unparsed retried judge_invalid "
         "decoded_tokens latent_steps seconds peak_memory_mb".split()}
QUICK = ["--num_recursive_rounds", 2, "--max_new_tokens", 4, "--latent_length", 2, "--out", "out"]
TINY_RUN = ["--num_samples", 6, "--batch_size", 3, "--num_recursive_rounds", 1,
            "--num_rollouts", 2, "--temperature", 0.8, "--max_new_tokens", 10, "--out", "out"]


def file_of(name, rows):
    """Flags that ask these rows, from a local file."""
    return ["--dataset", write_rows(Path("rows.jsonl"), rows), "--task", name]


def results():
    """(result lines without what differs from run to run, summary) of the last run."""
    return untimed(Path("out/results.jsonl")), json.loads(Path("out/summary.json").read_text())


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch, tmp_path):
    """Work in an empty folder, without the keys of this machine, and draw nothing."""
    monkeypatch.setattr(report, "plot", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    for name in ("TAVILY_API_KEY", "API_KEY", "API_BASE_URL", "API_MODEL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def ask(run):
    """ask(*flags): evaluate.py to its end -> (result lines, entries of the table)."""
    def ask_evaluate(*flags):
        assert run(evaluate, *flags)[::2] == (0, [])
        lines, summary = results()
        return lines, summary["rows"]
    return ask_evaluate


@pytest.fixture
def refused(run):
    """refused(*flags): the one line with which evaluate.py refuses a call."""
    def ask_in_vain(*flags):
        code, _, [error] = run(evaluate, *flags)
        assert code == 2 and error.startswith("error: ")
        return error
    return ask_in_vain


def parsed(monkeypatch, *flags):
    """The flags of evaluate.py, with the defaults of style and data set."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    return evaluate.parse()[0]


# ---- all data sets -------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ROWS)
def test_every_set_is_shown_and_evaluated_from_a_local_file(name, ask, run):
    """No set has keys of its own. The AIME draws ten samples, and also reports pass@10."""
    data = file_of(name, [ROWS[name]])
    [example], samples = get_task(name, "rows.jsonl").load(), 10 if "aime" in name else 1
    _, said, _ = run(evaluate, *data, "--show", 1, *QUICK)
    assert said.count("thinks") == 5 and said.count("writes") == 1 and not Path("out").exists()
    assert f"{example.question}    (gold: {example.gold})" in said
    lines, entries = ask(*data, *QUICK, "--method", "latent", "text")
    for line, entry, words, steps in zip(lines, entries[::-1], (4, 24), (10, 0), strict=True):
        assert set(line) == LINE and line["dataset"] == name
        assert [line[key] for key in ("id", "question", "gold")] == [
            example.id, example.question, example.gold]
        assert {len(line[key]) for key in ("outputs", "correct", "notes")} == {samples}
        assert line["parsed"] == [None] * samples and line["retried"] == samples
        # One role writes, and in words three roles in two rounds. The second try adds 16 or 256.
        more = 256 if example.kind == "code" else 16
        assert line["decoded_tokens"] <= samples * (words + more) and line["latent_steps"] == steps
        extra = {"samples", "pass_at_k", "pass_at_k_ci95"} if samples > 1 else set()
        assert set(entry) - {"latent_minus_this"} == ENTRY | extra
        assert ("latent_minus_this" in entry) == (entry["method"] == "text")
        assert [entry[key] for key in ("n", "accuracy", "unparsed", "retried", "errors")] == [
            1, 0, 1, 1, 0]
    assert results()[1]["settings"]["num_rollouts"] == samples


def test_a_set_by_its_hub_id_its_split_and_drawn_questions(monkeypatch, refused):
    """Oracles: the file's own rows, and random.Random(seed).sample of them."""
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("cache").absolute())
    folder = Path("HuggingFaceH4/MATH-500")
    folder.mkdir(parents=True)
    for split, numbers in (("test", range(9)), ("train", range(9, 12))):
        rows = [{"problem": f"{i}?", "answer": "1", "unique_id": f"t/{i}"} for i in numbers]
        datasets.Dataset.from_list(rows).to_parquet(f"{folder}/{split}-00000-of-00001.parquet")

    def chosen(*flags):
        args = parsed(monkeypatch, "--dataset", "math500", *flags)
        return [example.id for example in evaluate.chosen_questions(args)[1]]

    every = [f"t/{i}" for i in range(9)]
    assert chosen("--num_samples", 4) == every[:4]
    assert chosen("--dataset_split", "train") == ["t/9", "t/10", "t/11"]
    assert chosen("--dataset_filter", "problem>2?", "problem!=5?", "--num_samples", 3) == [
        "t/3", "t/4", "t/6"]
    drawn = chosen("--sample_seed", 7, "--num_samples", 4)
    assert drawn == random.Random(7).sample(every, 4) != every[:4]
    assert chosen("--sample_seed", 8, "--num_samples", 4) != drawn
    assert sorted(chosen("--sample_seed", 7, "--num_samples", 40)) == every
    for split, named in (("nope", "nope"), ("../../x", "MATH-500")):
        assert named in refused("--dataset", "math500", "--dataset_split", split)
    for file in folder.iterdir():
        whole = file.read_bytes()
        file.write_bytes(whole[:4] + bytes(400) + whole[404:])        # its footer can be read
    assert "MATH-500" in refused("--dataset", "math500")


@pytest.mark.parametrize("flags, named", lines_of("wrong_datasets.jsonl"))
def test_a_wrong_call_is_one_line(flags, named, refused):
    file_of("math500", [ROWS["math500"]])
    assert named in refused(*flags.split(), "--out", "out")
    assert not Path("out").exists()


@pytest.mark.parametrize("flags, missing", [([], "text_brief"), (["--num_samples", 1], "shuffle")])
def test_the_default_methods_are_those_that_are_possible(flags, missing, ask):
    """MedQA has no length for a brief message. A single question has no other beside it."""
    data = [] if flags else file_of("medqa", [MEDQA, {**MEDQA, "question": "Another one?"}])
    _, entries = ask(*data, *flags, *QUICK)
    assert [entry["method"] for entry in entries] == [
        method for method in METHODS if method != missing]


# ---- a scripted system, through evaluate.main ---------------------------------------------------

@pytest.fixture
def ask_team(ask, monkeypatch):
    """ask_team(name, rows, script): (result lines, entry) of answers by the script."""
    mas = scripted_mas()
    monkeypatch.setattr(evaluate, "get_style", lambda _: HELPED)
    monkeypatch.setattr(evaluate, "load_mas_system", lambda *_, **__: mas)

    def ask_caller(name, rows, script, *flags):
        mas.script, mas.calls[:] = [["", ""], *script], []      # first comes an untimed call
        lines, [entry] = ask(*file_of(name, rows), "--method", "latent", "--num_recursive_rounds",
                             1, "--latent_length", 2, "--temperature", 0, "--out", "out", *flags)
        assert len(mas.calls) == 1 + len(script)
        return lines, entry
    return ask_caller


@pytest.mark.parametrize("case", lines_of("second_tries.jsonl"), ids=lambda case: case["why"])
def test_unread_answers_and_samples_are_asked_for_once_more(case, ask_team):
    """script: what is written at first, and then after the beginning of an answer."""
    rows = [{"problem": "1" * i + "?", "answer": gold, "unique_id": str(i)}
            for i, gold in enumerate(case["golds"], 1)] or [MBPP]
    lines, entry = ask_team(case["set"], rows, case["script"], *case["flags"].split())
    for line, wanted in zip(lines, case["lines"], strict=True):
        assert {name: line[name] for name in wanted} == wanted
    assert {name: entry[name] for name in case["entry"]} == pytest.approx(case["entry"])


def test_questions_whose_tests_are_damaged_do_not_end_the_run(ask_team):
    """Tests that cannot be read decide nothing. No program passes a single damaged test."""
    rows = [live_row("[]", question_id="good"), live_row("!!", question_id="no base64"),
            live_row("[{}]", question_id="no columns"),
            live_row("[]", question_id="shown", public_test_cases="[{}]")]
    program = "```python\nprint(sum(map(int, input().split())))\n```"
    lines, entry = ask_team("livecodebench", rows, [[program] * 4])
    assert [(line["correct"], "error" in line, line["notes"][0][:11]) for line in lines] == [
        ([True], False, ""), ([False], True, "not scored:"), ([False], False, "test 2 of 2"),
        ([False], False, "test 1 of 1")]
    assert entry["errors"] == 1 and all(line["outputs"] == [program] for line in lines)


# ---- questions that fail ------------------------------------------------------------------------

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate\n")


@pytest.fixture
def failing(monkeypatch):
    """failing(problem_of): MAS.respond raises problem_of(questions), if there is one. Returns a
    list of all questions asked. A failed call must give its memory back before the next one."""
    asked, held, respond = [], [], MAS.respond

    def let_fail(problem_of):
        def respond_or_fail(mas, questions, *arguments, **options):
            assert not any(cache() is not None for cache in held)
            asked.append(list(getattr(questions, "questions", questions)))
            problem = problem_of(asked[-1])
            if problem is not None:
                cache = torch.zeros(9)              # the traceback keeps it alive
                held.append(weakref.ref(cache))
                raise type(problem)(*problem.args)
            return respond(mas, questions, *arguments, **options)

        monkeypatch.setattr(MAS, "respond", respond_or_fail)
        return asked
    return let_fail


def test_a_question_that_fails_is_recorded_and_the_run_goes_on(ask, run, failing, monkeypatch):
    """Its batch is halved until it stands alone, each time with an empty cache of the card. The
    others are answered as before. (shuffle needs the whole batch.)"""
    flags = [*TINY_RUN, "--method", "latent", "text", "shuffle"]
    whole, _ = ask(*flags)
    bad = whole[1]["question"]
    asked, emptied = failing(lambda questions: FULL if bad in questions else None), Mock()
    monkeypatch.setattr(torch.cuda, "empty_cache", emptied)
    _, said, _ = run(evaluate, *flags)
    lines, summary = results()
    assert bad in asked[0] and [len(questions) for questions in asked[1:]] == [
        *[3, 1, 2, 1, 1] * 2, 3, 3, 3, 3] and emptied.call_count == 2 * 2
    for line, wanted in zip(lines, whole, strict=True):
        if line["question"] == bad or wanted in whole[6:9]:
            assert line == {**wanted, "outputs": [], "parsed": [], "correct": [], "notes": [],
                            "retried": 0, "decoded_tokens": 0, "latent_steps": 0,
                            "error": "OutOfMemoryError: CUDA out of memory. Tried"}
        else:
            assert line == wanted
    for entry in summary["rows"]:                          # a failed question counts as wrong
        mine = [line["correct"] for line in lines if line["method"] == entry["method"]]
        for name, shares in (("ci95", [sum(correct) / 2 for correct in mine]),
                             ("pass_at_k_ci95", [float(any(correct)) for correct in mine])):
            assert entry[name] == bootstrap(shares)
    found = {entry["method"]: (entry["n"], entry["errors"]) for entry in summary["rows"]}
    assert found == {"latent": (6, 1), "text": (6, 1), "shuffle": (6, 3)} and "1 failed" in said


@pytest.mark.parametrize("problem", [FULL, RuntimeError("")], ids=["told", "untold"])
def test_where_all_fail_the_run_still_ends(problem, refused, failing):
    failing(lambda questions: problem)
    assert type(problem).__name__ in refused(*TINY_RUN, "--method", "latent", "text")
    for entry in results()[1]["rows"]:
        assert (entry["errors"], entry["accuracy"], entry["unparsed"]) == (6, 0, 1)


def test_a_card_that_has_failed_ends_the_run(run, failing):
    """Every later question would fail on it too. What was answered before is kept."""
    broken = torch.AcceleratorError("CUDA error: unspecified")
    asked = failing(lambda questions: broken if len(asked) == 3 else None)
    with pytest.raises(torch.AcceleratorError):
        run(evaluate, *TINY_RUN, "--method", "latent")
    assert len(asked) == 3 and len(list(Path("out/parts").iterdir())) == 1


def test_a_run_that_was_stopped_goes_on_elsewhere(ask, run, refused, failing):
    """With samples, second tries and a question that fails. Oracle: the unbroken run."""
    rows = [{"problem": f"\ud83d {i}?", "answer": "1"} for i in range(4)]    # not a proper text
    flags = [*file_of("math500", rows), "--num_rollouts", 2, "--batch_size", 2, "--method",
             "latent", "text", "zero", *QUICK]
    asked = failing(lambda questions: KeyboardInterrupt() if len(asked) == stop else
                    FULL if "\ud83d 1?" in questions else None)
    stop = 0
    whole, _ = ask(*flags, "--revision", "v1")
    assert any(line["retried"] for line in whole) and any("error" in line for line in whole)
    stop = len(asked) + 6                # an untimed call, 3 for a batch that is halved, and 2
    assert run(evaluate, *flags)[0] == 130
    assert len(list(Path("out/parts").iterdir())) == 1
    assert json.loads(Path("out/summary.json").read_text())["rows"] == []
    assert ask(*flags, "--resume", "--offload", "--device", "cpu,cpu")[0] == whole
    for flag, value in (("--num_rollouts", 3), ("--answer_retry", 0), ("--top_k", 3)):
        assert flag[2:] in refused(*flags, flag, value, "--resume")
    assert results()[0] == whole


# ---- the judge and the search tool --------------------------------------------------------------

SECRET = "tvly-secret-0123456789"
PLACES = [{"Question": f"Where is {i}?", "Answer": f"Oslo {i}"} for i in range(5)]


@pytest.fixture
def service(monkeypatch):
    """It answers in place of judge and search, by reply(body) -> (status, content). asked: the
    bodies of all requests, keys: those that they were signed with."""
    def post(session, url, auth, **options):
        there.asked.append(options["json"])
        there.keys.add(auth[:])
        status, content = there.reply(options["json"])
        raw = types.SimpleNamespace(read=lambda *_, **__: json.dumps(content).encode())
        return types.SimpleNamespace(status_code=status, raw=raw)

    for name, value in (("API_KEY", SECRET), ("API_BASE_URL", "http://j"), ("API_MODEL", "m")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(requests.Session, "post", post)
    there = types.SimpleNamespace(asked=[], keys=set())
    yield there
    for path in Path("out").rglob("*"):                    # the key stands in no file
        assert path.is_dir() or SECRET.encode() not in path.read_bytes()


def test_the_judge_end_to_end(service, ask_team):
    """Exact match comes first. A clear verdict is kept, and what was invalid is asked anew."""
    first = ["\\boxed{The Oslo 0.}", "\\boxed{Kristiania}", "\\boxed{Rome}", "no box",
             "\\boxed{unclear}"]

    def judge(body):
        text = body["messages"][-1]["content"]
        says = "correct" if "Kristiania" in text else "incorrect" if "Rome" in text else SECRET
        return 200, {"choices": [{"message": {"content": says}}]}

    service.reply = judge
    for asked in (3, 4):
        lines, entry = ask_team("bamboogle", PLACES, [first, ["nothing"]])
        assert [(line["notes"], line["correct"], line["retried"]) for line in lines] == [
            (["exact match"], [1], 0), (["judge: correct"], [1], 0), (["judge: incorrect"], [0], 0),
            ([""], [0], 1), (["judge: invalid"], [0], 0)]
        assert [line["parsed"] == [None] for line in lines] == [0, 0, 0, 1, 0]
        assert len(service.asked) == asked and entry["judge_invalid"] == 1 / 5
    assert service.keys == {SECRET}


@pytest.mark.parametrize("reply", [(401, {"detail": SECRET}), (200, {"choices": []})])
def test_a_judge_that_refuses_does_not_end_the_run(reply, service, ask_team):
    service.reply = lambda body: reply
    lines, entry = ask_team("bamboogle", PLACES[:2], [["\\boxed{oslo 0}", "\\boxed{Rome}"]])
    assert [line["correct"] for line in lines] == [[True], [False]]
    assert "error" not in lines[0] and lines[1]["error"].startswith("not scored: ")
    assert lines[1]["outputs"] == ["\\boxed{Rome}"] and entry["errors"] == 1


def test_half_a_judge_is_named_before_anything_runs(refused, monkeypatch):
    monkeypatch.setenv("API_KEY", SECRET)
    said = refused(*file_of("bamboogle", PLACES), "--out", "out")
    assert "API_MODEL" in said and SECRET not in said and not Path("out").exists()


def test_search_end_to_end(service, ask_team, refused):
    """Without a key the text says so. With one, what was found stands in the output."""
    rows = [{"Question": "Emma", "Answer": "austen"}]
    script = [["<search>who</search>"], ["\\boxed{Austen}"]]
    [line], _ = ask_team("bamboogle", rows, script)
    assert "not available" in line["outputs"][0] and line["correct"] == [True]
    assert "none.txt" in refused(*file_of("bamboogle", rows), "--method", "latent",
                                 "--tavily_keys_file", "none.txt")
    Path("keys").write_text(f"# mine\n{SECRET}\n")
    service.reply = lambda body: (200, {"results": [
        {"title": "Emma", "url": "http://e", "content": "Austen"}]})
    [line], entry = ask_team("bamboogle", rows, script, "--tavily_keys_file", "keys")
    assert line["outputs"] == ["<search>who</search>\n<result>\n[1] Emma\nhttp://e\nAusten\n"
                               "</result>\n\\boxed{Austen}"]
    assert entry["accuracy"] == 1 and entry["retried"] == 0 and entry["decoded_tokens"] == 20 + 15
    assert service.asked[0]["query"] == "who" and service.keys == {SECRET}


# ---- settings -----------------------------------------------------------------------------------

@pytest.mark.parametrize("case", lines_of("style_settings.jsonl"), ids=lambda case: case["flags"])
def test_a_styles_settings_for_a_data_set(case, monkeypatch, capsys):
    """They are used with --task as with --dataset, only where no flag was given, and printed."""
    shutil.copy(PROJECT / "tests/data/styles/settings.txt", "mine.py")
    args = parsed(monkeypatch, *case["flags"].split())
    assert vars(args).items() >= {**case["given"], **case["set"]}.items()
    printed = capsys.readouterr().out.split("defaults of this system: ")[1].split("\n")[0].split()
    assert set(printed) == {f"{name}={value}" for name, value in case["set"].items()}

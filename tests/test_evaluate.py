"""Evaluation: counts, intervals, resuming, the table, and every way to call it wrongly.

One finished evaluation serves many tests: those that change it work on a copy.
"""
import contextlib
import dataclasses
import io
import json
import math
import random
import shlex
import shutil
import sys
from importlib import import_module

import pytest
from helpers import PROJECT, untimed, write_rows

import evaluate
from evaluation import merge, report
from evaluation.statistics import bootstrap, wilson
from support import files, flags
from support.batches import chunks
from tasks import get_task

QUICK = ["--num_samples", 6, "--batch_size", 3, "--num_recursive_rounds", 2, "--method", "text",
         "latent", "shuffle", "--temperature", 0.8]
IMPORTS = "from dataclasses import replace\nfrom styles.tiny import tiny\n"
QUESTIONS = [example.question for example in get_task("tiny").load(4)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, what was printed) of a finished evaluation, started outside of the project."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["evaluate.py", *map(str, QUICK)])
        flags.run(evaluate.main)
    return folder / "out/evaluate", said.getvalue()


def test_results_and_summary_hold_what_is_promised(finished):
    folder, said = finished
    lines = untimed(folder / "results.jsonl")
    assert len(lines) == 18
    summary = json.loads((folder / "summary.json").read_text())
    assert [entry["method"] for entry in summary["rows"]] == ["text", "shuffle", "latent"]
    for entry in summary["rows"]:
        mine = [line for line in lines if line["method"] == entry["method"]]
        assert entry["n"] == len(mine) == 6
        assert entry["accuracy"] == sum(line["correct"][0] for line in mine) / 6
        assert entry["decoded_tokens"] == sum(line["decoded_tokens"] for line in mine) / 6
        assert entry["latent_steps"] == (0 if entry["method"] == "text" else 5 * 6)   # five turns
        assert f"\n{entry['method']:12s}      2 {entry['accuracy']:8.3f}" in said
    assert (folder / "summary.png").read_bytes()[:4] == b"\x89PNG"
    assert summary["settings"]["latent_length"] == 6          # tiny's own, no flag was given


def test_the_ceiling_is_that_of_the_system_made_for_the_task(finished, shipped, tmp_path, capsys):
    """Other models or edges may reach more, or less. What the style is called does not count."""
    task, style, replace = get_task("tiny"), shipped.style, dataclasses.replace
    planner = replace(style.roles[0], prompt=style.roles[0].first)          # it hears nobody
    deaf = replace(style, edges=style.edges[:2], roles=(planner, *style.roles[1:]))
    entries = json.loads((finished[0] / "summary.json").read_text())["rows"]
    best = f"2: {task.ceiling(task.load(6), 2):.3f}"
    for change, told in (({"style": replace(style, name="debate")}, 1), ({"style": deaf}, 0),
                         ({"agents": {**shipped.agents, "planner": shipped.agents["solver"]}}, 0)):
        report.write_report(entries, tmp_path, {}, replace(shipped, **change), task, task.load(6))
        assert best in finished[1] and (best in capsys.readouterr().out) == told


# ---- resuming -----------------------------------------------------------------------------------

def test_a_folder_that_is_removed_meanwhile_costs_no_answer(finished, tmp_path, monkeypatch, run):
    out, real, batches = tmp_path / "out", evaluate.answer_batch, []

    def answer_and_remove(*arguments):
        batches.append(real(*arguments))
        if len(batches) == 4:
            shutil.rmtree(out)
        return batches[-1]

    monkeypatch.setattr(evaluate, "answer_batch", answer_and_remove)
    code, said, _ = run(evaluate, *QUICK, "--out", out)
    assert code == 0 and f"{out / 'parts'} were removed" in said and len(batches) == 6
    assert untimed(out / "results.jsonl") == untimed(finished[0] / "results.jsonl")


def test_a_run_does_not_go_on_with_another_system(tmp_path, run):
    """The flags are the same, and the data, the prompts or the links are not."""
    outer = shutil.copytree(PROJECT / "tiny/outer", tmp_path / "outer")
    style, data = tmp_path / "mine.py", tmp_path / "rows.jsonl"
    style.write_text(IMPORTS + "first = replace(tiny.roles[0], system='')\n"
                     "mine = replace(tiny, name='mine', roles=(first, *tiny.roles[1:]))\n")
    write_rows(data, [{"problem": question, "answer": "4"} for question in QUESTIONS])

    def ask(*more):
        return run(evaluate, "--style", style, "--ckpt_override", f"outer={outer}", "--dataset",
                   data, "--task", "math500", "--method", "latent", "--num_recursive_rounds", 1,
                   "--latent_length", 6, "--max_new_tokens", 4, "--answer_retry", 0, "--out",
                   tmp_path / "out", *more)

    assert ask()[0] == ask("--resume")[0] == 0
    for path, old, new in ((data, b'"4"', b'"5"'), (style, b"system=''", b"system='Go.'"),
                           (outer / "outer_12.safetensors", None, bytes(4))):
        before = path.read_bytes()                # the last number of the link becomes 0
        path.write_bytes(before.replace(old, new, 1) if old else before[:-4] + new)
        code, _, errors = ask("--resume")
        assert code == 2 and len(errors) == 1, path
        assert str(tmp_path / "out") in errors[0] and "links_prompts_data" in errors[0]
        path.write_bytes(before)


def test_a_new_run_keeps_the_old_results(finished, tmp_path, run):
    out = shutil.copytree(finished[0], tmp_path / "out")
    before = (out / "results.jsonl").read_text()
    for number in (1, 2):
        assert run(evaluate, "--num_samples", 2, "--method", "single", "--seed", number,
                   "--out", out)[0] == 0
        assert len(list((out / "parts").iterdir())) == 1
        earlier = out / f"earlier_{number}"
        assert (earlier / "results.jsonl").read_text() == before
        assert sorted(one.name for one in earlier.iterdir()) == sorted(files.RESULTS)
        before = (out / "results.jsonl").read_text()


# ---- what is asked ------------------------------------------------------------------------------

@pytest.mark.parametrize("m", [6, 5])
def test_show_prints_every_turn_and_scores_nothing(m, tmp_path, run):
    """Another m than tiny's own says what it measures."""
    code, out, _ = run(evaluate, "--show", 2, "--latent_length", m, "--out", tmp_path / "none")
    assert code == 0 and out.count("thinks") == 2 * 8 and out.count("writes") == 2
    assert ("m = 5" in out) == (m == 5)
    assert not (tmp_path / "none").exists()


# ---- figures ------------------------------------------------------------------------------------

@pytest.mark.parametrize("right, n", [(0, 10), (5, 10), (10, 10), (87, 500)])
def test_wilson_interval_solves_its_own_equation(right, n):
    """The ends are the p at which |share - p| = 1.96 standard errors of p."""
    for p in wilson(right, n):
        assert abs(right / n - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n), abs=1e-9)


def test_the_bootstrap_draws_the_same_numbers_everywhere():
    """Oracles: Python's own generator, from the same seed, and numbers from another process."""
    rng = random.Random(3)
    for values in ([rng.random() for _ in range(60)], [0.0, 1.0, 1.0, 0.5], [0.25]):
        draw = random.Random(0)
        means = sorted(sum(draw.choices(values, k=len(values))) / len(values) for _ in range(2000))
        assert bootstrap(values) == pytest.approx([means[50], means[1950]], abs=1e-12)
    assert bootstrap([0, 1, 1, 2]) == [0.25, 1.75]


def test_chunks_keep_order_and_are_of_nearly_the_same_length():
    for count in (1, 2, 9, 10, 11, 33, 500):
        for size in (1, 2, 10, 32):
            parts = chunks(list(range(count)), size)
            assert sum(parts, []) == list(range(count)) and len(parts) == -(-count // size)
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_runs_are_merged(finished, tmp_path, run):
    """Means, and the lowest and highest accuracy; runs with other entries are refused."""
    runs = [json.loads((finished[0] / "summary.json").read_text())["rows"] for _ in range(2)]
    for i, entry in enumerate(runs[1]):
        entry.update(accuracy=0.25 * i, seconds=1.0 + i, errors=i)
    for name, entries in zip("12", runs):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps({"rows": entries}))
    both = tmp_path / "both"
    code, said, _ = run(merge, tmp_path / "1", tmp_path / "2", "--out", both)
    merged = json.loads((both / "summary.json").read_text())["rows"]
    assert code == 0 and [entry["method"] for entry in merged] == ["text", "shuffle", "latent"]
    for entry, one, two in zip(merged, *runs):
        low, high = sorted([one["accuracy"], two["accuracy"]])
        assert entry["accuracy"] == pytest.approx((low + high) / 2)
        assert entry["ci95"] == [low, high] and entry["runs"] == 2
        assert entry["seconds"] == pytest.approx((one["seconds"] + two["seconds"]) / 2)
        assert entry["errors"] == two["errors"] and f"{low:.3f} - {high:.3f}" in said
    assert (both / "summary.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="summary.json"):
        merge.merge([runs[0], runs[1][:1]])
    code, _, errors = run(merge, tmp_path / "1", tmp_path)
    assert code == 2 and "summary.json" in errors[0]


# ---- wrong calls: one line on stderr, exit code 2, nothing written ------------------------------

WRONG_FILES, WRONG_CALLS = (json.loads((PROJECT / f"tests/data/{name}.json").read_text())
                            for name in ("wrong_files", "wrong_calls"))


@pytest.mark.parametrize("script, wrong, named", [
    (script, *case) for script, calls in WRONG_CALLS.items() for case in calls.items()])
def test_a_wrong_call_is_one_line(script, wrong, named, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    for name, text in WRONG_FILES.items():
        (tmp_path / name).write_text(text.replace("IMPORTS", IMPORTS))
    shutil.copytree(PROJECT / "tiny/critic", "cut")
    (tmp_path / "cut/model.safetensors").write_bytes(b"\0" * 5000)
    code, _, errors = run(import_module(script), "--out" if script == "evaluate" else "--save_dir",
                          "out", *shlex.split(wrong.replace("PROJECT", str(PROJECT))))
    assert code == 2 and len(errors) == 1 and errors[0].startswith("error: ")
    assert named in errors[0] and not (tmp_path / "out").exists()

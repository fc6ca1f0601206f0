"""Evaluation: counts, intervals, resuming, the table, and every way to call it wrongly."""
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROJECT

import evaluate
import train_inner
import train_outer
from recurse import chunks
from support import files, report
from support.checkpoints import load_outer, save_outer
from support.flags import run
from tasks import get_task

QUICK = ["--num_samples", 6, "--batch_size", 3, "--num_recursive_rounds", 2, "--method", "text",
         "latent", "shuffle"]


def run_evaluate(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
    evaluate.main()


def untimed(path):
    """Result lines without what differs from run to run."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "peak_memory_mb")}
            for line in lines]


def test_results_and_summary_hold_what_is_promised(tmp_path, monkeypatch):
    run_evaluate(monkeypatch, *QUICK, "--out", tmp_path)
    lines = untimed(tmp_path / "results.jsonl")
    assert len(lines) == 18
    assert set(lines[0]) >= {"id", "question", "gold", "outputs", "parsed", "correct",
                             "decoded_tokens", "latent_steps", "method", "rounds"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    for row in summary["rows"]:
        mine = [line for line in lines if line["method"] == row["method"]]
        assert row["n"] == len(mine) == 6
        assert row["accuracy"] == sum(line["correct"][0] for line in mine) / 6
        assert row["decoded_tokens"] == sum(line["decoded_tokens"] for line in mine) / 6
        assert row["latent_steps"] == (0 if row["method"] == "text" else 5 * 6)   # five turns think
    assert (tmp_path / "summary.png").read_bytes()[:4] == b"\x89PNG"
    assert summary["settings"]["latent_length"] == 6          # tiny's own, no flag was given


@pytest.mark.parametrize("problem", [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_one_line(problem, capsys):
    """On a GPU and on a CPU. Any other RuntimeError is a bug, and keeps its traceback."""
    def broken(error):
        raise error

    with pytest.raises(SystemExit) as stopped:
        run(lambda: broken(problem))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "Lower --batch_size" in said and said.count("\n") == 1
    with pytest.raises(RuntimeError, match="shapes"):
        run(lambda: broken(RuntimeError("shapes do not fit")))


def test_the_ceiling_is_that_of_the_system_made_for_the_task(tmp_path, monkeypatch, capsys):
    """Another style over the same questions may reach more, or less."""
    run_evaluate(monkeypatch, *QUICK, "--out", tmp_path)
    assert "expected of a perfect system" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    rows = [{**row, "style": "debate"} for row in summary["rows"]]
    report.write_report(rows, tmp_path, {}, get_task("tiny"), get_task("tiny").load(6))
    assert "expected" not in capsys.readouterr().out


@pytest.fixture
def own_system(tmp_path):
    """A copy of the shipped links, a style file with tiny's words, and eight of its problems."""
    shutil.copytree(PROJECT / "tiny/outer", tmp_path / "outer")
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\nfrom styles.tiny import tiny\n"
        "mine = replace(tiny, name='mine')\n")
    rows = [{"problem": example.question, "answer": example.gold}
            for example in get_task("tiny").load(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def other_link(folder):
    links = load_outer(folder / "outer", {"outer_12": (96, 80), "outer_23": (80, 112),
                                          "outer_31": (112, 96)})
    torch.nn.init.zeros_(links["outer_12"].proj1.weight)
    save_outer(links, folder / "outer")


def other_words(folder):
    (folder / "mine.py").write_text((folder / "mine.py").read_text().replace(
        "name='mine'",
        "name='mine', roles=(replace(tiny.roles[0], system='Go.'), *tiny.roles[1:])"))


def other_data(folder):
    rows = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text(rows.replace('"answer": "', '"answer": "1', 1))


@pytest.mark.parametrize("change", [other_link, other_words, other_data])
def test_a_run_does_not_go_on_with_another_system(change, own_system, monkeypatch):
    """The flags are the same, and the links, the prompts or the data are not."""
    def ask(*flags):
        monkeypatch.setattr(sys, "argv", [
            "evaluate.py", "--style", str(own_system / "mine.py"), "--ckpt_override",
            f"outer={own_system / 'outer'}", "--dataset", str(own_system / "rows.jsonl"), "--task",
            "math500", "--method", "latent", "--num_recursive_rounds", "1", "--latent_length", "6",
            "--max_new_tokens", "4", "--answer_retry", "0", "--out", str(own_system / "out"),
            *flags])
        evaluate.main()

    ask()
    ask("--resume")
    change(own_system)
    with pytest.raises(ValueError, match="of another run .links_prompts_data differ."):
        ask("--resume")


def test_an_interrupted_run_resumes_to_the_same_results(tmp_path, monkeypatch):
    """Parts that are missing, cut off or failed are answered again, the others are kept."""
    flags = [*QUICK, "--temperature", 0.8]
    run_evaluate(monkeypatch, *flags, "--out", tmp_path / "whole")
    whole = untimed(tmp_path / "whole/results.jsonl")
    real, asked = evaluate.answer_batch, []

    def broken_off(mas, task, batch, method, rounds, plan):
        asked.append(method)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return real(mas, task, batch, method, rounds, plan)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "answer_batch", broken_off)
        run_evaluate(patch, *flags, "--out", tmp_path / "cut")
    parts = sorted((tmp_path / "cut/parts").iterdir())
    assert len(parts) == 3 and not (tmp_path / "cut/results.jsonl").exists()
    (tmp_path / "cut/parts/a.json.part").write_text("half")         # what kill -9 leaves behind
    failed = json.loads(parts[0].read_text())
    failed["lines"][1]["error"] = "OutOfMemoryError: .."
    parts[0].write_text(json.dumps(failed))
    asked.clear()
    monkeypatch.setattr(evaluate, "answer_batch", lambda *given: asked.append(1) or real(*given))
    run_evaluate(monkeypatch, *flags, "--out", tmp_path / "cut", "--resume")
    assert untimed(tmp_path / "cut/results.jsonl") == whole and len(asked) == 6 - 3 + 1
    with pytest.raises(ValueError, match="temperature"):
        run_evaluate(monkeypatch, *QUICK, "--out", tmp_path / "cut", "--resume")
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        run_evaluate(monkeypatch, *QUICK, "--out", tmp_path / "new", "--resume")


def test_a_new_run_keeps_the_old_results(tmp_path, monkeypatch):
    run_evaluate(monkeypatch, *QUICK, "--out", tmp_path)
    before = (tmp_path / "results.jsonl").read_text()
    for number in (1, 2):
        run_evaluate(monkeypatch, *QUICK, "--seed", number, "--out", tmp_path)
        assert len(list((tmp_path / "parts").iterdir())) == 6
        earlier = tmp_path / f"earlier_{number}"
        assert (earlier / "results.jsonl").read_text() == before
        assert sorted(one.name for one in earlier.iterdir()) == sorted(files.RESULTS)
        before = (tmp_path / "results.jsonl").read_text()


def test_another_m_of_tiny_says_what_it_measures(tmp_path, monkeypatch, capsys):
    for m, told in ((6, 0), (5, 1)):
        run_evaluate(monkeypatch, *QUICK, "--latent_length", m, "--out", tmp_path)
        said = capsys.readouterr().out
        assert said.count("a note of this task has 6 words, and its agents have never") == told


def test_greedy_results_do_not_depend_on_the_batch_size(tmp_path, monkeypatch):
    flags = ["--num_samples", 6, "--method", "latent", "text", "--num_recursive_rounds", 1, 3]
    run_evaluate(monkeypatch, *flags, "--batch_size", 1, "--out", tmp_path / "one")
    run_evaluate(monkeypatch, *flags, "--batch_size", 6, "--out", tmp_path / "six")
    one, six = (sorted(untimed(tmp_path / f"{name}/results.jsonl"), key=str)
                for name in ("one", "six"))
    assert one == six


def test_show_prints_every_turn_and_scores_nothing(tmp_path, monkeypatch, capsys):
    run_evaluate(monkeypatch, "--show", 2, "--out", tmp_path / "none")
    out = capsys.readouterr().out
    assert out.count("thinks") == 2 * 8
    assert out.count("writes") == 2
    assert not (tmp_path / "none").exists()


def test_a_style_file_replaces_the_words(tmp_path, monkeypatch):
    """A shipped style with one prompt changed asks other words of the same system."""
    path = tmp_path / "mine.py"
    path.write_text("from dataclasses import replace\nfrom styles.tiny import tiny\n"
                    "solver = replace(tiny.role('solver'), prompt='{question} {critic}')\n"
                    "mine = replace(tiny, name='mine', roles=(*tiny.roles[:2], solver))\n")
    run_evaluate(monkeypatch, *QUICK, "--out", tmp_path / "a", "--style", path)
    run_evaluate(monkeypatch, *QUICK, "--out", tmp_path / "b")
    outputs = [[line["outputs"] for line in untimed(tmp_path / f"{x}/results.jsonl")] for x in "ab"]
    assert outputs[0] != outputs[1]
    assert untimed(tmp_path / "a/results.jsonl")[0]["style"] == "mine"


def test_runs_are_merged(tmp_path, monkeypatch, capsys):
    """Means, and the lowest and highest accuracy; runs with other rows are refused."""
    flags = ["--num_samples", 6, "--batch_size", 6, "--num_recursive_rounds", 1, "--method",
             "latent", "text"]
    for seed in (1, 2):
        run_evaluate(monkeypatch, *flags, "--temperature", 2.5, "--seed", seed, "--out",
                     tmp_path / str(seed))
    rows = [json.loads((tmp_path / name / "summary.json").read_text())["rows"] for name in "12"]
    rows[1][0]["accuracy"] = rows[0][0]["accuracy"] + 0.25
    (tmp_path / "2/summary.json").write_text(json.dumps({"rows": rows[1]}))
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "1"), str(tmp_path / "2"), "--out",
                                      str(tmp_path / "both")])
    report.main()
    merged = json.loads((tmp_path / "both/summary.json").read_text())["rows"]
    assert [row["method"] for row in merged] == ["text", "latent"]
    for row, one, two in zip(merged, *rows):
        assert row["accuracy"] == pytest.approx((one["accuracy"] + two["accuracy"]) / 2)
        assert row["ci95"] == sorted([one["accuracy"], two["accuracy"]]) and row["runs"] == 2
        assert row["seconds"] == pytest.approx((one["seconds"] + two["seconds"]) / 2)
    assert "lowest - highest" in capsys.readouterr().out
    assert (tmp_path / "both/summary.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="with the same rows"):
        report.merge([rows[0], rows[1][:1]])
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "1"), str(tmp_path)])
    with pytest.raises(ValueError, match="hold no summary.json"):
        report.main()


@pytest.mark.parametrize("right, n", [(0, 10), (5, 10), (10, 10), (87, 500)])
def test_wilson_interval_solves_its_own_equation(right, n):
    """The ends are the p at which |share - p| = 1.96 standard errors of p."""
    for p in report.wilson(right, n):
        assert abs(right / n - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n), abs=1e-9)


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 33, 500])
@pytest.mark.parametrize("size", [1, 2, 10, 32])
def test_chunks_keep_order_and_leave_no_lonely_row(count, size):
    parts = chunks(list(range(count)), size)
    assert sum(parts, []) == list(range(count))
    assert len(parts) == -(-count // size)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_script_runs_from_any_folder_as_its_own_process(tmp_path):
    project = Path(evaluate.__file__).parent
    done = subprocess.run([sys.executable, project / "evaluate.py", *map(str, QUICK)],
                          cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "latent against text at 2 rounds" in done.stdout
    assert len((tmp_path / "out/evaluate/results.jsonl").read_text().splitlines()) == 18
    failed = subprocess.run([sys.executable, project / "train_outer.py", "--style", "nope"],
                            cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: unknown style 'nope'")
    assert failed.stderr.count("\n") == 1


# ---- wrong calls: one line on stderr, exit code 2, nothing written ------------------------------

STYLE = """import dataclasses
from styles.tiny import tiny
it = dataclasses.replace(tiny, name="it", settings={"train_outer": %s})
"""
BAD_ROWS = '{"question": "start 1 s1 +1 s2 +1"}\n'


@pytest.mark.parametrize("script, flags, complaint", [
    (evaluate, ["--style", "nope"], "unknown style 'nope'"),
    (evaluate, ["--dataset", "nope"], "unknown data set 'nope'"),
    (evaluate, ["--method", "magic"], "invalid choice: 'magic'"),
    (evaluate, ["--latent_length", "0"], "at least 1"),
    (evaluate, ["--num_recursive_rounds", "0"], "at least 1"),
    (evaluate, ["--num_recursive_rounds", "two"], "invalid number value: 'two'"),
    (evaluate, ["--temperature", "nan"], "at least 0"),
    (evaluate, ["--device", "toaster"], "toaster"),
    (evaluate, ["--dtype", "int8"], "invalid choice"),
    (evaluate, ["--lat", "3"], "unrecognized arguments"),
    (evaluate, ["--ckpt_override", "outer"], "KEY=PATH"),
    (evaluate, ["--ckpt_override", "judge=tiny/solver"], "one of planner, critic, solver"),
    (evaluate, ["--ckpt_override", "outer="], "KEY=PATH"),
    (evaluate, ["--min_p", "2"], "at most 1.0"),
    (evaluate, ["--seed", str(2**64)], "at most"), (evaluate, ["--seed", "-1"], "at least 0"),
    (evaluate, ["--temperature", "1e400"], "must be at least 0, not 1e400"),
    (evaluate, ["--out", ""], "name of the folder to write to is empty"),
    (train_outer, ["--save_dir", ""], "name of the folder to write to is empty"),
    (train_outer, ["--dataset_name", "rows.csv"], "rows.csv is neither .json nor .jsonl"),
    (train_outer, ["--agent1_inner_aligner_path", "tiny/planner", "--save_dir",
                   str(PROJECT / "tiny/../tiny/planner")], "holds the inner link of planner"),
    (train_outer, ["--style", "EXITS"], "does not run: SystemExit: 0"),
    (train_outer, ["--style", "HALF"], "argument --batch_size: invalid number value: '2.5'"),
    (train_outer, ["--style", "ZERO"], "argument --batch_size: must be at least 1, not 0"),
    (train_outer, ["--style", "FLAT"], "settings are no dict of dicts"),
    (train_outer, ["--style", "DREAMS"], "argument --latents: invalid choice: 'dreams'"),
    (train_outer, ["--style", "SEVEN"], "argument --gradient_checkpointing: invalid choice: 7"),
    (train_outer, ["--style", "NONE"], "argument --max_steps: invalid number value: 'None'"),
    (evaluate, ["--repetition_penalty", "0"], "at least 0.01"),
    (evaluate, ["--device", "meta"], "unknown device"),
    (evaluate, ["--ckpt_override", "critic=CUT"], "does not load"),
    (train_outer, ["--eval_samples", "1"], "at least 2"),
    (evaluate, ["--ckpt_override", "outer=missing/folder"], "missing/folder"),
    (evaluate, ["--ckpt_override", "outer=tiny/solver"], "outerlink_config.json is missing"),
    (evaluate, ["--ckpt_override", "critic=tiny/outer"], "no inner link"),
    (evaluate, ["--style", "missing.py"], "missing.py does not run: FileNotFoundError"),
    (evaluate, ["--num_samples", "1", "--method", "shuffle"], "at least two questions"),
    (evaluate, ["--batch_size", "1", "--method", "shuffle"], "at least two questions"),
    (train_inner, ["--mas_role", "judge"], "no role 'judge'"),
    (train_inner, ["--adapter_type", "3layer"], "3layer"),
    (train_inner, ["--dataset_name", "missing.json"], "No such file or directory: 'missing.json'"),
    (train_inner, ["--dataset_name", "BAD"], "no usable row: no column plan (1"),
    (train_inner, ["--dataset_name", "EMPTY"], "holds no rows"),
    (train_inner, ["--dataset_name", "BROKEN"], "row 1 is not JSON"),
    (train_inner, ["--dataset_name", "LIST", "--dataset_json_field", "rows"],
     "a list under 'rows'"),
    (train_inner, ["--load_dir", "tiny/critic"], "damaged, or it holds no 2layer_ln_res link"),
    (train_inner, ["--model_name_or_path", "missing/model"], "missing/model"),
    (train_outer, ["--latents", "dreams"], "invalid choice"),
    (train_outer, ["--dataset_name", "BAD"], "no usable row: "),
    (train_outer, ["--num_recursive_rounds", "0"], "at least 1"),
    (train_outer, ["--outer_adapter_type", "3layer"], "unknown link kind"),
    (train_outer, ["--planner_inner_aligner_path", "missing/folder"], "missing/folder"),
    (train_outer, ["--planner_inner_aligner_path", "tiny/critic", "--planner_model_name_or_path",
                   "tiny/planner"], "tiny/critic"),
    (train_outer, ["--outer_lr", "inf"], "at least 0"),
    (train_outer, ["--resume"], "nothing to resume"),
])
def test_a_wrong_call_is_one_line_and_exit_code_2(script, flags, complaint, tmp_path, monkeypatch,
                                                  capsys):
    for name, text in (("BAD", BAD_ROWS), ("EMPTY", ""), ("BROKEN", "{nope\n")):
        (tmp_path / f"{name}.jsonl").write_text(text)
        flags = [str(tmp_path / f"{name}.jsonl") if flag == name else flag for flag in flags]
    (tmp_path / "LIST.json").write_text('{"data": []}')
    cut = shutil.copytree(Path(evaluate.__file__).parent / "tiny/critic", tmp_path / "CUT.json")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:5000])
    for name, words in (("EXITS", "raise SystemExit(0)"), ("HALF", STYLE % "{'batch_size': 2.5}"),
                        ("ZERO", STYLE % "{'batch_size': 0}"), ("FLAT", STYLE % "3"),
                        ("DREAMS", STYLE % "{'latents': 'dreams'}"),
                        ("SEVEN", STYLE % "{'gradient_checkpointing': 7}"),
                        ("NONE", STYLE % "{'max_steps': None}")):
        (tmp_path / f"{name}.py").write_text(words)
        flags = [str(tmp_path / f"{name}.py") if flag == name else flag for flag in flags]
    for name in ("LIST", "CUT"):
        flags = [flag.replace(name, str(tmp_path / f"{name}.json")) for flag in flags]
    out = tmp_path / "out"
    where = "--out" if script is evaluate else "--save_dir"
    monkeypatch.setattr(sys, "argv", ["script", where, str(out), *flags])
    with pytest.raises(SystemExit) as stopped:
        run(script.main)
    assert stopped.value.code == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert complaint in errors[-1]
    assert errors[-1].startswith("error: ")
    assert not out.exists()


@pytest.mark.parametrize("module", ["matplotlib"])
def test_a_missing_package_is_named_before_anything_runs(module, tmp_path, monkeypatch):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"pip install {module}"):
        run_evaluate(monkeypatch, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()

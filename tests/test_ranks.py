"""Several ranks (gloo, on a CPU) = one process with the batch of all of them."""
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import PROJECT, lines_of, log_of, run_ranks, start_ranks, tiny_in_float64, untimed

import evaluate
import train_inner
import train_outer
from support import ranks

OUTER = ["--eval_samples", 0, "--num_samples", 64, "--warm_start_steps", 0, "--role_loss_weight", 0,
         "--num_recursive_rounds", 2, "--log_every", 1, "--latent_length", 2, "--max_steps", 3]
INNER = ["--num_samples", 20, "--held_out", 4, "--log_every", 1, "--latent_length", 2,
         "--max_steps", 4]
ODD = "tests/data/odd_rank.txt"


@pytest.mark.parametrize("script, flags, rounding", [(train_outer, OUTER, 1e-5),
                                                     (train_inner, INNER, 1e-4)])
def test_two_ranks_are_one_process_with_the_double_batch(script, flags, rounding, tmp_path, run,
                                                         monkeypatch):
    """All losses are the same. Batches of 3 that one rank accumulates twice hold as many rows as
    batches of 3 on two ranks, and give the same too. The ranks decide which rows make a step, so
    another number of ranks cannot go on with the run."""
    started, more = (ODD, ["nothing"]) if script is train_outer else ("train_inner.py", [])
    both = start_ranks(2, started, *flags, "--batch_size", 3, "--save_dir", tmp_path / "two", *more)
    monkeypatch.setattr(train_outer, "new_system", lambda *_: tiny_in_float64())
    for name, size in (("one", [6]), ("halves", [3, "--grad_accum_steps", 2])):
        assert run(script, *flags, "--batch_size", *size, "--save_dir", tmp_path / name)[0] == 0
    assert [one.wait() for one in both] == [0, 0], both[0].stderr() + both[1].stderr()
    two, one, halves = (log_of(tmp_path / name) for name in ("two", "one", "halves"))
    assert len(two) == len({line["loss"] for line in two}) == flags[-1]
    for a, b, c in zip(two, one, halves, strict=True):
        assert a == pytest.approx(b, rel=rounding) and a == pytest.approx(c, rel=rounding)
    code, _, errors = run(script, *flags, "--batch_size", 3, "--save_dir", tmp_path / "two",
                          "--resume")
    assert code == 2 and "2 ranks" in errors[0] and "has 1" in errors[0]


def test_ranks_evaluate_to_the_same_results(tmp_path, run):
    """Every line but the times is the same, and so is the table. Then parts of both ranks are lost,
    and --resume brings the same back. An evaluation may go on with another number of ranks."""
    flags = ["--method", "latent", "single", "--num_recursive_rounds", 1, 2,
             "--num_samples", 8, "--batch_size", 4, "--temperature", 0.5, "--num_rollouts", 2]

    def told(name):
        """The lines and the table, without the times."""
        table = json.loads((tmp_path / name / "summary.json").read_text())["rows"]
        return untimed(tmp_path / name / "results.jsonl"), [
            {**entry, "seconds": 0, "peak_memory_mb": 0} for entry in table]

    def two(*more):
        codes, said = run_ranks(2, "evaluate.py", *flags, "--out", tmp_path / "two", *more)
        assert codes == [0, 0], said
        return said

    assert " 3/3 " in two()                              # each rank has half of the six parts
    assert run(evaluate, *flags, "--out", tmp_path / "one")[0] == 0
    parts = sorted((tmp_path / "two/parts").iterdir())
    assert len(parts) == 6 and {part.name for part in parts} == {
        part.name for part in (tmp_path / "one/parts").iterdir()}
    assert told("two") == told("one")
    for again, lost in ((two, parts[:3]), (lambda *more: run(
            evaluate, *flags, "--out", tmp_path / "two", *more), parts[2:5])):
        kept = {part: part.stat().st_mtime_ns for part in parts if part not in lost}
        for file in (*lost, tmp_path / "two/results.jsonl"):
            file.unlink()
        again("--resume")
        assert all(part.is_file() for part in lost)
        assert {part: part.stat().st_mtime_ns for part in kept} == kept     # not asked again
        assert told("two") == told("one")


def test_a_rank_that_skips_keeps_nobody_waiting(tmp_path):
    """After a NaN on one rank, both leave the step out. Both begin and end with the same links."""
    codes, said = run_ranks(2, ODD, *OUTER, "--batch_size", 2, "--save_dir", tmp_path, "nan")
    assert codes == [0, 0], said
    assert [line["skipped"] for line in log_of(tmp_path)] == [0, 1, 1]
    assert [line["grad_norm"] is None for line in log_of(tmp_path)] == [False, True, False]
    ours, theirs = (torch.load(tmp_path / f"links_{i}.pt") for i in range(2))
    start = tiny_in_float64().outer.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in start)
    assert 0 < max((ours[name] - start[name]).abs().max() for name in start) < 0.1


@pytest.mark.parametrize("moment, done", [("loss", 2), ("sum", 3)])
def test_an_interrupt_of_one_rank_stops_all(moment, done, tmp_path):
    """All of them after the same step, which is saved. Ctrl-C may come when rank 1 has already told
    the others that it goes on. Then they stop after the next step."""
    both = start_ranks(2, ODD, *OUTER[:-1], 9, "--batch_size", 1, "--save_steps", 0, "--save_dir",
                       tmp_path, f"stop in the {moment}")
    assert [one.wait() for one in both] == [130, 130]
    assert "Traceback" not in both[0].stderr() + both[1].stderr()
    assert str(tmp_path) in both[0].stderr().splitlines()[-1]
    assert torch.load(tmp_path / "state.pt")["done"] == log_of(tmp_path)[-1]["step"] == done
    ours, theirs = (torch.load(tmp_path / f"links_{i}.pt") for i in range(2))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_error_of_all_ranks_is_one_line(tmp_path):
    codes, said = run_ranks(2, "train_outer.py", *OUTER, "--dataset_name", tmp_path / "none.jsonl")
    errors = [line for line in said.splitlines() if line.startswith("error")]
    assert codes == [2, 2] and len(errors) == 2 and all("none.jsonl" in line for line in errors)
    assert "Traceback" not in said and said.count("defaults of") == 1        # rank 0 alone prints


@pytest.mark.parametrize("case", lines_of("machines.jsonl"), ids=lambda case: case["why"])
def test_ranks_meet_on_every_kind_of_machine(case, monkeypatch):
    """On a machine with GPUs, tensors of the CPU are summed too: the tiny agents run there."""
    world, cards = case["ranks"], case["cards"]
    met, chosen = [], []
    for name, value in (("RANK", 1), ("LOCAL_RANK", 1), ("WORLD_SIZE", world)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda by, **_: met.append(by))
    ranks.join_ranks()
    assert met == case["backend"] and chosen == case["taken"]
    assert ranks.rank() == 1 and ranks.ranks() == world
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    assert (ranks.rank(), ranks.ranks()) == (0, 1)


@pytest.mark.slow
def test_torchrun(tmp_path):
    """As README says."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "train_outer.py", *map(str, OUTER), "--batch_size", "2", "--save_dir", tmp_path],
        cwd=PROJECT, capture_output=True, text=True, timeout=240, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(log_of(tmp_path)) == OUTER[-1]
    assert json.loads((tmp_path / "train_args.json").read_text())["batch_size"] == 2
    assert torch.load(tmp_path / "state.pt")["settings"]["ranks"] == 2

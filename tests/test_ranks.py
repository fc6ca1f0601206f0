"""Several ranks (torchrun, gloo, on a CPU) = one process with the batch of all of them."""
import json
import os
import subprocess
import sys

import pytest
from conftest import PROJECT

TIMES = ("seconds", "peak_memory_mb")
OUTER = ["train_outer.py", "--eval_samples", "0", "--num_samples", "64", "--warm_start_steps", "0",
         "--role_loss_weight", "0", "--num_recursive_rounds", "2", "--log_every", "1",
         "--latent_length", "2", "--max_steps", "4"]
INNER = ["train_inner.py", "--num_samples", "60", "--log_every", "1", "--latent_length", "2",
         "--max_steps", "6"]


def run(ranks, *arguments, fails=False):
    """Run a script in `ranks` processes. Returns what they printed."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run(
        [sys.executable, *(command if ranks > 1 else []), *map(str, arguments)], cwd=PROJECT,
        capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert bool(done.returncode) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("script", [OUTER, INNER], ids=["outer", "inner"])
def test_two_ranks_are_one_process_with_the_double_batch(script, tmp_path):
    """All losses are the same. Batches of 3 that one rank accumulates twice hold as many rows as
    batches of 3 on two ranks, and give the same too. The ranks decide which rows make a step, so
    another number of ranks cannot go on with the run."""
    run(2, *script, "--batch_size", 3, "--save_dir", tmp_path / "two")
    run(1, *script, "--batch_size", 6, "--save_dir", tmp_path / "one")
    run(1, *script, "--batch_size", 3, "--grad_accum_steps", 2, "--save_dir", tmp_path / "halves")
    two, one, halves = (log(tmp_path / name) for name in ("two", "one", "halves"))
    assert len(two) == int(script[-1])
    for a, b, c in zip(two, one, halves, strict=True):
        for other in (b, c):
            assert a["loss"] == pytest.approx(other["loss"], abs=1e-5)
            assert a["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
            assert a["step"] == other["step"] and a["lr"] == other["lr"]
    assert len({line["loss"] for line in two}) == len(two)
    assert "ranks differ" in run(1, *script, "--batch_size", 3, "--save_dir", tmp_path / "two",
                                 "--resume", fails=True)


def test_ranks_evaluate_to_the_same_results(tmp_path):
    """Every line but the times is the same, and so is the table. Then parts of both ranks are lost,
    and --resume brings the same back. An evaluation may go on with another number of ranks."""
    flags = ["evaluate.py", "--method", "latent", "text", "single", "--num_recursive_rounds", 1, 2,
             "--num_samples", 30, "--batch_size", 8, "--temperature", 0.5, "--num_rollouts", 2]
    run(2, *flags, "--out", tmp_path / "two")
    run(1, *flags, "--out", tmp_path / "one")
    parts = sorted((tmp_path / "two/parts").iterdir())

    def lines(name):
        text = (tmp_path / name / "results.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if key not in TIMES}
                for line in text]

    def table(name):
        rows = json.loads((tmp_path / name / "summary.json").read_text())["rows"]
        return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]

    assert [part.name for part in parts] == sorted(
        part.name for part in (tmp_path / "one/parts").iterdir())
    assert lines("two") == lines("one") and table("two") == table("one")
    for ranks, lost in ((2, parts[:7]), (1, parts[5:10])):
        kept = {part: part.stat().st_mtime_ns for part in parts if part not in lost}
        for part in lost:
            part.unlink()
        (tmp_path / "two/results.jsonl").unlink()
        run(ranks, *flags, "--out", tmp_path / "two", "--resume")
        assert all(part.is_file() for part in lost)
        assert {part: part.stat().st_mtime_ns for part in kept} == kept     # not asked again
        assert lines("two") == lines("one") and table("two") == table("one")


NAN_ON_ONE_RANK = """
import argparse
import torch
from support import flags
from support.training import Training

def main():
    link = torch.nn.Linear(2, 1, bias=False)
    args = argparse.Namespace(weight_decay=0.0, lr_scheduler_type="constant", warmup_steps=0,
                              resume=False, max_grad_norm=0.0, grad_accum_steps=1, log_every=1,
                              save_steps=0, seed=0, batch_size=2, max_steps=4, num_train_epochs=1,
                              mas_task="math")
    training = Training(link, args, 0.1, "FOLDER", 4)
    for step in training.steps("link"):
        bad = float("nan") if step == 1 and flags.RANK == 1 else 1.0
        for rows in training.batches([0, 1, 2, 3], step):
            with training.halved_if_full():
                training.backward(link(torch.ones(2)).sum() * bad, len(rows) * (1 + flags.RANK))
                if flags.RANK == 1 and len(rows) > 1:
                    raise torch.OutOfMemoryError("CUDA out of memory")
        training.step()
    assert training.at_once == 2 - flags.RANK
    weights = [torch.zeros_like(link.weight) for _ in range(2)]
    torch.distributed.all_gather(weights, link.weight.data)
    assert torch.equal(*weights)

flags.run(main)
"""


def test_a_rank_that_skips_keeps_nobody_waiting(tmp_path):
    """After a NaN on one rank, both leave the step out and go on. The links stay the same on both,
    also where one rank's card is full, and it takes fewer rows at once."""
    script = tmp_path / "nan.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(PROJECT)!r})\n"
                      + NAN_ON_ONE_RANK.replace("FOLDER", str(tmp_path / "out")))
    assert "rank 1: the card is too full, so a step takes 1 rows" in run(2, script)
    lines = log(tmp_path / "out")
    assert [line["skipped"] for line in lines] == [0, 1, 1, 1]
    assert lines[1]["grad_norm"] is None and lines[2]["grad_norm"] == pytest.approx(2 ** 0.5)


def test_an_error_of_all_ranks_is_one_line(tmp_path):
    output = run(2, *OUTER, "--dataset_name", tmp_path / "none.jsonl", fails=True)
    assert "No such file" in output and "none.jsonl" in output
    assert 'File "' not in output.split("error:")[0]

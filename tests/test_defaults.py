"""What holds where the user says nothing, and what a user's slip is answered with."""
import dataclasses
import json
import shutil
from unittest.mock import Mock

import pytest
import torch
from helpers import PROJECT, lines_of, load_mas_system, refuses

import evaluate
import tasks
import train_inner
import train_outer
from evaluation import report
from styles import get_style
from support.devices import Clock, peak_memory_mb, pick_device, settle
from support.errors import say_once
from tasks import get_task
from training.rows import flags_to_ask


def test_a_participants_task_is_asked_as_in_training(shipped, tmp_path, run, monkeypatch):
    """By its m, and greedily: by evaluate.py, and by the trainer at its end."""
    shutil.copy(PROJECT / "tests/data/chain.txt", tmp_path / "chain.py")
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    run(evaluate, "--dataset", "chain", "--num_samples", 8, "--method", "latent", "--out", tmp_path,
        "--num_recursive_rounds", 3)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["rows"][0]["accuracy"] == 1 and summary["settings"]["max_new_tokens"] == 32
    monkeypatch.setattr(evaluate, "evaluate", Mock())
    args = Mock(eval_samples=8, num_recursive_rounds=1, seed=1)
    evaluate.compare(shipped, get_task("chain"), args, tmp_path)
    assert evaluate.evaluate.call_args.kwargs["plan"].writing.max_new_tokens == 32
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--style", "duo", "--dataset", "chain"])
    args = evaluate.parse()[0]
    assert (args.latent_length, args.num_recursive_rounds, args.temperature) == (8, [1], 0)
    assert evaluate.m_and_rounds({"num_recursive_rounds": 2}) == {"num_recursive_rounds": [1, 2]}


def test_a_foreign_m_is_told_once(shipped, capsys):
    """R and m swapped are the usual slip. Methods in words have no m."""
    say_once.cache_clear()
    for method, m, told in (("text", 3, 0), ("latent", 6, 0), ("latent", 3, 1), ("latent", 3, 0)):
        shipped.request(["start 2 s1 x7"], 6, m, method=method)
        said = capsys.readouterr().out
        assert said.count("\n") == told and ("3" in said and "6" in said) == told


def test_the_trainers_last_line_names_questions_like_those_of_the_training():
    for style, kind, flags in (("sequential_light", "code", "mbppplus"), ("duo", "math", "gsm8k"),
                               ("relay", "math", "relay"), ("duo", "search", "FILE --task")):
        assert f"--dataset {flags}" in flags_to_ask(None, get_style(style).settings, kind)


def test_a_style_file_may_import_the_file_beside_it(tmp_path):
    """Its last style counts, and those that it only imports do not."""
    (tmp_path / "helper.py").write_text("NAME = 'beside'\n")
    (tmp_path / "mine.py").write_text("from dataclasses import replace\nimport helper\nfrom styles."
                                      "relay import relay\nfirst = replace(relay, name='first')\n"
                                      "mine = replace(first, name=helper.NAME)\n"
                                      "from styles.tiny import tiny\n")
    assert get_style(str(tmp_path / "mine.py")).name == "beside"


def test_arguments_that_mean_nothing_are_named():
    with refuses("None"):
        load_mas_system(None)
    with refuses("maths"):
        load_mas_system("tiny", task="maths")
    for name in ("tiny", "relay", "math500"):
        with refuses("-1", "None"):
            get_task(name).load(-1)


def test_fewer_nats_are_better(tmp_path, capsys):
    costs = {"decoded_tokens": 4, "latent_steps": 6, "peak_memory_mb": 1.0, "correct": []}
    lines = [{"style": "", "dataset": "", "method": method, "rounds": 1, "id": i, "outputs": ["x"],
              "nats": nats, "seconds": time, **costs} for i in range(3)
             for method, nats, time in (("text", 2.0, 3.0), ("latent", max(i, 1), 2.0))]
    report.write_report(report.summarise(lines), tmp_path, {})
    said = capsys.readouterr().out
    assert "better in 2, worse in 0" in said and "unparsed" not in said
    assert "text takes 1.50 times as long" in said


# ---- where a style runs: the user decides, then the style, then the environment ------------------

CPU = torch.device("cpu")


@pytest.fixture
def two_threads(monkeypatch):
    """torch starts with two threads, and nothing in the environment says otherwise."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("style, device, threads, variable, chosen, used, line",
                         lines_of("devices.jsonl"))
def test_who_decides(style, device, threads, variable, chosen, used, line, monkeypatch, capsys,
                     two_threads):
    """A variable sets torch's threads before any of our code runs, and does not count after."""
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
        torch.set_num_threads(int(variable))
    assert settle(get_style(style), device, threads) == chosen
    assert torch.get_num_threads() == used
    said = capsys.readouterr().out
    assert line in said and said.count("\n") == bool(line)


def test_a_wrong_setting_is_named(two_threads):
    style = dataclasses.replace(get_style("tiny"), settings={"device": {"cores": 1}})
    with pytest.raises(ValueError, match="style tiny.*cores"):
        settle(style)


@pytest.mark.parametrize("script, options", [
    (evaluate, "--num_samples 2 --method single"),
    (train_inner, "--num_samples 4 --max_steps 1 --held_out 2"),
    (train_outer, "--num_samples 4 --max_steps 1 --warm_start_steps 1 --eval_samples 2 "
                  "--num_recursive_rounds 1")])
def test_every_script_asks_the_style(script, options, run, monkeypatch, tmp_path, two_threads):
    """On a machine with a GPU (so it seems) the tiny system runs on the CPU, with one thread. What
    the user asks for counts more, also where it cannot be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    code, said, _ = run(script, *options.split())
    assert code == 0 and torch.get_num_threads() == 1
    assert said.count("style tiny: device cpu (the style's), CPU threads 1 (the style's); ") == 1
    code, said, [error] = run(script, *options.split(), "--threads", 3, "--device", "cpu",
                              "--compile", 1)
    assert code == 2 and "compile 1" in error
    assert "device cpu (asked for), CPU threads 3 (asked for)" in said


@pytest.mark.parametrize("device", ["cpu", CPU])
@pytest.mark.parametrize("dtype, used", [
    ("auto", torch.float32), ("bfloat16", torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
def test_devices_and_dtypes_may_be_torchs_own(device, dtype, used, capsys):
    """One line says what was picked."""
    assert pick_device(device, dtype) == (CPU, used)
    said = capsys.readouterr().out
    assert "cpu" in said and str(used).removeprefix("torch.") in said and said.count("\n") == 1


def test_a_gpu_is_picked_if_there_is_one(monkeypatch):
    """Under torchrun it is this rank's. bfloat16, but float16 on an old card."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank, capability, dtype in (("", (9, 0), torch.bfloat16), ("1", (7, 5), torch.float16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        if rank:
            monkeypatch.setenv("LOCAL_RANK", rank)
        assert pick_device("auto") == (torch.device("cuda", int(rank or 0)), dtype)
    assert pick_device("cuda:0", "float32") == (torch.device("cuda:0"), torch.float32)


@pytest.mark.parametrize("device, dtype, named", [
    ("toaster", "auto", "toaster"), ("cpu", "float12", "float12"), ("cuda:77", "auto", "cuda:77")])
def test_wrong_devices_and_dtypes_are_named(device, dtype, named):
    with pytest.raises(ValueError, match=named):
        pick_device(device, dtype)


def test_a_clock_and_the_memory():
    with Clock() as clock:
        sum(range(10_000))
    assert 0 < clock.seconds < 10
    assert 10 < peak_memory_mb() < 10**6                 # torch alone takes some 200 MB

"""Who decides where a style runs: the user, then the style, then the environment."""
import dataclasses

import pytest
import torch
from helpers import lines_of

import evaluate
import train_inner
import train_outer
from styles import get_style
from support.devices import Clock, peak_memory_mb, pick_device, settle

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    """torch starts with two threads, and nothing in the environment says otherwise."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("style, device, threads, variable, chosen, used, line",
                         lines_of("devices.jsonl"))
def test_who_decides(style, device, threads, variable, chosen, used, line, monkeypatch, capsys):
    """A variable sets torch's threads before any of our code runs, and does not count after."""
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
        torch.set_num_threads(int(variable))
    assert settle(get_style(style), device, threads) == chosen
    assert torch.get_num_threads() == used
    said = capsys.readouterr().out
    assert line in said and said.count("\n") == bool(line)


def test_a_wrong_setting_is_named():
    style = dataclasses.replace(get_style("tiny"), settings={"device": {"cores": 1}})
    with pytest.raises(ValueError, match="style tiny.*cores"):
        settle(style)


@pytest.mark.parametrize("script, options", [
    (evaluate, "--num_samples 2 --method single"),
    (train_inner, "--num_samples 4 --max_steps 1 --held_out 2"),
    (train_outer, "--num_samples 4 --max_steps 1 --warm_start_steps 1 --eval_samples 2 "
                  "--num_recursive_rounds 1")])
def test_every_script_asks_the_style(script, options, run, monkeypatch, tmp_path):
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

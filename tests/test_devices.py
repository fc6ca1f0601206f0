"""Who decides where a style runs: the user, then the style, then the environment."""
import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from conftest import PROJECT

import evaluate
import train_inner
import train_outer
from recurse import load_mas_system
from styles import get_style
from support import devices
from support.devices import settle

TINY, OTHER = get_style("tiny"), get_style("duo")


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    """torch starts with two threads, and nothing in the environment says otherwise."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("style, device, threads, variable, chosen, used, line", [
    (TINY, "auto", 0, "", "cpu", 1, "style tiny: device cpu (the style's), CPU threads 1 (the "
                                    "style's); its matrices are too small for a GPU"),
    (TINY, "cuda:1", 0, "", "cuda:1", 1, "device cuda:1 (asked for), CPU threads 1 (the style's)"),
    (TINY, "auto", 3, "2", "cpu", 3, "device cpu (the style's), CPU threads 3 (asked for)"),
    (TINY, "cpu", 0, "2", "cpu", 1, "device cpu (asked for), CPU threads 1 (the style's)"),
    (OTHER, "auto", 0, "", "auto", 2, ""),
    (OTHER, "auto", 0, "2", "auto", 2, ""),
    (OTHER, "cuda:0,cuda:1", 0, "", "cuda:0,cuda:1", 2, ""),
    (OTHER, "auto", 4, "", "auto", 4, "style duo: device auto (default), CPU threads 4 (asked ")])
def test_who_decides(style, device, threads, variable, chosen, used, line, monkeypatch, capsys):
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert settle(style, device, threads) == chosen
    assert torch.get_num_threads() == used
    said = capsys.readouterr().out
    assert said.startswith(line) or line in said
    assert said.count("\n") == bool(line)


def test_a_wrong_setting_is_named():
    style = dataclasses.replace(TINY, settings={"device": {"cores": 1}})
    with pytest.raises(ValueError, match="style tiny: .* device, threads and why, not cores"):
        settle(style)


@pytest.mark.parametrize("script, arguments", [
    (evaluate, "--num_samples 2 --method single"),
    (train_inner, "--num_samples 4 --max_steps 1 --held_out 2"),
    (train_outer, "--num_samples 4 --max_steps 1 --warm_start_steps 1 --eval_samples 2 "
                  "--num_recursive_rounds 1")])
def test_every_script_asks_the_style(script, arguments, monkeypatch, tmp_path, capsys):
    """On a machine with a GPU (so it seems) the tiny system runs on the CPU, with one thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(sys, "argv", [script.__name__, *arguments.split()])
    script.main()
    said = capsys.readouterr().out
    assert said.count("style tiny: device cpu (the style's), CPU threads 1 (the style's); ") == 1
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)
    monkeypatch.setattr(sys, "argv", [script.__name__, *arguments.split(), "--threads", "3",
                                      "--device", "cpu", "--compile", "1"])
    with pytest.raises(ValueError, match="compile 1 is for a GPU"):
        script.main()
    assert "device cpu (asked for), CPU threads 3 (asked for)" in capsys.readouterr().out


def test_threads_of_the_environment_do_not_count():
    """On a machine of 16 cores, torch begins with as many threads."""
    done = subprocess.run([sys.executable, "evaluate.py", "--show", "1"], cwd=PROJECT, text=True,
                          capture_output=True, check=True,
                          env={**os.environ, "OMP_NUM_THREADS": "16"})
    assert "CPU threads 1 (the style's); " in done.stdout


def test_a_system_asks_its_style(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    mas = load_mas_system("tiny")
    assert {agent.device.type for agent in mas.agents.values()} == {"cpu"}
    assert torch.get_num_threads() == 1 and "the style's" in capsys.readouterr().out
    load_mas_system("tiny", threads=2)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("dtype, flags, said", [
    ("auto", ["fma", "avx512_bf16"], True), ("auto", ["fma"], False),
    ("float32", ["avx512_bf16"], False), ("bfloat16", ["avx512_bf16"], False)])
def test_a_processor_with_bfloat16_is_named(dtype, flags, said, monkeypatch, capsys):
    """float32 stays what auto means on a CPU."""
    monkeypatch.setattr(devices, "cpu_flags", lambda: flags)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert devices.pick_device("auto", dtype)[1] == getattr(torch, dtype.replace("auto", "float32"))
    assert ("--dtype bfloat16" in capsys.readouterr().out) == said


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_devices_and_dtypes_may_be_torchs_own(device, dtype):
    assert devices.pick_device(device, dtype) == (torch.device("cpu"), torch.bfloat16)

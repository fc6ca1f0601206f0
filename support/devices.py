"""Where the frozen models run, and in which precision. This is decided here and nowhere else.

Frozen weights are only ever read, so half precision halves their memory and their reading time. The
links are trained, so they stay in float32 (agents.apply_link runs them under autocast).
"""
import os
import re
from pathlib import Path

import torch

from support.errors import need

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device="auto", dtype="auto"):
    """(torch.device, torch.dtype) of the frozen models, printed with the reason.

    auto: the first GPU if there is one (under torchrun this rank's GPU), else the CPU; bfloat16 on
    a GPU, float16 on a card without bfloat16, float32 on a CPU. Raises ValueError for a device that
    is not there."""
    asked, gpus = str(device), torch.cuda.device_count()
    if asked in ("auto", "cuda") and gpus:
        asked = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    why = "" if str(device) != "auto" else (
        " (no GPU found)" if asked == "auto" else " (a GPU is there)")
    need(re.fullmatch(r"auto|cpu|cuda(:\d+)?", asked), f"unknown device '{device}': use auto, cpu, "
         "cuda or cuda:N")
    device = torch.device("cpu" if asked == "auto" else asked)
    need(device.type == "cpu" or (device.index or 0) < gpus, f"there is no {device}: torch sees "
         f"{gpus} GPUs on this machine")
    dtype = str(dtype).removeprefix("torch.")                  # a torch.dtype will do as well
    if dtype == "auto":
        dtype = "float32"
        if why and device.type == "cpu" and "avx512_bf16" in cpu_flags():
            why = " (no GPU found; this processor is 2 to 3 times as fast with --dtype bfloat16)"
        if device.type == "cuda":              # cards before compute capability 8 emulate bfloat16
            dtype = "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    need(dtype in DTYPES, f"unknown dtype '{dtype}': choose auto, {', '.join(DTYPES)}")
    print(f"device {device}{why}, frozen models in {dtype}, links in float32", flush=True)
    return device, DTYPES[dtype]


def cpu_flags():
    """What the processor can do, in Linux's words. Nothing on other systems."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    return text.partition("flags")[2].partition("\n")[0].split()


def settle(style, device="auto", threads=0):
    """The device that `style` runs on, as pick_device takes it. Sets the number of CPU threads.

    A flag counts first. Then the style's settings count, under "device":

        settings={"device": {"device": "cpu", "threads": 1, "why": "its matrices are .."}}

    The variable OMP_NUM_THREADS does not count against a style: on a machine of 16 cores it is
    often set to 16, and a step of tiny's training takes 2.3 s then, in place of .4 s.
    Device and threads are settled one by one: on a GPU, tiny keeps its single thread. pick_device
    and torch choose what nobody asks for. One line says what was chosen, and by whom."""
    own = style.settings.get("device", {})
    need(own.keys() <= {"device", "threads", "why"}, f"style {style.name}: its settings of the "
         f"device are device, threads and why, not {', '.join(own)}")
    whose = "asked for" if str(device) != "auto" else (
        "the style's" if "device" in own else "default")
    device = own.get("device", "auto") if str(device) == "auto" else str(device)
    who = "asked for" if threads else "the style's" if "threads" in own else "default"
    if threads or "threads" in own:
        torch.set_num_threads(threads or own["threads"])
    if own or threads:
        why = f"; {own['why']}" if "why" in own and "the style's" in (whose, who) else ""
        print(f"style {style.name}: device {device} ({whose}), CPU threads "
              f"{torch.get_num_threads()} ({who}){why}", flush=True)
    return device

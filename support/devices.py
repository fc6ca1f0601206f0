"""Where the frozen models run, and in which precision. This is decided here and nowhere else.

Frozen weights are only ever read, so half precision halves their memory and their reading time. The
links are trained, so they stay in float32 (agents.apply_link runs them under autocast).
"""
import os
import re
import sys
import time

import torch

from support.errors import need

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device="auto", dtype="auto"):
    """(torch.device, torch.dtype) of the frozen models, printed with the reason.

    auto: the first GPU if there is one (under torchrun this rank's GPU), else the CPU; bfloat16 on
    a GPU, float16 on a card without bfloat16, float32 on a CPU. Raises ValueError for a device that
    is not there."""
    asked, gpus = str(device), torch.cuda.device_count()
    why = "" if asked != "auto" else " (a GPU is there)" if gpus else " (no GPU found)"
    if asked in ("auto", "cuda") and gpus:
        asked = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    need(re.fullmatch(r"auto|cpu|cuda(:\d+)?", asked), f"unknown device '{device}': use auto, cpu, "
         "cuda or cuda:N")
    device = torch.device("cpu" if asked == "auto" else asked)
    need(device.type == "cpu" or (device.index or 0) < gpus, f"there is no {device}: torch sees "
         f"{gpus} GPUs on this machine")
    dtype = str(dtype).removeprefix("torch.")                  # a torch.dtype will do as well
    if dtype == "auto":                        # cards before compute capability 8 emulate bfloat16
        dtype = "float32" if device.type == "cpu" else (
            "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16")
    need(dtype in DTYPES, f"unknown dtype '{dtype}': choose auto, {', '.join(DTYPES)}")
    print(f"device {device}{why}, frozen models in {dtype}, links in float32", flush=True)
    return device, DTYPES[dtype]


def settle(style, device="auto", threads=0):
    """The device for `style`: as asked, or as the style sets it. Sets the number of CPU threads.

    A flag counts first. Then the style's settings count, under "device":

        settings={"device": {"device": "cpu", "threads": 1, "why": "its matrices are .."}}

    The variable OMP_NUM_THREADS does not count against a style: on a machine of 16 cores it is
    often set to 16, and a step of tiny's training takes 2.3 s then, instead of .4 s.
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


# ---- time and memory ----------------------------------------------------------------------------

def cards():
    """The GPUs that this process has put something on. (Before CUDA is initialised there are none,
    and asking for their memory does not initialise it.)"""
    return [card for card in range(torch.cuda.device_count())
            if torch.cuda.max_memory_allocated(card)]


class Clock:
    """The seconds of a with-block.

        with Clock() as clock:
            texts, run = mas.respond(questions)
        print(clock.seconds)

    A GPU works on while Python goes ahead. So the clock waits for it, before and after."""

    def __enter__(self):
        for card in cards():
            torch.cuda.synchronize(card)
        self.started = time.perf_counter()
        return self

    def __exit__(self, problem, *_):
        for card in cards() if problem is None else ():     # a failed card cannot be waited for
            torch.cuda.synchronize(card)
        self.seconds = time.perf_counter() - self.started


def reset_peak_memory():
    """Begin to measure peak memory anew, on all GPUs."""
    for card in cards():
        torch.cuda.reset_peak_memory_stats(card)


def peak_memory_mb():
    """Peak memory: of the GPUs since the last reset, on a CPU of the whole process so far."""
    if cards():
        return sum(torch.cuda.max_memory_allocated(card) for card in cards()) / 2**20
    import resource                    # Windows does not have this module
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)

"""Several processes, called ranks, that share the work. torchrun starts them, one for each GPU.

    torchrun --nproc_per_node 2 train_outer.py          rank 0 and rank 1 of 2

Without torchrun there is one process, and it is rank 0 of 1. Rank 0 alone prints results and writes
the final files. Other ranks write only their own share of the work.
"""
import datetime
import os

import torch


def rank():
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def ranks():
    """How many processes share the work."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join_ranks():
    """Meet the other ranks, and take this rank's card."""
    if ranks() == 1:
        return
    # NCCL carries tensors of GPUs only, and Gloo those of CPUs. One system may have both: on a
    # machine with GPUs, the tiny agents still run on the CPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    card = int(os.environ.get("LOCAL_RANK", 0))
    if card < torch.cuda.device_count():
        torch.cuda.set_device(card)
    # A day, because one rank may wait long for another one's share of an evaluation.
    torch.distributed.init_process_group(backend, timeout=datetime.timedelta(days=1))


def wait_for_ranks():
    """Wait until all ranks have come this far."""
    if ranks() > 1:
        # Not barrier(): on a machine with GPUs it runs on the cards, and two ranks may share one.
        torch.distributed.all_reduce(torch.zeros(1))


def leave_ranks():
    """Say goodbye to the other ranks, at the end of a run."""
    if ranks() > 1:
        torch.distributed.destroy_process_group()

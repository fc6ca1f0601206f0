"""Items in batches, with a progress bar, and how to know that a batch was too large."""
import torch
from tqdm import tqdm

from support.errors import need
from support.ranks import rank


def chunks(items, size):
    """Items in the fewest batches of at most `size` items. Their sizes differ by at most 1."""
    count = -(-len(items) // size)
    return [items[len(items) * i // count: len(items) * (i + 1) // count] for i in range(count)]


def by_length(lengths, size):
    """The numbers of items of these lengths, in batches of items of like length.

    A batch is as long as its longest item, and the rest is padding. So little is wasted."""
    return chunks(sorted(range(len(lengths)), key=lengths.__getitem__), size)


def others(items):
    """For each item of a batch, the number of another one: the nearest before it that is not equal
    to it. (Before the first one stands the last one.) Raises ValueError if all are equal."""
    found = [next((other for other in range(b - 1, b - len(items), -1)      # -1 is the last one
                   if items[other] != item), None) for b, item in enumerate(items)]
    need(None not in found, "shuffle needs two different questions in a batch (batch_size)")
    return found


def progress(items, name, **settings):
    """The items with a progress bar, on the rank that prints."""
    return tqdm(items, desc=name, mininterval=1, disable=rank() > 0, **settings)


def out_of_memory(problem):
    """Whether an exception says that memory is too small, of a card or of this machine."""
    return isinstance(problem, torch.OutOfMemoryError) or any(
        sign in str(problem) for sign in ("CUDA error: out of memory", "DefaultCPUAllocator",
                                          "CUBLAS_STATUS_ALLOC_FAILED"))

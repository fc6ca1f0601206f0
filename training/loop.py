"""What the training loops of train_inner.py and train_outer.py share: plain functions, and a State.

The loop itself stands in the scripts, from the rows of a step to the saved state.

The gradient of a step is that of the mean over all tokens of all its micro-batches on all ranks,

    g = sum_b tokens_b g_b / sum_b tokens_b

so accumulating micro-batches, or adding GPUs, is the same as a larger batch. (Nearly so with a loss
for every role, which is a mean over a micro-batch's own tokens.) On a GPU a step takes nearly as
long for 1 row as for 32, so give it many rows at once: --batch_size 32 --grad_accum_steps 1.

There is no DDP wrapper: DDP expects every weight to be used once in a graph, but a link is used R
times, and some links are not used at all if R = 1. Links stay in float32 whatever the models'
dtype: AdamW's updates are often smaller than a step of bfloat16, and would be lost. A gradient
longer than max_grad_norm is scaled down to that length. This is needed because the backward pass
multiplies many Jacobians. Some steps have gradients 100 times as long.

Resuming. state.pt holds links, optimizer, schedule, scaler and step. The data need no state: which
rows make a step follows from the seed and the step alone.
"""
import functools
import json
import math
import random
import signal
import sys
from pathlib import Path

import torch
import transformers

from checkpoints import link_task
from support.batches import progress
from support.errors import blame, need, need_same, need_saved
from support.files import (RESULTS, move_aside, read_json, read_lines, write_json, write_lines,
                           write_whole)
from support.ranks import rank, ranks

MAX_SKIPPED = 10       # steps in a row without a finite loss and gradient, before training gives up
# What a training writes to its folder, beside links. (Own texts stay: the next training uses them.)
WRITTEN = ("train_args.json", "log.jsonl", "state.pt", "readability.json", "gradients.png",
           "outerlink_config.json", *RESULTS)
# Flags that a resumed run may change, because they do not change what is learnt.
FREE = ("resume", "save_dir", "log_every", "save_steps", "device", "threads", "compile",
        "eval_samples")


# ---- the rows of a step -------------------------------------------------------------------------

def rows_per_step(args):
    """How many rows make a step: those of all micro-batches on all ranks."""
    return args.batch_size * args.grad_accum_steps * ranks()


def number_of_steps(args, count):
    """--max_steps, or as many steps as --num_train_epochs over `count` rows take."""
    return args.max_steps or math.ceil(count * args.num_train_epochs / rows_per_step(args))


def micro_batches(items, step, args):
    """This rank's items of step 0, 1, .., as lists of --batch_size items.

    The items come from seeded shuffles, one epoch after the other. So they depend on seed and step
    alone, and a resumed run sees the same data."""
    size = rows_per_step(args)
    mine = range(step * size, (step + 1) * size)[rank()::ranks()]
    chosen = [items[shuffled(len(items), args.seed, i // len(items))[i % len(items)]] for i in mine]
    return [chosen[i:i + args.batch_size] for i in range(0, len(chosen), args.batch_size)]


@functools.lru_cache(maxsize=2)
def shuffled(length, seed, epoch):
    """The order of the items in one epoch."""
    order = list(range(length))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)
    return order


# ---- parts of a step ----------------------------------------------------------------------------

def new_schedule(optimizer, args, steps):
    """The learning rate by steps: a linear warm-up, then a cosine down to 0, or constant.

        lr(i) = lr min(1, i / warmup) (1 + cos(pi max(0, i - warmup) / (steps - warmup))) / 2

    The log's line for step s, counted from 1, has lr(s): the rate of the step after it."""
    kind = "constant_with_warmup" if args.lr_scheduler_type == "constant" else "cosine"
    return transformers.get_scheduler(kind, optimizer, min(args.warmup_steps, steps), steps)


def new_scaler(links, dtype):
    """The scaler of the loss, for models in fp16. With any other dtype it does nothing.

    Small gradients are zero in fp16. So the loss is scaled up before backward, and gradients are
    scaled down before the update."""
    device = next(links.parameters()).device.type
    return torch.amp.GradScaler(device, init_scale=2.0**10, enabled=dtype == torch.float16)


def mean_over_tokens(links, state):
    """Turn the step's sums into means: of gradients, and in state.means of the logged values.

    The sums are over the micro-batches of this rank. Here the other ranks' are added. A NaN on one
    rank becomes a NaN on all of them, so all skip the step together."""
    gradients = [weight.grad for weight in links.parameters() if weight.grad is not None]
    state.sums["stops"] = float(state.asked_to_stop)        # if one rank is told to stop, all stop
    if ranks() > 1:
        # With R = 1 the feedback link is unused and its gradient is None, on every rank alike. It
        # stays None: AdamW would move a link with a zero gradient by its momentum.
        device = next(links.parameters()).device
        sums = torch.tensor(list(state.sums.values()), device=device)
        for tensor in (sums, *gradients):
            torch.distributed.all_reduce(tensor)
        state.sums = dict(zip(state.sums, sums.tolist()))
    state.stops = state.sums.pop("stops") > 0
    tokens = state.sums.pop("tokens")
    for gradient in gradients:
        gradient /= tokens
    state.means, state.sums = {name: total / tokens for name, total in state.sums.items()}, {}


# ---- the state of a run -------------------------------------------------------------------------

class State:
    """Where a training run stands: it is saved, resumed and logged.

    args: the flags of flags.add_training_flags; train_args.json, log.jsonl and state.pt go to
    --save_dir. contents: the fingerprint of what is trained on, which a resumed run compares.
    notes: more entries of train_args.json. parts: the objects with a state_dict, `links` and
    `schedule` among them."""

    def __init__(self, args, total_steps, contents="", notes=None, **parts):
        self.args, self.parts, self.total_steps = args, parts, total_steps
        self.done, self.skipped, self.skipped_in_a_row = 0, 0, 0
        # Ctrl-C on this rank, at any moment; and what all ranks agree on, once in each step.
        self.asked_to_stop = self.stops = False
        self.folder, self.sums, self.means, self.logged = Path(args.save_dir), {}, {}, {}
        if ranks() > 1:
            for weight in parts["links"].parameters():    # all ranks start from the same links
                torch.distributed.broadcast(weight.data, 0)
        self.settings = {name: value for name, value in vars(args).items() if name not in FREE}
        # The number of ranks decides which rows make a step.
        self.settings.update(ranks=ranks(), links_prompts_data=contents)
        if args.resume:
            self.load()
        elif rank() == 0:
            move_training_aside(self.folder, args.mas_task)
            write_json(self.folder / "train_args.json", {**vars(args), **(notes or {})})
            write_lines(self.folder / "log.jsonl", [])

    def steps(self, name):
        """The numbers of the steps still to do, with a progress bar.

        Ctrl-C and SIGTERM end the run after the step that is running, with its state saved."""
        before = {number: signal.signal(number, self.stop)
                  for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield from progress(range(self.done, self.total_steps), name, initial=self.done,
                                total=self.total_steps)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self, *_):
        """Stop after this step. Asked twice, stop at once."""
        if self.asked_to_stop:
            raise KeyboardInterrupt
        self.asked_to_stop = True
        print("stopping after this step (once more: at once)", file=sys.stderr, flush=True)

    def add(self, weight, **values):
        """Add a micro-batch's mean values to the step's sums. weight: for how many tokens."""
        for name, value in {"tokens": 1.0, **values}.items():
            value = value.item() if torch.is_tensor(value) else value
            self.sums[name] = self.sums.get(name, 0.0) + weight * value

    def end_step(self, norm, finite):
        """Log the step, save the state every --save_steps, and stop if asked.

        norm: of the gradient before clipping. finite: False if the step was skipped. Raises
        ValueError after MAX_SKIPPED such steps in a row."""
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.done += 1
        self.logged = {"step": self.done, **self.means, "grad_norm": norm,
                       "lr": self.parts["schedule"].get_last_lr()[0], "skipped": self.skipped}
        ends, gives_up = self.done == self.total_steps, self.skipped_in_a_row == MAX_SKIPPED
        if rank() == 0 and (ends or gives_up or self.done % self.args.log_every == 0):
            with open(self.folder / "log.jsonl", "a") as log:
                log.write(json.dumps({name: value if math.isfinite(value) else None
                                      for name, value in self.logged.items()}) + "\n")
        # At the end the script writes the links first, which are smaller, and then the state.
        every = self.args.save_steps or self.total_steps
        if self.stops or self.done % every == 0 and not ends:
            self.save()
        if self.stops:
            raise KeyboardInterrupt
        need(not gives_up, f"the loss or its gradient was not finite {MAX_SKIPPED} steps in a row: "
             "begin again with a lower learning rate")

    def save(self):
        """Write state.pt: everything that a resumed run needs."""
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        state = {"settings": self.settings, "done": self.done, "skipped": self.skipped, **parts}
        if rank() == 0:
            write_whole(self.folder / "state.pt", lambda part: torch.save(state, part))

    def load(self):
        """Go on from state.pt. Raises FileNotFoundError if it is missing, ValueError if it is
        damaged or of a run with other flags."""
        path = need_saved(self.folder / "state.pt")
        with blame(f"{path} is not a state of this script, or damaged"):
            state = torch.load(path, map_location="cpu", weights_only=True)
            theirs, saved = dict(state["settings"]), {name: state[name] for name in self.parts}
            self.done, self.skipped = state["done"], state["skipped"]
        need_same(path, theirs, self.settings)
        with blame(f"{path} is not a state of these links"):
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
        if rank() == 0:                       # the log may be ahead of the state: cut it back
            log = self.folder / "log.jsonl"
            lines = [line for line in read_lines(log) if line.get("step", 1e9) <= self.done]
            write_lines(log, lines)
            self.logged = lines[-1] if lines else {}


def move_training_aside(folder, task):
    """Move an earlier training in this folder aside. But an agent may have two inner links in one
    folder, for code and for all other questions. A link for another task is not moved."""
    manifest = folder / "outerlink_config.json"
    with blame(f"{manifest} is not {{adapters: [{{filename: name}}]}}"):
        outer = [Path(link["filename"]).name for link in read_json(manifest).get("adapters", [])]
    own = f"adapter({link_task(task)})*"
    others = set(folder.glob("adapter(*")) - set(folder.glob(own))
    inner = [own] if others else ["adapter*", "innerlink_config.json"]
    move_aside(folder, [*WRITTEN, *outer, *inner])

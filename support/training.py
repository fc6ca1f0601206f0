"""The inside of both training loops: batches, the optimizer's step, the log, and resuming.

    training = Training(links, args, learning_rate, folder, len(rows), dtype)
    for step in training.steps("outer links"):
        for batch in training.batches(rows, step):      # micro-batches, this rank's share of them
            with training.halved_if_full():             # fewer rows at once on a card that is full
                learn_from(batch, training)             # training.backward(loss, tokens)
        training.step()                                 # clip, update, log, save

The gradient of a step is that of the mean over all tokens of all its micro-batches on all ranks,

    g = sum_b tokens_b g_b / sum_b tokens_b

so accumulating micro-batches, or adding GPUs, is the same as a larger batch. (Nearly so with a loss
for every role, which is a mean over a micro-batch's own tokens.) On a GPU a step takes nearly as
long for 1 row as for 32. So all rows of a step are one micro-batch there, and half as many whenever
the card is too full for that. On a CPU a micro-batch has batch_size rows.

There is no DDP wrapper: DDP expects every weight to be used once in a graph, but a link is used R
times, and some links are not used at all if R = 1.

Clipping. A gradient longer than max_grad_norm is scaled down to that length. Backward through R
rounds of rollouts multiplies many Jacobians, so single steps have gradients 100 times as long.

Links stay in float32 whatever the models' dtype: AdamW's updates are often smaller than a step of
bfloat16, and would be lost.

Resuming. state.pt holds links, optimizer, schedule, scaler and step. The data need no state: which
rows make a step follows from the seed and the step alone.
"""
import contextlib
import functools
import json
import math
import random
import signal
import sys
import threading
from pathlib import Path

import torch
import transformers

from support import flags
from support.checkpoints import link_task
from support.errors import blame, need, need_same, need_saved
from support.files import RESULTS, move_aside, read_json, write_json, write_whole
from support.flags import RANK, RANKS

PARTS = ("links", "optimizer", "schedule", "scaler")      # of a Training, that state.pt holds
MAX_SKIPPED = 10       # steps in a row without a finite loss and gradient, before training gives up
# What a training writes to its folder, beside links. (Own texts stay: the next training uses them.)
WRITTEN = ("train_args.json", "log.jsonl", "state.pt", "readability.json", "gradients.png",
           "outerlink_config.json", *RESULTS)
# Flags that a resumed run may change, because they do not change what is learnt.
FREE = ("resume", "save_dir", "log_every", "save_steps", "device", "threads", "compile",
        "eval_samples")


def batch_of(items, step, size, seed):
    """The batch of step 0, 1, ..: from seeded shuffles of the items, one epoch after the other. It
    depends on its arguments alone, so a resumed run sees the same data."""
    places = range(step * size, (step + 1) * size)
    return [items[shuffled(len(items), seed, place // len(items))[place % len(items)]]
            for place in places]


@functools.lru_cache(maxsize=2)
def shuffled(length, seed, epoch):
    """The order of the items in one epoch."""
    order = list(range(length))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)
    return order


class Training:
    """AdamW over links, with warm-up and cosine, clipping, fp16 scaling, ranks and resuming.

    args: the flags of flags.add_training_flags. folder: where train_args.json, log.jsonl and
    state.pt go. items: how many rows make an epoch. dtype: of the frozen models. contents: the
    fingerprint of what is trained on, which a resumed run compares. notes: what train_args.json
    says beside the flags."""

    def __init__(self, links, args, learning_rate, folder, items, dtype=torch.float32, contents="",
                 **notes):
        self.links, self.args, self.folder = links.requires_grad_(True), args, Path(folder)
        self.done, self.skipped, self.skipped_in_a_row, self.stopping = 0, 0, 0, False
        self.per_step = args.batch_size * args.grad_accum_steps * RANKS       # rows of all ranks
        self.total_steps = args.max_steps or math.ceil(
            items * args.num_train_epochs / self.per_step)
        on_gpu = next(links.parameters()).device.type == "cuda"
        self.at_once = args.batch_size * (args.grad_accum_steps if on_gpu else 1)
        self.full = False                 # the card was too full for the last micro-batch
        self.logged = {}                  # the last step's values
        self.sums = {"tokens": 0.0}       # over this step's micro-batches: sum_b tokens_b value_b
        self.weights = list(links.parameters())
        if RANKS > 1:
            for weight in self.weights:                   # all ranks start from the same links
                torch.distributed.broadcast(weight.data, 0)
        self.optimizer = torch.optim.AdamW(self.weights, lr=learning_rate, betas=(0.9, 0.95),
                                           weight_decay=args.weight_decay, fused=True)
        self.schedule = transformers.get_scheduler(
            "constant_with_warmup" if args.lr_scheduler_type == "constant" else "cosine",
            self.optimizer, min(args.warmup_steps, self.total_steps), self.total_steps)
        # Small gradients are zero in fp16. So the loss is scaled up before backward, and gradients
        # are scaled down before the update. With any other dtype the scaler does nothing.
        self.scaler = torch.amp.GradScaler(self.weights[0].device.type, init_scale=2.0**10,
                                           enabled=dtype == torch.float16)
        self.settings = {name: value for name, value in vars(args).items() if name not in FREE}
        self.settings["ranks"] = RANKS                    # they decide which rows make a step
        self.settings["links_prompts_data"] = contents
        if args.resume:
            self.load()
        elif RANK == 0:
            self._move_aside()
            write_json(self.folder / "train_args.json", {**vars(args), **notes})
            write_whole(self.folder / "log.jsonl", lambda part: part.write_text(""))

    def _move_aside(self):
        """Move an earlier training in this folder aside. But an agent may have two inner links in
        one folder, for code and for all other questions. A link for another task stays."""
        manifest = self.folder / "outerlink_config.json"
        with blame(f"{manifest} is not {{adapters: [{{filename: name}}]}}"):
            outer = [Path(link["filename"]).name
                     for link in read_json(manifest).get("adapters", [])]
        own = f"adapter({link_task(self.args.mas_task)})*"
        others = set(self.folder.glob("adapter(*")) - set(self.folder.glob(own))
        inner = [own] if others else ["adapter*", "innerlink_config.json"]
        move_aside(self.folder, [*WRITTEN, *outer, *inner])

    def steps(self, name):
        """The numbers of the steps still to do, with a progress bar. Then the links are frozen.

        Ctrl-C and SIGTERM end the run after the step that is running, with its state saved."""
        main = threading.current_thread() is threading.main_thread()     # others get no signals
        before = {number: signal.signal(number, self.stop)
                  for number in (signal.SIGINT, signal.SIGTERM) if main}
        try:
            yield from flags.progress(range(self.done, self.total_steps), name, initial=self.done,
                                      total=self.total_steps)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        self.links.requires_grad_(False)

    def stop(self, *_):
        """Stop after this step. Asked twice, stop at once."""
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        print("stopping after this step (once more: at once)", file=sys.stderr, flush=True)

    def batches(self, items, step):
        """This rank's rows of a step, `at_once` rows at a time. They begin anew if the card was too
        full for the last ones."""
        rows, begin = batch_of(items, step, self.per_step, self.args.seed)[RANK::RANKS], 0
        while begin < len(rows):
            yield rows[begin:begin + self.at_once]
            begin += self.at_once
            if self.full:                                # what it left of this step is not whole
                torch.cuda.empty_cache()
                self.optimizer.zero_grad()
                self.sums, self.full, begin = {"tokens": 0.0}, False, 0

    @contextlib.contextmanager
    def halved_if_full(self):
        """Take a micro-batch. If there is too little memory on the card, halve all micro-batches
        from here on. What runs in here has to be one function, so that its tensors are freed when
        it fails.

        Raises ValueError if there is too little memory for one row."""
        try:
            yield
        except RuntimeError as problem:
            if not flags.out_of_memory(problem):
                raise
            need(self.at_once > 1, "the card is too full for a single row: see --latent_length, "
                 "--max_length and --gradient_checkpointing")
            self.at_once, self.full = self.at_once // 2, True
            print(f"rank {RANK}: the card is too full, so a step takes {self.at_once} rows at "
                  "once from here on", file=sys.stderr, flush=True)

    def backward(self, loss, tokens, **values):
        """Add the gradient of one micro-batch's loss, a mean over so many tokens.

        `values` go into the log, as means over all tokens. Returns the factor by which gradients
        are too large at this moment, before step() divides by it."""
        weight = tokens / 1000            # near 1, so that scaled fp16 gradients stay in range
        if loss.requires_grad:
            self.scaler.scale(loss * weight).backward()
        self.sums["tokens"] += weight
        self.note(tokens, loss=loss, **values)
        return weight * self.scaler.get_scale()

    def note(self, tokens, **values):
        """Add values of a micro-batch with so many tokens to the log's means."""
        for name, value in values.items():
            value = value.item() if torch.is_tensor(value) else value
            self.sums[name] = self.sums.get(name, 0.0) + tokens / 1000 * value

    def step(self):
        """Update the links, or skip the step if the loss or a gradient is not finite.

        A NaN on one rank makes the summed gradient NaN on every rank, so all of them skip the step
        together."""
        self._share()
        self.scaler.unscale_(self.optimizer)
        limit = self.args.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.weights, limit).item()
        if math.isfinite(norm) and math.isfinite(self.sums["loss"]):
            self.scaler.step(self.optimizer)
            self.schedule.step()
            self.skipped_in_a_row = 0
        else:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        self.scaler.update()                             # fp16: an overflow lowers the scale
        self.optimizer.zero_grad()
        self.done += 1
        self._log(norm)
        # At the end the script writes the links first, which are smaller, and then the state.
        every, ends = self.args.save_steps or self.total_steps, self.done == self.total_steps
        if self.stopping or self.done % every == 0 and not ends:
            self.save()
        if self.stopping:
            raise KeyboardInterrupt
        need(self.skipped_in_a_row < MAX_SKIPPED, f"the loss or its gradient was not finite "
             f"{MAX_SKIPPED} steps in a row: begin again with a lower learning rate")

    def _share(self):
        """Sum the gradients and the logged values over the ranks, and divide by all tokens."""
        if RANKS > 1:
            self.sums["stopping"] = float(self.stopping)      # told on one rank, all of them stop
            sums = torch.tensor(list(self.sums.values()), device=self.weights[0].device)
            # With R = 1 the feedback link is unused and its gradient is None, on every rank alike.
            # It stays None: AdamW would move a link with a zero gradient by its momentum.
            for tensor in (sums, *(w.grad for w in self.weights if w.grad is not None)):
                torch.distributed.all_reduce(tensor)
            self.sums = dict(zip(self.sums, sums.tolist()))
            self.stopping = self.sums.pop("stopping") > 0
        for weight in self.weights:
            if weight.grad is not None:
                weight.grad /= self.sums["tokens"]

    def _log(self, norm):
        """Write a line of log.jsonl, every log_every steps and at the end."""
        tokens = self.sums.pop("tokens")
        means = {name: total / tokens for name, total in self.sums.items()}
        self.logged = {"step": self.done, **means, "grad_norm": norm,
                       "lr": self.schedule.get_last_lr()[0], "skipped": self.skipped}
        self.sums = {"tokens": 0.0}
        ends = self.done == self.total_steps or self.skipped_in_a_row == MAX_SKIPPED
        if RANK == 0 and (ends or self.done % self.args.log_every == 0):
            with open(self.folder / "log.jsonl", "a") as log:
                log.write(json.dumps({name: value if math.isfinite(value) else None
                                      for name, value in self.logged.items()}) + "\n")

    def summary(self):
        """How the run went, in a few words."""
        return f"{self.total_steps} steps, {self.skipped} skipped"

    def save(self):
        """Write state.pt: everything that a resumed run needs."""
        parts = {name: getattr(self, name).state_dict() for name in PARTS}
        state = {"settings": self.settings, "done": self.done, "skipped": self.skipped, **parts}
        if RANK == 0:
            write_whole(self.folder / "state.pt", lambda part: torch.save(state, part))

    def load(self):
        """Go on from state.pt. Raises FileNotFoundError if it is missing, ValueError if it is
        damaged or of a run with other flags."""
        path = need_saved(self.folder / "state.pt")
        with blame(f"{path} is not a state of this script, or damaged"):
            state = torch.load(path, map_location="cpu", weights_only=True)
            theirs, parts = dict(state["settings"]), [state[name] for name in PARTS]
            self.done, self.skipped = state["done"], state["skipped"]
        need_same(path, theirs, self.settings)
        with blame(f"{path} is not a state of these links"):
            for name, part in zip(PARTS, parts):
                getattr(self, name).load_state_dict(part)
        if RANK == 0:                         # the log may be ahead of the state: cut it back
            log = self.folder / "log.jsonl"
            lines = [line + "\n" for line in log.read_text().split("\n")
                     if line.endswith("}") and json.loads(line)["step"] <= self.done]
            write_whole(log, lambda part: part.write_text("".join(lines)))
            self.logged = json.loads(lines[-1]) if lines else {}

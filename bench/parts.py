"""What bench/card.py measures on a card. Each part is one process:

    python -m bench.parts step out/card            or with --cpu, in small

The parts step .. memory are methods of Card, as the sections of bench/__main__.py are methods of
Bench, and Card takes four sections from there. Reference and ours mean what the part says. Each
figure is added to the file lines.jsonl as soon as it is there, so a part that is stopped loses
nothing.

Shapes: B questions, T tokens of a prompt, m latent thoughts, R rounds, n tokens of a text, d width.
"""
import argparse
import contextlib
import io
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

import train_outer
from bench.__main__ import STEPS, TINY, Bench
from bench.both_sides import apart, gradient, our_losses, our_messages, read
from bench.library import WAYS, library_agent
from bench.models import model_memory, size_of, some_texts
from bench.reading import reading_agent
from link import InnerLink
from support import flags
from support.devices import Clock, peak_memory_mb, reset_peak_memory
from train_inner import inner_loss

# Sizes on a card, and in small. T, m, B, R, n and rollouts are those of bench/__main__.py.
#     step_T, batches   tokens and questions before a step
#     prompts           (B, T, lengths are rounded to)
#     rows, texts       of a step of outer and of inner training
CARD = SimpleNamespace(T=128, long_T=1024, m=4, B=4, R=2, n=32, layers=0, step_T=256,
                       batches=(1, 32, 8), rollouts=[(256, 48, 1), (256, 48, 32)], rows=8, texts=32,
                       prompts=[(1, 256, 64), (1, 300, 64), (1, 300, 128), (4, 256, 64),
                                (4, 300, 128)])
SMALL = SimpleNamespace(**{**vars(TINY), "step_T": 8, "batches": (1, 3), "rows": 2, "texts": 2,
                           "prompts": [(1, 12, 8), (2, 16, 8)]})
FULL = 64 * 2**20      # bytes of a card on which the tiny system's training has no room


class Card(Bench):
    """The parts. Their figures go to the file lines.jsonl of a folder."""

    def __init__(self, part, folder, cpu):
        self.part, self.file = part, Path(folder) / "lines.jsonl"
        super().__init__(argparse.Namespace(
            dims="tiny" if cpu else "qwen3-1.7b", layers=0, device="cpu" if cpu else "cuda",
            dtype="auto", threads=0, repeats=1 if cpu else 3, compile=None))
        self.size = SMALL if cpu else CARD

    def keep(self, text, **figures):
        """Print a line, and write its figures."""
        super().keep(text, **figures)
        with open(self.file, "a") as file:
            file.write(json.dumps({"part": self.part, **figures}) + "\n")

    def error(self, case, results, exact):
        """Bench.error. Products of the judge in float32 are tf32 here, 8 times as exact as
        bfloat16: at 32 questions the judge would else take half a minute."""
        torch.set_float32_matmul_precision("high")
        try:
            return super().error(case, results, exact)
        finally:
            torch.set_float32_matmul_precision("highest")

    def attempt(self, case, *sides, **options):
        """compare(), where a failure is a figure too, and the next case is still measured."""
        try:
            self.compare(case, *sides, **options)
        except Exception as problem:         # a compiler and a driver fail in errors of any class
            says = " ".join(f"{type(problem).__name__}: {problem}".split())[:300]
            self.keep(f"{case} FAILED: {says}", case=case, why=says)

    @torch.no_grad()
    def card(self):
        """Which card it is, and how fast it copies (bytes read and written)."""
        # 4 GB, which is far more than a cache holds. The fastest of six: the first one also asks
        # the driver for memory.
        numbers = torch.empty(2**16 if self.device.type == "cpu" else 2**30, device=self.device)
        seconds = []
        for _ in range(6):
            with Clock() as clock:
                numbers.clone()
            seconds.append(clock.seconds)
        name = "CPU" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        speed = 2 * numbers.nbytes / min(seconds)
        self.keep(f"{name}: a copy moves {speed / 1e12:.2f} TB/s, torch {torch.__version__}",
                  case="copy", card=name, bytes_per_s=speed, torch=torch.__version__)

    @torch.no_grad()
    def step(self):
        """A step (ours) against reading its weights once (reference).

        At B = 1 the memory sets the pace: the ratio is the share of its speed that is reached. A
        batch has more to do with the same weights, so its ratio is lower. The first call of B = 1
        compiles and tunes, that of 32 compiles, and 8 shares its code with later sizes."""
        weights = sum(size_of(module.parameters()) for module in (
            self.agent.body.layers, self.agent.body.norm, self.agent.inner))
        matrix = torch.randn(weights // 4096 + 1, 1024, device=self.device)    # as many bytes
        for B in self.size.batches:
            context = read(self.agent, some_texts(self.size.step_T, B))
            self.attempt(f"a step, T={self.size.step_T} B={B}, {weights / 1e9:.3f} GB", self.agent,
                         lambda _: [torch.mv(matrix, matrix[0]) for _ in range(STEPS)],
                         lambda agent: agent.think(context, 1 + STEPS), per=STEPS, agree=False)

    @torch.no_grad()
    def library(self):
        """A step: our recorded and compiled one (reference) against the library's ways (ours).

        A ratio of .8 or more says that the library's way is good enough. All ways take the same
        thoughts from the same contexts, and each case starts with a right result: see error()."""
        # The judge in float32 costs seconds. It is the same for all ways: computed once for each B.
        exact = {}                                                  # {B: thoughts in float32}

        def today(agent, texts, context):
            if agent is self.agent:
                return agent.think(context, 1 + STEPS)
            if len(texts) not in exact:
                exact[len(texts)] = agent.think(read(agent, texts), 1 + STEPS)
            return exact[len(texts)]

        for way in WAYS:
            fast = library_agent(self.agent, way)
            for B in self.size.batches:
                texts = some_texts(self.size.step_T, B)
                context = read(self.agent, texts)
                self.attempt(f"a step, {way}, T={self.size.step_T} B={B}", self.agent,
                             partial(today, texts=texts, context=context),
                             lambda _: fast.think(context, 1 + STEPS), per=STEPS)

    @torch.no_grad()
    def prompt(self):
        """Reading a prompt: as today (reference) against recorded at rounded lengths (ours).

        256 is a multiple of both roundings and needs no padding. 300 becomes 320 or 384, and shows
        what padding costs. The last line is a whole rollout: both sides take recorded steps."""
        def reading(texts, reads, agent):
            context = read(reads or agent, texts)
            return [context.hidden, context.cache.layers[-1].keys]

        for B, T, to in self.size.prompts:
            texts, fast = some_texts(T, B), reading_agent(self.agent, to)
            self.attempt(f"a prompt, T={T} rounded to {to}, B={B}", self.agent,
                         partial(reading, texts, None), partial(reading, texts, fast))
        T, m, B = self.size.rollouts[0]
        texts, fast = some_texts(T, B), reading_agent(self.agent, self.size.prompts[0][2])
        self.attempt(f"prompt and thoughts, T={T} m={m} B={B}", self.agent,
                     lambda agent: agent.think(read(agent, texts), m),
                     lambda _: fast.think(read(fast, texts), m))

    def outer(self):
        """Outer training: one row after the other (reference) against all rows at once (ours).

        Launching its kernels sets the pace of a step with gradients. So 8 rows at once should take
        little longer than one. Both sides are our own code and keep all turns (no checkpointing).
        What agrees is the sum of the losses, and its gradient in all outer links."""
        size = self.size
        rows = [{"question": question, "answer": answer} for question, answer in zip(
            some_texts(size.T, size.rows), some_texts(size.n, size.rows, seed=1))]

        def one_by_one(mas, rows, R, m):
            for row in rows:
                yield from our_losses(mas, [row], R, m)

        self.args.repeats = 1                              # a turn takes long
        what = dict(rows=rows, R=1, m=size.m)
        self.attempt(f"outer training, R=1 T={size.T} m={size.m}, a row of {size.rows}",
                     self.mas, partial(gradient, one_by_one, **what),
                     partial(gradient, our_losses, **what), per=size.rows)

    def inner(self):
        """Inner training: hidden states computed anew (reference) against kept ones (ours).

        A step is the loss of a batch of texts and its gradient in the link. The published code
        computes the hidden states in every epoch. train_inner.py computes them once."""
        size, agent = self.size, self.agent
        texts = some_texts(size.T, size.texts)
        tokens = agent.tokenize(some_texts(size.n, size.texts, seed=1))
        args = SimpleNamespace(adapter_cos_weight=1.0, adapter_mse_weight=0.0,
                               adapter_contrast_weight=0.0)
        link = InnerLink(agent.width, gain=agent.embedding_rms).to(self.device)
        learner = SimpleNamespace(inner=link, embedding=agent.embedding, device=self.device)

        @torch.no_grad()
        def states(agent):
            along = agent.follow(read(agent, texts), [one[:-1] for one in tokens])   # (B, n, d)
            return [(h, torch.tensor(one, device=self.device)) for h, one in zip(along, tokens)]

        def step(pairs):
            inner_loss(learner, pairs, args)[0].backward()
            found = torch.cat([weight.grad.flatten() for weight in link.parameters()])
            link.zero_grad()
            return [found]

        kept = states(agent)
        self.attempt(f"inner training, T={size.T} n={size.n}, a text of {size.texts}", agent,
                     lambda agent: step(states(agent)), lambda _: step(kept), per=size.texts)

    @torch.no_grad()
    def offload(self):
        """All agents on the card (reference) against one at a time (ours).

        They do not take turns here: an offloaded agent stays in main memory, so the other side
        would begin by moving all of them. A move also throws an agent's recorded steps away, and
        that belongs to the price."""
        what = dict(questions=some_texts(self.size.T, self.size.B), R=1, m=self.size.m)
        times, sent = [], []
        for mas in (self.mas, self.mas, replace(self.mas, offload=True)):    # the first: warms up
            with Clock() as clock:
                sent.append(our_messages(mas, **what))
            times.append(clock.seconds)
        off = apart(sent[2], sent[1])
        if not off <= 0.05:
            raise RuntimeError(f"the messages are {off:.2g} apart, so no time is worth anything")
        case = f"--offload, R=1 T={self.size.T} m={self.size.m} B={self.size.B}"
        self.keep(f"{case}: {times[1]:.2f} s, offloaded {times[2]:.2f} s", case=case,
                  reference_s=[times[1]], ours_s=[times[2]], ratio=times[1] / times[2], apart=off)

    @torch.no_grad()
    def full(self):
        """Thoughts on a card without room for recorded buffers: the same, and a line that says so.
        """
        if self.device.type == "cpu":
            self.keep("a CPU has no card that could be full", case="full card, answering", said="")
            return
        # 96 positions are recorded in buffers of 256, which is 2.7 times the cache. Growing by one
        # position takes less than 2.5 times: the old cache stays until the new one is whole.
        agent, context = self.agent, read(self.agent, some_texts(96, 32))
        wanted = agent.think(context, 4)
        agent.recorder.recorded = None
        torch.cuda.empty_cache()
        cache = sum(size_of([layer.keys, layer.values]) for layer in context.cache.layers)
        whole = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(
            (torch.cuda.memory_reserved(self.device) + 2.5 * cache) / whole, self.device)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            thoughts = agent.think(context, 4)
        off, says = apart([thoughts], [wanted]), " ".join(said.getvalue().split())
        self.keep(f"apart {off:.1e}, recorded {agent.recorder.recorded is not None}, said: {says}",
                  case="full card, answering", apart=off, said=says,
                  recorded=agent.recorder.recorded is not None)

    def memory(self):
        """What memory holds, and at most held, in MB: worked out and measured.

        Peaks count from the start of each case, with the models in memory. (On a CPU they are of
        the whole process so far.) Three agents are loaded from the first training on."""
        size, agent = self.size, self.agent
        T, m, B = size.rollouts[-1]
        weights, cache, _ = model_memory(agent.model.config, self.dtype, B, T)
        self.keep(f"worked out: weights {weights / 2**20:.0f} MB, cache of B={B} T={T} "
                  f"{cache / 2**20:.0f} MB", case="worked out", weights=weights, cache=cache)
        rows = [{"question": question, "answer": "w5 w6"} for question in some_texts(size.T, 2)]
        texts = some_texts(T, B)

        @torch.no_grad()
        def rollout():
            agent.think(read(agent, texts), m)

        runs = {"one agent loaded": lambda: None, f"rollout T={T} m={m} B={B}": rollout}
        for checkpointing in (0, 1):
            runs[f"outer training of 2 rows, checkpointing {checkpointing}"] = partial(
                gradient, our_losses, self.mas, rows=rows, R=size.R, m=size.m,
                checkpointing=checkpointing)
        for case, measured in runs.items():
            reset_peak_memory()
            measured()
            self.keep(f"{case}: {peak_memory_mb():.0f} MB at most", case=case, mb=peak_memory_mb())


def full_training():
    """train_outer.py on a card of FULL bytes. It has to end with one line and exit code 2.

    The limit is torch's own, of this process, so nothing else on the card is touched. (The line is
    in log.txt.) On a CPU the same command trains one step, and ends with 0."""
    wanted = code = 0
    if torch.cuda.is_available():
        wanted, whole = 2, torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(FULL / whole, 0)
    try:
        flags.run(train_outer.main)
    except SystemExit as stopped:
        code = stopped.code
    if code != wanted:
        raise SystemExit(f"train_outer.py ended with exit code {code}, and not {wanted}")


def main():
    """One part: its name and the folder; or full_training and the flags of train_outer.py."""
    if sys.argv[1] == "full_training":
        del sys.argv[1]
        return full_training()
    part, folder, *cpu = sys.argv[1:]
    bench = Card(part, folder, cpu == ["--cpu"])
    print(f"{part}: {getattr(Card, part).__doc__.splitlines()[0]}", flush=True)
    getattr(bench, part)()
    if any("why" in line for line in bench.lines):
        raise SystemExit("a case has failed")


if __name__ == "__main__":
    main()

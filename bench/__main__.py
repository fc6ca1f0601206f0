"""What a system costs, beside the plain reference of the same method.

    python -m bench                                    # all sections, some 5 minutes on a CPU
    python -m bench --sections step rollout --dims qwen3-1.7b --layers 4
    python -m bench --dims light                       # the three models of sequential_light

The physics. A latent step at B = 1 multiplies one vector by every weight of the decoder body and of
the inner link. It uses each weight once, so the memory sets the pace and not the processor. No step
can be faster than reading the weights once:

    floor [s] = bytes of the weights / memory bandwidth

torch.mv on one matrix of as many bytes takes this time, and so shows the bandwidth. (A step also
reads the KV cache. After 128 tokens of Qwen3-0.6B that is 2 % more.)

The sections. Each prints a table, and the figures of all of them come last, as one JSON line.

    step        a latent step against its floor
    rollout     m thoughts after a prompt
    answer      the whole recursion, up to the last agent's answer
    training    a step of outer training, forward and backward
    decoding    our way of writing words against the library's
    memory      what the real styles take, worked out from their dimensions

(evaluate.py measures what latents cost beside text and other baselines: its methods take turns.)

The reference is reference.py: no cache, no batch, no padding. It leaves out two things that the
published code does: it does not run the vocabulary head at each latent step, and it does not load
the models again at each stage. In these it is the kinder reference. In one thing it is not: it
answers one question after the other, where the published code answers a batch. (In training, the
published code takes one row after the other too. In the section rollout, both sides here take a
batch.)

How times are taken. Models have real dimensions and random weights, so nothing is downloaded.
Reference and ours take turns in one process. Times are medians (fastest .. slowest). The ratio is
the reference's time over ours. On a GPU, a first turn of both, which chooses kernels, compiles and
records, is not counted.

No time is printed before the results agree. In float32, ours and the reference may be 1e-3 apart.
In half precision both round, each in its own way, so both are judged by the reference in float32:
ours may be twice as far from it as the reference is.

Shapes: B questions, T tokens of a prompt, m latent thoughts, R rounds, n tokens of a text, d width.
"""
import json
import time
from functools import cached_property, partial
from statistics import median
from types import SimpleNamespace

import torch

from bench.both_sides import (apart, gradient, in_float32, our_losses, our_messages, plain_losses,
                              plain_messages, plain_think, read)
from bench.models import DIMS, memory_table, new_agent, size_of, some_texts
from gpu.compiled import set_compile
from recurse import MAS
from styles import get_style
from support import flags
from support.devices import Clock, pick_device

# The sizes of what is measured, on a CPU, on a GPU and in the tests. T, m, B, R and n are as above.
#     long_T       tokens of a prompt where it matters that prompts are long
#     rollouts     (T, m, B) of each
#     layers       of the models, 0 for all of them
#     styles       of the table of memory, none for all of them
CPU = SimpleNamespace(T=32, long_T=128, m=4, B=2, R=2, n=16, layers=8, styles=(),
                      rollouts=[(64, 16, 1), (64, 8, 4), (256, 48, 1)])
GPU = SimpleNamespace(T=128, long_T=1024, m=8, B=8, R=2, n=64, layers=0, styles=(),
                      rollouts=[(256, 48, 1), (512, 32, 1), (256, 48, 32)])
TINY = SimpleNamespace(T=8, long_T=12, m=3, B=2, R=2, n=4, layers=0,
                       styles=("sequential_light",), rollouts=[(12, 4, 1), (12, 4, 3)])
SECTIONS = ("step", "rollout", "answer", "training", "decoding", "memory")
STEPS = 32         # latent steps in a row, from which the time of one follows
PATIENCE = 15      # seconds after which a comparison that was repeated once is not again


# ---- the sections -------------------------------------------------------------------------------

class Bench:
    """The system that is measured, and the figures so far.

    Each section is a method. The first line of its docstring is printed above its table."""

    def __init__(self, args):
        self.args, self.lines = args, []
        self.device, self.dtype = pick_device(args.device, args.dtype)
        on_cpu = self.device.type == "cpu"
        torch.set_num_threads(args.threads or (1 if on_cpu else torch.get_num_threads()))
        torch.manual_seed(0)                               # the weights are the same in every run
        self.size = TINY if args.dims == "tiny" else CPU if on_cpu else GPU
        self.compile = int(not on_cpu) if args.compile is None else args.compile
        self.agent = self.new(DIMS[args.dims][0])          # the planner, which some sections use

    def new(self, base):
        """A random agent of a base model's dimensions."""
        agent = new_agent(base, self.args.layers or self.size.layers, self.device, self.dtype)
        set_compile([agent], self.compile)
        return agent

    @cached_property
    def mas(self):
        """The system of three agents. It is made when a section first asks for it."""
        style = get_style("tiny")
        _, *others = DIMS[self.args.dims]
        agents = dict(zip([role.name for role in style.roles],
                          [self.agent, *map(self.new, others)]))
        mas = MAS(style, agents, None).with_fresh_outer()
        mas.outer.to(self.dtype).requires_grad_(True)
        return mas

    def keep(self, text, **figures):
        """Print a line, and keep its figures."""
        print(f"  {text}", flush=True)
        self.lines.append(figures)

    def compare(self, case, system, plain, ours, per=1, agree=True):
        """Time plain(system) and ours(system) in turns, and keep the line.

        system: an agent or a MAS. per: the times are divided by it, to give those of one step,
        token or row of data. agree: whether both have to compute the same. Raises RuntimeError if
        they do not."""
        # 1. They take turns, so that other work of the machine meets both alike.
        times, results, began = ([], []), [None, None], time.perf_counter()
        first = None
        if self.device.type == "cuda":
            plain(system)
            with Clock() as clock:
                ours(system)
            first = clock.seconds
        while len(times[0]) < self.args.repeats and (
                len(times[0]) < 2 or time.perf_counter() - began < PATIENCE):
            for side, run in enumerate((plain, ours)):
                with Clock() as clock:
                    results[side] = run(system)
                times[side].append(clock.seconds / per)
        # 2. Do they agree?
        error = self.error(case, results, lambda: plain(in_float32(system))) if agree else None
        # 3. The line. The table has the median and both ends, and the JSON line every single time.
        ratio = median(times[0]) / median(times[1])
        columns = ["{:.1f} ({:.1f} .. {:.1f})".format(
            1000 * median(side), 1000 * min(side), 1000 * max(side)) for side in times]
        note = f"   first call {first:.1f} s" if first else ""
        self.keep(f"{case:48s}{columns[0]:>30s}{columns[1]:>30s}{ratio:8.2f}x{note}", case=case,
                  reference_s=times[0], ours_s=times[1], ratio=ratio, apart=error, first_s=first)

    def error(self, case, results, exact):
        """How far our result is from the right one. Raises RuntimeError if it is too far.

        results: the reference's, and ours. exact() is the reference's in float32."""
        wanted, ours = results
        if self.dtype == torch.float32:
            error, allowed = apart(ours, wanted), 1e-3
        else:
            exact = exact()
            error, allowed = apart(ours, exact), 2 * apart(wanted, exact)
        if not error <= allowed:
            raise RuntimeError(f"{case}: our result is {error:.2g} away from the reference's, and "
                               f"{allowed:.2g} is allowed, so no time is worth anything")
        return error

    @torch.no_grad()
    def step(self):
        """One latent step at B = 1 (ours) against its floor (reference).

        The ratio is the share of the memory's speed that the step reaches. The rest goes to the
        cache, to the small operations between the products, and to Python."""
        agent, T = self.agent, self.size.long_T
        context = read(agent, some_texts(T, 1))
        used = (agent.body.layers, agent.body.norm, agent.inner)
        weights = sum(size_of(module.parameters()) for module in used)
        matrix = torch.randn(weights // 4096 + 1, 1024, device=self.device)    # as many bytes
        self.compare(f"T={T}, {weights / 1e9:.3f} GB of weights", agent,
                     lambda _: [torch.mv(matrix, matrix[0]) for _ in range(STEPS)],
                     lambda agent: agent.think(context, 1 + STEPS), STEPS, agree=False)
        bandwidth = weights / median(self.lines[-1]["reference_s"])
        self.keep(f"the memory gives {bandwidth / 1e9:.1f} GB/s: no step can be faster than that",
                  case="bandwidth", weights=weights, bandwidth=bandwidth)

    @torch.no_grad()
    def rollout(self):
        """m thoughts after the T tokens of each of B questions.

        The reference runs m passes of T, T + 1, .. T + m - 1 positions. Ours is one pass of T
        positions and m - 1 steps of one. reference.think takes the B prompts as one batch too."""
        for T, m, B in self.size.rollouts:
            texts = some_texts(T, B)
            self.compare(f"T={T} m={m} B={B}, {len(self.agent.body.layers)} layers", self.agent,
                         lambda agent: plain_think(agent, texts, m),
                         lambda agent: agent.think(read(agent, texts), m))

    @torch.no_grad()
    def answer(self):
        """All messages between three agents, up to the last one's answer."""
        size = self.size
        what = dict(questions=some_texts(size.T, size.B), R=size.R, m=size.m)
        self.compare(f"three agents, R={size.R} T={size.T} m={size.m} B={size.B}", self.mas,
                     partial(plain_messages, **what), partial(our_messages, **what))

    def training(self):
        """A step of outer training, forward and backward.

        The reference unrolls one row after the other, and ours takes all at once. The last line is
        our own code in two ways: all turns kept for the backward pass, or each turn run again there
        (checkpointed), which takes less memory."""
        size = self.size
        rows = [{"question": question, "answer": answer} for question, answer in zip(
            some_texts(size.T, size.B), some_texts(size.n, size.B, seed=1))]
        what = dict(rows=rows, R=size.R, m=size.m)
        plain, kept = partial(gradient, plain_losses, **what), partial(gradient, our_losses, **what)
        self.compare(f"outer, R={size.R} T={size.T} m={size.m} n={size.n}, a row of {size.B}",
                     self.mas, plain, kept, size.B)
        self.compare("turns kept; checkpointed", self.mas, kept, partial(kept, checkpointing=1),
                     size.B)

    @torch.no_grad()
    def decoding(self):
        """Words: the library's generate against our loop.

        Our loop is there for what generate cannot do (see Agent.write). It should be as fast."""
        agent, T, n = self.agent, self.size.long_T, self.size.n
        texts = some_texts(T, 1)
        ids = torch.tensor(agent.tokenize(texts), device=self.device)                  # (1, T)
        options = dict(max_new_tokens=n, do_sample=False, pad_token_id=0)
        # In half precision they need not agree: near-ties fall either way.
        self.compare(f"a token, T={T} n={n}", agent,
                     lambda agent: agent.model.generate(ids, **options)[:, T:].cpu(),
                     lambda agent: torch.tensor(agent.write(read(agent, texts), n)), n,
                     agree=self.dtype == torch.float32)

    def memory(self):
        """What the real styles take, in GB."""
        self.lines += memory_table(self.size.styles)


def main():
    """The flags, the sections, and all figures as one JSON line."""
    parser, started = flags.Parser(__doc__), time.time()
    add = parser.add_argument
    add("--sections", nargs="+", default=SECTIONS, choices=SECTIONS)
    add("--dims", default="qwen3-0.6b", choices=list(DIMS), help="light: those of sequential_light")
    add("--layers", type=flags.at_least(0), default=0, help="0: 8 on a CPU, all on a GPU")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", default="auto", choices=["auto", *flags.DTYPES])
    add("--threads", type=flags.at_least(0), default=0, help="0: one on a CPU")
    add("--compile", type=int, choices=[0, 1],
        help="1: compile the layers of steps, on a GPU. Not given, it is 1 there and 0 on a CPU")
    add("--repeats", type=flags.at_least(1), default=3, help="of each comparison")
    args = parser.parse_args()
    bench, sections, failed = Bench(args), {}, False
    print(f"  {'ms: median (fastest .. slowest)':48s}{'reference':>30s}{'ours':>30s}    ratio")
    for name in dict.fromkeys(args.sections):
        section = getattr(bench, name)
        print(f"{name}: {section.__doc__.splitlines()[0]}", flush=True)
        sections[name] = bench.lines = []
        try:
            section()
        except Exception as problem:                 # the figures of the other sections are kept
            failed, says = True, " ".join(f"{type(problem).__name__}: {problem}".split())
            bench.keep(f"section {name} FAILED: {says}", case=f"{name} failed", why=says)
    print(json.dumps({**vars(args), "device": str(bench.device), "dtype": str(bench.dtype),
                      "threads": torch.get_num_threads(), "compile": bench.compile,
                      "torch": torch.__version__,
                      "seconds": time.time() - started, "sections": sections}))
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    flags.run(main)

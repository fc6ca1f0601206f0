"""An experiment: single steps by the library's fixed cache and by torch's own graphs.

    fast = library_agent(agent, "whole")
    fast.think(fast.read(embeds, mask), m)       thoughts by the library's steps

gpu/recorded.py and gpu/compiled.py record and compile steps with code of our own. Here less of it
is used, so that a run on a card can say whether our own code is worth its lines. The ways:

    graph     the whole step, recorded by torch.cuda.make_graphed_callables. Nothing is compiled.
    layers    the same, with a layer compiled once for all. Attention is the library's.
    whole     the whole step, by torch.compile(mode="reduce-overhead"): it compiles and records.

For single questions `layers` and `whole` are tuned, as our own code is.

A fourth way would be to give each layer to mode="reduce-overhead". It was not tried: a step would
start as many graphs as there are layers, and Python checks the inputs of each. It also needs our
OneLayer, because a layer that gets the whole cache is compiled anew for each number.

The library's cache for sliding windows cannot be used. It counts positions in a Python number, and
a graph replays kernels and not Python. So these layers get full buffers, as in gpu/recorded.py, and
the mask does the sliding. Layers of linear attention get the buffers of gpu/recorded.py too.

On a CPU nothing is recorded, and the compiler's backend is "eager", which computes what it is
given. So a test can show that results are right, and that torch can trace the step as one graph.

Shapes: B questions, T positions, d hidden width.
"""
import copy

import torch
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from gpu.compiled import CompiledForward
from gpu.recorded import ROOM, fill, fixed_layer

WAYS = ("graph", "layers", "whole")


def rounded(length, to):
    """The next multiple of `to`. Lengths of both experiments are rounded here, nowhere else."""
    return -(-length // to) * to


class LibraryLayers(CompiledForward):
    """CompiledForward without our attention: layers call the one that the model was loaded with."""

    def __call__(self, x, cache, mask):
        if not self.layers:
            self.compile()
        body = self.agent.body
        layers, body.layers = body.layers, self.layers
        try:
            return self.agent.forward(x, cache, mask)
        finally:
            body.layers = layers


def forward_of(agent, way, single):
    """Agent.forward in one of the WAYS. single: it is for single questions, so it is tuned."""
    on_cpu = agent.device.type == "cpu"
    if way == "graph":
        return agent.forward
    if way == "layers":
        return LibraryLayers(agent, "eager" if on_cpu else "inductor")
    if on_cpu:
        return torch.compile(agent.forward, fullgraph=True, dynamic=False, backend="eager")
    # triton.cudagraphs is what mode="reduce-overhead" stands for. A mode takes no other options.
    return torch.compile(agent.forward, dynamic=False, options={
        "triton.cudagraphs": True, "coordinate_descent_tuning": single})


class LibrarySteps:
    """Single steps in a fixed cache of the library. They are called as gpu/recorded.Recorded is."""

    def __init__(self, agent, context, capacity, way):
        B = len(context.mask)
        self.cache = StaticCache(config=agent.body.config, max_cache_len=capacity)
        self.cache.layers = [fixed if type(fixed) is StaticLayer else fixed_layer(layer, capacity)
                             for fixed, layer in zip(self.cache.layers, context.cache.layers)]
        self.mask = context.mask.new_zeros(B, capacity)
        forward = forward_of(agent, way, B == 1)
        self.run = lambda x, mask: forward(x, self.cache, mask)
        self.load(context)
        if agent.device.type == "cuda" and way != "whole":
            # It takes three steps before it records one. They need room, so buffers are emptied.
            # (What these steps write does no harm, because load() overwrites all of it.)
            for fixed in self.cache.layers:
                if isinstance(fixed, StaticLayer):
                    fixed.reset()
            with torch.no_grad():
                x = torch.zeros_like(context.hidden)
                self.run = torch.cuda.make_graphed_callables(self.run, (x, self.mask))

    def load(self, context):
        """Copy a Context into the buffers, and clear the rest of them."""
        self.length = context.mask.shape[1]
        self.mask.zero_()[:, :self.length] = context.mask
        for fixed, layer in zip(self.cache.layers, context.cache.layers):
            if isinstance(fixed, StaticLayer):
                fixed.reset()
                fixed.update(layer.keys, layer.values)
            else:
                fill(fixed, layer, self.length)

    @torch.no_grad()
    def step(self, x):
        """The next position's hidden state. x (B, 1, d) -> h (B, 1, d)."""
        self.mask[:, self.length] = 1
        self.length += 1
        torch.compiler.cudagraph_mark_step_begin()
        return self.run(x, self.mask).clone()    # a clone, because the next step overwrites it


def library_agent(agent, way):
    """A copy of the agent, whose single steps are the library's. It shares all weights."""
    twin, kept = copy.copy(agent), {}

    def steps(context, count):
        key = len(context.mask), rounded(context.mask.shape[1] + count, ROOM)
        if key not in kept:
            kept.clear()                          # old buffers are freed before new ones are made
            kept[key] = LibrarySteps(agent, context, key[1], way)
        kept[key].load(context)
        return kept[key]

    twin.steps = steps
    return twin

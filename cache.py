"""What an agent has read is kept, so that nothing is read twice: its KV cache, and steps after it.

A decoder computes a key and a value for each position in each layer. If they are kept, the next
position costs one step. If they are not, it costs the whole prompt again, as in reference.py. We
keep them in a Context. A Context is never changed. Whoever wants to go on from it (the next round,
ten samples of one answer, the text after a tool's result) takes a fork.

There are two ways to take single steps after a Context:

    Growing    Each step makes new tensors that are one position longer. This is right everywhere,
               and gradients flow through it. Training and CPUs need nothing else: fixed buffers
               were tried on a CPU and gained a factor of 1.00 to 1.12.
    Recorded   For a GPU, without gradients. A step of a 1.7B model is some 1,200 small kernels, and
               Python takes longer to launch them than the card takes to run them. So everything
               that a step reads and writes lies in buffers that never move, the step's kernels are
               recorded once as a CUDA graph, and each further step replays the graph. Where it
               pays, the layers are compiled before that: see support/compiled.py.

Shapes: B questions (rows), T positions, d hidden width.
"""
import copy
import functools
from dataclasses import dataclass

import torch
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer, StaticLayer

ROOM = 256        # the length of recorded buffers is a multiple of this many positions


# ---- a prompt that was read ---------------------------------------------------------------------

@dataclass
class Context:
    """A prompt that was read. It is never changed: to go on, fork() it first."""
    cache: DynamicCache      # keys and values of every layer, (B, heads, T, head width)
    mask: torch.Tensor       # (B, T), 1 = a token, 0 = padding to its left
    hidden: torch.Tensor     # (B, 1, d), the hidden state at the last position

    def fork(self):
        """A copy of the cache that can grow on its own. The tensors are shared: a layer that grows
        makes a new tensor and leaves the old one alone."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in cache.layers:
            for name, value in vars(layer).items():
                if isinstance(value, dict):          # NewStateLayer keeps its states in dicts:
                    setattr(layer, name, dict(value))     # without this both forks share them
        return cache

    def rows(self, places):
        """The Context of these rows alone. A row may come several times (ten samples of it)."""
        if list(places) == list(range(len(self.mask))):
            return self
        places, cache = torch.tensor(places, device=self.mask.device), self.fork()
        cache.reorder_cache(places)
        return Context(cache, self.mask[places], self.hidden[places])


class NewStateLayer(LinearAttentionLayer):
    """A linear-attention layer (Qwen3.5) whose states are replaced, not overwritten.

    Such a layer keeps a state of fixed size in place of keys and values. The library writes new
    states over the old ones. That breaks the backward pass, and it would change every other Context
    that shares them. With `record_past` (meant for rolling back) the library assigns a new tensor
    instead, which is what we need."""

    def __init__(self):
        super().__init__()
        self.record_past = True

    def update_conv_state(self, conv_states, state_idx=0, conv_kernel_size=None, **kwargs):
        """The states that the convolution runs over. The library would keep all: we keep the end.
        """
        full = super().update_conv_state(conv_states, state_idx, conv_kernel_size, **kwargs)
        self.conv_states[state_idx] = full[..., -conv_kernel_size:]
        return full

    def update_recurrent_state(self, recurrent_states, state_idx=0, **kwargs):
        """The new state takes the old one's place, and leaves its memory alone."""
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states


def new_cache(config):
    """An empty cache for a decoder of this config.

    A bare DynamicCache keeps all positions in every layer, sliding windows included: the mask does
    the sliding. Only a model with linear attention has to be told which layer is which."""
    if "linear_attention" not in (getattr(config, "layer_types", None) or ()):
        return DynamicCache()
    cache = DynamicCache(config=config)
    cache.layers = [NewStateLayer() if isinstance(layer, LinearAttentionLayer) else layer
                    for layer in cache.layers]
    return cache


# ---- single steps after it ---------------------------------------------------------------------

class Growing:
    """Steps after a Context, with a cache that grows. Differentiable."""

    def __init__(self, forward, context):
        self.forward = forward                   # forward(x, cache, mask, positions) -> h
        self.cache, self.mask, self.hidden = context.fork(), context.mask, context.hidden
        self.room = 0                            # nothing is set aside

    def step(self, x):
        """The next position's hidden state. x (B, 1, d) -> h (B, 1, d)."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        positions = self.mask.sum(1, keepdim=True) - 1                         # (B, 1)
        self.hidden = self.forward(x, self.cache, self.mask, positions)
        return self.hidden

    def context(self):
        """The Context of all that was read by now."""
        return Context(self.cache, self.mask, self.hidden)


class Recorded:
    """Steps in buffers of a fixed size, replayed as a CUDA graph. Without gradients.

    Every step attends over the whole buffers, and the mask hides the columns that are not written
    yet. So all steps are the same kernels on the same addresses, which is what a graph can hold.
    load() copies a Context into the buffers; one recording serves every Context that fits.
    graph=False runs the same step without recording it, which is how a CPU can test it.
    compiled: a CompiledForward, used in place of `forward` if it works."""

    def __init__(self, forward, context, count, graph=True, compiled=None):
        self.forward, self.compiled, self.ready = forward, compiled, False
        self.tried = compiled is not None        # compiled layers were tried, even if they failed
        self.graph, self.wants_graph = None, graph
        rows, length = context.mask.shape
        self.capacity = -(-(length + count) // ROOM) * ROOM      # prompts differ a little in length
        self.mask = context.mask.new_zeros(rows, self.capacity)
        self.column = context.mask.new_zeros(1)                  # where the next position goes
        self.position = context.mask.new_zeros(rows, 1)          # its number within its own text
        self.x = context.hidden.new_zeros(rows, 1, context.hidden.shape[2])    # the step's input
        self.cache = DynamicCache()
        self.cache.layers = [fixed_layer(layer, rows, self.capacity)
                             for layer in context.cache.layers]

    def fits(self, context, count):
        """Whether so many steps after this Context have room in these buffers. (Not after the
        Context that lies in these buffers itself: loading it would overwrite it.)"""
        rows, length = context.mask.shape
        return (rows == len(self.mask) and length + count <= self.capacity
                and context.cache is not self.cache)

    def load(self, context):
        """Copy a Context into the buffers, and clear the rest of them."""
        self.length = length = context.mask.shape[1]
        self.room = self.capacity - length       # steps that can follow
        self.mask.zero_()[:, :length] = context.mask
        self.column.fill_(length)
        self.position.copy_(context.mask.sum(1, keepdim=True))
        for fixed, layer in zip(self.cache.layers, context.cache.layers):
            fill(fixed, layer, length)

    def run(self):
        """One step. All that it changes, it changes in place and on the device."""
        self.mask.index_fill_(1, self.column, 1)
        forward = self.compiled or self.forward
        self.hidden = forward(self.x, self.cache, self.mask, self.position)
        self.column.add_(1)
        self.position.add_(1)

    @torch.no_grad()
    def step(self, x):
        """The next position's hidden state. x (B, 1, d) -> h (B, 1, d)."""
        self.x.copy_(x)
        if not self.ready:
            self.prepare()
        if self.graph is None:
            self.run()
        else:
            self.graph.replay()
        self.length += 1
        return self.hidden.clone()               # a clone, because the next step overwrites it

    def prepare(self):
        """Choose the fastest way to take a step that works here: compiled layers and a graph, else
        a graph, else neither. A line says what failed."""
        self.ready = True
        failed = self.compiled and self.trial()
        if failed:
            self.compiled.give_up(failed)
            self.compiled = None
        if self.wants_graph and not self.graph:
            failed = self.trial()
            if failed:
                say_once(f"no CUDA graph, so steps are launched kernel by kernel: {failed}")

    def trial(self):
        """Try a step, and record it. Returns what failed, or None if nothing did.

        The first call of a kernel chooses how to run it (or compiles it), and that choice must not
        be recorded. So the step runs once before. (Recording runs nothing.) What that one step
        changed is put back."""
        changed = [self.mask, self.column, self.position, *counters(self.cache)]
        before = [tensor.clone() for tensor in changed]
        try:
            if self.wants_graph:
                self.graph = self.recording()
            else:
                self.run()
        except Exception as problem:      # a compiler and a driver fail in errors of any class
            says = " ".join(f"{type(problem).__name__}: {problem}".split())
            return says.split(". ")[0][:200]       # what follows has numbers, new ones each time
        finally:
            for tensor, value in zip(changed, before):
                tensor.copy_(value)

    def recording(self):
        """The step as a CUDA graph."""
        device, graph = self.x.device, torch.cuda.CUDAGraph()
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.stream(aside):
                self.run()
                with torch.cuda.graph(graph, stream=aside):
                    self.run()
        finally:
            torch.cuda.current_stream(device).wait_stream(aside)
        return graph

    def context(self):
        """The Context of all that was read by now, to go on from in other buffers."""
        return Context(self.cache, self.mask[:, :self.length], self.hidden)


@functools.cache
def say_once(text):
    """Print a line, unless it was printed before."""
    print(text, flush=True)


def fixed_layer(layer, rows, capacity):
    """An empty layer of so many rows and positions, in tensors that never move."""
    if isinstance(layer, LinearAttentionLayer):
        fixed = LinearAttentionLayer()           # the library's own layer overwrites its states
        vars(fixed).update(vars(layer), record_past=False)       # its flags: a prompt was read
        conv, state = layer.conv_states[0], layer.recurrent_states[0]
        fixed.conv_states = {0: conv.new_zeros(rows, conv.shape[1], layer.conv_kernel_size[0])}
        fixed.recurrent_states = {0: state.new_zeros(rows, *state.shape[1:])}
        return fixed
    fixed = StaticLayer(capacity)
    # It makes zeros of the full length. The tensors tell it how many rows and heads, and the dtype.
    fixed.lazy_initialization(*(part[:1].expand(rows, -1, -1, -1)
                                for part in (layer.keys, layer.values)))
    return fixed


def fill(fixed, layer, length):
    """Copy `length` positions of a layer, or its states, into a fixed layer."""
    if isinstance(fixed, LinearAttentionLayer):
        conv, state = layer.conv_states[0], layer.recurrent_states[0]
        # A short prompt has fewer states to convolve: zeros stand before them.
        fixed.conv_states[0].zero_()[..., -conv.shape[-1]:] = conv
        fixed.recurrent_states[0].copy_(state)
        return
    # Hidden columns get weight 0. But 0 x NaN is NaN, so what is left of an older text is cleared.
    fixed.keys.zero_()[:, :, :length] = layer.keys[:, :, :length]
    fixed.values.zero_()[:, :, :length] = layer.values[:, :, :length]
    fixed.cumulative_length.fill_(length)


def counters(cache):
    """The tensors of a cache that a step must not change twice: lengths, and recurrent states.
    (Keys and values may be written twice, because a repeated step writes the same columns.)"""
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionLayer):
            yield from (layer.conv_states[0], layer.recurrent_states[0])
        else:
            yield layer.cumulative_length

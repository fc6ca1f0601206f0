"""An agent's single steps on a GPU, recorded once and replayed. Without gradients.

    recorded = agent.recorder.steps(context, count)      room for `count` steps, or None
    h = recorded.step(x)                                 (B, 1, d) -> (B, 1, d)

A step of a 1.7B model is some 1,200 small kernels, and Python takes longer to launch them than the
card takes to run them. So everything that a step reads and writes lies in buffers that never move.
The step's kernels are recorded once as a CUDA graph, and each further step replays the graph. With
--compile 1 the layers are compiled before that: see gpu/compiled.py.

A reader may leave this room closed: a recorded step computes what Agent.read computes.

Shapes: B questions, T positions, d hidden width.
"""
import torch
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer, StaticLayer

from cache import Context
from support.errors import say_once

ROOM = 256        # the length of recorded buffers is a multiple of this many positions


class Recorder:
    """Records an agent's steps, and keeps the recording of the last turn.

    compiled: a CompiledForward, or None (see set_compile). recorded: the Recorded steps of the last
    turn."""

    def __init__(self, forward):
        self.forward, self.compiled, self.recorded = forward, None, None

    def steps(self, context, count):
        """Recorded steps after a Context: those of the last turn, if `count` more fit into their
        buffers. None, if the card has no room for buffers."""
        if not (self.recorded and self.recorded.fits(context, count)):
            self.recorded = None             # frees the old buffers before new ones are made
            try:
                with torch.inference_mode(False):  # later calls may write outside inference mode
                    self.recorded = Recorded(self.forward, context, count, compiled=self.compiled)
            except torch.OutOfMemoryError:
                say_once("the card has no room for recorded steps, so they are launched kernel by "
                         "kernel (fewer questions may have room: --batch_size)")
                return None
        self.recorded.load(context)
        return self.recorded


class Recorded:
    """Steps in buffers of a fixed size, replayed as a CUDA graph. Without gradients.

    Every step attends over the whole buffers, and the mask hides the columns that are not written
    yet. So all steps are the same kernels on the same addresses, which is what a graph can hold.
    load() copies a Context into the buffers; one recording serves every Context that fits.
    graph=False runs the same step without recording it, which is how a CPU can test it.
    compiled: a CompiledForward, used instead of `forward` if it works."""

    def __init__(self, forward, context, count, graph=True, compiled=None):
        self.forward, self.compiled, self.graph = forward, compiled, None
        B, T = context.mask.shape
        # Rounded up, so that prompts of nearly the same length share one recording.
        self.capacity = -(-(T + count) // ROOM) * ROOM
        self.mask = context.mask.new_zeros(B, self.capacity)
        self.column = context.mask.new_zeros(1)                  # where the next position goes
        self.x = context.hidden.new_zeros(B, 1, context.hidden.shape[2])    # the step's input
        self.cache = DynamicCache()
        self.cache.layers = [fixed_layer(layer, self.capacity) for layer in context.cache.layers]
        self.prepare(graph)

    def fits(self, context, count):
        """Do `count` steps after this Context fit? After a Context that lies in these very buffers
        they never do, because loading it would overwrite it."""
        B, T = context.mask.shape
        return (B == len(self.mask) and T + count <= self.capacity
                and context.cache is not self.cache)

    def load(self, context):
        """Copy a Context into the buffers, and clear the rest of them."""
        self.length = context.mask.shape[1]
        self.room = self.capacity - self.length  # steps that can follow
        self.mask.zero_()[:, :self.length] = context.mask
        self.column.fill_(self.length)
        for fixed, layer in zip(self.cache.layers, context.cache.layers):
            fill(fixed, layer, self.length)

    def run(self):
        """One step. All that it changes, it changes in place and on the device."""
        self.mask.index_fill_(1, self.column, 1)
        self.hidden = (self.compiled or self.forward)(self.x, self.cache, self.mask)
        self.column.add_(1)

    @torch.no_grad()
    def step(self, x):
        """The next position's hidden state. x (B, 1, d) -> h (B, 1, d)."""
        self.x.copy_(x)
        if self.graph is None:
            self.run()
        else:
            self.graph.replay()
        self.length += 1
        return self.hidden.clone()               # a clone, because the next step overwrites it

    @torch.no_grad()
    def prepare(self, graph):
        """Choose the fastest way to take a step that works here: compiled layers and a graph, else
        a graph, else neither. A line says what failed."""
        if self.compiled and (failed := self.trial(graph)):
            self.compiled.give_up(failed)
            self.compiled = None
        if graph and not self.graph and (failed := self.trial(graph)):
            say_once(f"no CUDA graph, so steps are launched kernel by kernel: {failed}")

    def trial(self, graph):
        """Try a step in the empty buffers, and record it. Returns what failed, or None if nothing
        did. (What the step writes does no harm, because load() overwrites all of it.)

        The first call of a kernel chooses how to run it (or compiles it), and that choice must not
        be recorded. So the step runs once before. (Recording runs nothing.)"""
        try:
            if graph:
                self.graph = self.recording()
            else:
                self.run()
        except Exception as problem:      # a compiler and a driver fail in errors of any class
            says = " ".join(f"{type(problem).__name__}: {problem}".split())
            return says.split(". ")[0][:200]       # what follows has numbers, new ones each time

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


def fixed_layer(layer, capacity):
    """An empty layer for `capacity` positions of as many questions, in tensors that never move."""
    if isinstance(layer, LinearAttentionLayer):
        fixed = LinearAttentionLayer()           # the library's own layer overwrites its states
        vars(fixed).update(vars(layer), record_past=False)       # its flags: a prompt was read
        conv, state = layer.conv_states[0], layer.recurrent_states[0]
        fixed.conv_states = {0: conv.new_zeros(*conv.shape[:2], layer.conv_kernel_size[0])}
        fixed.recurrent_states = {0: state.new_zeros(state.shape)}
        return fixed
    fixed = StaticLayer(capacity)
    # It makes zeros of the full length, with the number of questions and heads of these tensors.
    fixed.lazy_initialization(layer.keys, layer.values)
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

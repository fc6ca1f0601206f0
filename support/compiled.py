"""A Recorder takes an agent's single steps on a GPU, and compiles the layers where that pays. A
reader may leave this closed.

A step of a 1.7B model is some 1,200 small kernels. A CUDA graph (cache.py) takes away what Python
spends on launching them. torch.compile also fuses them. All layers of a model do the same, so one
layer's forward is compiled and called with each layer's weights. Measured on an H200, Qwen3-1.7B in
bfloat16, after 256 tokens, milliseconds a step:

                     kernel by kernel    CUDA graph    compiled layers + graph    and tuned
    1 row            28.2                5.3           2.66                       1.77
    32 rows          28.6                10.6          2.92                       2.87

The first calls took 3 to 6 s, and 13 to 29 s with tuning (Inductor tries several sizes of each
kernel). Tuning does not help 32 rows, so only single rows are tuned. The code serves buffers of
every length. The first batch has code for its size, and all later sizes share one. (The figures are
of a revision that rounded the scores of attention to bfloat16: see one_position.)

Reading a prompt, and steps with gradients, are not compiled. It was tried with sizes that may
change: reading became 1.2 to 1.8 times as fast, steps with gradients 1.5 times, the first calls of
both took half a minute, and torch 2.11 failed on the backward pass of a batch.

The linear-attention layers of Qwen3.5 are not compiled. They run as the library has them.
"""
import copy

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import StaticLayer
from transformers.masking_utils import sdpa_mask

from cache import Growing, Recorded, say_once
from support.errors import need


def set_compile(agents, choice):
    """Tell agents whether to compile their layers: auto, 0 or 1."""
    need(str(choice) in ("auto", "0", "1"), f"compile is auto, 0 or 1, not '{choice}'")
    on_gpu = any(agent.device.type != "cpu" for agent in agents)
    need(on_gpu or str(choice) != "1", "compile 1 is for a GPU: on a CPU no step is recorded, so "
         "none is compiled. Leave it out")
    for agent in agents:
        agent.recorder.choice, agent.recorder.compiled = str(choice), None


class Recorder:
    """Records an agent's steps, and decides whether its layers are compiled.

    choice: auto, 0 or 1. recorded: the Recorded steps of the last turn. asked: how many steps were
    asked for by now, of single rows (True) and of batches (False)."""

    def __init__(self, agent):
        self.agent, self.choice = agent, "auto"
        self.recorded = self.compiled = None
        self.asked = {True: 0, False: 0}

    def steps(self, context, count):
        """Recorded steps: those of the last turn, if this Context has room in their buffers.
        Growing ones, if the card has no room for buffers."""
        compiled, old = self.compiled_forward(len(context.mask), count), self.recorded
        if not (old and old.fits(context, count) and (old.tried or not compiled)):
            old = self.recorded = None             # frees the old buffers before new ones are made
            try:
                with torch.inference_mode(False):  # later calls may write outside inference mode
                    self.recorded = Recorded(self.agent.forward, context, count, compiled=compiled)
            except torch.OutOfMemoryError:
                say_once("the card has no room for recorded steps, so they are launched kernel by "
                         "kernel (fewer rows may have room: --batch_size)")
                return Growing(self.agent.forward, context)
        self.recorded.load(context)
        return self.recorded

    def compiled_forward(self, rows, count):
        """What runs `count` more steps of so many rows with compiled layers. None where it does not
        pay."""
        self.asked[rows == 1] += count
        if not self.compiled and self.pays(rows):
            say_once(f"layers are compiled from now on (--compile {self.choice})")
            self.compiled = CompiledForward(self.agent)
        return self.compiled if self.compiled and not self.compiled.broken else None

    def pays(self, rows):
        """Whether to compile for batches of so many rows."""
        if self.choice != "auto":
            return self.choice == "1"
        # Nobody knows how many steps will follow. So a model is compiled when the steps so far have
        # lost as much as compiling costs: then a run loses at most twice what it had to lose. By
        # the table above, that is after 5000 steps of one row (3.5 ms lost in each, against 13 to
        # 29 s), and after 1000 steps of more rows (7.7 ms lost in each, against 3 to 6 s).
        say_once("steps are recorded; layers are compiled after 5000 steps of single rows, or 1000 "
                 "of more rows (--compile auto)")
        return self.asked[rows == 1] >= (5000 if rows == 1 else 1000)


# ---- attention of one position ------------------------------------------------------------------

def one_position(module, query, key, value, attention_mask, scaling=None, **unused):
    """softmax(q K^T / sqrt(d)) V for one position a row, in the form that the library asks for.

    Several heads of q share one of K and V. The library copies K and V for each of them, which took
    38 % of a step at 32 rows. Here the heads that share stand side by side.

    Scores are computed in float32. Qwen2's go into the thousands, where bfloat16 would round them
    to whole units. As a sum of products, they compile to one kernel that reads K once. (A matrix
    product in float32 would need a copy of K.)"""
    B, heads, _, d = query.shape                                      # (B, heads, 1, d)
    q = query.reshape(B, key.shape[1], -1, 1, d).float()              # (B, kv, group, 1, d)
    scores = (q * key[:, :, None].float()).sum(-1) * scaling          # (B, kv, group, T)
    if attention_mask is not None:                                    # (B, 1, 1, T), True = seen
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    read = scores.softmax(-1).to(value.dtype) @ value                 # (B, kv, group, d)
    return read.reshape(B, 1, heads, -1), None


AttentionInterface.register("one_position", one_position)
AttentionMaskInterface.register("one_position", sdpa_mask)


# ---- compiled layers ----------------------------------------------------------------------------

class OneLayer:
    """What a layer sees of the cache: its own buffers. (With the whole cache, the layer would look
    its buffers up by its number, and each number would be compiled anew.)"""

    def __init__(self, layer):
        self.layer = layer

    def update(self, keys, values, *unused, **also_unused):
        """All keys and values, with the new ones written in."""
        return self.layer.update(keys, values)


class CompiledForward:
    """Agent.forward for a single position a row, with compiled layers and `one_position`.

    broken: it failed on this machine, and is not to be tried again. tuned: single rows run tuned
    code. This is so if the first step was one of a single row. (If a batch came first, a single row
    is what is left of a batch, and not worth the tuning.)"""

    def __init__(self, agent, backend="inductor"):
        self.agent, self.backend = agent, backend
        self.layers, self.broken, self.tuned = None, False, None       # tuned: not known yet

    def give_up(self, why):
        """Say why there are no compiled steps from now on. (Too little memory for these rows is no
        reason to give up: fewer rows may have room.)"""
        say_once(f"layers are not compiled: {why}")
        self.broken = not why.startswith("OutOfMemory")

    def compile(self):
        """Make the compiled layers. (torch compiles each case at its first call: a single row, the
        first batch, batches of any other size. The length of the buffers may change without that:
        see twin.)"""
        import torch._dynamo                            # here, because importing it takes seconds
        torch._dynamo.config.allow_unspec_int_on_nn_module = True    # else each layer_idx is a case
        torch._dynamo.config.recompile_limit = 256      # of all models and shapes of a process
        how = dict(fullgraph=True, backend=self.backend)
        tunes = {"coordinate_descent_tuning": True} if self.backend == "inductor" else None
        self.kind = type(self.agent.body.layers[0])
        self.step = {True: torch.compile(self.kind.forward, options=tunes, **how),   # tuned
                     False: torch.compile(self.kind.forward, **how)}
        self.layers = torch.nn.ModuleList(map(self.twin, range(len(self.agent.body.layers))))

    def twin(self, i):
        """A copy of layer i whose forward is compiled. It shares everything else with the layer.

        A layer of linear attention, or of another class than the first one, keeps its own forward.
        """
        layer, name = self.agent.body.layers[i], self.agent.cache_name

        def forward(hidden_states, **inputs):
            own = inputs[name].layers[i]
            if type(layer) is not self.kind or not isinstance(own, StaticLayer):
                return layer(hidden_states, **inputs)
            for part, columns in ((own.keys, 2), (own.values, 2), (inputs["attention_mask"], 3)):
                torch._dynamo.maybe_mark_dynamic(part, columns)        # one code for all lengths
            single = len(hidden_states) == 1
            if self.tuned is None:
                self.tuned = single
            step = self.step[single and self.tuned]
            return step(layer, hidden_states, **{**inputs, name: OneLayer(own)})

        twin = copy.copy(layer)
        twin.forward = forward
        return twin

    def __call__(self, x, cache, mask, positions):
        """The same as Agent.forward. For the time of this call, the body holds the compiled layers
        and `one_position` in place of its own layers and attention."""
        if not self.layers:
            self.compile()
        body, config = self.agent.body, self.agent.body.config
        layers, attention = body.layers, config._attn_implementation
        body.layers = self.layers
        if attention == "sdpa":                          # other attention may do more than this
            config._attn_implementation = "one_position"
        try:
            # Always the same mode, because torch compiles each mode anew.
            with torch.inference_mode(False), torch.no_grad():
                return self.agent.forward(x, cache, mask, positions)
        finally:
            body.layers, config._attn_implementation = layers, attention

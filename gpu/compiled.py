"""A step's layers, compiled, with --compile 1 on a GPU. A reader may leave this room closed.

A CUDA graph (gpu/recorded.py) takes away what Python spends on launching the small kernels of a
step. torch.compile also fuses them. All layers of a model do the same, so one layer's forward is
compiled and called with each layer's weights. On an H200 a step of Qwen3-1.7B takes 5.3 ms with the
graph alone, and 1.77 ms compiled and tuned; at 32 questions 10.6 and 2.9 ms. The first calls take
3 to 6 s, and 13 to 29 s with tuning, for which Inductor tries several sizes of each kernel. Tuning
gains little at 32 questions, so only single ones are tuned. docs/speed.md has the whole table. (The
figures are of a revision that rounded the scores of attention to bfloat16: see one_position.)

The code serves buffers of every length. torch compiles code for the size of the first batch. All
later sizes share one other code.

Reading a prompt, and steps with gradients, are not compiled. It was tried with sizes that may
change: reading became 1.2 to 1.8 times as fast, steps with gradients 1.5 times, the first calls
took 12 to 18 s for each case, and torch 2.11 failed on the backward pass of a batch.

The linear-attention layers of Qwen3.5 are not compiled. They run as the library has them.
"""
import copy

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import StaticLayer
from transformers.masking_utils import sdpa_mask

from support.errors import need, say_once


def set_compile(agents, choice):
    """Tell agents whether to compile the layers of their steps: 0 or 1. Raises ValueError for 1
    where no agent is on a GPU."""
    need(not choice or any(agent.device.type != "cpu" for agent in agents), "compile 1 is for a "
         "GPU: on a CPU no step is recorded, so none is compiled. Leave it out")
    for agent in agents:
        agent.recorder.compiled = CompiledForward(agent) if choice else None
        agent.recorder.recorded = None             # a recording of the other way


# ---- attention of one position ------------------------------------------------------------------

def one_position(module, query, key, value, attention_mask, scaling=None, **unused):
    """softmax(q K^T / sqrt(d)) V for one new position, in the form that the library asks for.

    Several heads of q share one of K and V. The library copies K and V for each of them, which took
    38 % of a step at 32 questions. Here the heads that share stand side by side.

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
    """Agent.forward for one new position, with compiled layers and `one_position`.

    tuned: single questions run tuned code. That is decided at the first step. (If batches came
    first, a single question is only the rest of one, and tuning would not pay.)"""

    def __init__(self, agent, backend="inductor"):
        self.agent, self.backend = agent, backend
        self.layers = self.tuned = None                  # tuned: not known yet

    def give_up(self, why):
        """Say why steps are not compiled, and stop trying. (Too little memory is not a reason
        to give up: fewer questions may have room.)"""
        say_once(f"layers are not compiled: {why}")
        if not why.startswith("OutOfMemory"):
            self.agent.recorder.compiled = None

    def compile(self):
        """Make the compiled layers. (torch compiles each case at its first call: a single question,
        the first batch, batches of any other size. The length of the buffers may change without
        that: see twin.)"""
        import torch._dynamo                            # here, because importing it takes seconds
        torch._dynamo.config.allow_unspec_int_on_nn_module = True    # else each layer_idx is a case
        torch._dynamo.config.recompile_limit = 256      # of all models and shapes of a process
        tunes = {"coordinate_descent_tuning": True} if self.backend == "inductor" else None
        self.kind = type(self.agent.body.layers[0])
        self.step = [torch.compile(self.kind.forward, fullgraph=True, backend=self.backend,
                                   options=options) for options in (None, tunes)]    # [tuned]
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

    def __call__(self, x, cache, mask):
        """The same as Agent.forward. For the time of this call, the body holds the compiled layers
        and `one_position` instead of its own layers and attention."""
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
                return self.agent.forward(x, cache, mask)
        finally:
            body.layers, config._attn_implementation = layers, attention

"""An agent's KV cache: what was read once is never read again.

A decoder computes a key and a value for each position in each layer. If they are kept, the next
position costs one step. If they are not, it costs the whole prompt again, as in reference.py. We
keep them in a Context. A Context is never changed. To go on from it (in the next round, for ten
samples of one answer, for the text after a tool's result), take a fork of its cache.

Reading on makes new tensors that are longer, and leaves the old ones alone. So a fork costs
nothing, and gradients flow through it. Training and CPUs need nothing else: fixed buffers were
tried on a CPU and gained a factor of 1.00 to 1.12. On a GPU, single steps without gradients run in
fixed buffers: see gpu/recorded.py.

Shapes: B questions, T positions, d hidden width.
"""
import copy
from dataclasses import dataclass

import torch
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer


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

    def pick(self, chosen):
        """The Context of some questions of the batch, given by their numbers. A number may come
        several times (ten samples of one answer)."""
        if list(chosen) == list(range(len(self.mask))):
            return self
        chosen, cache = torch.tensor(chosen, device=self.mask.device), self.fork()
        cache.reorder_cache(chosen)
        return Context(cache, self.mask[chosen], self.hidden[chosen])


class NewStateLayer(LinearAttentionLayer):
    """A linear-attention layer (Qwen3.5) whose states are replaced, not overwritten.

    Such a layer keeps a state of fixed size instead of keys and values. The library writes new
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


class Growing:
    """Single steps after a Context. What goes in is read as a word is. Differentiable."""

    def __init__(self, read, context):
        self.read, self.reached = read, context              # read: Agent.read
        self.room = 0                                        # nothing is set aside

    def step(self, x):
        """The next position's hidden state. x (B, 1, d) -> h (B, 1, d)."""
        one = self.reached.mask.new_ones(len(x), 1)
        self.reached = self.read(x, one, self.reached)
        return self.reached.hidden

    def context(self):
        """The Context of all that was read by now."""
        return self.reached

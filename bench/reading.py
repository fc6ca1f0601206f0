"""An experiment: prompts are read by a recorded graph, at rounded lengths.

    fast = reading_agent(agent, 64)              read at lengths that are multiples of 64
    context = fast.read(embeds, mask)

Reading a short prompt of one question takes as long as launching its kernels: some 25 ms for 256
tokens of a 1.7B model on an H200, where the card needs about 2. A graph takes the launching away,
as it does for single steps (gpu/recorded.py). A graph holds one length. So prompts are padded on
the left to a multiple of 64 or 128, and each of these lengths is recorded once.

The Context that comes out is the one of Agent.read: the padding is cut off again. Its tensors are
copies, because the next replay overwrites the graph's own.

On a CPU nothing is recorded. The same computation runs kernel by kernel, for a test.

Shapes: B questions, T tokens of a prompt, d hidden width.
"""
import copy

import torch

from bench.library import rounded
from cache import Context, new_cache


class RecordedReading:
    """The reading of B prompts of one length, in buffers that never move."""

    def __init__(self, agent, B, length):
        self.agent, self.graph = agent, None
        self.embeds = torch.zeros(B, length, agent.width, dtype=agent.dtype, device=agent.device)
        self.mask = torch.ones(B, length, dtype=torch.long, device=agent.device)
        self.mask[:, 0] = 0        # with padding, as recorded: without, other kernels would run
        if agent.device.type == "cuda":
            self.record()

    def run(self):
        """Read what lies in the buffers. The cache is made anew, where the graph has its memory."""
        self.cache = new_cache(self.agent.body.config)
        self.hidden = self.agent.forward(self.embeds, self.cache, self.mask)[:, -1:]

    def record(self):
        """Run once, so that kernels are chosen, and then record."""
        aside = torch.cuda.Stream(self.agent.device)
        aside.wait_stream(torch.cuda.current_stream(self.agent.device))
        with torch.cuda.stream(aside):
            self.run()
        torch.cuda.current_stream(self.agent.device).wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.run()

    def read(self, embeds, mask):
        """The Context of embeds (B, T, d) with mask (B, T), for any T up to the buffers' length."""
        B, T = mask.shape
        self.embeds.zero_()[:, -T:] = embeds
        self.mask.zero_()[:, -T:] = mask
        if self.graph:
            self.graph.replay()
        else:
            self.run()
        return Context(self.copied(T), mask, self.hidden.clone())

    def copied(self, T):
        """A copy of the cache without the padding: its last T positions. States are copied whole.
        """
        cache = Context(self.cache, self.mask, self.hidden).fork()
        for layer in cache.layers:
            for name, value in vars(layer).items():
                if name in ("keys", "values"):
                    setattr(layer, name, value[:, :, -T:].clone())      # (B, heads, T, head width)
                elif isinstance(value, dict):
                    setattr(layer, name, {key: state.clone() if torch.is_tensor(state) else state
                                          for key, state in value.items()})
        return cache


def reading_agent(agent, to):
    """A copy of the agent that reads new prompts at multiples of `to`. It shares all weights.

    Only without gradients. One recording is kept for each number of questions and length."""
    twin, kept = copy.copy(agent), {}

    def read(embeds, mask, context=None):
        if context is not None:
            return agent.read(embeds, mask, context)
        key = len(mask), rounded(mask.shape[1], to)
        if key not in kept:
            kept[key] = RecordedReading(agent, *key)
        return kept[key].read(embeds, mask)

    twin.read = read
    return twin

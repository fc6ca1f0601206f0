"""The vocabulary head: from a hidden state to a score for each word.

    logits = head(h)        h (.., d) after the body's final norm -> logits (.., V)

In most models this is one product with a matrix, W h. Some do more after it: Granite divides by
logits_scaling, Cohere multiplies by logit_scale, Gemma 2 caps the result with a tanh. Greedy words
are the same without it. Samples and losses are not. The library has this code in the forward pass
of each model's own class, and a list of all the ways would be out of date with its next version.

So the model's own forward pass runs here, without its body. We take a copy of the model that shares
all weights, and has a module in the place of the body that hands on what it is given. What goes in
as embeddings comes out as hidden states, and the library goes on from there.
"""
import copy
from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


class Head:
    """Logits (.., V) of hidden states (.., d), as the library computes them. Differentiable."""

    def __init__(self, model):
        # deepcopy copies nothing that its memo holds: it takes what stands there instead.
        shared = {id(kept): kept for part in model.modules()
                  for kept in (part._parameters, part._buffers)}
        self.model = copy.deepcopy(model, {**shared, id(model.get_decoder()): HandOn()})

    def __call__(self, states):
        one_row = states.reshape(1, -1, states.shape[-1])                           # (1, N, d)
        return self.model(inputs_embeds=one_row).logits.view(*states.shape[:-1], -1)


class HandOn(torch.nn.Module):
    """Stands in for a body: the embeddings that it is given are its hidden states."""

    def forward(self, *_, inputs_embeds, **__):
        return Output(inputs_embeds)


@dataclass
class Output(ModelOutput):
    """A body's output: hidden states, and None for a cache, attention scores and other fields."""
    last_hidden_state: torch.Tensor

    def __getattr__(self, name):
        return None

"""The vocabulary head: from a hidden state to a score for each word.

    logits = head(h)        h (.., d) after the body's final norm -> logits (.., V)

In most models this is one product with a matrix, W h. Some do more after it: Granite divides by
logits_scaling, Cohere multiplies by logit_scale, Gemma 2 caps the result with a tanh. Greedy words
are the same without it. Samples and losses are not. The library has this code in the forward pass
of each model's own class, and a list of all the ways would be out of date with its next version.

So the model's own forward pass runs here, without its body. We take a copy of the model that shares
all weights, and put a module in the place of the body that hands on what it is given. What goes in
as embeddings comes out as hidden states, and the library goes on from there.
"""
import copy
from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


class Head:
    """Logits (.., V) of hidden states (.., d), as the library computes them. Differentiable."""

    def __init__(self, model):
        self.model = without(model.get_decoder(), model)

    def __call__(self, states):
        one_row = states.reshape(1, -1, states.shape[-1])                           # (1, N, d)
        return self.model(inputs_embeds=one_row).logits.view(*states.shape[:-1], -1)


def without(body, part):
    """A copy of a part of a model with HandOn in the place of the body. All weights are shared."""
    if part is body:
        return HandOn()
    part = copy.copy(part)                   # its dict of weights is the same object as before ..
    if part is not None:                     # .. and its dict of parts is a new one
        part._modules = {name: without(body, inside) for name, inside in part._modules.items()}
    return part


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

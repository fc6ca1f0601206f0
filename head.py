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

import torch


class Head:
    """Logits (.., V) of hidden states (.., d), as the library computes them. Differentiable."""

    def __init__(self, model):
        body = model.get_decoder()
        path = next((name for name, part in model.named_modules() if part is body), "")
        *above, last = path.split(".")
        self.model = inside = copy.copy(model)
        for name in above:
            child = copy.copy(inside._modules[name])
            inside._modules = {**inside._modules, name: child}     # the model itself keeps its own
            inside = child
        inside._modules = {**inside._modules, last: HandOn()}

    def __call__(self, states):
        one_row = states.reshape(1, -1, states.shape[-1])                           # (1, N, d)
        return self.model(inputs_embeds=one_row).logits.view(*states.shape[:-1], -1)


class HandOn(torch.nn.Module):
    """Stands in for a body: the embeddings that it is given are its hidden states."""

    def forward(self, *_, inputs_embeds, **__):
        return Output([inputs_embeds])


class Output(tuple):
    """A body's output: hidden states, and None for a cache, attention scores and other fields."""

    def __getattr__(self, name):
        return self[0] if name == "last_hidden_state" else None

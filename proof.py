"""Is a model read here as the library reads it? Four checks on a dozen tokens, at loading.

We do not run a model as the library's generate does. Prompts go in as embeddings, batches are
padded on the left, a cache is used more than once, and the vocabulary head runs apart from the
body. For most architectures this gives the library's own numbers. For some it gives others, and a
text does not show it. One looks up each token's number in a second table. A recurrent layer runs
over the padding. A cache is written over. So each model has to show four things before it is used:

    logits   prompts read as embeddings              = the library's forward pass over token ids
    batch    thoughts of two lengths, padded         = each of them alone
    cache    read in pieces, the last by a step      = read in one go
    fork     a cache, after something was read on    = as it was before (its error is 0 or 1)

An error is relative to the spread of the logits: the root mean square of the difference, divided by
the standard deviation. Measured on small random models of 150 families: right ones have an error
of 1e-6 in float32 (2e-5 with 64 layers), and of .01 in bfloat16 (.06 with 64 layers, .15 where
rounding sends tokens to other experts). Wrong ones have .03 to 1.4. In half precision an error of
.25 has to be allowed, so a mild fault is not seen there.
"""
import functools

import torch

from support.errors import need, say_once

LONG, SHORT = 12, 7                          # tokens of the two prompts; they begin alike


def relative(got, wanted):
    """The error of logits, relative to the spread of those that are wanted."""
    got, wanted = got.double(), wanted.double()
    return ((got - wanted).pow(2).mean().sqrt() / wanted.std()).item()


def some_tokens(agent):
    """LONG ordinary tokens (LONG,), the same every time. torch's global generator is left alone."""
    special = {*agent.tokenizer.all_special_ids, *agent.tokenizer.get_added_vocab().values()}
    known = min(len(agent.tokenizer), agent.embedding.num_embeddings)
    drawn = torch.randint(known, (10 * LONG,), generator=torch.Generator().manual_seed(0))
    ordinary_first = sorted(drawn.tolist(), key=lambda token: token in special)
    return torch.tensor(ordinary_first[:LONG], device=agent.device)


def held(context):
    """The tensors in a Context's cache: keys and values, or states, which stand in dicts."""
    values = [value for layer in context.cache.layers for value in vars(layer).values()]
    return [tensor for value in values
            for tensor in (value.values() if isinstance(value, dict) else [value])
            if torch.is_tensor(tensor)]


@torch.no_grad()
def prove(agent):
    """{check: its error}. The error is one line of text instead where the check raised one."""
    ids, gap = some_tokens(agent), LONG - SHORT
    words = agent.embedding(ids)[None]                                              # (1, LONG, d)
    # Row 0 is a long prompt. Row 1 is a short one with padding to its left. Like thoughts, their
    # embeddings are those of no token: each is the mean of two.
    thoughts = (words + words.roll(1, 1)) / 2
    rows = torch.cat([thoughts, thoughts.roll(gap, 1)])                             # (2, LONG, d)
    mask = torch.ones_like(rows[..., 0], dtype=torch.long)                          # (2, LONG)
    mask[1, :gap] = 0

    def read(t, context=None):
        return agent.read(rows[:, t], mask[:, t], context)

    @functools.cache                                 # what two checks need is read once
    def alone(embeds):
        """The logits after embeds (1, LONG, d), and after their beginning: (2, 1, V)."""
        contexts = [agent.read(embeds[:, :n], mask[:1, :n]) for n in (LONG, SHORT)]
        return agent.logits(torch.cat([context.hidden for context in contexts]))

    @functools.cache
    def but_one():
        return read(slice(LONG - 3, LONG - 1), read(slice(LONG - 3)))

    def logits():
        whole = agent.model(input_ids=ids[None]).logits                             # (1, LONG, V)
        return relative(alone(words), whole[0, [LONG - 1, SHORT - 1], None])

    def batch():
        return relative(agent.logits(read(slice(LONG)).hidden), alone(thoughts))

    def cache():
        step = agent.steps(but_one(), 1).step(rows[:, -1:])
        return relative(agent.logits(step), alone(thoughts))

    def fork():
        before = [tensor.clone() for tensor in held(but_one())]
        read(slice(LONG - 1, LONG), but_one())
        return float(not all(map(torch.equal, before, held(but_one()))))

    found = {}
    for check in (logits, batch, cache, fork):
        try:
            found[check.__name__] = check()
        except torch.OutOfMemoryError:           # it says nothing about the family
            raise
        except Exception as problem:             # the library's code for a family may raise any
            found[check.__name__] = " ".join(f"{type(problem).__name__}: {problem}".split())[:200]
    return found


def need_proved(agent):
    """Print a line if the agent's model passes the four checks. Raises ValueError if it does not:
    the line names the model, its family and the check."""
    most = .25 if agent.dtype.itemsize == 2 else 1e-3               # 2 bytes: half precision
    for check, error in prove(agent).items():
        says = error if isinstance(error, str) else f"{error:.2g}, at most {most:.2g} is rounding"
        need(not isinstance(error, str) and error <= most, f"{agent.name}: a model of the family "
             f"{agent.model.config.model_type} cannot be read here as the library reads it (check "
             f"'{check}': {says}): choose a model of another family")
    say_once("each model is shown to be read as the library reads it")

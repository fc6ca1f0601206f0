"""Is a model read here as the library reads it? Four checks on a dozen tokens, at loading.

We do not run a model as the library's generate does. Prompts go in as embeddings, batches are
padded on the left, caches are forked, and the vocabulary head runs apart from the body. For most
architectures this gives the library's own numbers. For some it gives others, and a text does not
show it. One looks up each token's number in a second table. A recurrent layer runs over the
padding. A cache is written over. So each model has to show four things before it is used:

    logits   prompts read as embeddings              = the library's forward pass over token ids
    batch    prompts of two lengths, padded          = each of them alone
    cache    read in pieces, the last token alone    = read in one go
    fork     going on from a cache a second time     = the first time

An error is relative to the spread of the logits: the root mean square of the difference, divided by
the standard deviation. Rounding makes it small. A wrong way of reading makes it about 1.
"""
import functools

import torch

from support.errors import need, say_once

LONG, SHORT = 12, 7                          # tokens of the two prompts; they begin alike


def allowed(dtype):
    """The largest error that rounding alone may make in this dtype."""
    return max(1e-3, 32 * torch.finfo(dtype).eps)


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


@torch.no_grad()
def prove(agent):
    """{check: its error}. The error is one line of text instead where the check raised one."""
    ids, gap = some_tokens(agent), LONG - SHORT
    # Row 0 is the long prompt. Row 1 is the short one with padding to its left.
    rows = torch.stack([ids, ids.roll(gap)])                                        # (2, LONG)
    mask = torch.ones_like(rows)
    mask[1, :gap] = 0

    def read(b, t, context=None):
        return agent.read(agent.embedding(rows[b, t]), mask[b, t], context)

    @functools.cache
    def alone():
        """The logits after each prompt, read alone and without padding: (2, 1, V)."""
        contexts = [read(slice(b, b + 1), slice(b * gap, LONG)) for b in (0, 1)]
        return torch.cat([agent.logits(context.hidden) for context in contexts])

    @functools.cache
    def all_but_one():
        """The Context of both prompts without their last token, read in two pieces."""
        both = slice(None)
        return read(both, slice(LONG - 3, LONG - 1), read(both, slice(LONG - 3)))

    def step():
        return agent.logits(read(slice(None), slice(LONG - 1, LONG), all_but_one()).hidden)

    def logits():
        whole = agent.model(input_ids=ids[None]).logits                             # (1, LONG, V)
        return alone(), whole[0, [LONG - 1, SHORT - 1], None]

    def batch():
        return agent.logits(read(slice(None), slice(None)).hidden), alone()

    def cache():
        return step(), alone()

    def fork():
        once = step()
        return step(), once

    found = {}
    for check in (logits, batch, cache, fork):
        try:
            found[check.__name__] = relative(*check())
        except Exception as problem:             # the library's code for a family may raise any
            found[check.__name__] = " ".join(f"{type(problem).__name__}: {problem}".split())[:200]
    return found


def need_proved(agent):
    """Print a line if the agent's model passes the four checks. Raises ValueError if it does not:
    the line names the model, its family and the check."""
    most = allowed(agent.dtype)
    for check, error in prove(agent).items():
        need(not isinstance(error, str) and error <= most, f"{agent.name}: a model of the family "
             f"{agent.model.config.model_type} cannot be read here as the library reads it (check "
             f"'{check}': {error}, at most {most:.2g}): choose a model of another family")
    say_once("Each model is shown to be read as the library reads it.")

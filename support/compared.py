"""Both sides of what bench.py compares: plain_.. by reference.py, our_.. by the fast code.
(our_losses stands in bench.py, because it is train_outer.py's.)

All systems here are those of support/dimensions.py, and their texts are its words.
"""
import copy
from functools import partial

import torch
import torch.nn.functional as F

import reference
from link import word_losses
from recurse import MAS, recurse
from support.compiled import Recorder

EPOCHS = 21        # as published: 20,000 steps of 2 rows, on 1,904 rows


def read(agent, texts):
    """The Context of bare texts, without a chat around them."""
    return agent.read(*agent.embed([[tokens] for tokens in agent.tokenize(texts)], {}))


def plain_prompt(question, role, heard):
    """The parts of a prompt, as reference.recurse asks for them.

    All systems here have the prompts of styles/tiny.py, `{question} <|notes|> {role heard}`, in the
    chat of words_tokenizer. Words that it does not know, like <|notes|>, are one token each."""
    return [f"w1 {question} <|notes|>", *(heard.values() or ["none"]), "w2"]


def plain_states(agent, embeds):
    """reference.hidden_states for B prompts of one length at once: (B, T, d)."""
    return agent.body(inputs_embeds=embeds, use_cache=False).last_hidden_state


def plain_think(agent, texts, m):
    """reference.think for B texts of one length at once: (B, m, d)."""
    embeds = torch.stack([reference.embed(agent, [text]) for text in texts])       # (B, T, d)
    thoughts = []
    for _ in range(m):
        thoughts.append(plain_states(agent, embeds)[:, -1:])                       # (B, 1, d)
        embeds = torch.cat([embeds, agent.inner(thoughts[-1])], 1)
    return torch.cat(thoughts, 1)


def plain_messages(mas, questions, R, m):
    """All messages of the recursion, for one question after the other: [(m, d_dst)]."""
    runs = [reference.recurse(mas, partial(plain_prompt, one), R, m) for one in questions]
    return [message for _, _, sent in runs for message in sent.values()]


def our_messages(mas, questions, R, m):
    """The same messages in the same order, from one batch."""
    sent = recurse(mas, questions, R, m, trace=True).sent           # {(round, edge): (B, m, d_dst)}
    return [message for of_one in zip(*sent.values()) for message in of_one]


def inner_losses(agent, texts, again):
    """Train an inner link along texts for EPOCHS epochs, and return the losses.

    The base model is frozen, so its hidden states never change. They are computed once, as in
    train_inner.py, or `again` in each epoch, as published. How many texts an epoch has does not
    change the ratio."""
    tokens = torch.tensor(agent.tokenize(texts), device=agent.device)          # (B, T)
    link, losses = copy.deepcopy(agent.inner).float().requires_grad_(True), []
    optimizer = torch.optim.AdamW(link.parameters(), lr=5e-4, fused=True)    # as in training.py
    for epoch in range(EPOCHS):
        if again or epoch == 0:
            with torch.no_grad():
                states = plain_states(agent, agent.embedding(tokens))          # (B, T, d)
        got = link(states[:, :-1].float().flatten(0, 1))                       # (B (T - 1), d)
        loss, _ = word_losses(got, tokens[:, 1:].flatten(), agent.embedding)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def plain_losses(mas, rows, R, m):
    """The outer loss of one row after the other, by reference.py.

        loss = CE(head(states before each word of the gold answer), the gold answer)"""
    for row in rows:
        agent, embeds, _ = reference.recurse(mas, partial(plain_prompt, row["question"]), R, m)
        gold = reference.embed(agent, [row["answer"]])                         # (n, d)
        states = reference.hidden_states(agent, torch.cat([embeds, gold]))     # (T + n, d)
        logits = agent.head(states[-len(gold) - 1:-1]).float()                 # (n, V)
        tokens = torch.tensor(agent.tokenize([row["answer"]])[0], device=agent.device)
        yield F.cross_entropy(logits, tokens)


def gradient(losses_of, mas, **what):
    """[the sum of losses, its gradient in all outer links].

    Each loss is taken back before the next one is computed, so that memory holds one at a time."""
    total = 0.0
    for loss in losses_of(mas, **what):
        loss.backward()
        total += loss.detach()
    flat = torch.cat([weight.grad.flatten() for weight in mas.outer.parameters()])
    mas.outer.zero_grad()
    return [total, flat]


def in_float32(system):
    """A copy of an agent or a MAS in float32. It leaves the GPU's recorded steps behind."""
    twin = copy.copy(system)
    if isinstance(system, MAS):
        twin.agents = {name: in_float32(agent) for name, agent in system.agents.items()}
        twin.outer = copy.deepcopy(system.outer).float()
        return twin
    twin.recorder = None
    twin = copy.deepcopy(twin)
    twin.recorder = Recorder(twin)
    twin.model.float()
    twin.inner.float()
    twin.dtype = torch.float32
    return twin


def apart(ours, theirs):
    """How far two lists of tensors are apart: the largest |a - b| / |b|. A size that differs is an
    error, and a NaN stays one."""
    pairs = [(a.float(), b.float().view(a.shape)) for a, b in zip(ours, theirs, strict=True)]
    return torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max().item()

"""Both sides of each comparison: plain_.. by reference.py, our_.. by the fast code.

All systems here are those of bench/models.py, and their texts are its words. Shapes: B questions,
T tokens of a prompt, m thoughts, R rounds, n tokens of a gold answer, d width.
"""
import copy
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import reference
from gpu.recorded import Recorder
from recurse import MAS, recurse
from train_outer import outer_loss

# Flags of train_outer.py that its loss looks at: the published values.
TRAINING = dict(mas_task="math", loss="answer", latents="rollout", max_length=4096,
                role_loss_weight=0.0, supervise_final_only=1, log_gradients=0)


def read(agent, texts):
    """The Context of bare texts, without a chat around them."""
    return agent.read(*agent.embed([[tokens] for tokens in agent.tokenize(texts)], {}))


def plain_prompt(question, role, heard):
    """The parts of a prompt, as reference.recurse asks for them.

    All systems here have the prompts of styles/tiny.py, `{question} <|notes|> {role heard}`, in the
    chat of words_tokenizer. Words that it does not know, like <|notes|>, are one token each."""
    return [f"w1 {question} <|notes|>", *(heard.values() or ["none"]), "w2"]


def plain_think(agent, texts, m):
    """reference.think for B texts of one length at once: (B, m, d)."""
    embeds = torch.stack([reference.embed(agent, [text]) for text in texts])       # (B, T, d)
    thoughts = []
    for _ in range(m):                           # reference.hidden_states, of B prompts at once
        states = agent.body(inputs_embeds=embeds, use_cache=False).last_hidden_state
        thoughts.append(states[:, -1:])                                            # (B, 1, d)
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


def plain_losses(mas, rows, R, m):
    """The outer loss of one row after the other, by reference.py.

        loss = CE(head(states before each word of the gold answer), the gold answer)"""
    for row in rows:
        agent, embeds, _ = reference.recurse(mas, partial(plain_prompt, row["question"]), R, m)
        gold = reference.embed(agent, [row["answer"]])                         # (n, d)
        states = reference.hidden_states(agent, torch.cat([embeds, gold]))     # (T + n, d)
        logits = agent.logits(states[-len(gold) - 1:-1]).float()                 # (n, V)
        tokens = torch.tensor(agent.tokenize([row["answer"]])[0], device=agent.device)
        yield F.cross_entropy(logits, tokens)


def our_losses(mas, rows, R, m, checkpointing=0):
    """The same by train_outer.py: the sum, of all rows at once. (Its loss is a mean over tokens,
    and here all rows have equally many.)"""
    args = SimpleNamespace(**TRAINING, latent_length=m, gradient_checkpointing=checkpointing)
    yield outer_loss(mas, rows, R, args).loss * len(rows)


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
    twin.recorder = Recorder(twin.forward)
    twin.model.float()
    twin.inner.float()
    twin.dtype = torch.float32
    return twin


def apart(ours, theirs):
    """How far two lists of tensors are apart: the largest |a - b| / |b|. A NaN stays a NaN. Raises
    RuntimeError or ValueError where sizes differ."""
    pairs = [(a.float(), b.float().view(a.shape)) for a, b in zip(ours, theirs, strict=True)]
    return torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max().item()

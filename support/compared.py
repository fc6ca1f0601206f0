"""What bench.py compares: the same thing by reference.py and by the fast code.

plain_..: by reference.py. our_..: by the fast code. Both return lists of tensors, in one order.
"""
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import reference
from recurse import recurse
from train_outer import outer_loss

# Flags of train_outer.py, as far as its loss looks at them: the published values.
TRAINING = dict(mas_task="math", latents="rollout", max_length=4096, role_loss_weight=0.0,
                supervise_final_only=1, log_gradients=0)


def read(agent, texts):
    """The Context of bare texts, without a chat around them."""
    return agent.read(*agent.embed([[tokens] for tokens in agent.tokenize(texts)], {}))


def plain_prompt(question, role, heard):
    """The parts of a prompt, as reference.recurse asks for them.

    All systems here have the prompts of styles/tiny.py, `{question} <|notes|> {role heard}`, in the
    chat of words_tokenizer. Words that it does not know, like <|notes|>, are one token each."""
    return [f"w1 {question} <|notes|>", *(heard.values() or ["none"]), "w2"]


def plain_messages(mas, questions, R, m):
    """All messages of the recursion, for one question after the other: [(m, d_dst)]."""
    runs = [reference.recurse(mas, partial(plain_prompt, one), R, m) for one in questions]
    return [message for _, _, sent in runs for message in sent.values()]


def our_messages(mas, questions, R, m):
    """The same messages in the same order, from one batch."""
    sent = recurse(mas, questions, R, m, trace=True).sent           # {(round, edge): (B, m, d_dst)}
    return [message for of_one in zip(*sent.values()) for message in of_one]


def plain_loss(mas, rows, R, m):
    """The outer loss, summed over one row after the other, by reference.py.

        loss = CE(head(states before each word of the gold answer), the gold answer)"""
    total = 0.0
    for row in rows:
        agent, embeds, _ = reference.recurse(mas, partial(plain_prompt, row["question"]), R, m)
        gold = reference.embed(agent, [row["answer"]])                         # (n, d)
        states = reference.hidden_states(agent, torch.cat([embeds, gold]))     # (T + n, d)
        logits = agent.head(states[-len(gold) - 1:-1]).float()                 # (n, V)
        tokens = torch.tensor(agent.tokenize([row["answer"]])[0], device=agent.device)
        total += F.cross_entropy(logits, tokens)
    return total


def our_loss(mas, rows, R, m, checkpointing=0):
    """The same by train_outer.py, of all rows at once. Its loss is a mean over all tokens, of which
    each row here has equally many."""
    args = SimpleNamespace(**TRAINING, latent_length=m, gradient_checkpointing=checkpointing)
    return outer_loss(mas, rows, R, args).loss * len(rows)


def gradient(loss, mas):
    """[the loss, its gradient in all outer links]."""
    loss.backward()
    flat = torch.cat([weight.grad.flatten() for weight in mas.outer.parameters()])
    mas.outer.zero_grad()
    return [loss.detach(), flat]


def apart(ours, theirs):
    """How far two lists of tensors are apart: the largest |a - b| / |b|. A size that differs is an
    error, and a NaN stays one."""
    pairs = [(a.float(), b.float().view(a.shape)) for a, b in zip(ours, theirs, strict=True)]
    return torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max().item()

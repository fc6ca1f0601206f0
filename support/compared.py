"""What bench.py compares: the same thing by reference.py and by the fast code.

plain_..: by reference.py. our_..: by the fast code. Both return lists of tensors, in one order.
"""
import copy
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import reference
from recurse import recurse
from support.rows import RoleText
from tasks import get_task
from train_inner import inner_loss, states_along
from train_outer import outer_loss
from writing import Writing

EPOCHS = 21        # 20,000 steps of 2 rows are 21 epochs of the 1,904 rows of Sequential-Math
# Flags of the trainers, as far as their losses look at them: the published values.
TRAINING = dict(mas_task="math", latents="rollout", max_length=4096, role_loss_weight=0.0,
                supervise_final_only=1, log_gradients=0, adapter_cos_weight=1.0,
                adapter_mse_weight=0.0)


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


def ask_tiny(mas, examples, method):
    """Ask the shipped tiny system with R = 3, m = 6 and 32 words a text.

    Returns two lists with one entry a question: words of all agents, and whether it is right."""
    questions, task = [example.question for example in examples], get_task("tiny")
    texts, run = mas.respond(questions, 3, 6, method=method, writing=Writing(32))
    return run.decoded, [task.score(*pair).correct for pair in zip(examples, texts)]


def inner_losses(agent, style, rows, again):
    """Train an inner link on one batch for EPOCHS epochs, and return the losses.

    The base model is frozen, so its hidden states never change. They are computed once, as in
    train_inner.py, or `again` in each epoch. How many rows an epoch has does not change the ratio.
    So a single batch is enough to tell what 20,000 steps on 1,904 rows would gain."""
    texts = [RoleText(row["question"], "math", {}, row, row["answer"]) for row in rows]
    tokens = agent.tokenize([one.text for one in texts])
    targets = torch.tensor([token for row in tokens for token in row], device=agent.device)
    link, losses = copy.deepcopy(agent.inner).float().requires_grad_(True), []
    optimizer = torch.optim.AdamW(link.parameters(), lr=5e-4)
    for epoch in range(EPOCHS):
        if again or epoch == 0:
            states = torch.cat(states_along(agent, style, style.roles[0], texts, tokens))
        loss, *_ = inner_loss(link, agent.embedding, states, targets, SimpleNamespace(**TRAINING))
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


def our_losses(mas, batches, R, m, checkpointing=0):
    """The same by train_outer.py: of one batch after the other, as a sum over its rows."""
    args = SimpleNamespace(**TRAINING, latent_length=m, gradient_checkpointing=checkpointing)
    for batch in batches:
        # It is a mean over all tokens, of which each row here has equally many.
        yield outer_loss(mas, batch, R, args).loss * len(batch)


def gradient(losses, mas, *what):
    """[sum of losses(mas, *what), its gradient in all outer links].

    Each loss goes backward before the next one is computed, so one graph is kept at a time."""
    total = 0.0
    for loss in losses(mas, *what):
        loss.backward()
        total += loss.item()
    flat = torch.cat([weight.grad.flatten() for weight in mas.outer.parameters()])
    mas.outer.zero_grad()
    return [torch.tensor(total), flat]


def apart(ours, theirs):
    """How far two lists of tensors are apart: the largest |a - b| / |b|. A size that differs is an
    error, and a NaN stays one."""
    pairs = [(a.float(), b.float().view(a.shape)) for a, b in zip(ours, theirs, strict=True)]
    return torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max().item()

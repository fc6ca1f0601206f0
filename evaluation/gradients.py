"""How much does a round teach the links? |dL/d(message)| of each message, logged and drawn.

    keep_gradients(sent)                         before backward: torch drops them otherwise
    message_gradients(sent, count, scale)        after backward: for log.jsonl
    plot_gradients(folder)                       after training: FOLDER/gradients.png

A round that is far below the others teaches its links nothing. docs/training.md shows the picture.
"""
from statistics import fmean

import torch

from evaluation.report import new_figure, save_figure
from support.files import read_lines


def keep_gradients(sent):
    """Let backward keep the gradients of messages {(round, edge key): message}."""
    for message in sent.values():
        for part in parts_of(message):
            part.retain_grad()


def message_gradients(sent, count, scale):
    """{gradient_EDGE_ROUND: |dL/d(message)| of one row}, where L is the row's own loss.

    The batch's loss is a mean over `count` rows, so |dL/d(message)| is multiplied by count. scale:
    the factor by which gradients are too large. The norm is computed in float32, because early
    rounds would be zero in half precision."""
    found = {}
    for (round, key), message in sent.items():
        sizes = [part.grad.float().norm(dim=(-2, -1)).view(-1) for part in parts_of(message)
                 if part.grad is not None]
        if sizes:
            found[f"gradient_{key}_{round}"] = torch.cat(sizes).mean().item() * count / scale
    return found


def parts_of(message):
    """A message as tensors: (B, m, d), or one for each row where rows differ in length."""
    return [message] if torch.is_tensor(message) else message


def plot_gradients(folder):
    """Draw FOLDER/gradients.png from the log: |dL/d(message)| of each edge by round.

    Mean over the logged steps."""
    norms = {}                                      # {edge key: {round: [norm of each step]}}
    for line in read_lines(folder / "log.jsonl"):
        for name, value in line.items():
            if name.startswith("gradient_") and value:
                key, round = name.removeprefix("gradient_").rsplit("_", 1)
                norms.setdefault(key, {}).setdefault(int(round), []).append(value)
    figure = new_figure(width=5)
    axes = figure.subplots()
    for key, by_round in norms.items():
        means = {round: fmean(by_round[round]) for round in sorted(by_round)}
        axes.plot(list(means), list(means.values()), marker="o", label=key)
        print(f"gradient of {key} by round: "
              + "  ".join(f"{round}: {mean:.1e}" for round, mean in means.items()))
    axes.set(xlabel="round", ylabel="|dL/d(message)|", yscale="log", title="gradients by round",
             xticks=sorted({round for by_round in norms.values() for round in by_round}))
    axes.legend(fontsize=8)
    save_figure(figure, folder / "gradients.png")

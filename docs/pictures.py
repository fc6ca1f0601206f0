"""The pictures of README and docs that show what the tiny system does.

    python docs/pictures.py                 draws them into docs/pictures, half a minute
    python docs/pictures.py --out DIR       draws them elsewhere

    accuracy.png    accuracy by rounds, beside text and the controls (evaluate.py)
    thoughts.png    the thoughts about one question, read as words (evaluate.py --show 1)
    gradients.png   |dL/d(message)| of each message (train_outer.py --log_gradients 1)

The project's own functions measure all figures in these three. The other pictures of docs/pictures
are diagrams. Nothing in them is measured, so they are files and no script draws them:

    method.png      one agent thinks, and its thoughts go into the next agent's prompt
    links.png       the two RecursiveLinks, layer by layer (link.py)
    rounds.png      two rounds of planner, critic and solver (recurse.py)
"""
import argparse
import sys
import tempfile
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from matplotlib.figure import Figure  # noqa: E402

import evaluate  # noqa: E402
from evaluation import report  # noqa: E402
from evaluation.answers import Plan  # noqa: E402
from evaluation.in_words import in_words  # noqa: E402
from recurse import load_mas_system  # noqa: E402
from support import flags  # noqa: E402
from tasks import get_task  # noqa: E402
from train_outer import outer_loss  # noqa: E402
from writing import Writing  # noqa: E402

# Colours that colour-blind readers can tell apart (Okabe and Ito), and pale ones for the roles.
BLUE, ORANGE, GREEN, RED, GRAY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#767676"
ROLES = {"planner": "#F3DCE8", "critic": "#FFF7C2", "solver": "#DCE3F5"}
ROUNDS = (1, 2, 3)


# ---- accuracy -----------------------------------------------------------------------------------

def plan_for(mas, methods=(), batch_size=100):
    """How the tiny system is asked: as in training, with the most probable word each time."""
    return Plan(list(methods), list(ROUNDS), mas.latent_length, batch_size, Writing(32))


def measure_accuracy(mas, count=200):
    """(table entries of the methods, {rounds: the best accuracy possible}) on `count` questions."""
    task = get_task("tiny")
    examples = task.load(count)
    plan = plan_for(mas, ("latent", "text", "single_loop", "single", "shuffle"))
    with tempfile.TemporaryDirectory() as folder:            # evaluate.py's own files are not kept
        lines = evaluate.evaluate(mas, None, task, examples, plan, Path(folder), {})
    return report.summarise(lines), {rounds: task.ceiling(examples, rounds) for rounds in ROUNDS}


def draw_accuracy(entries, ceiling, path):
    """Bars by rounds with 95 % intervals. `single` has no rounds, so it is a line."""
    figure = Figure(figsize=(10, 5.8), layout="constrained")
    axes = figure.subplots()
    looks = {"latent": (BLUE, "", "latent: thoughts are sent"),
             "text": (ORANGE, "//", "text: texts are sent"),
             "single_loop": (GREEN, "\\\\", "single_loop: the solver rereads its own text"),
             "shuffle": (GRAY, "..", "shuffle: another question's thoughts are sent")}
    for i, (method, (color, hatch, label)) in enumerate(looks.items()):
        mine = [one for one in entries if one["method"] == method]
        xs = [one["rounds"] + 0.22 * (i - 1.5) for one in mine]
        axes.bar(xs, [one["accuracy"] for one in mine], 0.2, color=color, label=label,
                 hatch=hatch, edgecolor="white")
        axes.vlines(xs, *zip(*(one["ci95"] for one in mine)), color="black", lw=1.5)
        for x, one in zip(xs, mine):
            axes.text(x, one["ci95"][1] + 0.025, f"{one['accuracy']:.3f}", ha="center", fontsize=12,
                      bbox=dict(facecolor="white", edgecolor="none", pad=0.5))
    alone, = (one["accuracy"] for one in entries if one["method"] == "single")
    axes.axhline(alone, color=RED, ls=":", lw=2.5,
                 label=f"single: the solver alone, once ({alone:.3f})")
    for rounds, best in ceiling.items():
        axes.hlines(best, rounds - 0.46, rounds + 0.46, color="black", ls="--", lw=2,
                    label="expected of a perfect system" if rounds == 1 else None)
    axes.set_xlabel("rounds", fontsize=14)
    axes.set_ylabel(f"accuracy on {entries[0]['n']} questions", fontsize=14)
    axes.set(xticks=list(ceiling), ylim=(0, 1.12))
    axes.tick_params(labelsize=13)
    figure.legend(fontsize=13, loc="outside upper center", ncols=2, frameon=False)
    report.save_figure(figure, path)


# ---- thoughts -----------------------------------------------------------------------------------

def draw_thoughts(example, turns, path):
    """A grid of words: a line per turn, a cell per thought. The counter's values are bold."""
    m = len(turns[0][3])
    figure = Figure(figsize=(10, 5.4))
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.1)
    axes = figure.subplots()
    for y, (_, role, _, words) in enumerate(turns):
        width = m / len(words)                               # the written text takes the whole line
        for i, word in enumerate(words):
            axes.barh(y, width - 0.06, 0.84, i * width + 0.03, color=ROLES[role], ec="black")
            axes.text((i + 0.5) * width, y, word, ha="center", va="center", fontsize=13,
                      weight="bold" if word.isdigit() else "normal")
    axes.set_yticks(range(len(turns)), [f"round {round}  {role} {does}"
                                        for round, role, does, _ in turns], fontsize=12.5)
    axes.set_xticks([i + 0.5 for i in range(m)], [f"thought {i + 1}" for i in range(m)],
                    fontsize=12)
    axes.set(xlim=(0, m), ylim=(len(turns) - 0.5, -0.5))     # the first turn on top
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    question = textwrap.fill(example.question, 60, break_on_hyphens=False)
    figure.suptitle(f"{question}\n(right answer: {example.gold}; bold: where the counter stands)",
                    x=0.02, ha="left", fontsize=13.5, family="monospace")
    report.save_figure(figure, path)


# ---- gradients ----------------------------------------------------------------------------------

def measure_gradients(mas, rows, role_loss_weight):
    """{(round, edge key): |dL/d(message)|} of a batch of rows, through all rounds unrolled."""
    args = argparse.Namespace(
        loss="answer", latents="rollout", latent_length=mas.latent_length, max_length=4096,
        role_loss_weight=role_loss_weight, supervise_final_only=1, gradient_checkpointing=0,
        mas_task="math", log_gradients=1)
    mas.outer.requires_grad_(True)             # else nothing has a gradient: the rest is frozen
    outcome = outer_loss(mas, rows, max(ROUNDS), args)
    outcome.loss.backward()
    mas.outer.zero_grad()
    mas.outer.requires_grad_(False)
    return {which: message.grad.norm().item() for which, message in outcome.sent.items()}


def draw_gradients(style, by_loss, path):
    """by_loss: {label: sizes of measure_gradients}. Messages stand in the order of sending."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    # The second marker is larger and empty: it hides no point of the first curve.
    looks = ((BLUE, "o", "-", 7), (ORANGE, "s", "--", 14))
    for (label, sizes), (color, marker, line, size) in zip(by_loss.items(), looks):
        axes.plot(range(len(sizes)), list(sizes.values()), color=color, marker=marker, ls=line,
                  lw=2.5, ms=size, mew=2, fillstyle="full" if size < 9 else "none", label=label)
    ends = {edge.key: f"{edge.src}\nto {edge.dst}" for edge in style.edges}
    axes.set_xticks(range(len(sizes)), [f"{ends[key]}\nround {round}" for round, key in sizes])
    axes.set_yscale("log")
    axes.set_ylabel("|dL/d(message)|", fontsize=14)
    axes.set_xlabel("messages in the order of sending, through the shipped links", fontsize=14)
    axes.tick_params(labelsize=12)
    axes.grid(axis="y", alpha=0.4)
    axes.legend(fontsize=13, loc="lower right")
    report.save_figure(figure, path)


# ---- the script ---------------------------------------------------------------------------------

def draw_all(mas, out, questions=200, batch=16):
    """Measure and draw the three pictures into the folder `out`."""
    task = get_task("tiny")
    draw_accuracy(*measure_accuracy(mas, questions), out / "accuracy.png")
    example, = task.load(1)
    draw_thoughts(example, in_words(mas, example, plan_for(mas)), out / "thoughts.png")
    rows = task.train_rows(batch, seed=0)
    losses = {"L = the last answer's loss alone": 0.0,
              "L = a loss for every role (--role_loss_weight 1)": 1.0}
    by_loss = {label: measure_gradients(mas, rows, weight) for label, weight in losses.items()}
    draw_gradients(mas.style, by_loss, out / "gradients.png")


def main():
    """Load the tiny system, draw, say where."""
    parser = flags.Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pictures",
                        help="where the pictures go")
    out = parser.parse_args().out
    draw_all(load_mas_system("tiny", device="cpu"), out)
    print(f"the pictures are in {out}")


if __name__ == "__main__":
    flags.run(main)

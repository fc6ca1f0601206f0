"""The pictures of README and docs: the method drawn, and the tiny system measured.

    python docs/pictures.py                 draws all of them into docs/pictures, half a minute
    python docs/pictures.py --out DIR       draws them elsewhere

    method.png      one agent thinks, and its thoughts go into the next agent's prompt
    links.png       the two RecursiveLinks, layer by layer (link.py)
    rounds.png      two rounds of planner, critic and solver (recurse.py)
    accuracy.png    accuracy by rounds, beside text and the controls (evaluate.py)
    thoughts.png    the thoughts about one question, read as words (evaluate.py --show 1)
    gradients.png   |dL/d(message)| of each message (train_outer.py --log_gradients 1)

The first three are drawn by hand: all places are in inches, from the lower left corner. The other
three show figures that the project's own functions measure.
"""
import argparse
import sys
import tempfile
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

import evaluate  # noqa: E402
from recurse import load_mas_system  # noqa: E402
from support import flags, report  # noqa: E402
from support.answers import Plan, in_words  # noqa: E402
from tasks import get_task  # noqa: E402
from train_outer import outer_loss  # noqa: E402
from writing import Writing  # noqa: E402

# Colours that colour-blind readers can tell apart (Okabe and Ito), and pale ones for boxes.
BLUE, ORANGE, RED, GRAY = "#0072B2", "#E69F00", "#D55E00", "#767676"
WORD, MODEL, THOUGHT, INNER, OUTER = "#F2F2F2", "#DDDDDD", "#BFE6DA", "#BFDDF0", "#FBE0A6"
ROLES = {"planner": "#F3DCE8", "critic": "#FFF7C2", "solver": "#DCE3F5"}
ROUNDS = (1, 2, 3)


# ---- boxes and arrows ---------------------------------------------------------------------------

def canvas(width, height):
    """(figure, axes) to draw boxes on, where one unit is one inch."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return figure, axes


def box(axes, x, y, text, width=0.62, height=0.5, color=WORD, size=13, **style):
    """A box with a text, its middle at (x, y)."""
    axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, ec="black",
                                  fc=color, boxstyle="round,pad=0,rounding_size=0.06"))
    axes.text(x, y, text, ha="center", va="center", fontsize=size, **style)


def arrow(axes, *points):
    """A line through the points, with a head at its end. Boxes lie above it (zorder)."""
    for start, end in zip(points, points[1:]):
        style = "-|>" if end is points[-1] else "-"
        axes.annotate("", end, start, zorder=0, arrowprops=dict(
            arrowstyle=style, color="black", lw=1.8, mutation_scale=18, shrinkA=0, shrinkB=0))


def prompt_row(axes, y, message):
    """A prompt as a row of boxes: words, a message of m vectors in its slot, one more word."""
    slot = (f"${message}_1$", "…", f"${message}_m$")
    cells = [*((word, WORD) for word in ("start", "3", "s1", "…")),
             *((vector, OUTER) for vector in slot), ("…", WORD)]
    for i, (text, color) in enumerate(cells):
        box(axes, 0.6 + 0.64 * i, y, text, color=color)


# ---- the method ---------------------------------------------------------------------------------

def draw_method(path):
    """One agent reads, thinks m times in a loop, and sends its thoughts to the next agent."""
    figure, axes = canvas(10, 7.0)
    inputs, middle, states = 5.6, 4.4, 3.2                       # heights of the three levels
    say, title = axes.text, {"fontsize": 15, "weight": "bold"}
    # 1. The agent reads its prompt. The last hidden state is its first thought.
    say(0.3, 6.6, "1. The critic reads its prompt", **title)
    say(0.3, 6.2, "$v_1$ .. $v_m$: the planner's message, where words would stand", fontsize=12)
    prompt_row(axes, inputs, "v")
    box(axes, 2.84, middle, "body: a frozen language model\nwithout its vocabulary head", 5.1, 0.9,
        MODEL, 14)
    for i in range(8):
        arrow(axes, (0.6 + 0.64 * i, inputs - 0.25), (0.6 + 0.64 * i, middle + 0.45))
    arrow(axes, (5.08, middle - 0.45), (5.08, states + 0.25))
    box(axes, 5.08, states, "$h_1$", color=THOUGHT, size=15)
    # 2. The loop: R_in makes a thought the next input, so the agent reads its own thought.
    say(5.9, 6.6, "2. It thinks m times", **title)
    say(5.9, 6.2, "$R_{in}(h)$ is its next input: no word is chosen", fontsize=12)
    for x, thought, begin in ((7.15, "$h_2$", 5.39), (9.4, "$h_m$", 7.95)):
        link = x - 1.0                                           # the place of R_in
        arrow(axes, (begin, states), (link, states), (link, middle - 0.3))
        box(axes, link, middle, "$R_{in}$", 0.62, 0.6, INNER, 15)
        arrow(axes, (link, middle + 0.3), (link, inputs), (x - 0.31, inputs))
        box(axes, x, inputs, "", color=INNER)
        arrow(axes, (x, inputs - 0.25), (x, middle + 0.45))
        box(axes, x, middle, "body", 0.85, 0.9, MODEL, 14)
        arrow(axes, (x, middle - 0.45), (x, states + 0.25))
        box(axes, x, states, thought, color=THOUGHT, size=15)
    say(7.7, states, "…", fontsize=18, ha="center", va="center")
    say(0.3, states, "Each body is the same model. It has\nread all inputs to its left.",
        fontsize=12, va="center")
    # 3. All thoughts go through both links into the slot of the next agent's prompt.
    axes.plot([4.8, 4.8, 9.7, 9.7], [2.8, 2.65, 2.65, 2.8], color="black", lw=1.8)
    say(9.7, 2.3, "H = ($h_1$ .. $h_m$): m thoughts of width d", fontsize=12, ha="right",
        va="center")
    arrow(axes, (5.6, 2.65), (5.6, 2.0))
    arrow(axes, (5.15, 1.75), (4.25, 1.75))
    arrow(axes, (3.8, 1.5), (3.8, 0.75))
    box(axes, 5.6, 1.75, "$R_{in}$", 0.9, 0.5, INNER, 15)
    box(axes, 3.8, 1.75, "$R_{out}$", 0.9, 0.5, OUTER, 15)
    say(6.25, 1.75, "message $u_1$ .. $u_m$ = $R_{out}(R_{in}(H))$", fontsize=14, va="center")
    say(0.3, 2.15, "3. The solver hears it", **title)
    prompt_row(axes, 0.5, "u")
    say(5.6, 0.5, "… and the solver thinks in turn", fontsize=14, va="center")
    report.save_figure(figure, path)


def draw_link(axes, y, color, names, bypass, widths):
    """One link from left to right. names: input, six layers, output. bypass: the layer on the way
    around. widths: of the vector on each of the seven arrows."""
    xs = [0.4, *(1.65 + 1.25 * i for i in range(6)), 9.45]
    halves = [0.2, 0.42, 0.42, 0.42, 0.42, 0.2, 0.42, 0.45]
    # Around the layers, the input itself is added, or W_3 x where the widths differ.
    arrow(axes, (0.9, y), (0.9, y - 0.65), (xs[5], y - 0.65), (xs[5], y - 0.25))
    if bypass:
        box(axes, xs[3], y - 0.65, bypass, 0.84, 0.5, color, 14)
    for i, (x, half, name) in enumerate(zip(xs, halves, names)):
        if i in (0, 7):
            axes.text(x, y, name, fontsize=16, ha="center", va="center")
        else:
            box(axes, x, y, name, 2 * half, 0.5, color, 14)
        if i:
            begin, end = xs[i - 1] + halves[i - 1], x - half
            arrow(axes, (begin, y), (end, y))
            axes.text((begin + end) / 2, y + 0.08, widths[i - 1], fontsize=12, ha="center")


def draw_links(path):
    """Both links, each below its equation."""
    figure, axes = canvas(10, 5.8)
    axes.text(0.25, 5.4, "Inner link: a thought becomes the agent's own next input", fontsize=15,
              weight="bold")
    axes.text(0.25, 4.95, r"$R_{in}(h) = LN_{post}(\,h + W_2\,GELU(\,W_1\,LN_{pre}(h)))$",
              fontsize=15)
    draw_link(axes, 4.2, INNER, ("h", "$LN_{pre}$", "$W_1$", "GELU", "$W_2$", "+", "$LN_{post}$",
                                 "$R_{in}(h)$"), "", ["d"] * 7)
    axes.text(0.25, 2.75, "Outer link: that input becomes another agent's input", fontsize=15,
              weight="bold")
    axes.text(0.25, 2.3, r"$R_{out}(x) = LN_t(\,W_3\,x + W_2\,GELU(\,W_1\,LN_s(x)))$", fontsize=15)
    draw_link(axes, 1.55, OUTER, ("x", "$LN_s$", "$W_1$", "GELU", "$W_2$", "+", "$LN_t$",
                                  "$R_{out}(x)$"), "$W_3$", ("d", "d", "2d'", "2d'", *["d'"] * 3))
    axes.text(0.25, 0.2, "LN: a LayerNorm. W: a linear layer. d: the sender's width. d': the "
              "receiver's width.", fontsize=12.5)
    report.save_figure(figure, path)


def draw_rounds(style, path):
    """Two rounds as two rows. The names on the arrows are those of the outer links."""
    figure, axes = canvas(10, 4.5)
    names = {edge.src: f"{edge.key}: $R_{{out}}(R_{{in}}(H))$" for edge in style.edges}
    roles, xs, rows = [role.name for role in style.roles], (1.35, 5.0, 8.65), (3.35, 1.25)
    for round, y in enumerate(rows, start=1):
        axes.text(0.25, y + 0.7, f"round {round}", fontsize=15, weight="bold")
        for role, x in zip(roles, xs):
            writes = round == 2 and role == roles[-1]
            does = ("has heard nothing yet,\nthinks m times" if (round, role) == (1, roles[0])
                    else "reads its message,\nWRITES the answer" if writes
                    else "reads its message,\nthinks m times")
            box(axes, x, y, "", 2.2, 1.0, ROLES[role])
            axes.text(x, y + 0.28, role, fontsize=14, weight="bold", ha="center", va="center")
            axes.text(x, y - 0.17, does, fontsize=12, ha="center", va="center",
                      weight="bold" if writes else "normal")
            if role != roles[-1]:
                arrow(axes, (x + 1.1, y), (x + 2.55, y))
                axes.text(x + 1.79, y + 0.1, names[role].replace(": ", "\n"), fontsize=12,
                          ha="center")
    arrow(axes, (xs[2], rows[0] - 0.5), (xs[2], 2.3), (xs[0], 2.3), (xs[0], rows[1] + 0.5))
    axes.text(xs[1], 2.37, names[roles[-1]] + ", and the next round begins", fontsize=12,
              ha="center")
    axes.text(0.25, 0.25, "Every agent also reads the question. H: the sender's m thoughts. Words "
              "are written in the last turn alone.", fontsize=12)
    report.save_figure(figure, path)


# ---- the tiny system, measured ------------------------------------------------------------------

def plan_for(mas, methods=(), batch_size=100):
    """How the tiny system is asked: as in training, with the most probable word each time."""
    return Plan(list(methods), list(ROUNDS), mas.latent_length, batch_size, Writing(32))


def measure_accuracy(mas, count=200):
    """(summary rows of the methods, {rounds: the best accuracy possible}) on `count` questions."""
    task = get_task("tiny")
    examples = task.load(count)
    plan = plan_for(mas, ("latent", "text", "single", "shuffle"))
    with tempfile.TemporaryDirectory() as folder:            # evaluate.py's own files are not kept
        lines = evaluate.evaluate(mas, None, task, examples, plan, Path(folder), {})
    return report.summarise(lines), {rounds: task.ceiling(examples, rounds) for rounds in ROUNDS}


def draw_accuracy(rows, ceiling, path):
    """Bars by rounds with 95 % intervals. `single` has no rounds, so it is a line."""
    figure = Figure(figsize=(10, 5.8), layout="constrained")
    axes = figure.subplots()
    looks = {"latent": (BLUE, "", "latent: thoughts are sent"),
             "text": (ORANGE, "//", "text: texts are sent"),
             "shuffle": (GRAY, "..", "shuffle: another question's thoughts are sent")}
    for place, (method, (color, hatch, label)) in enumerate(looks.items()):
        mine = [row for row in rows if row["method"] == method]
        xs = [row["rounds"] + 0.25 * (place - 1) for row in mine]
        axes.bar(xs, [row["accuracy"] for row in mine], 0.23, color=color, label=label,
                 hatch=hatch, edgecolor="white")
        axes.vlines(xs, *zip(*(row["ci95"] for row in mine)), color="black", lw=1.5)
        for x, row in zip(xs, mine):
            axes.text(x, row["ci95"][1] + 0.02, f"{row['accuracy']:.3f}", ha="center", fontsize=13)
    alone, = (row["accuracy"] for row in rows if row["method"] == "single")
    axes.axhline(alone, color=RED, ls=":", lw=2.5, label=f"single: the solver alone ({alone:.3f})")
    for rounds, best in ceiling.items():
        axes.hlines(best, rounds - 0.42, rounds + 0.42, color="black", ls="--", lw=2,
                    label="expected of a perfect system" if rounds == 1 else None)
    axes.set_xlabel("rounds", fontsize=14)
    axes.set_ylabel(f"accuracy on {rows[0]['n']} questions", fontsize=14)
    axes.set(xticks=list(ceiling), ylim=(0, 1.12))
    axes.tick_params(labelsize=13)
    figure.legend(fontsize=13, loc="outside upper center", ncols=2, frameon=False)
    report.save_figure(figure, path)


def draw_thoughts(example, turns, path):
    """A grid of words: a row a turn, a column a thought. The counter's values are in bold."""
    m = len(turns[0][3])
    left, width, height = 2.9, 1.15, 0.44
    figure, axes = canvas(10, 1.5 + height * len(turns))
    top = 0.15 + height * len(turns)
    question = textwrap.fill(example.question, 60, break_on_hyphens=False)
    axes.text(0.2, top + 0.8, f"{question}\n(right answer: {example.gold}; "
              "bold: where the counter stands)", fontsize=13.5, va="center", family="monospace")
    for i in range(m):
        axes.text(left + width * (i + 0.5), top + 0.1, f"thought {i + 1}", fontsize=12,
                  ha="center")
    for row, (round, role, does, words) in enumerate(turns):
        y = top - height * (row + 0.5)
        axes.text(0.2, y, f"round {round}  {role} {does}", fontsize=12.5, va="center",
                  weight="bold" if does == "writes" else "normal")
        cell = width * m / len(words)                        # the written text takes the whole row
        for i, word in enumerate(words):
            box(axes, left + cell * (i + 0.5), y, word, cell - 0.06, height - 0.06, ROLES[role],
                weight="bold" if word.isdigit() else "normal")
    report.save_figure(figure, path)


def measure_gradients(mas, rows, role_loss_weight):
    """{(round, edge key): |dL/d(message)|} of a batch of rows, through all rounds unrolled."""
    args = argparse.Namespace(
        latents="rollout", latent_length=mas.latent_length, role_loss_weight=role_loss_weight,
        supervise_final_only=1, gradient_checkpointing=0, mas_task="math", max_length=4096,
        log_gradients=1)
    mas.outer.requires_grad_(True)             # else nothing has a gradient: the rest is frozen
    outcome = outer_loss(mas, rows, max(ROUNDS), args)
    outcome.loss.backward()
    mas.outer.zero_grad()
    mas.outer.requires_grad_(False)
    return {place: message.grad.norm().item() for place, message in outcome.sent.items()}


def draw_gradients(style, by_loss, path):
    """by_loss: {label: sizes of measure_gradients}. Messages stand in the order of sending."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    looks = ((BLUE, "o", "-"), (ORANGE, "s", "--"))
    for (label, sizes), (color, marker, line) in zip(by_loss.items(), looks):
        axes.plot(range(len(sizes)), list(sizes.values()), color=color, marker=marker, ls=line,
                  lw=2.5, ms=9, label=label)
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
    """Draw every picture into the folder `out`."""
    task, style = get_task("tiny"), mas.style
    draw_method(out / "method.png")
    draw_links(out / "links.png")
    draw_rounds(style, out / "rounds.png")
    draw_accuracy(*measure_accuracy(mas, questions), out / "accuracy.png")
    example, = task.load(1)
    draw_thoughts(example, in_words(mas, example, plan_for(mas)), out / "thoughts.png")
    rows = task.train_rows(batch, seed=0)
    losses = {"L = the last answer's loss alone": 0.0,
              "L = a loss for every role (--role_loss_weight 1)": 1.0}
    by_loss = {label: measure_gradients(mas, rows, weight) for label, weight in losses.items()}
    draw_gradients(style, by_loss, out / "gradients.png")


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

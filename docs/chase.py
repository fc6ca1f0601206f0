"""How far do agents follow a chain? The table and the picture of docs/real.md, from evaluate.py.

    python docs/chase.py out/chase_new out/chase_known        a title is made of a folder's name
    python docs/chase.py out/chase_new --out my.png           default: docs/pictures/chase.png

Each folder holds the results.jsonl of `evaluate.py --dataset chase`. An answer there has the note
`word 4` if it is the word after 4 hops of its chain (tasks/chase.py). So the table does not only
say how often R rounds end at the word after 2R hops, in bold letters. It also says how often they
end at another word of the chain. A 95 % interval is Wilson's. Whoever knows one table alone guesses
1 of 4 words, which the picture shows as a dashed line.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from docs.capacity import markdown  # noqa: E402
from docs.pictures import BLUE, RED  # noqa: E402
from evaluation import report  # noqa: E402
from evaluation.statistics import wilson  # noqa: E402
from support import flags  # noqa: E402
from support.errors import need  # noqa: E402
from support.files import read_lines  # noqa: E402

# All methods that serve the chase, in the order of table and picture.
METHODS = ("latent", "text", "shuffle", "zero", "untrained", "single_loop", "single")
DEPTHS = (2, 4, 6)           # hops
CHANCE = 1 / 4


def shares(folder):
    """{(method, rounds): (n, {hops: share of the answers that are the word after these hops})}.

    A question that failed counts as wrong. Raises ValueError, naming the folder, for one without
    answers to the chase."""
    found = {}
    for line in read_lines(Path(folder) / "results.jsonl"):
        if line.get("dataset") == "chase" and "nats" not in line:
            found.setdefault((line["method"], line["rounds"]), []).append(line["notes"])
    need(found, f"{folder} has no results.jsonl with answers to the chase: run "
         f"evaluate.py --dataset chase --out {folder}")
    return {key: (len(found[key]), {hops: found[key].count([f"word {hops}"]) / len(found[key])
                                    for hops in DEPTHS})
            for key in sorted(found, key=lambda key: (METHODS.index(key[0]), key[1]))}


def table(measured):
    """A table in markdown of what shares() found."""
    rows = []
    for (method, rounds), (n, by_hops) in measured.items():
        cells = []
        for hops, share in by_hops.items():
            low, high = wilson(share * n, n)
            mark = "**" if hops == 2 * rounds else ""
            cells.append(f"{mark}{share:.2f}{mark} ({low:.2f} to {high:.2f})")
        rows.append([method, rounds, n, *cells])
    return markdown(["method", "rounds", "n", *(f"word after {hops}" for hops in DEPTHS)], rows)


def draw(by_title, path):
    """A row of panels for each folder, a panel for each method. by_title: {title: shares()}."""
    asked = {method for measured in by_title.values() for method, _ in measured}
    methods = [name for name in METHODS if name in asked]
    figure = report.new_figure(width=2.1 * len(methods) + 1)
    figure.set_figheight(2.6 * len(by_title) + 0.6)
    panels = figure.subplots(len(by_title), len(methods), sharex=True, sharey=True, squeeze=False)
    for row, (title, measured) in zip(panels, by_title.items()):
        row[0].set_ylabel(f"{title}\nshare of answers", fontsize=10)
        for panel, method in zip(row, methods):
            mine = {rounds: one for (name, rounds), one in measured.items() if name == method}
            for i, hops in enumerate(DEPTHS):
                xs = [rounds + 0.27 * (i - 1) for rounds in mine]
                ys = [by_hops[hops] for _, by_hops in mine.values()]
                ends = [wilson(by_hops[hops] * n, n) for n, by_hops in mine.values()]
                panel.bar(xs, ys, 0.25, color=("#56B4E9", BLUE, RED)[i],
                          label=f"word after {hops} hops")
                panel.vlines(xs, *zip(*ends) if ends else ((), ()), color="black", lw=1)
            panel.axhline(CHANCE, color="gray", ls="--", lw=1)
            panel.set(title=method, xticks=(1, 2, 3), ylim=(0, 1), visible=bool(mine))
    for panel in panels[-1]:
        panel.set_xlabel("rounds")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(DEPTHS), frameon=False)
    report.save_figure(figure, path)


def main():
    """Read the folders, print their tables, draw the picture."""
    parser = flags.Parser(__doc__)
    parser.add_argument("folder", nargs="+", type=Path, help="an --out of evaluate.py")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pictures/chase.png")
    args = parser.parse_args()
    measured = {folder.name.replace("_", " "): shares(folder) for folder in args.folder}
    for title, one in measured.items():
        print(f"{title}:\n\n{table(one)}\n")
    draw(measured, args.out)
    print(f"the picture is {args.out}")


if __name__ == "__main__":
    flags.run(main)

"""How much fits through a link? The table and the picture of lists of words.

    python docs/capacity.py out/lists_* out/places*          markdown tables, and the picture
    python docs/capacity.py out/lists_* --out my.png         the picture elsewhere

The folders are those of evaluate.py (results.jsonl and summary.json), asked with a relay of lists
(tasks/relay.py), and those of docs/places.py (places.json). For each method and length of the list:

    share     of the words that arrive at their place (evaluate.py)
    nats      per token of the right list (evaluate.py --measure loss)

for new words and for words of the training (--dataset_split train). Then the shares by place:
docs/places.py says what they are. Folders that are not given leave their part of the picture empty.

A share's interval counts each list as one answer (Wilson), because words of a list are not
independent. The interval of the nats is a bootstrap over lists.
"""
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from matplotlib.figure import Figure  # noqa: E402

from docs.pictures import BLUE, GRAY, ORANGE, RED  # noqa: E402
from docs.places import PLACES  # noqa: E402
from evaluation.answers import METHODS  # noqa: E402
from evaluation.report import save_figure  # noqa: E402
from evaluation.statistics import bootstrap, wilson  # noqa: E402
from support import flags  # noqa: E402
from support.errors import need  # noqa: E402
from support.files import read_json, read_lines  # noqa: E402
from tasks.relay import at_place  # noqa: E402

SPLITS = {"test": "new words", "train": "words of the training"}
# Colours that colour-blind readers can tell apart, and another mark for each control.
LOOKS = {"latent": (BLUE, "o"), "text": (ORANGE, "s"), "shuffle": (GRAY, "^"), "zero": (GRAY, "v"),
         "untrained": (GRAY, "x"), "single": (RED, "+")}
PLACE_LOOKS = {"thinks": (ORANGE, "s", "sender: the thought says the word"),
               "link": (GRAY, "^", "link: of the word's true embedding"),
               "arrives": (RED, "v", "link: of the thought"),
               "told_words": ("black", "x", "receiver: told the true embeddings"),
               "writes": (BLUE, "o", "all of them: the system")}


# ---- from folders to figures --------------------------------------------------------------------

def figures_of(folders):
    """(shares, nats, places) of the folders.

    shares, nats: {(split, method): {length: (mean, [low, high], lists)}}. places: the rows of
    places.json. Raises ValueError for a folder that is neither of the two, or that holds lists of
    another form."""
    values, places = {"share": defaultdict(dict), "nats": defaultdict(dict)}, []
    for folder in map(Path, folders):
        if (folder / "places.json").is_file():
            places += read_json(folder / "places.json")["rows"]
            continue
        need((folder / "results.jsonl").is_file(), f"{folder} has neither results.jsonl nor "
             "places.json: give folders of evaluate.py and of docs/places.py")
        settings = read_json(folder / "summary.json").get("settings", {})
        split = settings.get("dataset_split") or "test"
        need(str(settings.get("dataset")).startswith("relay"),
             f"{folder}: its questions are those of {settings.get('dataset')}, and not of a relay")
        for line in read_lines(folder / "results.jsonl"):
            words = line["gold"].split()
            measure = "nats" if "nats" in line else "share"
            value = line["nats"] if measure == "nats" else fmean(
                at_place(line["gold"], text) / len(words) for text in line["outputs"] or [""])
            found = values[measure][split, line["method"]].setdefault(len(words), {})
            found[line["id"]] = value
    return (summed(values["share"], lambda found: wilson(sum(found), len(found))),
            summed(values["nats"], bootstrap), places)


def summed(values, interval):
    """{key: {length: (mean, interval, lists)}} of {key: {length: {id: value}}}."""
    return {key: {length: (fmean(found.values()), interval(list(found.values())), len(found))
                  for length, found in sorted(by_length.items())}
            for key, by_length in values.items()}


# ---- tables -------------------------------------------------------------------------------------

def markdown(head, rows):
    """A markdown table of a line of cells and more lines of cells."""
    return "\n".join(f"| {' | '.join(map(str, cells))} |"
                     for cells in (head, ["---"] * len(head), *rows))


def table(name, cells, keys):
    """A markdown table: a line for each of `keys`, a column for each length. cells: {key: {length:
    (mean, interval, lists)}}."""
    lengths = sorted({length for key in keys for length in cells[key]})
    rows = []
    for key in keys:
        texts = []
        for length in lengths:
            mean, interval, _ = cells[key].get(length) or (None, None, 0)
            texts.append("" if mean is None else
                         f"{mean:.3f} ({interval[0]:.2f} to {interval[1]:.2f})")
        rows.append([key if isinstance(key, str) else key[1], *texts])
    return markdown([name, *(f"{length} word{'s' * (length > 1)}" for length in lengths)], rows)


def place_cells(places, split):
    """{place: {length: (share, interval, lists)}} of the rows of places.json of a split."""
    return {place: {row["length"]: (row[place]["share"], row[place]["ci95"], row["lists"])
                    for row in places if row["split"] == split} for place in PLACES}


def tables(shares, nats, places):
    """All tables as one markdown text."""
    texts = []
    for split, words in SPLITS.items():
        for name, cells in (("share at its place", shares), ("nats per token", nats)):
            keys = [(split, method) for method in reversed(METHODS) if (split, method) in cells]
            if keys:
                count = {lists for key in keys for _, _, lists in cells[key].values()}
                texts.append(f"{words}, lists of each length: {', '.join(map(str, sorted(count)))}"
                             f"\n\n{table(name, cells, keys)}")
        if any(row["split"] == split for row in places):
            texts.append(f"{words}, by place\n\n"
                         + table("share", place_cells(places, split), PLACES))
    return "\n\n".join(texts)


# ---- the picture --------------------------------------------------------------------------------

def draw(shares, nats, places, path):
    """Four panels over the length of the list: shares of new words and of words of the training,
    nats of both, and the places of new words."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    panels = figure.subplots(2, 2)
    for panel, split in zip(panels[0], SPLITS):
        for method, (color, mark) in LOOKS.items():
            line(panel, shares.get((split, method), {}), color, mark, method)
        panel.set(title=f"{SPLITS[split]}: share at its place", ylim=(-0.03, 1.03))
    for split, style in zip(SPLITS, ("-", "--")):
        for method, (color, mark) in LOOKS.items():
            line(panels[1][0], nats.get((split, method), {}), color, mark,
                 method if split == "test" else "", style)
    panels[1][0].set(title="nats per token (dashed: words of the training)", ylim=(0, None))
    by_place = place_cells(places, "test")
    for place, (color, mark, label) in PLACE_LOOKS.items():
        line(panels[1][1], by_place[place], color, mark, label)
    panels[1][1].set(title="new words: where they are lost", ylim=(-0.03, 1.03))
    lengths = sorted({length for cells in (*shares.values(), *nats.values(), *by_place.values())
                      for length in cells})
    for panel in panels.flat:
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, lengths)
        panel.set_xlabel("words in the list")
        panel.grid(axis="y", alpha=0.4)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    save_figure(figure, path)


def line(panel, cells, color, mark, label, style="-"):
    """A curve over the lengths with its intervals. cells: {length: (mean, interval, lists)}."""
    known = {length: cell for length, cell in cells.items() if cell[0] is not None}
    if known:
        means, intervals, _ = zip(*known.values())
        panel.plot(list(known), means, color=color, marker=mark, ls=style, label=label)
        panel.vlines(list(known), *zip(*intervals), color=color, alpha=0.5)


def main():
    """Read the folders, print the tables, draw."""
    parser = flags.Parser(__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="of evaluate.py and places.py")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pictures/capacity.png")
    args = parser.parse_args()
    figures = figures_of(args.folders)
    print(tables(*figures))
    draw(*figures, args.out)
    print(f"\nthe picture is {args.out}")


if __name__ == "__main__":
    flags.run(main)

"""From result lines to a table: shares, 95 % intervals, costs, a picture. And several runs as one.

    python -m support.report out/seed_0 out/seed_1 out/seed_2       # one table over three runs

    method       rounds accuracy  95 % interval    unparsed  tokens latent      ms
    text              3    1.000  0.992 - 1.000       0.000   132.0      0    7.63
    latent            3    0.998  0.989 - 1.000       0.000    12.0     48    3.98

A row stands for one method and one number of rounds. `unparsed` is the share of texts in which no
answer could be read; they count as wrong. `tokens` are decoded by all agents together, `latent` are
thoughts, and both are means per question, as `ms` is.

Intervals. With one answer a question, accuracy is a share of right answers. Its interval is
Wilson's, which stays within [0, 1] and is right for small n. Several answers to one question are
not independent, so their interval is a bootstrap over questions. Over several runs the table shows
the lowest and the highest run in place of an interval.
"""
import importlib.util
import json
import math
import random
import sys
import time
from pathlib import Path
from statistics import fmean

import torch

from support import flags
from support.errors import need
from support.files import read_json, write_json, write_whole
from tasks import pass_at_k

# The methods in the order of the table: baselines in words, controls, the system itself.
METHODS = ("text", "text_brief", "single", "single_loop", "untrained", "zero", "shuffle", "latent")
CONTROLS = ("untrained", "zero", "shuffle")
COSTS = ("decoded_tokens", "latent_steps", "seconds")


def wilson(right, n, z=1.96):
    """95 % interval [low, high] of a share right / n (Wilson score interval).

    Its ends are the two p for which the share lies z standard errors of p away:

        |share - p| = z sqrt(p (1 - p) / n)"""
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def bootstrap(values, resamples=2000):
    """95 % interval [low, high] of the mean of values.

    The values are drawn anew, with replacement, and averaged, many times. The interval holds the
    middle 95 % of these means. The draw has a fixed seed, so a table comes out the same twice."""
    rng, n = random.Random(0), len(values)
    means = sorted(sum(rng.choices(values, k=n)) / n for _ in range(resamples))
    return [means[int(0.025 * resamples)], means[int(0.975 * resamples)]]


def summarise(lines):
    """Summary rows, one for each method and number of rounds, in the order of METHODS."""
    groups, rows = {}, []
    for line in lines:
        groups.setdefault((line["method"], line["rounds"]), []).append(line)
    deepest = max((rounds for method, rounds in groups if method == "latent"), default=0)
    for method, rounds in sorted(groups, key=lambda group: (METHODS.index(group[0]), group[1])):
        row = summary_row(groups[method, rounds])
        # `single` has one round. It is compared with the latents of the most rounds.
        ours = groups.get(("latent", deepest if method == "single" else rounds))
        if ours and method != "latent":
            row["latent_minus_this"] = paired(ours, groups[method, rounds])
        rows.append(row)
    return rows


def value_of(line):
    """What a line counts for: nats a token (--measure loss), else its share of right answers."""
    return line.get("nats", sum(line["correct"]) / max(1, len(line["correct"])))


def summary_row(lines):
    """The row of one method and number of rounds: shares, and means per question.

    A question that failed counts as wrong, and costs nothing. With several answers a question, the
    row also has pass@k, where k is all of them. With --measure loss, `nats` stands in place of
    `accuracy`, and a question that failed is left out."""
    answered = [line for line in lines if line["outputs"]]
    row = {name: lines[0][name] for name in ("style", "dataset", "method", "rounds")}
    row.update(n=len(lines), errors=sum("error" in line for line in lines),
               peak_memory_mb=max(line["peak_memory_mb"] for line in lines))
    for name in COSTS:
        row[name] = fmean(line[name] for line in answered) if answered else 0.0
    if any("nats" in line for line in lines):
        values = [line["nats"] for line in answered]
        return {**row, "nats": fmean(values), "ci95": bootstrap(values)}
    shares, samples = list(map(value_of, lines)), max(1, *(len(line["correct"]) for line in lines))
    row.update(accuracy=fmean(shares), ci95=wilson(sum(shares), len(lines)))
    if samples > 1:
        passed = [pass_at_k(samples, sum(line["correct"]), samples) for line in lines]
        row.update(ci95=bootstrap(shares), samples=samples, pass_at_k=fmean(passed),
                   pass_at_k_ci95=bootstrap(passed))
    parsed = [one for line in answered for one in line["parsed"]] or [None]
    notes = [one for line in answered for one in line["notes"]]
    return {**row, "unparsed": parsed.count(None) / len(parsed),
            "retried": sum(line["retried"] for line in answered) / len(parsed),
            "judge_invalid": notes.count("judge: invalid") / len(parsed)}


def paired(ours, theirs):
    """The mean difference between two methods over the same questions, with its 95 % interval.

    Two methods are asked the same questions, and a hard question is hard for both. So the interval
    of the difference (a bootstrap over questions) is narrower than the two intervals suggest.
    ours_only and theirs_only count questions that one method alone gets right (McNemar's counts):
    if the methods are equally good, a question of either kind is as likely as of the other."""
    by_id = {line["id"]: value_of(line) for line in theirs if line["outputs"]}
    pairs = [(value_of(line), by_id[line["id"]]) for line in ours
             if line["outputs"] and line["id"] in by_id]
    differences = [a - b for a, b in pairs] or [math.nan]
    return {"difference": fmean(differences), "ci95": bootstrap(differences),
            "n": len(pairs), "ours_only": sum(a > b for a, b in pairs),
            "theirs_only": sum(a < b for a, b in pairs)}


def merge(summaries):
    """Rows over the rows of several runs: means, and in ci95 the lowest and the highest accuracy.

    Raises ValueError for runs that do not have the same rows."""
    names = ("style", "dataset", "method", "rounds", "n")
    keys = [[[row[name] for name in names] for row in rows] for rows in summaries]
    need(keys[0] and keys == [keys[0]] * len(keys), "these folders hold no summary.json with the "
         "same rows (style, data set, methods, rounds, n): merge runs that differ in seed alone")
    merged, measure = [], measure_of(summaries[0])
    for rows in zip(*summaries):
        values = [row[measure] for row in rows]
        means = {name: fmean(row[name] for row in rows)
                 for name in (measure, "unparsed", *COSTS) if name in rows[0]}
        merged.append({**rows[0], **means, "runs": len(rows),
                       "ci95": [min(values), max(values)],
                       "errors": sum(row["errors"] for row in rows),
                       "peak_memory_mb": max(row["peak_memory_mb"] for row in rows)})
        merged[-1].pop("latent_minus_this", None)      # it holds within a run
    return merged


def measure_of(rows):
    """What the rows measure: accuracy, or nats (a token of the gold answer)."""
    return "nats" if "nats" in rows[0] else "accuracy"


# ---- tables and pictures ------------------------------------------------------------------------

def write_report(rows, out, settings, task=None, examples=()):
    """Print the rows as a table, and write OUT/summary.json and OUT/summary.png."""
    write_json(out / "summary.json", {"settings": settings, "rows": rows})
    interval = "lowest - highest" if "runs" in rows[0] else "95 % interval"
    measure = measure_of(rows)
    print(f"\n{'method':12s} {'rounds':>6s} {measure:>8s}  {interval:16s} "
          f"{'unparsed':>8s} {'tokens':>7s} {'latent':>6s} {'ms':>7s}   (means per question)")
    for row in rows:
        low, high = row["ci95"]
        more = f"  pass@{row['samples']} {row['pass_at_k']:.3f}" if "samples" in row else ""
        more += f"  {row['errors']} failed" if row["errors"] else ""
        print(f"{row['method']:12s} {row['rounds']:6d} {row[measure]:8.3f}  {low:.3f} - {high:.3f}"
              f"    {row.get('unparsed', 0):8.3f} {row['decoded_tokens']:7.1f} "
              f"{row['latent_steps']:6.0f} {1000 * row['seconds']:7.2f}{more}")
    # The ceiling is that of the system that was made for the task, and of no other.
    depths, ceiling = sorted({row["rounds"] for row in rows}), {}
    if task and task.ceiling and measure == "accuracy" and rows[0]["style"] == task.name:
        ceiling = {depth: task.ceiling(examples, depth) for depth in depths}
    print_comparison(rows, ceiling)
    plot(rows, out / "summary.png", ceiling)


def print_comparison(rows, ceiling):
    """Print latents minus every other method at the deepest rounds, over the same questions, what
    they save against text, and the best accuracy that a method could reach."""
    depths = sorted({row["rounds"] for row in rows})
    by = {row["method"]: row for row in rows if row["rounds"] == depths[-1]
          or row["method"] == "single"}
    for method, row in by.items():
        if "latent_minus_this" in row:
            pair = row["latent_minus_this"]
            low, high = pair["ci95"]
            print(f"latent minus {method:12s} {pair['difference']:+.3f}  {low:+.3f} to {high:+.3f}"
                  f"  over the same {pair['n']} questions: higher in {pair['ours_only']}, lower in "
                  f"{pair['theirs_only']}")
    ours = by.get("latent")
    for other in ("text", "text_brief"):
        theirs = by.get(other)
        if ours and theirs and not ours["errors"] + theirs["errors"] and ours["decoded_tokens"]:
            fewer = 100 - 100 * ours["decoded_tokens"] / theirs["decoded_tokens"]
            print(f"latent against {other} at {depths[-1]} rounds: {fewer:.1f} % fewer decoded "
                  f"tokens, {theirs['seconds'] / ours['seconds']:.2f} x as fast")
    if ceiling:
        print("expected of a perfect system by rounds (what does not fit is guessed): "
              + ", ".join(f"{depth}: {best:.3f}" for depth, best in ceiling.items()))


def new_figure(width):
    """An empty matplotlib figure, 4 inches high."""
    from matplotlib.figure import Figure       # it takes half a second, which most runs can save
    return Figure(figsize=(width, 4), layout="constrained")


def save_figure(figure, path):
    """Write a figure as PNG."""
    write_whole(path, lambda part: figure.savefig(part, format="png", dpi=120))


def plot(rows, path, ceiling=None):
    """Draw what each method reaches and costs, by rounds, as bars side by side.

    ceiling: {rounds: the best accuracy possible}, drawn as dashed lines. Controls are pale."""
    measure = measure_of(rows)
    spread = "lowest to highest run" if "runs" in rows[0] else "95 % intervals"
    panels = {measure: f"{measure} ({spread})", "decoded_tokens": "decoded tokens a question",
              "seconds": "seconds a question"}
    figure = new_figure(width=15)
    axes = dict(zip(panels, figure.subplots(1, 3)))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    width = 0.8 / len(methods)
    for place, method in enumerate(methods):
        mine = [row for row in rows if row["method"] == method]
        middles = [row["rounds"] + width * (place - (len(methods) - 1) / 2) for row in mine]
        color = "black" if method == "latent" else f"C{METHODS.index(method)}"
        for name, panel in axes.items():
            panel.bar(middles, [row[name] for row in mine], width, color=color, label=method,
                      alpha=0.4 if method in CONTROLS else 1.0)
        axes[measure].vlines(middles, *zip(*(row["ci95"] for row in mine)), color="gray")
    for depth, best in (ceiling or {}).items():
        axes[measure].hlines(best, depth - 0.45, depth + 0.45, color="black", linestyle="--")
    for name, panel in axes.items():
        panel.set(xlabel="rounds", title=panels[name], ylim=(0, None),
                  xticks=sorted({row["rounds"] for row in rows}))
    axes["seconds"].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save_figure(figure, path)


def plot_gradients(folder):
    """Draw FOLDER/gradients.png from the log: |dL/d(message)| of each edge by round.

    Mean over the logged steps. A round that is far below the others teaches its links nothing."""
    norms = {}                                              # {edge key: {round: [norm a step]}}
    for line in (folder / "log.jsonl").read_text().splitlines():
        for name, value in json.loads(line).items():
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


def need_matplotlib():
    """Raise ValueError now, rather than after an hour, if the picture cannot be drawn."""
    need(importlib.util.find_spec("matplotlib"), "matplotlib is missing, which draws summary.png: "
         "pip install matplotlib")


# ---- memory and time of the devices -------------------------------------------------------------

def cards():
    """The GPUs that this process uses: none, as long as it has put nothing on one."""
    return range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()


def timed(run, *arguments, **options):
    """(what run() returns, its seconds). A GPU works on while Python goes ahead, so the clock waits
    for it, before and after."""
    for card in cards():
        torch.cuda.synchronize(card)
    started = time.perf_counter()
    result = run(*arguments, **options)
    for card in cards():
        torch.cuda.synchronize(card)
    return result, time.perf_counter() - started


def reset_peak_memory():
    """Begin to measure peak memory anew, on all GPUs."""
    for card in cards():
        torch.cuda.reset_peak_memory_stats(card)


def peak_memory_mb():
    """Peak memory: of the GPUs since the last reset, on a CPU of the whole process so far."""
    if cards():
        return sum(torch.cuda.max_memory_allocated(card) for card in cards()) / 2**20
    import resource                    # not on Windows, where there is no such figure to be had
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# ---- several runs as one ------------------------------------------------------------------------

def main():
    """Merge the summary.json of several folders: one table, and summary.json and .png in --out."""
    parser = flags.Parser("Several runs as one table: mean, lowest and highest accuracy.")
    parser.add_argument("folders", nargs="+", help="folders that hold a summary.json")
    parser.add_argument("--out", default="out/merged", help="where summary.json and .png go")
    args = parser.parse_args()
    need_matplotlib()
    rows = merge([read_json(Path(folder) / "summary.json").get("rows", [])
                  for folder in args.folders])
    write_report(rows, Path(args.out), vars(args))
    print(f"{len(args.folders)} runs; summary.json and summary.png are in {args.out}")


if __name__ == "__main__":
    flags.run(main)

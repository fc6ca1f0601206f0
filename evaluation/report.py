"""From result lines to a table and a picture.

    method       rounds accuracy  95 % interval    unparsed  tokens latent      ms
    text              3    1.000  0.992 - 1.000       0.000   132.0      0    7.63
    latent            3    0.998  0.989 - 1.000       0.000    12.0     48    3.98

An entry of the table stands for one method and one number of rounds. `unparsed` is the share of
texts in which no answer could be read; they count as wrong. `tokens` are decoded by all agents
together, `latent` are thoughts, and both are means per question, as `ms` is.

Intervals. With one answer per question, accuracy is a share of right answers. Its interval is
Wilson's, which stays within [0, 1] and is right for small n. Several answers to one question are
not independent, so their interval is a bootstrap over questions (evaluation/statistics.py).

With --measure loss the table has `nats` in place of accuracy, and fewer are better. The agents
write nothing then, so the column `unparsed` is left out.
"""
from statistics import fmean

from matplotlib.figure import Figure       # it draws into files, so no window is needed

from checkpoints import PROJECT
from evaluation.answers import METHODS
from evaluation.statistics import bootstrap, paired, value_of, wilson
from recurse import CONTROLS
from styles import all_styles
from support.files import write_json, write_whole
from tasks import pass_at_k

COSTS = ("decoded_tokens", "latent_steps", "seconds")
PALE = ("untrained", *CONTROLS)        # methods that the picture draws in pale colours


def summarise(lines):
    """The entries of the table, one for each method and number of rounds, in METHODS' order."""
    groups, entries = {}, []
    for line in lines:
        groups.setdefault((line["method"], line["rounds"]), []).append(line)
    deepest = max((rounds for method, rounds in groups if method == "latent"), default=0)
    for method, rounds in sorted(groups, key=lambda group: (METHODS.index(group[0]), group[1])):
        entry = entry_of(groups[method, rounds])
        # `single` has one round. It is compared with `latent` at its highest R.
        ours = groups.get(("latent", deepest if method == "single" else rounds))
        if ours and method != "latent":
            entry["latent_minus_this"] = paired(ours, groups[method, rounds])
        entries.append(entry)
    return entries


def entry_of(lines):
    """The entry of one method and one number of rounds: shares, and means per question.

    A question that failed counts as wrong, and costs nothing. With several answers per question, an
    entry also has pass@k, where k is all of them. With --measure loss it has `nats` and not
    `accuracy`, and a question that failed is left out."""
    answered = [line for line in lines if line["outputs"]]
    entry = {name: lines[0][name] for name in ("style", "dataset", "method", "rounds")}
    entry.update(n=len(lines), errors=sum("error" in line for line in lines),
                 peak_memory_mb=max(line["peak_memory_mb"] for line in lines))
    for name in COSTS:
        entry[name] = fmean(line[name] for line in answered) if answered else 0.0
    if any("nats" in line for line in lines):
        values = [line["nats"] for line in answered]
        return {**entry, "nats": fmean(values), "ci95": bootstrap(values)}
    shares, samples = list(map(value_of, lines)), max(1, *(len(line["correct"]) for line in lines))
    entry.update(accuracy=fmean(shares), ci95=wilson(sum(shares), len(lines)))
    if samples > 1:
        passed = [pass_at_k(samples, sum(line["correct"]), samples) for line in lines]
        entry.update(ci95=bootstrap(shares), samples=samples, pass_at_k=fmean(passed),
                     pass_at_k_ci95=bootstrap(passed))
    parsed = [one for line in answered for one in line["parsed"]] or [None]
    notes = [one for line in answered for one in line["notes"]]
    return {**entry, "unparsed": parsed.count(None) / len(parsed),
            "retried": sum(line["retried"] for line in answered) / len(parsed),
            "judge_invalid": notes.count("judge: invalid") / len(parsed)}


def measure_of(entries):
    """What the entries measure: accuracy, or nats (per token of the gold answer)."""
    return "nats" if "nats" in entries[0] else "accuracy"


# ---- tables and pictures ------------------------------------------------------------------------

def made_for(mas, task):
    """Whether `mas` is the shipped system that the task's ceiling is about: the same models, and
    the same edges between the same roles. The name of its style does not count."""
    shipped = all_styles().get(task.name)
    models = [mas.agents[role.name].name for role in mas.style.roles]
    return bool(shipped) and shipped.edges == mas.style.edges and models == [
        str((PROJECT / role.model).resolve()) for role in shipped.roles]


def write_report(entries, out, settings, mas=None, task=None, examples=()):
    """Print the table, and write OUT/summary.json and OUT/summary.png. mas, task, examples: what
    was asked, for the best accuracy possible; merged tables leave them out."""
    write_json(out / "summary.json", {"settings": settings, "rows": entries})
    interval = "lowest - highest" if "runs" in entries[0] else "95 % interval"
    measure = measure_of(entries)
    read = measure == "accuracy"                         # else nothing was decoded and read
    print(f"\n{'method':12s} {'rounds':>6s} {measure:>8s}  {interval:16s} "
          f"{'unparsed ' if read else ''}{'tokens':>7s} {'latent':>6s} {'ms':>7s}   "
          f"(means per question{'' if read else '; fewer nats are better'})")
    for one in entries:
        low, high = one["ci95"]
        unparsed = f"{one['unparsed']:8.3f} " if read else ""
        more = f"  pass@{one['samples']} {one['pass_at_k']:.3f}" if "samples" in one else ""
        more += f"  {one['errors']} failed" if one["errors"] else ""
        print(f"{one['method']:12s} {one['rounds']:6d} {one[measure]:8.3f}  {low:.3f} - {high:.3f}"
              f"    {unparsed}{one['decoded_tokens']:7.1f} "
              f"{one['latent_steps']:6.0f} {1000 * one['seconds']:7.2f}{more}")
    ceiling = {}
    if task and read and made_for(mas, task):
        depths = sorted({one["rounds"] for one in entries})
        ceiling = {depth: best for depth in depths if (best := task.ceiling(examples, depth))}
    print_comparison(entries, ceiling)
    plot(entries, out / "summary.png", ceiling)


def print_comparison(entries, ceiling):
    """Print three things, at the highest R: the difference between latent and each other method
    over the same questions, what latents save against text, and the best accuracy possible."""
    deepest = max(one["rounds"] for one in entries)
    by = {one["method"]: one for one in entries
          if one["rounds"] == deepest or one["method"] == "single"}
    for method, one in by.items():
        if "latent_minus_this" in one:
            pair = one["latent_minus_this"]
            low, high = pair["ci95"]
            print(f"latent minus {method:12s} {pair['difference']:+.3f}  {low:+.3f} to {high:+.3f}"
                  f"  over the same {pair['n']} questions: better in {pair['ours_only']}, worse in "
                  f"{pair['theirs_only']}")
    ours = by.get("latent")
    for other in ("text", "text_brief"):
        theirs = by.get(other)
        if ours and theirs and not ours["errors"] + theirs["errors"] and ours["decoded_tokens"]:
            fewer = 100 - 100 * ours["decoded_tokens"] / theirs["decoded_tokens"]
            print(f"latent against {other} at {deepest} rounds: {fewer:.1f} % fewer decoded "
                  f"tokens; {other} takes {theirs['seconds'] / ours['seconds']:.2f} times as long")
    if ceiling:
        print("expected of a perfect system by rounds (finishes what fits, guesses the rest): "
              + ", ".join(f"{depth}: {best:.3f}" for depth, best in ceiling.items()))


def new_figure(width):
    """An empty matplotlib figure, 4 inches high."""
    return Figure(figsize=(width, 4), layout="constrained")


def save_figure(figure, path):
    """Write a figure as PNG."""
    write_whole(path, lambda part: figure.savefig(part, format="png", dpi=120))


def plot(entries, path, ceiling):
    """Draw what each method reaches and costs, by rounds, as bars side by side.

    ceiling: {rounds: the best accuracy possible}, drawn as dashed lines. Controls are pale."""
    measure = measure_of(entries)
    spread = "lowest to highest run" if "runs" in entries[0] else "95 % intervals"
    better = "" if measure == "accuracy" else " per token, lower is better"
    panels = {measure: f"{measure}{better} ({spread})",
              "decoded_tokens": "decoded tokens per question", "seconds": "seconds per question"}
    figure = new_figure(width=15)
    axes = dict(zip(panels, figure.subplots(1, 3)))
    methods = list(dict.fromkeys(one["method"] for one in entries))
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        mine = [one for one in entries if one["method"] == method]
        middles = [one["rounds"] + width * (i - (len(methods) - 1) / 2) for one in mine]
        color = "black" if method == "latent" else f"C{METHODS.index(method)}"
        for name, panel in axes.items():
            panel.bar(middles, [one[name] for one in mine], width, color=color, label=method,
                      alpha=0.4 if method in PALE else 1.0)
        axes[measure].vlines(middles, *zip(*(one["ci95"] for one in mine)), color="gray")
    for depth, best in ceiling.items():
        axes[measure].hlines(best, depth - 0.45, depth + 0.45, color="black", linestyle="--")
    for name, panel in axes.items():
        panel.set(xlabel="rounds", title=panels[name], ylim=(0, None),
                  xticks=sorted({one["rounds"] for one in entries}))
    axes["seconds"].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save_figure(figure, path)

"""Several runs as one table: mean, lowest and highest accuracy.

    python -m evaluation.merge out/seed_0 out/seed_1 out/seed_2

The runs must have asked the same questions by the same methods. So merge runs that differ in their
seed alone.
"""
from pathlib import Path
from statistics import fmean

from evaluation.report import COSTS, measure_of, write_report
from support import flags
from support.errors import need
from support.files import read_json


def merge(runs):
    """One table of several: means, and in ci95 the lowest and the highest accuracy of a run.

    runs: the entries of each run (see evaluation/report.py). Raises ValueError for runs that do not
    have the same entries."""
    names = ("style", "dataset", "method", "rounds", "n")
    keys = [[[entry[name] for name in names] for entry in entries] for entries in runs]
    need(keys[0] and keys == [keys[0]] * len(keys), "these folders hold no summary.json with the "
         "same entries (style, data set, methods, rounds, n): merge runs that differ in seed alone")
    merged, measure = [], measure_of(runs[0])
    for same in zip(*runs):                              # one entry of each run
        values = [entry[measure] for entry in same]
        means = {name: fmean(entry[name] for entry in same)
                 for name in (measure, "unparsed", *COSTS) if name in same[0]}
        merged.append({**same[0], **means, "runs": len(same),
                       "ci95": [min(values), max(values)],
                       "errors": sum(entry["errors"] for entry in same),
                       "peak_memory_mb": max(entry["peak_memory_mb"] for entry in same)})
        merged[-1].pop("latent_minus_this", None)        # it holds within a run
    return merged


def main():
    """Merge the summary.json of several folders: one table, and summary.json and .png in --out."""
    parser = flags.Parser(__doc__)
    parser.add_argument("folders", nargs="+", help="folders that hold a summary.json")
    parser.add_argument("--out", default="out/merged", help="where summary.json and .png go")
    args = parser.parse_args()
    entries = merge([read_json(Path(folder) / "summary.json").get("rows", [])
                     for folder in args.folders])
    write_report(entries, Path(args.out), vars(args))
    print(f"{len(args.folders)} runs; summary.json and summary.png are in {args.out}")


if __name__ == "__main__":
    flags.run(main)

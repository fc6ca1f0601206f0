"""All that has to be measured on a card, by one command of at most ten minutes.

    python -m bench.card out/card                 on a GPU: Qwen3-1.7B's dimensions, random weights
    python -m bench.card out/card --cpu           the same parts in small, to see that they run
    python -m bench.card out/card --parts step library

Each part is a process of its own, with its own limit. A part that fails, or that is stopped at its
limit, does not stop the next ones. Nothing is downloaded. In the folder, afterwards:

    lines.jsonl   every figure and every part's exit code, written as it comes
    card.json     the same by parts; written anew after each part
    rows.txt      the figures as rows for docs/speed.md, likewise
    log.txt       what the parts printed

What the parts measure is said in bench/parts.py. Exit code 1: a part has failed (124: it was
stopped at its limit). The limits are for one H200 with 16 CPU cores. Their sum is under ten
minutes, and a new process takes some 15 s of each to import torch and to make a model.
"""
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from support import flags
from support.errors import need

PROJECT = Path(__file__).parent.parent

# (part, seconds at most). A test of the whole comes first, because figures of wrong code are worth
# nothing. Then come the figures that decide something (is our own graph needed? can reading be
# recorded?), and then those that complete the tables. `library` may well reach its limit: the whole
# step takes some 40 s to compile for each number of questions. Its cheap ways come first.
LIMITS = [("card", 25), ("tests", 65), ("ranks", 30), ("step", 45), ("library", 100),
          ("rollout", 55), ("prompt", 45), ("decoding", 35), ("outer", 50), ("inner", 20),
          ("answer", 35), ("offload", 20), ("full_training", 15), ("full", 15), ("memory", 20)]
BUSY = 10        # with --cpu, limits are times this, because a CPU may have other work


def command(part, folder, scratch, cpu):
    """The command line of a part, after the name of Python. scratch: a folder for its own files."""
    device, steps = ("cpu", "1") if cpu else ("cuda", "20")
    train = ["--device", device, "--max_steps", steps, "--warm_start_steps", steps,
             "--eval_samples", "4", "--save_dir", scratch]
    if part == "tests":                                  # on a CPU they are skipped
        return ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2" if cpu else "8", "-m", "",
                "-k", "cuda_graph or old_buffers", "tests/test_agents.py", "tests/test_compiled.py"]
    if part == "ranks":                                  # a process group, as torchrun makes it
        return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1",
                "train_outer.py", *train]
    if part == "full_training":
        return ["-m", "bench.parts", part, *train, "--batch_size", "4" if cpu else "512"]
    return ["-m", "bench.parts", part, str(folder), *["--cpu"] * cpu]


def run(arguments, limit, log):
    """Run Python in the project's folder. Returns (exit code, seconds): 124 if it was stopped.

    The process leads a group of its own, so that all that it has started can be ended with it: a
    test's workers, or torchrun's ranks. Two parts on one card would spoil each other's times."""
    began = time.time()
    process = subprocess.Popen([sys.executable, *arguments], cwd=PROJECT, stdout=log, stderr=log,
                               env={**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"},
                               process_group=0)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        code = 124
    finally:                                             # also where we are stopped ourselves
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return code, time.time() - began


def row(line):
    """A figure as a row for docs/speed.md, or "" for one that is not of two sides."""
    if "ours_s" not in line:
        return ""
    cells = ["{:.2f} ms ({:.2f} to {:.2f})".format(1000 * median(side), 1000 * min(side),
                                                   1000 * max(side))
             for side in (line["reference_s"], line["ours_s"])]
    first = f"{line['first_s']:.1f} s" if line.get("first_s") else ""
    cells = [f"{line['part']}: {line['case']}", *cells, f"{line['ratio']:.2f}", first]
    return f"| {' | '.join(cells)} |"


def write_results(folder):
    """card.json and rows.txt, of the lines so far. Returns {part: its exit code, its lines, ..}.

    lines.jsonl has two kinds of lines: figures, and the end of a part with its exit code. A part
    without an end was running when all was stopped."""
    parts = {}
    for line in map(json.loads, (folder / "lines.jsonl").read_text().splitlines()):
        of_part = parts.setdefault(line["part"], {"lines": []})
        if "code" in line:
            of_part.update(line)
        else:
            of_part["lines"].append(line)
    rows = [row(line) for part in parts.values() for line in part["lines"]]
    (folder / "card.json").write_text(json.dumps(parts, indent=1))
    (folder / "rows.txt").write_text("\n".join(filter(None, rows)) + "\n")
    return parts


def main():
    """The parts, one after the other."""
    names = [name for name, _ in LIMITS]
    parser = flags.Parser(__doc__)
    parser.add_argument("folder", type=Path, help="of the results: those of an earlier run go")
    parser.add_argument("--parts", nargs="+", default=names, choices=names)
    parser.add_argument("--cpu", action="store_true", help="run the parts in small, without a GPU")
    args = parser.parse_args()
    need(args.cpu or torch.cuda.is_available(), "torch sees no GPU: --cpu runs the parts in small")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # so that run() ends its part too
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "lines.jsonl"
    lines.write_text("")
    with open(folder / "log.txt", "w") as log, tempfile.TemporaryDirectory() as scratch:
        for part, limit in LIMITS:
            if part not in args.parts:
                continue
            limit *= BUSY if args.cpu else 1
            print(f"==== {part}", file=log, flush=True)
            code, seconds = run(command(part, folder, f"{scratch}/{part}", args.cpu), limit, log)
            with open(lines, "a") as file:
                file.write(json.dumps({"part": part, "code": code, "seconds": round(seconds, 1),
                                       "limit": limit}) + "\n")
            results = write_results(folder)
            print(f"{part}: exit code {code}, {seconds:.1f} s of {limit}", flush=True)
    print((folder / "rows.txt").read_text())
    if any(part["code"] for part in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    flags.run(main)

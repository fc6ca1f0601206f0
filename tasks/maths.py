r"""Mathematics: MATH-500 and the AIME of 2025 and 2026. Is the boxed answer equal to the gold one?

    record     {"problem": "What is $\\frac12 + \\frac13$?", "answer": "\\frac{5}{6}", "id": "toy"}
    question   What is $\frac12 + \frac13$?
    gold       \frac{5}{6}
    answer     First I tried \boxed{\frac{2}{5}}, but thirds and halves make sixths: \boxed{5/6}
    score      Score(correct=True, parsed='5/6', note='')

The last box counts, and math-verify decides whether it equals the gold answer as mathematics: 5/6
is \frac{5}{6}, and 0.7 is not 1/2. No box, or one that cannot be read, is unparsed and wrong. What
math-verify lets pass, and so do we: 10 for 10\%, a missing unit, a sum not added up (3+2 for 5), a
decimal that agrees to six places, and the set {1,2} for (1,2).

math-verify hands the answer to sympy, which may think about \boxed{9^{9^{9^9}}} for ever. So it
runs in a process of its own, this file as a script, which answers JSON lines. Its alarm clock has
the default action, death, which nothing sympy does can catch or put off; a dead worker is replaced
at the next answer. If we are killed ourselves, the clock or the end of its input ends it.
"""
import atexit
import functools
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

from tasks import (BOXED_RETRY, Example, Score, Task, column, examples_from, last_box, row_id,
                   source_rows)

SOURCES = {                     # name: hub id, config, split
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "aime25": ("math-ai/aime25", None, "test"),
    "aime26": ("MathArena/aime_2026", None, "train"),
}
NAMES = tuple(SOURCES)
SECONDS, MEMORY_MB = 5, 4096    # what one comparison may take


def load(name, path, limit=None, split=None):
    """The first `limit` questions as Examples. Raises ValueError or OSError naming the row."""
    rows = source_rows(SOURCES.get(name), path, split)
    return examples_from(rows, make_example, name, path, limit)


def make_example(place, row):
    """The Example of one row: columns problem (or question) and answer."""
    return Example(id=row_id(row, "unique_id", "id", "problem_idx"),
                   question=column(place, row, "problem", "question"),
                   gold=column(place, row, "answer").strip(), kind="math", row=row)


def score(example, text):
    """Is the last box of `text` equal to example.gold? Raises ValueError if there is no worker."""
    answer = last_box(text)
    if answer is None:
        return Score(False, None)
    verdict = WORKER.ask(example.gold, answer)
    return Score(verdict["correct"], answer if verdict["read"] else None, verdict["note"])


def ready(allow_unsafe=False):
    """Raise ValueError, before anything is generated, if answers cannot be compared."""
    if not WORKER.ask(r"\frac{1}{2}", "0.5")["correct"] or WORKER.ask("5", "-5")["correct"]:
        raise ValueError("math-verify says that 1/2 is not 0.5, or 5 is -5: install version 0.9")


def task(name, path=None):
    """The Task: ten samples a question for the AIME, whose published figure is pass@10."""
    return Task(name, "math", functools.partial(load, name, path), score,
                samples=10 if name.startswith("aime") else 1, ready=ready, retry=BOXED_RETRY)


class Worker:
    """The comparing process, started when first asked and again whenever it has died."""
    def __init__(self):
        self.process, self.lock = None, threading.Lock()      # scorers may run in threads

    def ask(self, gold, answer):
        """{"correct", "read", "note"} for one pair of LaTeX answers; what takes too long is wrong.
        Raises ValueError if no worker can be started."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.start()
            self.process.stdin.write(json.dumps([gold, answer]) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
            if line:
                return json.loads(line)
            self.stop()
            return {"correct": False, "read": True, "note": f"no verdict in {SECONDS} s"}

    def start(self):
        """Start the process and wait until it has imported what it needs."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tasks.maths"], cwd=Path(__file__).parent.parent, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if self.process.stdout.readline().strip() != "ready":
            self.stop()
            raise ValueError("answers cannot be compared: pip install math-verify (if that is "
                             "there, see what `python -m tasks.maths` says)")

    def stop(self):
        """End the process, if there is one."""
        if self.process:
            self.process.kill()
            self.process.communicate()
            self.process = None


WORKER = Worker()
atexit.register(WORKER.stop)


def compare(gold, answer):
    """In the worker: the verdict on one pair, without math-verify's own time limits."""
    from math_verify import parse, verify
    # Boxed, an answer is taken as a whole; bare, math-verify would look for a formula within it.
    expected, found = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer))
    return {"correct": bool(verify(expected, found, timeout_seconds=None)), "read": bool(found),
            "note": "" if expected else "the gold answer cannot be read"}


def serve():
    """The worker: answer JSON lines on stdin until it ends."""
    import math_verify  # noqa: F401  (now, so that no question's clock pays for it)
    if sys.platform == "linux":                     # elsewhere this limit is refused or ignored
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MB * 2**20,) * 2)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(SECONDS)
        try:
            verdict = compare(*json.loads(line))
        except Exception as problem:                # sympy may raise anything over a model's words
            verdict = {"correct": False, "read": False, "note": type(problem).__name__}
        signal.alarm(0)
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    serve()

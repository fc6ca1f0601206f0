r"""Mathematics: MATH-500, GSM8K and the AIME. Is the boxed answer equal to the gold one?

    record     {"problem": "What is $\\frac12 + \\frac13$?", "answer": "\\frac{5}{6}", "id": "toy"}
    question   What is $\frac12 + \frac13$?
    gold       \frac{5}{6}
    answer     First I tried \boxed{\frac{2}{5}}, but thirds and halves make sixths: \boxed{5/6}
    score      Score(correct=True, parsed='5/6', note='')

The last box counts, and math-verify decides whether it equals the gold answer as mathematics: 5/6
is \frac{5}{6}, and 0.7 is not 1/2. An answer without a box, or with a box that cannot be read, is
unparsed and wrong. Like math-verify we accept 10 for 10\%, a missing unit, a sum not added up (3+2
for 5), a decimal that agrees to six digits, and the set {1,2} for (1,2).

math-verify hands the answer to sympy, which may think about \boxed{9^{9^{9^9}}} for ever. So one
worker, a process of its own, compares all answers. A comparison that takes longer than SECONDS is
ended together with the worker, and the next one gets a new worker.
"""
import contextlib
import logging
import multiprocessing
import os
import re
import signal
import threading
from concurrent.futures import wait
from pathlib import Path

import pebble

from support.errors import need
from tasks import BOXED_RETRY, Example, RowTask, Score, Unusable, column, last_box
from tasks.formulas import plain

SECONDS, MEMORY_MB = 4, 4096    # the most that one comparison may take
POOLS, LOCK = [], threading.Lock()


class Maths(RowTask):
    """MATH-500, GSM8K, or rows in their columns."""
    kind, retry = "math", BOXED_RETRY
    # data set: its id on the hub, its configuration, its usual split
    names = {"math500": ("HuggingFaceH4/MATH-500", None, "test"),
             "gsm8k": ("openai/gsm8k", "main", "test")}

    def make_example(self, source, row):
        """The Example of one row: columns problem (or question) and answer. GSM8K's answers are
        whole solutions, whose last line is `#### 18`."""
        question = column(source, row, "problem", "question")
        gold = column(source, row, "answer").rpartition("####")[2].strip()
        need(gold, f"{source} has no answer after its ####", Unusable)
        return Example("", question, gold, kind="math", row=row)

    @staticmethod
    def score(example, text):
        """Is the last box of `text` equal to example.gold? Thread-safe."""
        answer, pool = last_box(text), worker()
        if answer is None:
            return Score(False, None)
        asked = pool.schedule(compare, (example.gold, answer), {}, SECONDS)
        while pool.active and not asked.done():        # a pool that breaks may forget a question
            wait([asked], 1)
        need(asked.done(), "the process that compares answers was ended", RuntimeError)
        try:
            found, correct = asked.result(0)
        except TimeoutError:
            return Score(False, answer, f"no verdict in {SECONDS} s")
        except Exception as problem:       # sympy may raise anything over a model's words
            return Score(False, None, type(problem).__name__)
        return Score(correct, answer if found else None)

    def ready(self, allow_unsafe=False):
        """Raise ValueError, before anything is generated, if answers cannot be compared."""
        half = Example("", "", r"\frac{1}{2}", "math")
        need(self.score(half, r"\boxed{0.5}").correct, "math-verify does not say that 0.5 is 1/2")


class Aime(Maths):
    """The AIME gets ten samples per question, because its published figure is pass@10."""
    names = {"aime25": ("math-ai/aime25", None, "test"),
             "aime26": ("MathArena/aime_2026", None, "train")}
    samples = 10


score = Maths.score


def worker():
    """The pool with the one process that compares, for all threads.

    It is forked, so it has sympy loaded, and the user's script is not started again. (Where there
    is no fork, on Windows, it is spawned.) After 100 comparisons a new process goes on, so what
    sympy keeps in memory cannot pile up."""
    with LOCK:
        if not POOLS or not POOLS[-1].active:      # the system may kill a process that is idle
            import math_verify
            logging.getLogger("math_verify").setLevel(logging.ERROR)    # it warns: we keep the time
            math_verify.parse("$1$", parsing_timeout=None)       # loads its grammar, once for all
            way = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
            POOLS.append(pebble.ProcessPool(1, max_tasks=100, initializer=confine, context=way))
        return POOLS[-1]


def confine():
    """In the worker, when it starts: limit its data to MEMORY_MB more than it was forked with. (As
    far as the system has such limits.) And let it end at once when it is told to."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(ImportError, AttributeError, OSError, ValueError):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        import resource
        used_kb = re.search(r"VmData:\s*(\d+)", Path("/proc/self/status").read_text())[1]
        limit = int(used_kb) * 2**10 + MEMORY_MB * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def compare(gold, answer):
    """In the worker: (can the answer be read, is it equal to gold).

    If the main process dies, a worker that waits ends, because its pipe is closed. A worker that
    compares is ended by an alarm."""
    alarm = getattr(signal, "alarm", int)      # Windows has no alarm
    alarm(2 * SECONDS)
    try:
        return equal(gold, answer)
    finally:
        alarm(0)


def equal(gold, answer):
    """(Can the answer be read, is it equal to gold)."""
    from math_verify import parse, verify
    gold, answer = plain(gold), plain(answer)
    their_base, our_base = in_base(gold), in_base(answer)
    if our_base:                           # math-verify does not see a base: 204_5, 204_6, 204
        return True, our_base == (their_base or (gold, "10"))
    gold = their_base[0] if their_base else gold         # the question asked for this base
    # Boxed, an answer is taken as a whole. Bare, math-verify would look for a formula within it.
    theirs, ours = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer))
    same = verify(theirs, ours, timeout_seconds=None) and not differ(theirs[0], ours[0])
    return bool(ours), bool(same)


def in_base(formula):
    """(digits, base) of a number like 204_5 or (204)_{5}, else None."""
    found = re.fullmatch(r"\(?(\d[\dA-F]*)\)?_\{?(\d+)\}?", formula)
    return found and found.groups()


def differ(gold, answer):
    """Are both numbers, and not the same one? Decimals are compared to six significant digits.
    (math-verify rounds to six digits after the point. To it .0000673 is .0000672, and 1/1996! is
    1/1998!.)"""
    from sympy import Float, N, UnevaluatedExpr
    values = [getattr(value, "is_number", False) and value.is_finite for value in (gold, answer)]
    if not all(values) or gold.has(UnevaluatedExpr) or answer.has(UnevaluatedExpr):   # a percentage
        return False
    gold, answer = gold.doit(), answer.doit()
    if gold.has(Float) or answer.has(Float):
        return str(N(gold, 6)) != str(N(answer, 6))
    return not abs(N(gold - answer, 20)) <= abs(N(gold, 20)) / 10**50     # exact, or one is wrong

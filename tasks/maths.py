r"""Mathematics: MATH-500, GSM8K and the AIME. Is the boxed answer equal to the gold one?

    record     {"problem": "What is $\\frac12 + \\frac13$?", "answer": "\\frac{5}{6}", "id": "toy"}
    question   What is $\frac12 + \frac13$?
    gold       \frac{5}{6}
    answer     First I tried \boxed{\frac{2}{5}}, but thirds and halves make sixths: \boxed{5/6}
    score      Score(correct=True, parsed='5/6', note='')

The last box counts, and math-verify decides whether it equals the gold answer as mathematics: 5/6
is \frac{5}{6}, and 0.7 is not 1/2. No box, or one that cannot be read, is unparsed and wrong. What
math-verify lets pass, and so do we: 10 for 10\%, a missing unit, a sum not added up (3+2 for 5), a
decimal that agrees to six places, and the set {1,2} for (1,2).

math-verify hands the answer to sympy, which may think about \boxed{9^{9^{9^9}}} for ever. So each
comparison runs in a process of its own, which is ended after SECONDS.
"""
import contextlib
import functools
import logging
import multiprocessing
import os
import re
import signal
from pathlib import Path

import pebble

from support.errors import need
from tasks import BOXED_RETRY, Example, Score, Unusable, column, last_box, row_task
from tasks.formulas import plain

SOURCES = {                     # name: hub id, config, split
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "aime25": ("math-ai/aime25", None, "test"),
    "aime26": ("MathArena/aime_2026", None, "train"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
}
NAMES = tuple(SOURCES)
SECONDS, MEMORY_MB = 4, 4096    # what one comparison may take


def task(name, path=None):
    """The Task: ten samples a question for the AIME, whose published figure is pass@10."""
    return row_task(name, "math", path, SOURCES.get(name), make_example, score, ready=ready,
                    retry=BOXED_RETRY, samples=10 if name.startswith("aime") else 1)


def make_example(place, row):
    """The Example of one row: columns problem (or question) and answer. GSM8K's answers are whole
    solutions, whose last line is `#### 18`."""
    question = column(place, row, "problem", "question")
    gold = column(place, row, "answer").rpartition("####")[2].strip()
    if not gold:
        raise Unusable(f"{place} has no answer after its ####")
    return Example("", question, gold, "math", row)


def score(example, text):
    """Is the last box of `text` equal to example.gold?"""
    answer, compare_apart = last_box(text), in_a_process()
    if answer is None:
        return Score(False, None)
    try:
        found, correct = compare_apart(example.gold, answer).result()
    except TimeoutError:
        return Score(False, answer, f"no verdict in {SECONDS} s")
    except Exception as problem:       # sympy may raise anything over a model's words
        return Score(False, None, type(problem).__name__)
    return Score(correct, answer if found else None)


@functools.cache
def in_a_process():
    """compare() as a function that runs in a process of its own and returns a future.

    The process is forked, so it has sympy loaded, and the user's script is not started again. Where
    there is no fork (Windows), the process is spawned."""
    import math_verify
    logging.getLogger("math_verify").setLevel(logging.ERROR)     # it warns that we keep the time
    math_verify.parse("$1$", parsing_timeout=None)               # loads its grammar, once for all
    pebble.CONSTS.term_timeout = 0.1               # a process over its time is ended without delay
    way = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    return pebble.concurrent.process(timeout=SECONDS, context=way)(compare)


def compare(gold, answer):
    """In the other process: (can the answer be read, is it equal to gold)."""
    from math_verify import parse, verify
    confine()
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
    """Are both numbers, and not the same one? Where there is a decimal, to six significant digits.
    (math-verify rounds to six places: .0000673 is .0000672 to it, and 1/1996! is 1/1998!.)"""
    from sympy import Float, N, UnevaluatedExpr
    values = [getattr(value, "is_number", False) and value.is_finite for value in (gold, answer)]
    if not all(values) or gold.has(UnevaluatedExpr) or answer.has(UnevaluatedExpr):   # a percentage
        return False
    gold, answer = gold.doit(), answer.doit()
    if gold.has(Float) or answer.has(Float):
        return str(N(gold, 6)) != str(N(answer, 6))
    return not abs(N(gold - answer, 20)) <= abs(N(gold, 20)) / 10**50     # exact, or one is wrong


def confine():
    """In the other process: an alarm that ends it, should nobody be left to do so, and at most
    MEMORY_MB more data than it was forked with. (As far as the system has such limits.)"""
    with contextlib.suppress(ImportError, AttributeError, OSError):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(2 * SECONDS)
        import resource
        used_kb = re.search(r"VmData:\s*(\d+)", Path("/proc/self/status").read_text())[1]
        limit = int(used_kb) * 2**10 + MEMORY_MB * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def ready(allow_unsafe=False):
    """Raise ValueError, before anything is generated, if answers cannot be compared."""
    half = Example("", "", r"\frac{1}{2}", "math")
    need(score(half, r"\boxed{0.5}").correct, "math-verify does not say that 0.5 is 1/2")

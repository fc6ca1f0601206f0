r"""Mathematics: MATH, GSM8K, the AMC and the AIME. Is the boxed answer equal to the gold one?

    record     {"problem": "What is $\\frac12 + \\frac13$?", "answer": "\\frac{5}{6}", "id": "toy"}
    question   What is $\frac12 + \frac13$?
    gold       \frac{5}{6}
    answer     First I tried \boxed{\frac{2}{5}}, but thirds and halves make sixths: \boxed{5/6}
    score      Score(correct=True, parsed='5/6', note='')

The last box counts, and math-verify decides whether it equals the gold answer as mathematics: 5/6
is \frac{5}{6}, and 0.7 is not 1/2. An answer without a box, or with a box that cannot be read, is
unparsed and wrong. Like math-verify we accept 10 for 10\%, a missing unit, a sum not added up (3+2
for 5), a decimal that agrees to six digits, and the set {1,2} for (1,2).

math-verify hands the answer to sympy, which may think about \boxed{9^{9^{9^9}}} for ever. So it
runs under the clock of tools/worker.py.
"""
import logging
import re

from support.errors import need
from tasks import BOXED_RETRY, Example, RowTask, Score, Unusable, column, found, in_time
from tasks.boxes import last_box
from tasks.formulas import plain


class Maths(RowTask):
    """MATH, GSM8K, AMC, or rows in their columns."""
    kind, retry = "math", BOXED_RETRY
    # data set: its id on the hub, its configuration, its usual split
    names = {"math500": ("HuggingFaceH4/MATH-500", None, "test"),
             "math": ("DigitalLearningGmbH/MATH-lighteval", None, "test"),
             "amc23": ("math-ai/amc23", None, "test"),
             "gsm8k": ("openai/gsm8k", "main", "test")}

    def make_example(self, source, row):
        """The Example of one row: columns problem (or question) and answer. GSM8K's answers are
        whole solutions, whose last line is `#### 18`. MATH has the answer in the last box of its
        solution."""
        question = column(source, row, "problem", "question")
        text = column(source, row, "answer", "solution")
        gold = text.rpartition("####")[2].strip() if "answer" in row else last_box(text)
        need(gold, f"{source} has no answer after its ####, or no box in its solution", Unusable)
        return Example("", question, gold, kind="math", row=row)

    @staticmethod
    def score(example, text):
        """Is the last box of `text` equal to example.gold? Thread-safe."""
        read = in_time(found, last_box, text, prepare=load_grammar)
        if read.parsed is None:
            return read
        return in_time(compare, example.gold, read.parsed, parsed=read.parsed)

    def ready(self, allow_unsafe=False):
        """Raise ValueError, before anything is generated, if answers cannot be compared."""
        half = Example("", "", r"\frac{1}{2}", "math")
        need(self.score(half, r"\boxed{0.5}").correct, "math-verify does not say that 0.5 is 1/2")


class Aime(Maths):
    """The AIME gets ten samples per question, because its published figure is pass@10."""
    names = {"aime24": ("HuggingFaceH4/aime_2024", None, "train"),
             "aime25": ("math-ai/aime25", None, "test"),
             "aime26": ("MathArena/aime_2026", None, "train")}
    samples = 10


score = Maths.score


def load_grammar():
    """Load math-verify with its grammar. Both take a second."""
    import math_verify
    logging.getLogger("math_verify").setLevel(logging.ERROR)    # it warns: we keep the time
    math_verify.parse("$1$", parsing_timeout=None)


def compare(gold, answer):
    """In the worker: the Score of an answer against gold. An answer that cannot be read is None."""
    from math_verify import parse, verify
    gold, formula = plain(gold), plain(answer)
    their_base, our_base = in_base(gold), in_base(formula)
    if our_base:                           # math-verify does not see a base: 204_5, 204_6, 204
        return Score(our_base == (their_base or (gold, "10")), answer)
    gold = their_base[0] if their_base else gold         # the question asked for this base
    # Boxed, an answer is taken as a whole. Bare, math-verify would look for a formula within it.
    theirs, ours = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (gold, formula))
    same = verify(theirs, ours, timeout_seconds=None) and not differ(theirs[0], ours[0])
    return Score(bool(same), answer if ours else None)


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

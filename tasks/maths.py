r"""Mathematics: MATH, GSM8K, the AMC and the AIME. Is the boxed answer equal to the gold one?

    record     {"problem": "What is $\\frac12 + \\frac13$?", "answer": "\\frac{5}{6}", "id": "toy"}
    question   What is $\frac12 + \frac13$?
    gold       \frac{5}{6}
    answer     First I tried \boxed{\frac{2}{5}}, but thirds and halves make sixths: \boxed{5/6}
    score      Score(correct=True, parsed='5/6', note='')

The last box counts. An answer without one is unparsed and wrong. scoring/equality.py says which two
answers are equal: 5/6 is \frac{5}{6}, and 0.7 is not 1/2. A missing unit is let pass, and another
one is not.

The comparison hands the answer to sympy, which may think about \boxed{9^{9^{9^9}}} for ever. So it
runs under the clock of tools/worker.py.
"""
from scoring.boxes import last_box
from scoring.equality import equal, load_grammar
from scoring.formulas import plain
from support.errors import need
from tasks import BOXED_RETRY, Example, RowTask, Score, Unusable, column, found, in_time


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


def compare(gold, answer):
    """In the worker: the Score of an answer against gold. An answer without a sign is None."""
    formula = plain(answer)
    return Score(bool(formula) and equal(plain(gold), formula), answer if formula else None)

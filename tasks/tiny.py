"""The tiny task: a one-digit counter, changed by a chain of K = 2..12 events. Where does it end?

    question   start 3 s1 x7 s2 flip s3 +2        (3 -> 1 -> 8 -> 0)
    gold       0

It is made for three small models that share the work. In one round the planner does two events. The
critic redoes the second of them and does a third. (It was trained on notes of which 3 in 10 have a
wrong last event, so it corrects the planner.) The solver does a fourth and says where the counter
stands:

    planner    s1 x7 1 s2 flip 8   because 3 to 1 and 1 to 8 .
    critic     s2 flip 8 s3 +2 0   because 1 to 8 and 8 to 0 .
    solver     s3 +2 0 answer 0 .  because 8 to 0 .       (nothing is left: the last event again)

So one round does four events, and a chain of twelve takes three rounds. Two things are therefore
built into the task: accuracy rises with the rounds, and the solver alone stays near chance. What is
not built in is whether *latents* can carry the notes from agent to agent. That is the question.

The words before `because` are the notes' essence (six tokens); the rest is the justification that
a model writing in words would give, and that latent thoughts need not spell out.

Own chains are rows {"question": "start 3 s1 x7"} of a file (--dataset FILE --task tiny).
"""
import functools
import random
from dataclasses import dataclass
from itertools import accumulate, islice

from support.errors import blame, need
from support.sources import Source
from tasks import Example, RowTask, Score, column

TEST_SIZE, TEST_SEED = 500, 999
SHORTEST, LONGEST = 2, 12
EVENTS_PER_ROUND = 4
NOTE = 6                       # words of a note, up to `because`
LISTED_ROUNDS = 4              # from the fourth round on, every text repeats: nothing is left to do

OPERATIONS = {
    "+1": lambda v: (v + 1) % 10, "+2": lambda v: (v + 2) % 10, "+3": lambda v: (v + 3) % 10,
    "-1": lambda v: (v - 1) % 10, "-2": lambda v: (v - 2) % 10,
    "x3": lambda v: v * 3 % 10, "x7": lambda v: v * 7 % 10, "flip": lambda v: 9 - v,
}
SPECIAL_WORDS = ("<pad>", "<bos>", "<eos>", "<unk>", "<|user|>", "<|notes|>", "<|assistant|>")
WORDS = (SPECIAL_WORDS + ("none", "start", "because", "and", "to", "answer", ".")
         + tuple(OPERATIONS) + tuple(str(digit) for digit in range(10))
         + tuple(f"s{step}" for step in range(1, LONGEST + 1)))


@dataclass(frozen=True)
class Problem:
    """values[i] is the counter after i events, so values[0] is the start, values[-1] the answer."""
    operations: tuple
    values: tuple

    @property
    def question(self):
        """start V s1 EVENT s2 EVENT .."""
        events = [f"s{i} {operation}" for i, operation in enumerate(self.operations, start=1)]
        return " ".join([f"start {self.values[0]}", *events])


def played(start, operations):
    """The Problem of a start and its operations."""
    values = accumulate(operations, lambda value, operation: OPERATIONS[operation](value),
                        initial=start)
    return Problem(tuple(operations), tuple(values))


def random_problem(rng, longest=LONGEST):
    """A problem of 2..longest events, every length equally likely."""
    operations = [rng.choice(list(OPERATIONS)) for _ in range(rng.randint(SHORTEST, longest))]
    return played(rng.randint(0, 9), operations)


def role_text(problem, role, done, full=False):
    """What a role says when `done` events are done in the notes that it has heard.

    The critic redoes the last of them. Past the end of the chain, the last event is said again.
    full=False stops after the six essential words, full=True adds the justification."""
    # Before any event is done, the critic takes the first two.
    events = {"planner": (done + 1, done + 2), "critic": (done, max(done, 1) + 1),
              "solver": (done + 1,)}[role]
    events = [min(max(i, 1), len(problem.operations)) for i in events]
    said = [f"s{i} {problem.operations[i - 1]} {problem.values[i]}" for i in events]
    if role == "solver":
        said.append(f"answer {problem.values[events[0]]} .")
    if full:
        reasons = [f"{problem.values[i - 1]} to {problem.values[i]}" for i in events]
        said.append(f"because {' and '.join(reasons)} .")
    return " ".join(said)


def gold_texts(problem, role):
    """The role's text in rounds 1, 2, .., given that everyone before did its part."""
    before = {"planner": 0, "critic": 2, "solver": 3}[role]    # events done when the role speaks
    return [role_text(problem, role, before + EVENTS_PER_ROUND * round)
            for round in range(LISTED_ROUNDS)]


@functools.cache
def test_problems():
    """The 500 test problems: always the same, all different. (A dict as an ordered set.)"""
    rng, problems = random.Random(TEST_SEED), {}
    while len(problems) < TEST_SIZE:
        problems[random_problem(rng)] = True
    return problems


def training_problems(rng, longest=LONGEST):
    """Endless random problems, none of them a test problem (of length 2 there are only 640)."""
    while True:
        problem = random_problem(rng, longest)
        if problem not in test_problems():
            yield problem


def train_rows(n, seed):
    """n rows with the columns of the published sequential sets: a text for each role and round."""
    problems = training_problems(random.Random(f"tiny outer {seed}"))
    return [{"question": problem.question, "plan": gold_texts(problem, "planner"),
             "refined_plan": gold_texts(problem, "critic"), "answer": gold_texts(problem, "solver"),
             "gold": str(problem.values[-1])} for problem in islice(problems, n)]


def score(example, text):
    """The word after the first `answer`; the counter has one digit, so equality is enough."""
    after = text.partition("answer ")[2].split()
    parsed = after[0] if after and after[0].isdigit() else None
    return Score(parsed == example.gold, parsed)


def ceiling(examples, rounds):
    """Expected accuracy of a perfect system: chains that `rounds` rounds finish, and for each other
    one a guess (one in ten)."""
    finished = sum(example.row["events"] <= EVENTS_PER_ROUND * rounds for example in examples)
    return (finished + (len(examples) - finished) / 10) / len(examples)


def check_m(agent, m, rounds=1):
    """Print a warning if m is not the length of a note: the agents know no other."""
    if m != NOTE:
        print(f"a note of this task has {NOTE} words, and its agents have never read one of {m}: "
              f"so m = {m} shows what the agents have learnt, not what links can do", flush=True)


class Tiny(RowTask):
    """The functions above, about the test problems or the rows of a file."""
    names, kind, brief = ("tiny",), "math", NOTE
    score, train_rows = staticmethod(score), staticmethod(train_rows)
    ceiling, check_m = staticmethod(ceiling), staticmethod(check_m)

    def rows(self, split=None):
        """(Source, row) one by one: of the file, or of the test problems, which are one split."""
        if self.path:
            return super().rows(split)
        need(split in (None, "test"), f"tiny has no split '{split}': leave --dataset_split out")
        return ((Source("tiny", i + 1), {"id": f"tiny-{i}", "question": problem.question})
                for i, problem in enumerate(test_problems()))

    def make_example(self, source, row):
        """The gold is where the chain ends, so a row needs none. Raises ValueError for other words
        than those of a chain."""
        words = column(source, row, "question").split()
        with blame(f"{source}: '{' '.join(words)[:60]}' is not a chain of 1 to {LONGEST} events: "
                   "write it like `start 3 s1 x7 s2 flip`"):
            problem = played(int(words[1]), words[3::2])
            # The agents know one digit, and steps up to the last one in WORDS.
            need(problem.question.split() == words and problem.operations
                 and set(words) <= set(WORDS), f"the events are {' '.join(OPERATIONS)}")
        return Example("", problem.question, str(problem.values[-1]), kind="math",
                       row={"events": len(problem.operations),
                            "answer": gold_texts(problem, "solver")})

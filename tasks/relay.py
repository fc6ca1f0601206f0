r"""The relay: does anything travel through the links? One agent is told a fact, another is asked.

    row        {"question": "Which word was your partner told? Answer with that word alone.",
                "told": "The word: harbor", "plan": "The word: harbor", "answer": "harbor"}
    gold       harbor
    answer     Harbor.
    score      Score(correct=True, parsed='harbor', note='')

A style for it holds {told} in a prompt of the first role, and in no other: see styles/relay.py. So
the last role cannot know the fact unless it comes through the links. What it gets right beyond
`zero`, `shuffle` and `untrained` has travelled. What it gets right with `text` is what the same
models reach in words.

    relay            one of the 8,100 words of tasks/words.txt
    relay_number     a number of 2 to 4 digits
    relay_sentence   one of 24 x 24 x 24 sentences on who looks for what where; what is asked

The test has 64 facts. The training rows have none of them, and the warm start leaves their words
out. So the test asks whether a link carries facts, and not whether it has learnt them by heart.
`--dataset_split train` asks for facts of the training rows instead.
"""
import functools
import random
from pathlib import Path

from support.errors import need
from tasks import Example, Score, Task

NAMES = ("relay", "relay_number", "relay_sentence")
TEST_SIZE, SEED = 64, 7
WORDS = Path(__file__).parent / "words.txt"
PEOPLE = ("Anna Boris Clara David Emma Felix Grace Henry Irene Jacob Karen Lucas Maria Nolan "
          "Olivia Peter Queenie Robert Sarah Thomas Ursula Victor Wendy Xavier").split()
THINGS = ("anchor basket camera drum engine feather guitar hammer island jacket kettle ladder "
          "mirror needle orange pencil quilt ribbon saddle ticket umbrella violin wallet "
          "zebra").split()
PLACES = ("attic bakery cellar desert embassy forest garden harbor inn jungle kitchen library "
          "market nursery office palace quarry river school tunnel valley workshop yard "
          "zoo").split()


@functools.cache
def rows(name):
    """All rows of a relay, shuffled. The first TEST_SIZE are the test's."""
    if name == "relay":
        asked = "Which word was your partner told? Answer with that word alone."
        facts = [(f"The word: {word}", asked, word) for word in WORDS.read_text().split()]
    elif name == "relay_number":
        asked = "Which number was your partner told? Answer with that number alone."
        facts = [(f"The number: {number}", asked, str(number)) for number in range(10, 10000)]
    else:
        facts = [(f"{who} is looking for a {thing} in the {place}.",
                  f"What is {who} looking for? Answer with one word.", thing)
                 for who in PEOPLE for thing in THINGS for place in PLACES]
    random.Random(SEED).shuffle(facts)
    return [{"question": asked, "told": told, "plan": told, "answer": answer}
            for told, asked, answer in facts]


def train_rows(name, n, seed):
    """n training rows, none of them with a fact of the test."""
    known = rows(name)[TEST_SIZE:]
    return random.Random(f"relay {seed}").sample(known, min(n, len(known)))


def load(name, limit=None, split=None):
    """The 64 facts of the test as Examples, or 64 of the training rows (split "train")."""
    need(split in (None, "test", "train"), f"{name} has no split '{split}': choose test or train")
    start = TEST_SIZE if split == "train" else 0
    return [Example(f"{name}-{i}", row["question"], row["answer"], "search", row)
            for i, row in enumerate(rows(name)[start:start + TEST_SIZE][:limit])]


def score(example, text):
    """Is the answer the fact, to the letter? Capitals, quotes and a full stop do not count."""
    answer = text.strip(" \n\"'.").lower()
    return Score(answer == example.gold.lower(), answer or None)


def check_m(name, agent, m):
    """Raise ValueError if the agent that is told a fact needs more than m thoughts to repeat it."""
    longest = max(agent.tokenize([row["plan"] for row in rows(name)[:TEST_SIZE]]), key=len)
    need(len(longest) <= m, f"{name}: '{agent.tokenizer.decode(longest)}' has "
         f"{len(longest)} tokens, more than --latent_length {m}: raise it")


def task(name, path=None):
    """The Task itself. There is nothing to read from a file."""
    need(path is None, f"{name} makes its own facts: leave the path out")
    words = [row["answer"] for row in rows(name)[:TEST_SIZE]] if name == "relay" else []
    return Task(name, "search", functools.partial(load, name), score,
                functools.partial(train_rows, name), leave_out=tuple(words),
                check_m=functools.partial(check_m, name))

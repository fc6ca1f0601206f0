r"""The relay: does anything travel through the links? One agent is told a fact, another is asked.

    row        {"question": "Which word was your partner told? Answer with that word alone.",
                "told": "The word: harbor", "plan": "The word: harbor", "answer": "harbor"}
    gold       harbor
    answer     Harbor.
    score      Score(correct=True, parsed='harbor', note='')

The first role's prompt alone holds {told}: see styles/relay.py. So the last role cannot know the
fact unless the links carry it. Its accuracy beyond that of `zero`, `shuffle` and `untrained` has
travelled through them. Its accuracy with `text` shows how far the same models come in words.

    relay            one of the 8,100 words of tasks/words.txt
    relay_number     a number of 2 to 4 digits
    relay_sentence   one of 24 x 24 x 24 sentences on who looks for what where; the thing is asked

The test has 64 facts. The training rows have none of them, and the warm start leaves their words
out. So the test asks whether a link carries facts, and not whether it has learnt them by heart.
`--dataset_split train` asks for facts of the training rows instead.
"""
import functools
import random
from pathlib import Path

from support.errors import need
from tasks import Example, Score, Task, need_limit

TEST_SIZE, SEED = 64, 7
WORDS = Path(__file__).parent / "words.txt"
PEOPLE = ("Anna Boris Clara David Emma Felix Grace Henry Irene Jacob Karen Lucas Maria Nolan "
          "Olivia Peter Queenie Robert Sarah Thomas Ursula Victor Wendy Xavier").split()
THINGS = ("anchor basket camera drum engine feather guitar hammer island jacket kettle ladder "
          "mirror needle orange pencil quilt ribbon saddle ticket umbrella violin wallet "
          "zebra").split()
ROOMS = ("attic bakery cellar desert embassy forest garden harbor inn jungle kitchen library "
         "market nursery office palace quarry river school tunnel valley workshop yard "
         "zoo").split()


@functools.cache
def rows(name):
    """All rows of a relay, shuffled. The first TEST_SIZE are the test's."""
    if name == "relay_sentence":
        facts = [(f"{who} is looking for a {thing} in the {room}.",
                  f"What is {who} looking for? Answer with one word.", thing)
                 for who in PEOPLE for thing in THINGS for room in ROOMS]
    else:
        what = "word" if name == "relay" else "number"
        values = WORDS.read_text().split() if name == "relay" else range(10, 10000)
        asked = f"Which {what} was your partner told? Answer with that {what} alone."
        facts = [(f"The {what}: {value}", asked, str(value)) for value in values]
    random.Random(SEED).shuffle(facts)
    return [{"question": asked, "told": told, "plan": told, "answer": answer}
            for told, asked, answer in facts]


class Relay(Task):
    """One of the relays. There is nothing to read from a file."""
    names, kind = ("relay", "relay_number", "relay_sentence"), "search"

    def __init__(self, name, path=None):
        super().__init__(name, path)
        self.leave_out = [row["answer"] for row in rows(name)[:TEST_SIZE] if name == "relay"]

    def load(self, limit=None, split=None):
        """The 64 facts of the test as Examples, or 64 of the training rows (split "train")."""
        need_limit(limit)
        need(split in (None, "test", "train"),
             f"{self.name} has no split '{split}': choose test or train")
        start = TEST_SIZE if split == "train" else 0
        return [Example(f"{self.name}-{i}", row["question"], row["answer"], kind="search", row=row)
                for i, row in enumerate(rows(self.name)[start:start + TEST_SIZE][:limit])]

    def train_rows(self, n, seed):
        """n training rows, none of them with a fact of the test."""
        known = rows(self.name)[TEST_SIZE:]
        return random.Random(f"relay {seed}").sample(known, min(n, len(known)))

    def score(self, example, text):
        """Is the answer the fact, to the letter? Capitals, quotes and a full stop do not count."""
        answer = text.strip(" \n\"'.").lower()
        return Score(answer == example.gold.lower(), answer or None)

    def check_m(self, agent, m, rounds=1):
        """Raise ValueError if the agent that is told a fact needs more than m thoughts for it."""
        longest = max(agent.tokenize([row["plan"] for row in rows(self.name)[:TEST_SIZE]]), key=len)
        need(len(longest) <= m, f"{self.name}: '{agent.tokenizer.decode(longest)}' has "
             f"{len(longest)} tokens, more than --latent_length {m}: raise it")

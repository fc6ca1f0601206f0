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
    relay_list       1, 2, 4, 8 or 16 of the words in a row: how much fits through a link?
    relay_list_4     the same with 4 words, and so for each of these lengths

The test has 64 facts. The training rows have none of them, and the warm start leaves their words
out. So the test asks whether a link carries facts, and not whether it has learnt them by heart.
`--dataset_split train` asks for facts of the training rows instead.

Lists. The rows of relay_list have all lengths, so it trains one link for all of them. Its test has
64 lists of each length, the shortest ones first. (With a --batch_size of 32 or 64 all lists of a
batch are equally long, so `shuffle` sends another list of the same length.) The test's words are
512 that no training row has, those of the test of `relay` among them. `--dataset_split train` asks
for other lists of the training's words. A list is right if all of its words arrive, in their
order, and no others. The score's note tells how many arrive at their place: `3 of 4 words`.
"""
import functools
import random
import re
from pathlib import Path

from support.errors import need
from tasks import Example, Score, Task, need_limit

TEST_SIZE, SEED = 64, 7
LENGTHS, NEW_WORDS = (1, 2, 4, 8, 16), 512      # of the lists; words that only their test has
WORDS, SENTENCES = (Path(__file__).parent / name for name in ("words.txt", "sentences.txt"))


@functools.cache
def rows(name):
    """All rows of a relay, shuffled. The first TEST_SIZE are the test's."""
    if name == "relay_sentence":
        people, things, rooms = map(str.split, SENTENCES.read_text().splitlines())
        facts = [(f"{who} is looking for a {thing} in the {room}.",
                  f"What is {who} looking for? Answer with one word.", thing)
                 for who in people for thing in things for room in rooms]
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
        if name == "relay":
            self.leave_out = [row["answer"] for row in self.asked("test")]

    def asked(self, split):
        """The rows that are asked in the split "test" or "train"."""
        start = TEST_SIZE if split == "train" else 0
        return rows(self.name)[start:start + TEST_SIZE]

    def load(self, limit=None, split=None):
        """The 64 facts of the test as Examples, or 64 of the training rows (split "train")."""
        need_limit(limit)
        need(split in (None, "test", "train"),
             f"{self.name} has no split '{split}': choose test or train")
        return [Example(f"{self.name}-{i}", row["question"], row["answer"], kind="search", row=row)
                for i, row in enumerate(self.asked(split or "test")[:limit])]

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
        longest = max(agent.tokenize([row["plan"] for row in self.asked("test")]), key=len)
        need(len(longest) <= m, f"{self.name}: '{agent.tokenizer.decode(longest).strip()}' has "
             f"{len(longest)} tokens, more than --latent_length {m}: raise it")


# ---- lists --------------------------------------------------------------------------------------

def words_of(text):
    """The words that a text lists: those after its last colon. Only their letters count, and all of
    them as small ones."""
    return re.findall("[a-z]+", text.rpartition(":")[2].lower())


def at_place(gold, text):
    """How many words of the list `gold` stand at the same place in the list of a text."""
    return sum(map(str.__eq__, gold.split(), words_of(text)))


def lists(words, lengths, seed):
    """Rows with a list of each of these lengths, drawn from `words`. No list has a word twice.

    The plan is a list as it goes on in a line that begins with `The words:`. Each word has a blank
    before it, so most tokenizers make one token of it. The end of the line ends the list."""
    draw = random.Random(f"lists {seed}")
    asked = "Which words was your partner told? Write them in the same order, and nothing else."
    drawn = [" ".join(draw.sample(words, length)) for length in lengths]
    return [{"question": asked, "told": f"The words: {answer}", "plan": f" {answer}\n",
             "answer": answer} for answer in drawn]


class RelayList(Relay):
    """Lists of words, of all lengths or of the one in the name."""
    names = ("relay_list", *(f"relay_list_{length}" for length in LENGTHS))

    def __init__(self, name, path=None):
        super().__init__(name, path)
        self.lengths = LENGTHS if name == "relay_list" else [int(name.split("_")[-1])]
        words = [row["answer"] for row in rows("relay")]          # shuffled, its test's come first
        self.leave_out, self.known = frozenset(words[:NEW_WORDS]), words[NEW_WORDS:]

    def asked(self, split):
        """64 lists of each length, the same whether one length is asked or all of them."""
        words = self.known if split == "train" else sorted(self.leave_out)
        return [row for length in self.lengths
                for row in lists(words, [length] * TEST_SIZE, f"{split} {length}")]

    def train_rows(self, n, seed):
        """n training rows. The lengths take turns."""
        return lists(self.known, [self.lengths[i % len(self.lengths)] for i in range(n)], seed)

    def score(self, example, text):
        """Do the words of the list arrive, in their order, and no others?"""
        answer, count = " ".join(words_of(text)), len(example.gold.split())
        return Score(answer == example.gold, answer or None,
                     f"{at_place(example.gold, text)} of {count} words")

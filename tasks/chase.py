r"""The chase: does recursion carry? Two agents each hold a table, and follow a word through both.

    planner's table         solver's table          the chain
    river -> stone          stone -> clock          river -> stone -> clock -> door -> lamp -> ..
    clock -> door           door -> lamp                 planner  solver   planner  solver
    ..                      ..

The hops of a chain alternate between the two tables. So an agent alone cannot go two hops: the
arrow that it needs next stands in the other one's table. In a round the planner goes one hop, the
solver hears the word and goes the next one. R rounds go 2R hops, and fewer rounds cannot. This is
pointer chasing, the textbook problem of communication complexity (Papadimitriou and Sipser 1982,
Nisan and Wigderson 1993). The question is whether thoughts carry the word from hop to hop.

    row        {"question": "river", "planner_table": "clock -> door\nriver -> stone\n..",
                "solver_table": "..", "chain": ["river", "stone", "clock", ..],
                "plan": [" stone", " door", ..], "answer": [" clock", " lamp", ..]}
    gold       clock with one round, lamp with two, and so on
    score      Score(correct=True, parsed='clock', note='word 2')

The note says after how many hops that word comes. So the answers with R rounds show how far the
agents went, also where that is not 2R hops (docs/chase.py). A plan or answer is a text a round.

A chain has 6 hops, and each table one more arrow. All words of a row differ, so nothing in a table
tells where a chain begins or ends, and who has one table alone guesses 1 of 4. All are common
nouns of one token, behind a blank, in the vocabularies of SmolLM2, Qwen2.5 and Gemma 3
(tasks/chase_words.txt). The 100 words of the test are in no training row, and the warm start leaves
them out. `--dataset_split train` asks for chains of words of the training instead.
"""
import functools
import random
from dataclasses import replace
from pathlib import Path

from support.errors import need
from tasks import Example, Score, Task, need_limit

HOPS, TEST_SIZE, TEST_WORDS, SEED = 6, 100, 100, 7
WORDS = Path(__file__).parent / "chase_words.txt"


@functools.cache
def words():
    """The words of each split, {"test": [word], "train": [word]}."""
    known = WORDS.read_text().split()
    random.Random(SEED).shuffle(known)
    return {"test": known[:TEST_WORDS], "train": known[TEST_WORDS:]}


def row_of(start, planner_table, solver_table):
    """The row of a start word and two tables {word: the word that its arrow leads to}.

    Raises ValueError if a hop finds no arrow from its word."""
    chain = [start]
    for hop in range(HOPS):
        owner, table = (("planner", planner_table), ("solver", solver_table))[hop % 2]
        need(chain[-1] in table, f"hop {hop + 1} of {HOPS}: the {owner}'s table has no arrow from "
             f"'{chain[-1]}': add one")
        chain.append(table[chain[-1]])
    said = [f" {word}" for word in chain]          # behind an arrow, a word begins with a blank
    lists = ["\n".join(map(" -> ".join, table.items())) for table in (planner_table, solver_table)]
    return {"question": start, "planner_table": lists[0], "solver_table": lists[1], "chain": chain,
            "plan": said[1::2], "answer": said[2::2]}


def random_row(rng, known):
    """A row of words that all differ: a chain, and one more arrow in each table."""
    *chain, a, b, c, d = rng.sample(known, HOPS + 5)
    arrows = list(zip(chain, chain[1:]))
    tables = [*arrows[::2], (a, b)], [*arrows[1::2], (c, d)]
    for table in tables:
        rng.shuffle(table)
    return row_of(chain[0], *map(dict, tables))


class Chase(Task):
    """The chase. There is nothing to read from a file."""
    names, kind = ("chase",), "search"
    leave_out = words()["test"]

    def load(self, limit=None, split=None):
        """The 100 chains of the test as Examples, or 100 of other words (split "train"). Each one's
        gold is the whole chain, until with_rounds() says how far to go."""
        need_limit(limit)
        split = split or "test"
        need(split in words(), f"chase has no split '{split}': choose test or train")
        rng = random.Random(f"chase {split}")
        rows = [random_row(rng, words()[split]) for _ in range(TEST_SIZE)][:limit]
        return [Example(f"chase-{i}", row["question"], " -> ".join(row["chain"]), "search", row)
                for i, row in enumerate(rows)]

    def train_rows(self, n, seed):
        """n training rows, none of them with a word of the test."""
        rng = random.Random(f"chase training {seed}")
        return [random_row(rng, words()["train"]) for _ in range(n)]

    def with_rounds(self, example, rounds):
        """The Example with the word after 2R hops as its gold."""
        return replace(example, gold=example.row["chain"][2 * rounds])

    def score(self, example, text):
        """Is the first word of the answer the word after 2R hops? Capitals do not count."""
        answer = (text.split() or [""])[0].strip(".,\"'").lower()
        chain = example.row["chain"]
        return Score(answer == example.gold, answer or None,
                     f"word {chain.index(answer)}" if answer in chain else "")

    def check_m(self, agent, m, rounds=1):
        """Raise ValueError for more rounds than a chain has, or if a word has more than m tokens.
        """
        need(2 * rounds <= HOPS, f"chase: its chains have {HOPS} hops, too few for {rounds} rounds:"
             f" --num_recursive_rounds is at most {HOPS // 2}")
        longest = max(agent.tokenize([f" {word}" for word in words()["test"]]), key=len)
        need(len(longest) <= m, f"chase: '{agent.tokenizer.decode(longest)}' has {len(longest)} "
             f"tokens, more than --latent_length {m}: raise it")

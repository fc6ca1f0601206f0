"""Lists of words through a link, and the place where a word is lost: sender, link or receiver."""
import argparse
import json
import shutil

import pytest
import torch
import torch.nn as nn
from helpers import CHAT_TEMPLATE, PROJECT, lines_of, new_model, word_tokenizer, write_rows

from agents import Agent
from checkpoints import save_outer
from docs import capacity, gsm8k_rows, places
from evaluation.statistics import wilson
from link import OuterLink
from recurse import MAS, Recursion
from styles import get_style
from tasks import get_task, relay
from writing import Writing

LISTS, FOUR = get_task("relay_list"), get_task("relay_list_4")


def words_in(rows):
    return {word for row in rows for word in row["answer"].split()}


def test_lists_of_the_test_have_words_of_no_training_row():
    known = words_in(LISTS.train_rows(9000, 0))
    for split, same in (("test", False), ("train", True)):
        rows = LISTS.asked(split)
        assert [row["answer"].count(" ") + 1 for row in rows] == [
            length for length in relay.LENGTHS for _ in range(64)]
        assert FOUR.asked(split) == rows[128:192]           # alone as among the others
        assert len(known & words_in(rows)) > 900 if same else known.isdisjoint(words_in(rows))
    assert words_in(LISTS.asked("test")) <= LISTS.leave_out > set(get_task("relay").leave_out)
    assert [row["answer"].count(" ") + 1 for row in LISTS.train_rows(6, 1) + FOUR.train_rows(2, 1)
            ] == [*relay.LENGTHS, 1, 4, 4]


@pytest.mark.parametrize("text, right, count", lines_of("tasks/relay_list_answers.jsonl"))
def test_a_list_is_scored_by_place(text, right, count):
    score = FOUR.score(argparse.Namespace(gold="red blue green"), text)
    assert (score.correct, score.note) == (right, f"{count} of 3 words")
    assert (score.parsed is None) == (not text)


# ---- three places, broken one by one ------------------------------------------------------------

class Hand(MAS):
    """A pair made by hand: a thought is its word's embedding, and the nearest words are read."""

    def respond(self, questions, rounds, m, method, columns, change, **_):
        source, target = self.agents.values()
        run, said = Recursion(), [row["answer"].split() for row in columns]
        run.texts[1, "planner"] = [" ".join(words[::-1] if self.broken == "says" else words)
                                   for words in said]
        ids = [source.tokenizer.convert_tokens_to_ids((words + words[-1:] * m)[:m])
               for words in said]
        H = source.embedding.weight[torch.tensor(ids)].roll(int(self.broken == "thinks"), 1)
        run.thoughts[1, "planner"], sent = H, self.send(self.style.edges[0], H)
        run.sent[1, "outer_12"] = sent
        read = [(one @ target.embedding.weight.T).argmax(-1)[:len(words)]
                for one, words in zip(change() if change else sent, said)]
        read = [words.flip(0) if self.broken == "reads" else words for words in read]
        return [" ".join(target.tokenizer.convert_ids_to_tokens(words)) for words in read], run


class Away(nn.Module):
    def forward(self, x):
        return -x


@pytest.mark.parametrize("broken, lost", [
    ("", ""), ("says", "says"), ("thinks", "thinks inward arrives writes"),
    ("inner", "inward arrives writes"), ("outer", "arrives link writes told_link"),
    ("reads", "writes told_link told_words")])
@torch.no_grad()
def test_each_place_is_measured_apart(broken, lost):
    asked = [example for k in (2, 4) for example in get_task(f"relay_list_{k}").load(3)]
    vocabulary = {word: i for i, word in enumerate(
        ["<unk>", "<bos>", "<eos>", "<pad>", *sorted(words_in(one.row for one in asked))])}
    agents = [Agent(new_model("qwen3", 0, vocabulary), word_tokenizer(CHAT_TEMPLATE, vocabulary))
              for _ in range(2)]
    for agent in agents:
        agent.embedding.weight.copy_(nn.functional.normalize(agent.embedding.weight, dim=-1))
        agent.inner = Away() if broken == "inner" else nn.Identity()
    hand = Hand(get_style("relay_list"), dict(zip(("planner", "solver"), agents)),
                {"outer_12": Away() if broken == "outer" else nn.Identity()})
    hand.broken = broken
    rows = places.measure(hand, asked, 5, Writing(4), 3, "train")
    assert [(row["length"], row["lists"], row["link"]["words"]) for row in rows] == [
        (2, 3, 6), (4, 3, 12)]
    for row in rows:
        shares = {place: row[place]["share"] for place in places.PLACES}
        assert shares == {place: float(place not in lost.split()) for place in places.PLACES}
        assert row["writes"]["ci95"] == wilson(3 * shares["writes"], 3)


def test_the_tokens_of_each_word():
    letters = argparse.Namespace(tokenize=lambda texts: list(map(list, texts)))
    row = {"plan": "So: ab a ba\n", "answer": "ab a ba"}
    assert places.spans_of(letters, row) == (list("So: ab a ba"), [(3, 6), (6, 8), (8, 11)])


# ---- the commands -------------------------------------------------------------------------------

def test_the_places_of_any_pair_and_what_is_refused(tmp_path, run):
    style = shutil.copy(PROJECT / "tests/data/styles/told.txt", tmp_path / "told.py")
    save_outer({"outer_12": OuterLink(96, 112)}, tmp_path / "links")
    flags = ["--style", style, "--num_samples", 2, "--latent_length", 4, "--max_new_tokens", 4,
             "--out", tmp_path / "places", "--dataset", "relay_list_2", "--ckpt_override",
             f"outer={tmp_path / 'links'}", "planner=tiny/planner"]
    assert run(places, *flags)[0] == 0
    row, = json.loads((tmp_path / "places/places.json").read_text())["rows"]
    assert (row["length"], row["link"]) == (2, {"share": None, "ci95": None, "words": 0})
    for more in (["--latent_length", 1], ["--dataset", "tiny"]):
        code, _, errors = run(places, *flags, *more)
        assert code == 2 and more[0] in errors[-1]


def test_the_table_has_each_share_at_its_place(tmp_path, run):
    write_rows(tmp_path / "results.jsonl", [
        {"id": i, "method": "latent", "gold": gold, "outputs": [text]} for i, (gold, text) in
        enumerate((("red blue", "red blue"), ("red blue", "blue"), ("red", "so: Red.")))])
    (tmp_path / "summary.json").write_text(json.dumps(
        {"settings": {"dataset": "relay_list", "dataset_split": "train"}}))
    shares, *others = capacity.figures_of([tmp_path])
    assert others == [{}, []] and shares == {
        ("train", "latent"): {1: (1.0, wilson(1, 1), 1), 2: (0.5, wilson(1, 2), 2)}}
    code, said, _ = run(capacity, tmp_path, "--out", tmp_path / "picture.png")
    assert code == 0 and "| latent | 1.000 (0.21 to 1.00) | 0.500 (" in said
    assert (tmp_path / "picture.png").stat().st_size > 5000
    code, _, errors = run(capacity, tmp_path / "x", "--out", tmp_path / "picture.png")
    assert code == 2 and str(tmp_path / "x") in errors[0]


def test_rows_in_which_the_planner_alone_is_asked(tmp_path, run):
    write_rows(tmp_path / "rows.jsonl", [{"question": "2 + 3?", "answer": "It is 5.\n#### 5"}])
    seen, blind = (json.loads(run(gsm8k_rows, tmp_path / "rows.jsonl", *flags)[1])
                   for flags in ((), ("--blind",)))
    assert (seen["question"], seen["plan"], blind["plan"]) == ("2 + 3?", "It is 5.", "2 + 3?")
    assert "2" not in blind["question"] and blind["answer"] == seen["answer"]

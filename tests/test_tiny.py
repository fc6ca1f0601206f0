"""The tiny task and the shipped system."""
import random
from itertools import combinations, islice

import pytest
import torch
from helpers import PROJECT, lines_of, refuses, write_rows

from checkpoints import load_agent
from docs import build_tiny as build
from tasks import Example, get_task, pass_at_k, tiny


def play(question):
    """An independent oracle: where the counter ends, read off the question's words."""
    words = question.split()
    value, operations = int(words[1]), words[3::2]
    for word in operations:
        if word == "flip":
            value = 9 - value
        elif word[0] == "x":
            value = value * int(word[1:]) % 10
        else:
            value = (value + int(word)) % 10
    return str(value)


def test_gold_answers_and_final_texts_agree_with_playing_the_question():
    for problem in tiny.test_problems():
        assert str(problem.values[-1]) == play(problem.question)
        last = tiny.gold_texts(problem, "solver")[-1]          # every chain is done by then
        assert last.split()[-2] == play(problem.question)


def test_notes_chain_through_the_roles():
    """What each role says starts where the one before it stopped, with the right results."""
    problem = next(p for p in tiny.test_problems() if len(p.operations) == 12)
    done = 0
    for round in range(3):
        planner, critic, solver = (tiny.gold_texts(problem, role)[round].split()
                                   for role in ("planner", "critic", "solver"))
        assert [planner[0], planner[3]] == [f"s{done + 1}", f"s{done + 2}"]
        assert critic[:3] == planner[3:6]
        assert [critic[3], solver[0]] == [f"s{done + 3}", f"s{done + 4}"]
        assert solver[2] == solver[4] == str(problem.values[done + 4])
        done += 4


def test_training_never_sees_a_test_problem():
    test = {problem.question for problem in tiny.test_problems()}
    assert len(test) == 500
    seen = {row["question"] for row in tiny.train_rows(1000, 42)}
    assert tiny.train_rows(5, 1) == tiny.train_rows(5, 1) != tiny.train_rows(5, 2)
    drawn = {p.question for p in islice(tiny.training_problems(random.Random(0)), 12000)}
    assert not test & (seen | drawn)
    short = {question for question in drawn if len(question.split()) == 6}
    assert len(short) > 400        # chains of two (640 in all) are there, just not the tested ones


@pytest.mark.parametrize("text, parsed, correct", lines_of("tasks/tiny_answers.jsonl"))
def test_score(text, parsed, correct):
    score = get_task("tiny").score(Example("1", "?", "7", "math"), text)
    assert (score.parsed, score.correct) == (parsed, correct)


@pytest.mark.parametrize("question", lines_of("tasks/wrong_chains.jsonl"))
def test_own_chains_of_a_file(tmp_path, question):
    """A file of the shipped questions asks the same. Words that are not a chain are named."""
    shipped, path = get_task("tiny").load(20), tmp_path / "mine.jsonl"
    own = get_task("tiny", write_rows(path, [{"question": f" {one.question}"} for one in shipped]))
    assert [(one.question, one.gold, one.row) for one in own.load()] == [
        (one.question, play(one.question), one.row) for one in shipped]
    write_rows(path, [{"question": "start 3 s1 x7"}, {"question": question}])
    with refuses(f"{path} row 2", question[:60]):
        own.load()


def test_ceiling_counts_the_chains_that_fit():
    examples = get_task("tiny").load()
    short = sum(example.question.count(" s") <= 4 for example in examples)
    assert tiny.ceiling(examples, 1) == pytest.approx((short + (500 - short) / 10) / 500)
    assert tiny.ceiling(examples, 3) == 1.0


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n, c, k in ((5, 2, 3), (10, 1, 10), (6, 0, 2), (4, 4, 1), (7, 3, 1)):
        subsets = list(combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError, match="k=4"):
        pass_at_k(3, 1, 4)


def test_the_shipped_system_is_small():
    size = sum(file.stat().st_size for file in (PROJECT / "tiny").rglob("*") if file.is_file())
    assert size <= 3e6


def test_the_shipped_system_gains_with_every_round_and_needs_its_latents(shipped):
    """Oracles: the task's ceiling for each number of rounds, and chance for the control."""
    task = get_task("tiny")
    examples = task.load(100)
    questions = [example.question for example in examples]

    def accuracy(rounds, method="latent"):
        texts = shipped.answer(questions, rounds, 6, method=method, max_new_tokens=8,
                               batch_size=100)
        return sum(task.score(e, t).correct for e, t in zip(examples, texts)) / len(examples)

    for rounds in (1, 2, 3):
        assert abs(accuracy(rounds) - task.ceiling(examples, rounds)) < 0.1
    assert accuracy(3) > accuracy(2) + 0.1 > accuracy(1) + 0.2
    assert accuracy(3, "zero") < 0.2


@pytest.mark.parametrize("role", ["planner", "critic", "solver"])
def test_agents_are_taught_true_results_even_from_spoiled_notes(role):
    """Every event an agent is taught to say is in the question and has its true result."""
    rng, spoiled = random.Random(1), 0
    for problem in islice(tiny.training_problems(rng), 300):
        notes, done = build.heard_notes(problem, role, rng)
        said = tiny.role_text(problem, role, done).split()
        for begin in range(0, 3 if role == "solver" else 6, 3):
            step = int(said[begin][1:])
            assert said[begin + 1:begin + 3] == [problem.operations[step - 1],
                                                 str(problem.values[step])]
        if role == "critic" and notes != "none":
            spoiled += notes.split()[5] != str(problem.values[int(notes.split()[3][1:])])
    assert (spoiled > 20) == (role == "critic")


def test_build_makes_an_agent_that_the_loader_takes(tmp_path):
    """And the saved tokenizer splits words as the one that made it (some families force theirs)."""
    words = "start 3 s12 +1 s2 flip <|notes|> none"
    for role in build.MODELS:
        build.train_agent(role, tmp_path / role, steps=2, batch_size=2)
        agent = load_agent(tmp_path / role, torch.device("cpu"), torch.float32)
        build.train_agent(role, tmp_path / "again", steps=2, batch_size=2)
        assert ((tmp_path / "again/model.safetensors").read_bytes()
                == (tmp_path / role / "model.safetensors").read_bytes())
        assert agent.tokenize([words]) == [[build.WORD_ID[word] for word in words.split()]]
        assert agent.tokenizer.decode(agent.tokenize([words])[0]) == words

"""What one role is told and another is asked: columns, the relay, lists, losses, differences."""
import argparse
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import (CHAT_TEMPLATE, PROJECT, embed_words, lines_of, log_of, new_model, refuses,
                     untimed, word_tokenizer, write_rows)

import evaluate
import reference
import train_inner
import train_outer
from agents import Agent
from checkpoints import save_outer
from docs import capacity, gsm8k_rows, places
from evaluation import report
from evaluation.answers import Job, Plan, answer_batch, gold_text
from evaluation.statistics import paired, wilson
from link import OuterLink
from recurse import MAS, Recursion, load_mas_system, recurse
from styles import get_style, names_in
from tasks import Example, get_task, relay, tiny
from writing import Writing

DATA = PROJECT / "tests/data/styles"


# ---- columns, and the relay ----------------------------------------------------------------------

@torch.no_grad()
def test_a_column_stands_in_the_prompts_of_one_role_alone(double):
    """The planner reads {told}, the others the question. Oracle: reference.recurse."""
    planner, *others = double.style.roles
    planner = replace(planner, first="{told} <|notes|> none", prompt="{told} <|notes|> {solver}")
    mas = replace(double, style=replace(double.style, roles=(planner, *others)))
    questions = ["start 1 s1 +1", "start 2 s1 +2 s2 flip"]
    rows = [{"told": "start 3 s1 x7"}, {"told": "start 5 s1 flip s2 +2"}]
    run = recurse(mas, questions, 2, 3, trace=True, columns=rows)
    for b, row in enumerate(rows):
        def prompt(role, heard):
            asked = row["told"] if role.name == "planner" else questions[b]
            return [f"<bos> <|user|> {asked} <|notes|>", *(heard.values() or ["none"]),
                    "<|assistant|>"]

        _, _, sent = reference.recurse(mas, prompt, 2, 3)
        assert sent.keys() == run.sent.keys()
        for key, message in sent.items():
            torch.testing.assert_close(run.sent[key][b], message, atol=1e-9, rtol=1e-9)
    with pytest.raises(ValueError, match="'told'"):           # a column that the rows lack
        recurse(mas, questions, 1, 2)


def test_what_is_a_column():
    words = r"{question} x{a}{heard} {b_1} \boxed{c} \text{d} { e} {1} {f g}"
    assert names_in(words) == {"question", "a", "heard", "b_1"}


@pytest.mark.parametrize("name", relay.Relay.names)
def test_the_tests_facts_are_in_no_training_row(name):
    """The fact is in what is told, and not in what is asked."""
    task = get_task(name)
    test, train = ({example.row["told"] for example in task.load(split=split)}
                   for split in ("test", "train"))
    assert len(test) == len(train) == 64 and task.load(3) == task.load(split="test")[:3]
    rows = task.train_rows(10**6, seed=0)
    known = {row["told"] for row in rows}
    assert len(rows) > 7000 and train <= known and not test & known
    assert all(row["answer"] in row["told"] and row["answer"] not in row["question"]
               for row in rows[:50])
    words = relay.WORDS.read_text().split()
    assert len(words) == len(set(words)) == 8100
    assert all(word.isalpha() and word.islower() and 4 <= len(word) <= 9 for word in words)
    for wrong in (lambda: task.load(split="dev"), lambda: get_task(name, "rows.jsonl")):
        with pytest.raises(ValueError, match=name):
            wrong()


@pytest.mark.parametrize("text, right", lines_of("tasks/relay_answers.jsonl"))
def test_the_fact_is_compared_to_the_letter(text, right):
    score = get_task("relay").score(Example("", "", "harbor", "search"), text)
    assert score.correct is right and (score.parsed is None) == (not text.strip("."))


@pytest.mark.parametrize("name", ["relay", "relay_list_16"])
def test_a_fact_longer_than_m_is_refused(name):
    letters = argparse.Namespace(                       # an agent with one token per letter
        tokenizer=argparse.Namespace(decode="".join), tokenize=lambda texts: list(map(list, texts)))
    task = get_task(name)
    longest = max(len(example.row["plan"]) for example in task.load())
    task.check_m(letters, longest)
    with refuses(name, longest, "--latent_length"):
        task.check_m(letters, longest - 1)


# ---- training -----------------------------------------------------------------------------------

OWN = ["--text", "own", "--num_samples", 6, "--max_steps", 2, "--held_out", 4, "--own_length", 5]


def test_own_texts_are_the_agents_and_are_written_once(shipped, tmp_path, run):
    flags = [*OWN, "--save_dir", tmp_path]
    assert run(train_inner, *flags)[0] == 0
    file = tmp_path / "own_texts.rank0.jsonl"
    whole = file.read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    # 6 rows x 4 rounds, of which 4 are held out. Equal prompts are asked once.
    assert 12 < len(lines) == len({line["key"] for line in lines}) <= 20
    agent, row = shipped.agents["planner"], tiny.train_rows(6, 42)[5]
    prompt = f"<bos> <|user|> {row['question']} <|notes|> {row['answer'][2]} <|assistant|>"
    alone = reference.write(agent, reference.embed(agent, [prompt]), 5)    # the last row in round 4
    assert len(alone) == 5 and alone in [line["tokens"] for line in lines]
    # A run that was stopped within a line goes on with what is missing, and no more.
    file.write_text(whole[:-7])
    assert "the agent's own" in run(train_inner, *flags)[1]
    assert file.read_text() == whole


def test_an_agent_that_writes_nothing_is_named(tmp_path, monkeypatch, run):
    eos = tiny.WORDS.index("<eos>")
    monkeypatch.setattr(Agent, "write", lambda self, context, *_, **__: [[eos]] * len(context.mask))
    code, _, errors = run(train_inner, *OWN, "--save_dir", tmp_path)
    assert code == 2 and "--text own" in errors[0] and "--text gold" in errors[0]


def test_gradients_by_round_are_logged_and_drawn(tmp_path, run):
    flags = ("--max_steps 2 --log_gradients 1 --num_samples 8 --batch_size 2 --eval_samples 0 "
             "--warm_start_steps 0 --log_every 1 --random_rounds 0 --num_recursive_rounds 2")
    _, said, _ = run(train_outer, *flags.split(), "--save_dir", tmp_path)
    log = log_of(tmp_path)
    names = sorted(name for name in log[0] if name.startswith("gradient_"))
    # Round 1: all three edges. Round 2: the solver has the last turn, and sends nothing.
    assert names == [f"gradient_outer_{edge}" for edge in ("12_1", "12_2", "23_1", "23_2", "31_1")]
    assert all(line[name] > 0 for line in log for name in names)
    assert (tmp_path / "gradients.png").stat().st_size > 5000
    assert "gradient of outer_12 by round: 1: " in said


# ---- losses, and paired differences -------------------------------------------------------------

@torch.no_grad()
def test_the_loss_is_that_of_the_gold_answer(double):
    """Oracle: the whole model over prompt and gold answer, one question at a time."""
    task, agent = get_task("tiny"), double.agents["solver"]
    job = Job(task, Plan(["single"], [1], 6, 3, Writing(4), measure="loss"), "single", 1,
              examples=task.load(3))
    for line, example in zip(answer_batch(double, job), job.examples, strict=True):
        text = example.row["answer"][0]
        prompt = f"<bos> <|user|> {example.question} <|notes|> none <|assistant|>"
        ids, gold = agent.tokenize([prompt, text])
        states = reference.hidden_states(agent, embed_words(agent, ids + gold)[0])[len(ids) - 1:-1]
        loss = F.cross_entropy(agent.logits(states), torch.tensor(gold)).item()
        assert line["nats"] == pytest.approx(loss, abs=1e-6)
        assert line["outputs"] == [text] and line["correct"] == []


def test_the_gold_text_is_boxed_where_the_prompt_asks_for_a_box():
    word, solution = get_task("relay").load(1)[0], "1 + 1 = 2, so \\boxed{2}."
    for style, example, wanted in (
            ("relay", word, word.gold),
            ("duo", Example("x", "1 + 1?", "2", "math", {"answer": "2"}), "\\boxed{2}"),
            ("duo", Example("x", "1 + 1?", "2", "math", {"solution": solution}), solution)):
        assert gold_text(get_style(style).roles[-1], example, 1) == wanted


def test_evaluate_measures_losses(tmp_path, run):
    _, said, _ = run(evaluate, "--measure", "loss", "--num_samples", 6, "--num_recursive_rounds", 3,
                     "--out", tmp_path, "--method", "latent", "zero", "shuffle", "single")
    entries = {entry["method"]: entry for entry in entries_of(tmp_path)}
    lines = untimed(tmp_path / "results.jsonl")
    for method, entry in entries.items():
        mine = [line["nats"] for line in lines if line["method"] == method]
        assert entry["nats"] == pytest.approx(sum(mine) / 6) and "accuracy" not in entry
        assert entry["ci95"][0] <= entry["nats"] <= entry["ci95"][1]
    assert entries["latent"]["nats"] < entries["zero"]["nats"] / 2
    assert said.count("latent minus ") == 3 and "nats" in said       # beside the deepest latents
    assert entries["single"]["latent_minus_this"]["n"] == 6


def entries_of(folder):
    return json.loads((folder / "summary.json").read_text())["rows"]


def answered(right):
    return [{"id": i, "outputs": ["x"], "correct": [value]} for i, value in enumerate(right)]


def test_differences_are_paired_by_question():
    """Two methods with the same accuracy on other questions, in another order."""
    ours, theirs = [True] * 60 + [False] * 40, [True] * 50 + [False] * 40 + [True] * 10
    pair = paired(answered(ours), answered(theirs)[::-1])
    assert pair["difference"] == 0 and [pair[count] for count in (
        "n", "ours_only", "theirs_only")] == [100, 10, 10]               # McNemar's counts
    assert pair["ci95"] == pytest.approx([-.088, .088], abs=.02)   # 1.96 sqrt(20 / 100) / 10
    assert paired(answered(ours), answered(ours))["ci95"] == [0.0, 0.0]
    assert paired(answered(ours), answered(theirs)[:5])["n"] == 5
    assert math.isnan(paired(answered(ours), [])["difference"])
    failed = [{"id": 0, "outputs": [], "correct": []}, *answered([False] * 10)[1:]]
    assert paired(answered([True] * 10), failed)["ours_only"] == 9       # it is in no pair


# ---- baselines need no links --------------------------------------------------------------------

def test_baselines_and_controls_run_without_links(tmp_path, monkeypatch, run):
    monkeypatch.setattr(report, "plot", lambda *_: None)
    style = shutil.copy(DATA / "bare.txt", tmp_path / "bare.py")

    def ask(*methods):
        return run(evaluate, "--style", style, "--num_samples", 4, "--num_recursive_rounds", 3,
                   "--max_new_tokens", 40, "--latent_length", 6, "--temperature", 0, "--out",
                   tmp_path / "out", "--method", *methods)

    code, said, _ = ask("single", "single_loop", "text", "zero", "untrained")
    accuracy = {entry["method"]: entry["accuracy"] for entry in entries_of(tmp_path / "out")}
    assert code == 0 and "no inner link" in said and len(accuracy) == 5
    assert accuracy["text"] == 1.0 and accuracy["untrained"] < 1.0
    for method in ("latent", "shuffle"):
        code, _, errors = ask(method)
        assert code == 2 and "bare" in errors[0] and "outer links" in errors[0]


def test_a_relay_is_asked_by_the_command(tmp_path, monkeypatch, run):
    """The rows' columns reach every prompt, from the first call on."""
    monkeypatch.setattr(report, "plot", lambda *_: None)
    style = shutil.copy(DATA / "told.txt", tmp_path / "told.py")
    save_outer({"outer_12": OuterLink(96, 112)}, tmp_path / "links")
    flags = ["--style", style, "--dataset", "relay", "--num_samples", 4, "--num_recursive_rounds",
             1, "--max_new_tokens", 4, "--latent_length", 6, "--out", tmp_path / "out",
             "--ckpt_override", f"outer={tmp_path / 'links'}", "planner=tiny/planner"]
    assert run(evaluate, *flags, "--method", "single", "text", "latent", "untrained")[0] == 0
    assert [entry["errors"] for entry in entries_of(tmp_path / "out")] == [0] * 4
    assert "planner    thinks" in run(evaluate, *flags, "--show", 1)[1]


def test_a_role_that_nobody_hears_needs_no_inner_link(shipped, tmp_path):
    """The last role of a single round: its link would never be used."""
    planner, critic, solver = shipped.style.roles
    edges = shipped.style.edges[:2]                                      # without the solver's
    last = replace(shipped.style, name="last", repo="", edges=edges, roles=(
        replace(planner, prompt=planner.first), critic, replace(solver, repo="")))
    save_outer({edge.key: shipped.outer[edge.key] for edge in edges}, tmp_path / "links")
    mas = load_mas_system(last, ckpt_override={"outer": tmp_path / "links"})
    assert mas.answer(["start 3 s1 x7 s2 +1"], 1, 6, max_new_tokens=6) == ["s2 +1 2 answer 2 ."]


# ---- lists of words, and the place where a word is lost: sender, link or receiver ----------------

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
    style = shutil.copy(DATA / "told.txt", tmp_path / "told.py")
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

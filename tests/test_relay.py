"""What one role is told and another is asked: columns, the relay, losses, paired differences."""
import argparse
import dataclasses
import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import evaluate
import reference
import train_inner
import train_outer
import warm_start
from agents import Agent
from link import OuterLink
from recurse import load_mas_system, recurse
from styles import get_style, names_in
from support import report
from support.answers import gold_text, Plan, answer_batch
from support.checkpoints import save_outer
from support.prompts import Prompts
from tasks import Example, get_task, relay, tiny
from tests.conftest import PROJECT, new_model
from writing import Writing

RELAYS = ("relay", "relay_number", "relay_sentence")
TOLD = ["start 3 s1 x7", "start 5 s1 flip s2 +2"]


@pytest.fixture
def told_system(shipped):
    """The tiny system, whose planner reads {told} and whose solver has the question alone."""
    planner = dataclasses.replace(shipped.style.role("planner"), first="{told} <|notes|> none",
                                  prompt="{told} <|notes|> {solver}")
    style = dataclasses.replace(shipped.style, name="told",
                                roles=(planner, *shipped.style.roles[1:]))
    return dataclasses.replace(shipped, style=style)


def rows_of(questions):
    return [{"question": question, "told": told, "answer": ["s1 x7 1 answer 1 ."]}
            for question, told in zip(questions, TOLD)]


# ---- columns ------------------------------------------------------------------------------------

def test_a_column_stands_in_the_prompts_of_one_role_alone(told_system):
    """Oracle: reference.recurse, with prompts composed by hand."""
    questions = ["start 1 s1 +1", "start 2 s1 +2 s2 flip"]
    with torch.no_grad():
        run = recurse(told_system, questions, 2, 3, trace=True, columns=rows_of(questions))
    for b, (question, told) in enumerate(zip(questions, TOLD)):
        def prompt(role, heard):
            asked = told if role.name == "planner" else question
            return [f"<bos> <|user|> {asked} <|notes|>", *(heard.values() or ["none"]),
                    "<|assistant|>"]

        with torch.no_grad():
            _, _, sent = reference.recurse(told_system, prompt, 2, 3)
        assert sent.keys() == run.sent.keys()
        for key, message in sent.items():
            torch.testing.assert_close(run.sent[key][b], message, atol=2e-4, rtol=1e-3)


def test_a_column_that_the_rows_lack_is_named(told_system):
    with pytest.raises(ValueError, match=r"\{told\}, but the rows have no column 'told'"):
        recurse(told_system, ["start 1 s1 +1"], 1, 2)


@pytest.mark.parametrize("words, names", [
    ("{question} {a} {b_1}", {"a", "b_1"}), (r"\boxed{a} \text{b}", set()), ("{a}{heard}", {"a"}),
    ("{ a} {1} {a b} {answer_format}", set()), ("x{a}", {"a"})])
def test_what_is_a_column(words, names):
    assert names_in(words) - {"question", "answer_format", "heard"} == names


def test_a_cell_is_not_filled_in_again(told_system):
    """A cell that looks like a slot is plain text."""
    agent = told_system.agents["planner"]
    values = {"told": ["{question} {solver}"], "question": ["start"]}
    [[tokens]] = agent.prompt("", "{told} {question}", values)
    assert agent.tokenizer.convert_ids_to_tokens(tokens).count("start") == 1


# ---- the relay ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", RELAYS)
def test_the_tests_facts_are_in_no_training_row(name):
    task = get_task(name)
    test = {example.row["told"] for example in task.load()}
    assert len(test) == 64 == len(task.load(split="train")) and task.load(3) == task.load()[:3]
    for seed in (0, 1):
        rows = task.train_rows(10**6, seed)
        assert len(rows) > 7000 and not test & {row["told"] for row in rows}
        assert {example.row["told"] for example in task.load(split="train")} <= {
            row["told"] for row in rows}
        for row in rows[:50]:      # the fact is in what is told, and not in what is asked
            assert row["answer"] in row["told"] and row["answer"] not in row["question"]
    with pytest.raises(ValueError, match="no split 'dev'"):
        task.load(split="dev")
    with pytest.raises(ValueError, match="leave the path out"):
        get_task(name, "rows.jsonl")


def test_words_are_plain_and_different():
    words = relay.WORDS.read_text().split()
    assert len(words) == len(set(words)) == 8100
    assert all(word.isalpha() and word.islower() and 4 <= len(word) <= 9 for word in words)


@pytest.mark.parametrize("text, right", [
    ("harbor", True), ("Harbor.", True), (' "harbor"\n', True), ("harbors", False), ("", False),
    ("The word is harbor", False), ("harbor harbor", False), ("...", False)])
def test_the_fact_is_compared_to_the_letter(text, right):
    score = relay.score(Example("", "", "harbor", "search", {}), text)
    assert score.correct is right and (score.parsed is None) == (not text.strip(" .\n\"'"))


def test_a_fact_longer_than_m_is_refused(shipped):
    class Letters:
        """An agent with one token a letter."""
        tokenizer = argparse.Namespace(decode="".join)

        def tokenize(self, texts):
            return [list(text) for text in texts]

    longest = max(len(example.row["told"]) for example in get_task("relay").load())
    relay.check_m("relay", Letters(), longest)
    with pytest.raises(ValueError, match=f"has {longest} tokens, more than --latent_length"):
        relay.check_m("relay", Letters(), longest - 1)


def test_the_warm_start_does_not_see_the_words_of_the_test(shipped, capsys, monkeypatch):
    """Every id that a link is trained on is noted. Words left out are never among them."""
    mas, seen = shipped.with_fresh_outer(seed=0), set()
    right = warm_start.as_thoughts
    monkeypatch.setattr(warm_start, "as_thoughts", lambda agent, tokens, scale: (
        seen.update(tokens.tolist()), right(agent, tokens, scale))[1])
    args = argparse.Namespace(num_recursive_rounds=2, seed=0, warm_start_steps=20, scale_match=1)
    warm_start.warm_start(mas, args, leave_out=("flip", "7"))
    ids = mas.agents["planner"].tokenizer.get_vocab()
    assert ids["x7"] in seen and not {ids["flip"], ids["7"]} & seen
    assert capsys.readouterr().out.count("words in both vocabularies") == 3


def test_the_warm_start_is_a_dictionary(shipped):
    """After it, a word of the sender comes out nearest to the same word of the receiver."""
    mas = shipped.with_fresh_outer(seed=0)
    args = argparse.Namespace(num_recursive_rounds=1, seed=0, warm_start_steps=150, scale_match=1)
    untrained = {key: link.state_dict()["proj1.weight"].clone() for key, link in mas.outer.items()}
    warm_start.warm_start(mas, args)
    source, target = mas.agents["planner"], mas.agents["critic"]
    pairs = torch.tensor(warm_start.shared_tokens(source, target))
    with torch.no_grad():
        got = mas.outer["outer_12"](warm_start.as_thoughts(source, pairs[:, 0], 1))
        nearest = warm_start.nearest_tokens(target, got)
        plain = F.cosine_similarity(got[:, None], target.embedding.weight[None], dim=-1).argmax(1)
    assert torch.equal(nearest, plain) and (nearest == pairs[:, 1]).float().mean() > 0.9
    # With one round, nobody hears the solver, so its link stays as it was.
    assert torch.equal(mas.outer["outer_31"].proj1.weight, untrained["outer_31"])


# ---- own texts ----------------------------------------------------------------------------------

def inner(monkeypatch, folder, *flags):
    monkeypatch.setattr(sys, "argv", ["train_inner.py", "--save_dir", str(folder), "--text", "own",
                                      "--num_samples", "6", "--max_steps", "2", "--held_out", "4",
                                      *map(str, flags)])
    train_inner.main()


def test_own_texts_are_the_agents_and_are_written_once(tmp_path, monkeypatch, capsys):
    inner(monkeypatch, tmp_path, "--own_length", 5)
    file = tmp_path / "own_texts.rank0.jsonl"
    lines = [json.loads(line) for line in file.read_text().split("\n")[1:]]
    # 6 rows x 4 rounds, of which 4 are held out. Equal prompts are asked once.
    assert 12 < len(lines) == len({line["key"] for line in lines}) <= 20
    agent = load_mas_system("tiny").agents["planner"]
    rows = tiny.train_rows(6, 42)
    prompt = (f"<bos> <|user|> {rows[5]['question']} <|notes|> {rows[5]['answer'][2]} "
              "<|assistant|>")                          # the last row in round 4
    alone = agent.write(agent.read(*agent.embed([agent.tokenize([prompt])], {})), 5)[0]
    assert len(alone) == 5 and alone in [line["tokens"] for line in lines]

    # A run that was stopped within a line goes on with what is missing, and no more.
    written = []
    right = train_inner.data.read_role_texts
    monkeypatch.setattr(train_inner.data, "read_role_texts", lambda agent, style, role, texts: (
        written.append(len(texts)), right(agent, style, role, texts))[1])
    whole = file.read_text()
    file.write_text(whole[:-7])
    inner(monkeypatch, tmp_path, "--own_length", 5)
    assert written[0] == 1
    again = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
    assert sorted(map(str, again)) == sorted(map(str, lines))
    assert "the agent's own" in capsys.readouterr().out


def test_an_agent_that_writes_nothing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Agent, "write", lambda self, context, *rest: [[2]] * len(context.mask))
    assert tiny.WORDS[2] == "<eos>"
    with pytest.raises(ValueError, match="writes nothing for these prompts, try --text gold"):
        inner(monkeypatch, tmp_path)


# ---- losses -------------------------------------------------------------------------------------

def test_the_loss_is_that_of_the_gold_answer(shipped):
    """Oracle: the whole model over prompt and gold answer, one question at a time."""
    task, mas = get_task("tiny"), shipped
    batch = task.load(3)
    plan = Plan(["single"], [2], 6, 3, Writing(4), measure="loss")
    lines = answer_batch(mas, task, batch, "single", 1, plan)
    agent = mas.agents["solver"]
    for line, example in zip(lines, batch):
        gold = agent.tokenize([example.row["answer"][0]])[0]
        ids = agent.tokenize([f"<bos> <|user|> {example.question} <|notes|> none <|assistant|>"])[0]
        with torch.no_grad():
            logits = agent.model(torch.tensor([ids + gold])).logits[0, len(ids) - 1:-1]
        assert line["nats"] == pytest.approx(F.cross_entropy(logits, torch.tensor(gold)).item(),
                                             abs=1e-4)
        assert line["outputs"] == [example.row["answer"][0]] and line["correct"] == []
    latent, zero = ([line["nats"] for line in answer_batch(mas, task, batch, method, 3, plan)]
                    for method in ("latent", "zero"))
    assert sum(latent) < sum(zero) / 2


def test_the_gold_text_is_boxed_where_the_prompt_asks_for_a_box():
    word = get_task("relay").load(1)[0]
    assert gold_text(get_style("relay").roles[-1], word, 1) == word.gold
    number = Example("x", "1 + 1?", "2", "math", {"answer": "2"})
    assert gold_text(get_style("duo").roles[-1], number, 1) == "\\boxed{2}"
    solved = Example("x", "1 + 1?", "2", "math", {"solution": "1 + 1 = 2, so \\boxed{2}."})
    assert gold_text(get_style("duo").roles[-1], solved, 1) == "1 + 1 = 2, so \\boxed{2}."


def test_evaluate_measures_losses(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [
        "evaluate.py", "--measure", "loss", "--num_samples", "6", "--num_recursive_rounds", "3",
        "--out", str(tmp_path), "--method", "latent", "zero", "shuffle", "single"])
    evaluate.main()
    printed = capsys.readouterr().out
    rows = {row["method"]: row for row in json.loads(
        (tmp_path / "summary.json").read_text())["rows"]}
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    for method, row in rows.items():
        mine = [line["nats"] for line in lines if line["method"] == method]
        assert row["nats"] == pytest.approx(sum(mine) / 6) and "accuracy" not in row
        assert row["ci95"][0] <= row["nats"] <= row["ci95"][1]
    assert rows["latent"]["nats"] < rows["zero"]["nats"]
    assert printed.count("latent minus ") == 3 and "nats" in printed
    assert rows["single"]["latent_minus_this"]["n"] == 6       # beside the deepest latents


# ---- paired differences -------------------------------------------------------------------------

def lines_of(method, right):
    return [{"style": "s", "dataset": "d", "method": method, "rounds": 1, "id": f"q{i}",
             "outputs": ["x"], "correct": [value], "parsed": ["x"], "notes": [""], "retried": 0,
             "decoded_tokens": 1, "latent_steps": 1, "seconds": 1.0, "peak_memory_mb": 1.0}
            for i, value in enumerate(right)]


def test_differences_are_paired_by_question():
    """Two methods with the same accuracy on other questions, and the same two in another order."""
    ours, theirs = [True] * 60 + [False] * 40, [True] * 50 + [False] * 40 + [True] * 10
    pair = report.paired(lines_of("latent", ours), lines_of("text", theirs)[::-1])
    assert (pair["difference"], pair["n"]) == (0.0, 100)
    assert (pair["ours_only"], pair["theirs_only"]) == (10, 10)          # McNemar's counts
    low, high = pair["ci95"]                     # standard error: sqrt(20 / 100) / 10 = .045
    assert -0.11 < low < -0.06 and 0.06 < high < 0.11
    certain = report.paired(lines_of("latent", ours), lines_of("text", ours))
    assert certain["ci95"] == [0.0, 0.0]
    few = report.paired(lines_of("latent", ours), lines_of("text", theirs)[:5])
    assert few["n"] == 5
    assert math.isnan(report.paired(lines_of("latent", ours), [])["difference"])


def test_failed_questions_are_in_no_pair():
    failed = lines_of("text", [False] * 10)
    failed[0].update(outputs=[], correct=[], error="out of memory")
    pair = report.paired(lines_of("latent", [True] * 10), failed)
    assert (pair["n"], pair["ours_only"], pair["difference"]) == (9, 9, 1.0)


# ---- baselines need no links --------------------------------------------------------------------

@pytest.fixture
def bare_style(tmp_path):
    """A style over the tiny base models without any link."""
    folder = tmp_path / "models"
    for role in ("planner", "critic", "solver"):
        (folder / role).mkdir(parents=True)
        for file in (PROJECT / "tiny" / role).iterdir():
            if not file.name.startswith(("adapter", "innerlink")):
                (folder / role / file.name).symlink_to(file)
    path = tmp_path / "bare.py"
    path.write_text(
        "from dataclasses import replace\nfrom styles.tiny import tiny\n"
        f"bare = replace(tiny, name='bare', repo='', roles=tuple(replace(role, repo='', "
        f"model={str(folder)!r} + '/' + role.name) for role in tiny.roles))\n")
    return path


def test_baselines_and_controls_run_without_links(bare_style, tmp_path, monkeypatch, capsys):
    def ask(out, *methods):
        monkeypatch.setattr(sys, "argv", [
            "evaluate.py", "--style", str(bare_style), "--num_samples", "6", "--out",
            str(tmp_path / out), "--num_recursive_rounds", "3", "--max_new_tokens", "40",
            "--latent_length", "6", "--temperature", "0", "--method", *methods])
        evaluate.main()
        return {row["method"]: row["accuracy"] for row in json.loads(
            (tmp_path / out / "summary.json").read_text())["rows"]}

    found = ask("words", "single", "single_loop", "text", "zero", "untrained")
    assert "no inner link, so it gets a new, untrained one" in capsys.readouterr().out
    assert found["text"] == 1.0 and found["untrained"] < 1.0
    for method in ("latent", "shuffle"):
        with pytest.raises(ValueError, match="style bare has no repo with outer links"):
            ask(method, method)


def test_a_styles_own_data_set_brings_its_settings(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--style", "relay"])
    args, _ = evaluate.parse()
    assert (args.dataset, args.max_new_tokens) == ("relay", 16)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--style", "relay", "--dataset", "tiny"])
    assert evaluate.parse()[0].max_new_tokens == 2000


def test_a_relay_is_asked_by_the_command(bare_style, tmp_path, monkeypatch, capsys):
    """The rows' columns reach every prompt, from the first call on. (The words mean nothing to the
    tiny agents, so no answer is right.)"""
    style = tmp_path / "told.py"
    style.write_text(
        f"from dataclasses import replace\nfrom styles import Edge, get_style\n"
        f"bare = get_style({str(bare_style)!r})\n"
        "edges = (Edge('outer_12', 'planner', 'solver'),)\n"
        "told = replace(bare, name='told', edges=edges, roles=(\n"
        "    replace(bare.role('planner'), prompt='{told}'), replace(bare.role('solver'),\n"
        "    first='{question}', prompt='{question} <|notes|> {planner}')))\n")
    monkeypatch.setattr(sys, "argv", [
        "evaluate.py", "--style", str(style), "--dataset", "relay", "--num_samples", "4", "--out",
        str(tmp_path / "out"), "--num_recursive_rounds", "1", "--max_new_tokens", "4",
        "--latent_length", "6", "--temperature", "0", "--method", "single", "text", "untrained"])
    evaluate.main()
    rows = json.loads((tmp_path / "out/summary.json").read_text())["rows"]
    assert [(row["method"], row["n"], row["errors"]) for row in rows] == [
        ("text", 4, 0), ("single", 4, 0), ("untrained", 4, 0)]
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-4], "--show", "1"])
    save_outer({"outer_12": OuterLink(96, 112)}, tmp_path / "links")
    sys.argv += ["--ckpt_override", f"outer={tmp_path / 'links'}", "planner=tiny/planner"]
    evaluate.main()
    assert "planner    thinks" in capsys.readouterr().out


def test_a_role_that_nobody_hears_needs_no_inner_link(bare_style, tmp_path, monkeypatch):
    """The relay's solver: its link would never be used."""
    style = get_style(str(bare_style))
    edges = tuple(edge for edge in style.edges if edge.src != "solver")
    last = dataclasses.replace(style, name="one_way", edges=edges, roles=(
        dataclasses.replace(style.role("planner"), repo="tiny/planner",
                            prompt=style.role("planner").first),
        dataclasses.replace(style.role("critic"), repo="tiny/critic"), style.role("solver")))
    mas = load_mas_system(last, ckpt_override={"outer": save_links(last, tmp_path)})
    assert mas.answer(["start 3 s1 x7 s2 +1"], 1, 6, max_new_tokens=6) == ["s2 +1 2 answer 2 ."]


def save_links(style, tmp_path):
    """Outer links of a style with two edges, from the shipped ones."""
    links = load_mas_system("tiny").outer
    save_outer({edge.key: links[edge.key] for edge in style.edges}, tmp_path / "links", style.name)
    return str(tmp_path / "links")


# ---- gradients by round -------------------------------------------------------------------------

def test_gradients_by_round_are_those_of_the_messages(shipped, tmp_path, monkeypatch, capsys):
    """Oracle: autograd.grad of an equal loss with respect to its messages."""
    args = argparse.Namespace(latents="rollout", latent_length=2, role_loss_weight=0.0,
                              supervise_final_only=1, non_last_loss_weight=0.1, log_gradients=1,
                              gradient_checkpointing=0, mas_task="math", max_length=99)
    mas, rows = shipped.with_fresh_outer(seed=0), tiny.train_rows(3, 0)
    mas.outer.requires_grad_(True)
    outcome, other = (train_outer.outer_loss(mas, rows, 2, args) for _ in range(2))
    wanted = torch.autograd.grad(other.loss, list(other.sent.values()))
    outcome.loss.backward()
    for (key, message), gradient in zip(outcome.sent.items(), wanted):
        assert torch.equal(message.grad, gradient) and gradient.norm() > 0, key
    mas.outer.requires_grad_(False)

    monkeypatch.setattr(sys, "argv", [
        "train_outer.py", "--max_steps", "2", "--log_gradients", "1", "--num_samples", "8",
        "--batch_size", "2", "--eval_samples", "0", "--warm_start_steps", "0", "--log_every", "1",
        "--random_rounds", "0", "--num_recursive_rounds", "2", "--save_dir", str(tmp_path)])
    train_outer.main()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    names = [name for name in log[0] if name.startswith("gradient_")]
    # Round 1: all three edges. Round 2: the solver has the last turn, and sends nothing.
    assert sorted(names) == ["gradient_outer_12_1", "gradient_outer_12_2", "gradient_outer_23_1",
                             "gradient_outer_23_2", "gradient_outer_31_1"]
    assert all(line[name] > 0 for line in log for name in names)
    assert (tmp_path / "gradients.png").stat().st_size > 5000
    assert "gradient of outer_12 by round: 1: " in capsys.readouterr().out


# ---- texts in slots -----------------------------------------------------------------------------

def test_a_text_is_tokenised_with_its_surroundings():
    """Oracle: the whole prompt as one string. A blank and a following `y` are one token here."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("\u0120", "y"), ("y", "z")]
    vocabulary = {**letters, **{a + b: len(letters) + i for i, (a, b) in enumerate(merges)}}
    core = Tokenizer(models.BPE(vocabulary, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template="{{ messages[-1]['content'] }}",
        clean_up_tokenization_spaces=False)
    model = new_model("qwen3", vocabulary={**dict.fromkeys(range(400), 0), "<bos>": 0, "<eos>": 1,
                                           "<pad>": 2})
    agent = Agent(model, tokenizer)
    [[tokens]] = agent.prompt("", "q{question}: {planner}!", {"question": ["?"],
                                                              "planner": ["yz y"]})
    assert tokens == tokenizer("q?: yz y!")["input_ids"] != (
        tokenizer("q?: ")["input_ids"] + tokenizer("yz y!")["input_ids"])
    # What was read before the slot is used again only as far as its tokens stayed the same.
    role = dataclasses.replace(get_style("tiny").role("critic"), prompt="q{question}: {planner}!")
    style = dataclasses.replace(get_style("tiny"), roles=(
        get_style("tiny").role("planner"), role, get_style("tiny").role("solver")))
    mas = argparse.Namespace(agents={"critic": agent}, agent=lambda name: agent)
    prompts = Prompts(mas, style, ["abcdefgh", "ab"], ["math", "math"], words=True)
    said = {"planner": ["yz y", "z"]}
    with torch.no_grad():
        found = prompts.turn(role, 1, said, reuse=True).read().hidden
        for b, text in enumerate(("qabcdefgh: yz y!", "qab: z!")):
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            plain = agent.body(ids).last_hidden_state[0, -1]
            torch.testing.assert_close(found[b, 0], plain, atol=1e-4, rtol=1e-4)

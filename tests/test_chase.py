"""The chase of tasks/chase.py, roles without a chat, and base models in a two-role style."""
import json
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import (PROJECT, VOCABULARY, byte_caller, log_of, new_model, read_plain, refuses,
                     word_tokenizer, write_rows)
from tokenizers.processors import TemplateProcessing

import check_model
import docs.chase
import evaluate
import reference
import train_inner
import train_outer
from agents import Agent
from evaluation.statistics import wilson
from recurse import load_mas_system
from styles import get_style
from tasks import chase, get_task

TASK, CHASE = get_task("chase"), get_style("chase")
SAID = "A list of arrows: From the list: ->".split()
WORDS = {word: i for i, word in enumerate(dict.fromkeys([
    *VOCABULARY, *SAID, *chase.words()["train"], *chase.words()["test"]]))}


# ---- the task -----------------------------------------------------------------------------------

def test_a_chain_is_followed_through_both_tables():
    """Oracle: from the end back to the start, by the arrows as they are written."""
    rows = [*(one.row for split in ("test", "train") for one in TASK.load(split=split)),
            *TASK.train_rows(200, seed=1)]
    places = Counter()
    for row in rows:
        arrows = {owner: re.findall(r"^(\w+) -> (\w+)$", row[f"{owner}_table"], re.MULTILINE)
                  for owner in ("planner", "solver")}
        words = [word for arrow in sum(arrows.values(), []) for word in arrow]
        assert [len(own) for own in arrows.values()] == [4, 4] and len(set(words)) == 11
        word, back = row["chain"][-1], []
        for owner in ("solver", "planner") * 3:
            back.append(word)
            (word, place), = [(start, place) for place, (start, end) in enumerate(arrows[owner])
                              if end == word]
            places[len(back), place] += 1
        assert word == row["question"]
        assert [f" {word}" for word in back] == [*sum(zip(row["answer"][::-1],
                                                          row["plan"][::-1]), ())]
    # Every hop's arrow stands at every place of its table: a place tells nothing.
    assert len(places) == 24 and min(places.values()) > len(rows) / 4 * .7


def test_words_of_the_test_are_in_no_training_row():
    words = chase.WORDS.read_text().split()
    test, train = ({word for row in rows for owner in ("planner", "solver")
                    for word in re.findall(r"\w+", row[f"{owner}_table"])} for rows in (
        [one.row for one in TASK.load()], TASK.train_rows(2000, seed=0)))
    assert len(words) == len(set(words)) == len(test | train) and not test & train
    assert test == set(TASK.leave_out) and len(test) == 100 == len(TASK.load())
    assert TASK.load(3) == TASK.load(split="test")[:3] != TASK.load(3, split="train")
    with refuses("'dev'", "test", "train"):
        TASK.load(split="dev")


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_the_rounds_decide_which_word_is_right(rounds):
    example = TASK.with_rounds(TASK.load(1)[0], rounds)
    for hops, word in enumerate(example.row["chain"]):
        for text in (f" {word}", f"{word.title()}.", f"{word} -> table"):
            score = TASK.score(example, text)
            assert (score.correct, score.parsed, score.note) == (hops == 2 * rounds, word,
                                                                 f"word {hops}")
    assert [TASK.score(example, text).parsed for text in ("", " \n", "elsewhere")] == [
        None, None, "elsewhere"] and TASK.score(example, "elsewhere").note == ""


def test_what_does_not_fit_the_chase_is_named():
    tables = ({"a": "b", "c": "d", "e": "f"}, {"b": "c", "d": "e", "f": "g"})
    assert chase.row_of("a", *tables)["chain"] == list("abcdefg")
    for start, changed, named in (("x", tables, ("hop 1", "planner", "'x'")),
                                  ("a", (tables[0], {"b": "c"}), ("hop 4", "solver", "'d'"))):
        with refuses(*named):
            chase.row_of(start, *changed)
    agent = byte_caller("qwen3", 0)                           # a letter is a token
    longest = max(map(len, TASK.leave_out)) + 1
    TASK.check_m(agent, longest, rounds=3)
    with refuses("--latent_length", longest, longest - 1):
        TASK.check_m(agent, longest - 1)
    with refuses("--num_recursive_rounds", "4 rounds"):
        TASK.check_m(agent, longest, rounds=4)


# ---- a role without a chat ----------------------------------------------------------------------

@pytest.mark.parametrize("begins", [True, False])
def test_without_a_chat_the_prompt_is_the_whole_text(begins):
    """Oracle: the tokenizer with its own beginning, as the library would read the text."""
    tokenizer = word_tokenizer(None, WORDS)
    if begins:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", WORDS["<bos>"])])
    agent = Agent(new_model("gemma3", 0, WORDS), tokenizer)
    [whole], = agent.tokenize_prompts("", "From {a}\n->", {"a": ["the list:"]})
    assert whole == tokenizer("From the list:\n->").input_ids and len(whole) == 4 + begins
    [parts] = agent.tokenize_prompts("", "From {a} {b} ->", {"a": ["list:"]}, slots=("b",))
    assert parts == [tokenizer("From list:").input_ids, "b", [WORDS["->"]]]


def test_without_a_chat_a_text_ends_with_its_line():
    agent = byte_caller("llama", 0)
    [wanted] = agent.tokenize(["one\ntwo"])

    def spell(logits, written, u):
        return torch.tensor([wanted[len(one)] for one in written])
    for chat, length in ((True, 7), (False, 4)):
        agent.chat = chat
        assert agent.write(read_plain(agent, [[65]]), 7, spell) == [wanted[:length]]


# ---- base models, by the commands ---------------------------------------------------------------

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """{role: folder} of two small base models of two families."""
    folders = {}
    for role, family in (("planner", "llama"), ("solver", "qwen3")):
        folders[role] = tmp_path_factory.mktemp("base") / role
        for part in (new_model(family, 3, WORDS), word_tokenizer(None, WORDS)):
            part.save_pretrained(folders[role])
    return folders


def test_base_models_are_trained_and_asked(base, tmp_path, run):
    """The commands of docs/real.md, in small. Oracle of the answers: reference.py."""
    given = []
    for i, (role, folder) in enumerate(base.items(), start=1):
        code, said, _ = run(train_inner, "--style", "chase", "--mas_role", role, "--num_samples",
                            20, "--max_steps", 3, "--held_out", 8, "--model_name_or_path", folder,
                            "--save_dir", tmp_path / role)
        assert code == 0 and "60 texts" not in said and "52 texts, 52 tokens" in said
        given += [f"--agent{i}_model_name_or_path", folder, f"--agent{i}_inner_aligner_path",
                  tmp_path / role]
    code, said, _ = run(train_outer, "--style", "chase", *given, "--num_samples", 20,
                        "--max_steps", 6, "--warm_start_steps", 2, "--log_every", 1, "--save_dir",
                        tmp_path / "outer")
    assert code == 0 and {line["rounds"] for line in log_of(tmp_path / "outer")} == {1, 2}
    ask = ["--style", "chase", "--ckpt_override", f"outer={tmp_path / 'outer'}", "--num_samples", 5]
    code, _, _ = run(evaluate, *ask, "--num_recursive_rounds", 1, 2, 3, "--out", tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out/results.jsonl").open()]
    assert code == 0 and len(lines) == 5 * (6 * 3 + 1) and not any("error" in one for one in lines)
    mas = load_mas_system(CHASE, ckpt_override={"outer": tmp_path / "outer"})
    rows = {one.id: one.row for one in TASK.load(5)}

    def answer(row, method, rounds):
        """The first token of the last turn, and in words each word from hop to hop."""
        def prompt(role, heard):
            return [f"A list of arrows: {row[f'{role.name}_table']} From the list:",
                    *(heard.values() or [row["question"]]), "->"]

        if method == "latent":
            agent, embeds, _ = reference.recurse(mas, prompt, rounds, 1)
            return agent.tokenizer.decode(reference.write(agent, embeds, 1))
        heard = {}
        for role in mas.style.roles * rounds:
            agent = mas.agents[role.name]
            embeds = reference.embed(agent, prompt(role, heard))
            heard = {role.name: agent.tokenizer.decode(reference.write(agent, embeds, 1))}
        return heard["solver"]

    with torch.no_grad():
        for line in lines:
            row = rows[line["id"]]
            assert line["gold"] == row["chain"][2 * line["rounds"]]
            if line["method"] in ("latent", "text"):
                assert line["outputs"] == [answer(row, line["method"], line["rounds"])]
    code, _, errors = run(evaluate, *ask, "--num_recursive_rounds", 4, "--out", tmp_path / "out")
    assert code == 2 and "--num_recursive_rounds" in errors[0]


def test_what_a_base_model_cannot_do_is_named(base, tmp_path, run, capsys):
    chat = replace(CHASE, name="chat", roles=tuple(
        replace(role, model=str(base[role.name]), chat=True) for role in CHASE.roles))
    with refuses(base["planner"], "chat template", "role planner", "chat=False"):
        load_mas_system(chat, need_links=False)
    code, said, _ = run(check_model, base["planner"])
    assert code == 0 and "chat=False" in said and "it can be an agent" in said
    rows = [{name: cell for name, cell in row.items() if name != "solver_table"}
            for row in TASK.train_rows(9, 0)]
    flags = ["--style", "chase", "--mas_role", "solver", "--model_name_or_path", base["solver"],
             "--dataset_name", write_rows(tmp_path / "rows.jsonl", rows), "--save_dir", tmp_path]
    code, _, errors = run(train_inner, *flags)
    assert code == 2 and "solver_table" in errors[0]
    write_rows(tmp_path / "rows.jsonl", [{**row, "answer": []} for row in rows])
    code, _, errors = run(train_inner, *flags, "--text", "gold")
    assert code == 2 and "answer" in errors[0]


# ---- the table ----------------------------------------------------------------------------------

def test_the_table_counts_the_words_by_hops(tmp_path, run):
    notes = {("latent", 1): ["word 2"] * 3 + [""], ("latent", 2): ["word 4", "word 2", "word 0", ""],
             ("single", 1): ["word 6"] * 4}
    write_rows(tmp_path / "results.jsonl", [
        {"dataset": "chase", "method": method, "rounds": rounds, "notes": [note]}
        for (method, rounds), found in notes.items() for note in found])
    code, said, _ = run(docs.chase, tmp_path, "--picture", tmp_path / "chase.png")
    low, high = wilson(3, 4)
    assert code == 0 and f"| latent | 1 | 4 | **0.75** ({low:.2f} to {high:.2f}) | 0.00 (" in said
    assert [re.findall(r"(\d\.\d\d)\** \(", line) for line in said.splitlines() if line.startswith(("| latent", "| single"))] == [
        ["0.75", "0.00", "0.00"], ["0.25", "0.25", "0.00"], ["0.00", "0.00", "1.00"]]
    assert (tmp_path / "chase.png").stat().st_size > 5000
    code, _, errors = run(docs.chase, PROJECT / "docs")
    assert code == 2 and "--dataset chase" in errors[0]

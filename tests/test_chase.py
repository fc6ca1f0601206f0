"""The chase of tasks/chase.py, roles without a chat, and base models in a two-role style."""
import re
from collections import Counter

import pytest
import torch
from helpers import (CHAT_TEMPLATE, VOCABULARY, byte_caller, log_of, new_model, read_plain, refuses,
                     untimed, word_tokenizer, write_rows)
from tokenizers.processors import TemplateProcessing

import check_model
import docs.chase
import evaluate
import reference
import train_inner
import train_outer
from agents import Agent
from recurse import load_mas_system
from tasks import chase, get_task

TASK = get_task("chase")
WORDS = {word: i for i, word in enumerate(dict.fromkeys([
    *VOCABULARY, *"A list of arrows: From the list: ->".split(), *chase.words()["train"],
    *chase.words()["test"]]))}


def test_a_chain_is_followed_through_both_tables():
    """Oracle: from the end back to the start, by the arrows as they are written."""
    places, rows = Counter(), [*(one.row for one in TASK.load()), *TASK.train_rows(300, seed=1)]
    for row in rows:
        tables = [re.findall(r"^(\w+) -> (\w+)$", row[f"{owner}_table"], re.MULTILINE)
                  for owner in ("solver", "planner")]
        assert list(map(len, tables)) == [4, 4]
        assert len({word for table in tables for arrow in table for word in arrow}) == 11
        word, back = row["chain"][-1], []
        for table in tables * 3:
            back.append(f" {word}")
            (place, word), = [(i, start) for i, (start, end) in enumerate(table) if end == word]
            places[len(back), place] += 1
        assert word == row["question"]
        assert (back[::2], back[1::2]) == (row["answer"][::-1], row["plan"][::-1])
    # The arrow of each hop stands at each place of its table: a place tells nothing.
    assert len(places) == 24 and min(places.values()) > len(rows) / 4 * .7


def test_words_of_the_test_are_in_no_training_row():
    known = chase.WORDS.read_text().split()
    test, train = ({word for row in rows for owner in ("planner", "solver")
                    for word in re.findall(r"\w+", row[f"{owner}_table"])} for rows in (
        [one.row for one in TASK.load()], TASK.train_rows(2000, seed=0)))
    assert len(known) == len(set(known)) == len(test | train) and not test & train
    assert test == set(TASK.leave_out) and len(test) == 100 == len(TASK.load())
    assert {one.question for one in TASK.load(split="train")} < train


def test_the_rounds_decide_which_word_is_right():
    for rounds in (1, 2, 3):
        example = TASK.with_rounds(TASK.load(1)[0], rounds)
        for hops, word in enumerate(example.row["chain"]):
            for text in (f" {word}", f"{word.title()}.", f"{word} -> x"):
                score, right = TASK.score(example, text), hops == 2 * rounds
                assert vars(score) == {"correct": right, "parsed": word, "note": f"word {hops}"}
    assert TASK.score(example, "elsewhere").note == "" and TASK.score(example, " ").parsed is None


def test_what_does_not_fit_the_chase_is_named():
    tables = {"a": "b", "c": "d", "e": "f"}, {"b": "c", "d": "e", "f": "g"}
    assert chase.row_of("a", *tables)["chain"] == list("abcdefg")
    agent, longest = byte_caller("qwen3", 0), max(map(len, TASK.leave_out)) + 1   # a byte, a token
    TASK.check_m(agent, longest, 3)
    for wrong, *named in ((lambda: chase.row_of("x", *tables), "hop 1", "planner", "'x'"),
                          (lambda: chase.row_of("a", tables[0], {"b": "c"}), "solver", "'d'"),
                          (lambda: TASK.check_m(agent, longest - 1), "--latent_length", longest),
                          (lambda: TASK.check_m(agent, longest, 4), "--num_recursive_rounds"),
                          (lambda: TASK.load(split="dev"), "'dev'", "test", "train")):
        with refuses(*named):
            wrong()


@pytest.mark.parametrize("begins", [True, False])
def test_without_a_chat_the_prompt_is_the_whole_text(begins):
    """Oracle: the tokenizer, which puts its own beginning before a text or has none."""
    tokenizer = word_tokenizer(None, WORDS)
    if begins:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", WORDS["<bos>"])])
    agent = Agent(new_model("gemma3", 0, WORDS), tokenizer)
    parts, = agent.tokenize_prompts("", "From {a} {b} ->", {"a": ["list:"]}, slots=("b",))
    assert parts == [tokenizer("From list:").input_ids, "b", [WORDS["->"]]]
    assert len(parts[0]) == 2 + begins


def test_without_a_chat_a_text_ends_with_its_line():
    agent = byte_caller("llama", 0)
    [wanted] = agent.tokenize(["one\ntwo"])
    for agent.chat, length in ((True, 7), (False, 4)):
        assert agent.write(read_plain(agent, [[65]]), 7, lambda logits, written, u: torch.tensor(
            [wanted[len(written[0])]])) == [wanted[:length]]


def save_model(folder, family, template=None):
    """A folder with a small model, by default a base model."""
    for part in (new_model(family, 3, WORDS), word_tokenizer(template, WORDS)):
        part.save_pretrained(folder)
    return folder


@torch.no_grad()
def answer(mas, row, method, rounds):
    """The solver's answer by reference.py: one token, after thoughts or words from hop to hop."""
    def prompt(role, heard):
        return [f"A list of arrows: {row[f'{role.name}_table']} From the list:",
                *(heard.values() or [row["question"]]), "->"]

    def word(agent, embeds):
        return agent.tokenizer.decode(reference.write(agent, embeds, 1))

    heard = {}
    for role in mas.style.roles * rounds if method == "text" else ():
        agent = mas.agents[role.name]
        heard = {role.name: word(agent, reference.embed(agent, prompt(role, heard)))}
    return heard["solver"] if heard else word(*reference.recurse(mas, prompt, rounds, 1)[:2])


def test_roles_without_a_chat_are_trained_and_asked(tmp_path, run):
    """The commands of docs/real.md, in small: a base model, and one that has a template."""
    given, outer, out = [], tmp_path / "outer", tmp_path / "out"
    for role, *model in (("planner", "llama"), ("solver", "qwen3", CHAT_TEMPLATE)):
        folder, inner = save_model(tmp_path / f"{role}_model", *model), tmp_path / role
        code, said, _ = run(train_inner, "--style", "chase", "--mas_role", role, "--max_steps", 3,
                            "--num_samples", 20, "--held_out", 8, "--model_name_or_path", folder,
                            "--save_dir", inner)
        assert code == 0 and "52 texts, 52 tokens" in said          # 20 rows x 3 rounds, 8 held out
        given += [f"--{role}_inner_aligner_path", inner]             # it remembers its model
    assert run(train_outer, "--style", "chase", *given, "--num_samples", 20, "--max_steps", 6,
               "--warm_start_steps", 2, "--log_every", 1, "--save_dir", outer)[0] == 0
    assert {line["rounds"] for line in log_of(outer)} == {1, 2}
    ask = "--style chase --num_samples 5 --ckpt_override".split() + [f"outer={outer}", "--out", out]
    assert run(evaluate, *ask, "--num_recursive_rounds", 1, 2, 3)[0] == 0
    lines = untimed(out / "results.jsonl")
    assert len(lines) == 5 * (6 * 3 + 1) and not any("error" in line for line in lines)
    mas, rows = load_mas_system("chase", ckpt_override={"outer": outer}), TASK.load(5)
    for line in lines:
        row, method, rounds = rows[int(line["id"][6:])].row, line["method"], line["rounds"]
        assert line["gold"] == row["chain"][2 * rounds]
        if method in ("latent", "text"):
            assert line["outputs"] == [answer(mas, row, method, rounds)]
    assert run(evaluate, *ask, "--num_recursive_rounds", 4)[0] == 2


def test_soft_words_take_the_place_of_inner_links(tmp_path, run):
    """The outer links remember them as they remember folders. Oracle: reference.py."""
    given, outer, out = [], tmp_path / "outer", tmp_path / "out"
    inner = {"planner": "soft_words:0.5", "solver": "soft_words"}
    for role, *model in (("planner", "llama"), ("solver", "qwen3", CHAT_TEMPLATE)):
        given += [f"--{role}_model_name_or_path", save_model(tmp_path / role, *model),
                  f"--{role}_inner_aligner_path", inner[role]]
    assert run(train_outer, "--style", "chase", *given, "--num_samples", 8, "--max_steps", 1,
               "--warm_start_steps", 2, "--save_dir", outer)[0] == 0
    ask = "--style chase --num_samples 5 --num_recursive_rounds 2 --method latent".split()
    ask += ["--out", out, "--ckpt_override", f"outer={outer}"]
    assert run(evaluate, *ask)[0] == 0
    mas, rows = load_mas_system("chase", ckpt_override={"outer": outer}), TASK.load(5)
    assert [agent.inner.temperature for agent in mas.agents.values()] == [0.5, 1]
    for line in untimed(out / "results.jsonl"):
        assert line["outputs"] == [answer(mas, rows[int(line["id"][6:])].row, "latent", 2)]
    code, said, _ = run(evaluate, *ask, "planner=soft_words")
    assert code == 0 and "role planner" in said and "soft_words" in said    # another T: it is told


def test_what_a_base_model_cannot_do_is_named(tmp_path, run):
    folder = save_model(tmp_path / "base", "llama")
    code, said, _ = run(check_model, folder)
    assert code == 0 and "chat=False" in said and "it can be an agent" in said
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "x", "planner_table": "x -> y"}] * 9)
    for style, named in (("relay", "chat=False"), ("chase", "solver_table")):
        code, _, errors = run(train_inner, "--style", style, "--mas_role", "solver", "--save_dir",
                              tmp_path, "--dataset_name", rows, "--model_name_or_path", folder)
        assert code == 2 and named in errors[0]


def test_the_table_counts_the_words_by_hops(tmp_path, run):
    write_rows(tmp_path / "results.jsonl", [
        {"dataset": "chase", "method": "latent", "rounds": rounds, "notes": [note]}
        for rounds, found in ((1, ("word 2", "word 2", "word 2", "")),
                              (2, ("word 4", "word 2", "word 0", ""))) for note in found])
    code, said, _ = run(docs.chase, tmp_path, "--out", tmp_path / "chase.png")
    assert "| latent | 1 | 4 | **0.75** (0.30 to 0.95) | 0.00 (" in said         # Wilson's interval
    assert re.findall(r"(\d\.\d\d)\** \(", said)[3:] == ["0.25", "0.25", "0.00"]
    assert code == 0 and (tmp_path / "chase.png").stat().st_size > 5000
    assert "--dataset chase" in run(docs.chase, tmp_path / "none")[2][0]

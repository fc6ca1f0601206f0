"""check_model.py: its figures beside formulas, and pairs of models that can and cannot talk."""
import argparse
import datetime

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import check_model
from agents import Agent
from helpers import CHAT_TEMPLATE, VOCABULARY, Script, new_agent, new_model, word_tokenizer

MANY = {word: i for i, word in enumerate([*VOCABULARY, *(f"w{i}" for i in range(1200))])}


@pytest.mark.parametrize("family, layers", [("qwen3", 2), ("gemma3", 2), ("qwen3_5", 1)])
def test_the_memory_of_a_cache_is_that_of_its_keys_and_values(family, layers):
    growth, fixed = check_model.cache_growth(new_agent(family))     # qwen3_5: 3 of 4 are linear
    assert growth == 2 * layers * 2 * 8 * 4 and (fixed > 0) == (layers == 1)   # 2 heads of width 8


@pytest.mark.parametrize("more, label", [
    ("{{ raise_exception('no') if messages[0].role == 'system' }}", "system text"),
    ("{{ enable_thinking }}", "thinking"), (f"{datetime.date.today():%d %B %Y}", "date")])
def test_what_a_template_does_changes_one_row_and_the_prompt(more, label):
    plain, other = (check_model.prompt_figures(new_agent("qwen3", template=template))
                    for template in (CHAT_TEMPLATE, more + CHAT_TEMPLATE))
    assert {row for row in plain if plain[row] != other[row]} - {"prompt"} == {label}


@pytest.mark.parametrize("moved, verdict", [(0, "can talk"), (7, "cannot talk")])
def test_models_can_talk_if_their_words_stand_alike(moved, verdict, capsys):
    agents = [Agent(new_model("qwen3", 0, MANY), word_tokenizer(vocabulary=vocabulary))
              for vocabulary in (MANY, dict(zip(MANY, reversed(MANY.values()))))]
    agents[1].embedding.weight.copy_(agents[0].embedding.weight.flip(0).roll(moved, 0))
    check_model.talk(*agents, argparse.Namespace(seed=0, scale_match=1, warm_start_steps=100))
    said = capsys.readouterr().out
    assert verdict in said and f"{len(MANY)} words in both" in said and " of 50 new words" in said


def test_both_directions_are_tried_and_a_refused_model_has_a_table(tmp_path):
    pair = Script("check_model.py", "tiny/solver", "tiny/planner", "--warm_start_steps", 1)
    config = AutoConfig.for_model("mamba", vocab_size=61, hidden_size=16, num_hidden_layers=1)
    for part in (AutoModelForCausalLM.from_config(config), word_tokenizer()):
        part.save_pretrained(tmp_path)
    refused = Script("check_model.py", tmp_path)
    assert pair.wait() == 0 and pair.stdout().count(" -> tiny/") == 2 and refused.wait() == 2
    assert "check fork" in refused.stdout() and str(tmp_path) in refused.stderr()

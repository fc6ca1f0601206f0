"""Which of the library's families are right, which are refused, what their templates do, and what
check_model.py says of them.

docs/models.md lists the families. tests/data/families.json has the sizes of small random models:
those of all families, and what a family needs of its own."""
import argparse
import dataclasses
import datetime
import json
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import (CHAT_TEMPLATE, PROJECT, THREE, VOCABULARY, Script, byte_tokenizer, new_agent,
                     new_model, nothing_in_float32, refuses, word_tokenizer)
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM,
                          PreTrainedTokenizerFast)

import cache
import check_model
import checkpoints
import chats
from agents import Agent
from proof import need_proved, prove
from writing import Draft, insert

DATA = json.loads((PROJECT / "tests/data/families.json").read_text())
SIZES = {name: int(size) for size, names in DATA["sizes"].items() for name in names.split()}
BLOCK = re.search(r"```\n(right .*?)```", (PROJECT / "docs/models.md").read_text(), re.S)[1]
LISTED = {kind: names for kind, *names in map(str.split, BLOCK.replace("\n  ", " ").splitlines())}
QUICK = "granite gemma2 gemma3n_text gemma4_text mamba granitemoehybrid llama4_text".split()
TOKENIZER = word_tokenizer(vocabulary={"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3,
                                       **{f"w{i}": i for i in range(4, 99)}})
SAYS = "{% for m in messages %}{{ m['content'] }}END{% endfor %}"


def listed(*kinds):
    return [pytest.param(family, kind, marks=() if family in QUICK else pytest.mark.slow)
            for kind in kinds for family in LISTED[kind]]


def agent_of(family, dtype=torch.float32):
    """An agent whose model is a small random one of a family, with lively weights."""
    plain = CONFIG_MAPPING[family]().to_dict()
    sizes = {name: size for name, size in SIZES.items() if isinstance(plain.get(name), int)}
    if kinds := list(dict.fromkeys(plain.get("layer_types") or ())):
        sizes["layer_types"] = (kinds * 2)[:max(2, len(kinds))]            # one layer of each kind
        sizes["num_hidden_layers"] = len(sizes["layer_types"])
    config = CONFIG_MAPPING[family](**{**sizes, **DATA["own"].get(family, {})})
    config._experts_implementation = "eager"                               # the others lack float64
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.requires_grad_(False).parameters():
        weight.normal_(0, 0.1) if weight.dim() > 1 else weight.add_(0.2 * torch.randn_like(weight))
    return Agent(model.to(dtype), TOKENIZER)


@pytest.mark.parametrize("family, kind", listed("right"))
def test_right_families_are_read_as_the_library_reads_them(family, kind):
    agent_of(family)                                     # the library imports a family when asked
    with nothing_in_float32():
        errors = prove(agent_of(family, torch.float64))
    assert len(errors) == 4 and max(errors.values()) < 1e-9, errors


@pytest.mark.parametrize("family, kind", listed("layers", "logits", "batch", "cache", "fork"))
def test_the_others_are_refused_by_name_and_check(family, kind):
    with refuses(f" {family} ", kind):
        need_proved(agent_of(family))


@torch.no_grad()
@pytest.mark.parametrize("family", ["granite", "gemma2"])
def test_a_loss_is_the_librarys(family):
    """These scale their logits, or cap them. Oracle: the whole model over token ids."""
    agent, ids = agent_of(family), torch.randint(4, 99, (1, 20))
    wanted = F.cross_entropy(agent.model(ids).logits[0, 7:-1], ids[0, 8:], reduction="none")
    context = agent.read(agent.embedding(ids[:, :8]), torch.ones(1, 8, dtype=torch.long))
    [losses] = agent.answer_loss(context, ids[:, 8:].tolist())
    assert (losses - wanted).abs().max() < 1e-5


def test_half_precision_passes_and_no_random_number_is_drawn():
    for dtype in (torch.bfloat16, torch.float16):
        agent, state = agent_of("granite", dtype), torch.get_rng_state()
        need_proved(agent)
        assert torch.equal(torch.get_rng_state(), state)


def test_wrong_ways_of_reading_are_refused(monkeypatch):
    """A head without Granite's factor, a mask left out, a forgotten cache, a fork that is none."""
    agent = agent_of("granite")
    read, forward = agent.read, agent.forward
    for check, owner, name, wrong in (
            ("logits", agent, "logits", agent.model.lm_head),
            ("batch", agent, "forward", lambda x, cache, mask: forward(x, cache, mask.clamp(1))),
            ("cache", agent, "read", lambda x, mask, context=None: read(x, mask)),
            ("fork", cache.Context, "fork", lambda context: context.cache)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, wrong)
            with refuses("granite", check):
                need_proved(agent)
    need_proved(agent)


def test_models_are_proven_at_loading(tmp_path, monkeypatch, capsys):
    """Once, though all roles share one. A PEFT adapter beside it is told, our own file of that name
    is not. A missing shard is named by its path."""
    def load(agent, name):
        agent.model.save_pretrained(tmp_path / name, max_shard_size="10KB")
        agent.tokenizer.save_pretrained(tmp_path / name)
        roles = (dataclasses.replace(role, model=str(tmp_path / name)) for role in THREE.roles)
        checkpoints.load_agents(dataclasses.replace(THREE, roles=tuple(roles)), need_links=False)

    with refuses(tmp_path, "mamba", "cache"):
        load(agent_of("mamba"), "bad")
    proofs = []
    monkeypatch.setattr(checkpoints, "need_proved", proofs.append)
    load(new_agent("llama"), "good")
    assert len(proofs) == 1
    for kind, told in (("adapter_type", False), ("peft_type", True)):
        (tmp_path / "good/adapter_config.json").write_text(json.dumps({kind: "LORA"}))
        load(new_agent("llama"), "good")
        assert ("PEFT" in capsys.readouterr().out) == told
    shard = next((tmp_path / "good").glob("model-00002-*"))
    shard.unlink()
    with refuses(shard, kind=FileNotFoundError):
        checkpoints.load_agent(shard.parent, torch.device("cpu"), torch.float32)


def test_the_day_of_a_template_is_always_the_same():
    """Also where it asks the clock itself, in any format, and begins with a line break."""
    day = "\n{{ strftime_now('%-d %B %Y') }}, {% set day = strftime_now( \"%F\" ) %}{{ day }}, "
    text = chats.render(byte_tokenizer(day + "{{ date_string }}. " + SAYS), "", "Hello.")
    assert text == "\n26 July 2024, 2024-07-26, 26 Jul 2024. Hello.END"


def test_a_turn_ends_where_the_template_ends_it():
    """A base model's configuration names another token. Plain text after a turn is no end."""
    for end, special in ((" <|im_end|>\n", True), ("<|im_end|>", False), (" so", True), ("", True)):
        tokenizer = byte_tokenizer(SAYS.replace("END", end))
        tokenizer.add_tokens([AddedToken("<|im_end|>", special=special)])
        ends = {tokenizer.convert_tokens_to_ids("<|im_end|>")} if special and "im" in end else set()
        agent = Agent(new_model("llama"), tokenizer)
        assert chats.turn_ends(tokenizer) == ends == agent.end_tokens & {len(tokenizer) - 1}
    assert not chats.turn_ends(byte_tokenizer("{{ raise_exception('no assistant') }}"))


@pytest.mark.parametrize("name, part", [
    ("normalizer", normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
     ), ("pre_tokenizer", pre_tokenizers.Metaspace(prepend_scheme="always")),
    ("pre_tokenizer", pre_tokenizers.Whitespace())])
def test_pieces_have_no_blank_of_their_own(name, part):
    """Llama 2's tokenizer.json, that of newer releases, and one that puts no blank. Oracle: the
    text in one piece, with an x in the slot."""
    signs = ["<unk>", "▁", *"abcdx", "▁c", "ab"]
    core = Tokenizer(models.BPE({sign: i for i, sign in enumerate(signs)},
                                [("a", "b"), ("▁", "c")], unk_token="<unk>"))
    setattr(core, name, part)
    agent = Agent(new_model("llama"), PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", chat_template=SAYS.replace("END", "")))
    for text in ("ab {x} cd", "ab {x}cd", "b{x}cab", "c{x} {x}d"):
        [parts] = agent.tokenize_prompts("", text, {"question": ["a"]}, slots=("x",))
        joined = sum(([signs.index("x")] if part == "x" else part for part in parts), [])
        assert joined == agent.tokenize([text.format(x="x")])[0]
    draft = Draft(0, 0, agent.tokenize(["ab"])[0])
    insert(SimpleNamespace(agent=agent), draft, "cd")
    assert draft.tokens == agent.tokenize(["abcd"])[0]


# ---- check_model.py: its figures, and pairs of models that can and cannot talk -------------------

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

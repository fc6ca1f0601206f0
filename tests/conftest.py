"""What the tests share: tiny random agents of real architectures, tokenizers, the plain reference.

The reference is reference.py: one question at a time, without cache, padding or batch. The links'
own oracle is the equations below, with plain tensor operations.
"""
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")      # for matrices this small, threads only wait
PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import (Gemma3Config, Gemma3ForCausalLM,  # noqa: E402
                          Gemma3ForConditionalGeneration, LlamaConfig, LlamaForCausalLM,
                          MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast,
                          Qwen2Config, Qwen2ForCausalLM, Qwen3_5Config, Qwen3_5ForCausalLM,
                          Qwen3_5ForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM)

import reference  # noqa: E402
from agents import Agent  # noqa: E402
from link import InnerLink, OuterLink  # noqa: E402
from recurse import MAS, load_mas_system  # noqa: E402
from styles import ANSWER_FORMAT, Edge, Role, Style  # noqa: E402
from tiny.build import CHAT_TEMPLATE, WORD_ID  # noqa: E402

torch.set_num_threads(1)        # nothing here is large; a second thread only waits for the first
FAMILIES = ("qwen3", "llama", "qwen2", "mistral", "gemma3", "gemma3_conditional", "qwen3_5",
            "qwen3_5_conditional")
WIDTHS = {"qwen3": 32, "llama": 24, "qwen2": 40, "mistral": 16, "gemma3": 24, "qwen3_5": 32}
WINDOW = 6              # of mistral and gemma3, shorter than the prompts, so that it matters
TOLERANCE = {"qwen3_5": 5e-4, "qwen3_5_conditional": 5e-4}       # all others: 1e-4
EXTRA_WORDS = tuple(dict.fromkeys(
    (ANSWER_FORMAT["math"] + " <|system|> plan: check: notes: own: mend it team of three").split()))
VOCABULARY = {word: i for i, word in enumerate((*WORD_ID, *EXTRA_WORDS))}
QUESTIONS = [
    "start 3 s1 x7 s2 flip s3 +2",
    "start 0 s1 +1",
    "start 9 s1 -2 s2 x3 s3 -1 s4 flip s5 +3 s6 x7",
    "start 5 s1 flip s2 +2",
    "start 7 s1 x3 s2 x3 s3 x3 s4 -2",
]


# ---- tokenizers ---------------------------------------------------------------------------------

def word_tokenizer(template=CHAT_TEMPLATE, vocabulary=VOCABULARY):
    """One word, one token, as in tiny/build.py, with a few more words."""
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        unk_token="<unk>", chat_template=template, clean_up_tokenization_spaces=False)


def byte_tokenizer(template):
    """One byte, one token: loses nothing, so that decoded tokens show the whole text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template,
                                   clean_up_tokenization_spaces=False)


def words(text):
    """The token ids of a text, by looking its words up."""
    return [VOCABULARY.get(word, VOCABULARY["<unk>"]) for word in text.split()]


def chat(user):
    """CHAT_TEMPLATE written out for one user turn."""
    return f"<bos> <|user|> {user} <|assistant|>"


# ---- models, links, agents ----------------------------------------------------------------------

def new_model(family, seed=0, vocabulary=VOCABULARY, width=None):
    """A random float32 causal LM of a real architecture, large enough weights to be lively."""
    torch.manual_seed(seed)
    kind = family.removesuffix("_conditional")
    width = width or WIDTHS[kind]
    shared = dict(vocab_size=len(vocabulary), hidden_size=width, intermediate_size=2 * width,
                  num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                  max_position_embeddings=256, initializer_range=0.12, tie_word_embeddings=True,
                  bos_token_id=vocabulary["<bos>"], eos_token_id=vocabulary["<eos>"],
                  pad_token_id=vocabulary["<pad>"])
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(head_dim=8, **shared))
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shared))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shared))
    elif kind == "mistral":
        model = MistralForCausalLM(MistralConfig(sliding_window=WINDOW, **shared))
    elif kind == "gemma3":
        layers = ["sliding_attention", "full_attention"]
        config = Gemma3Config(
            text_config=dict(shared, head_dim=8, sliding_window=WINDOW, layer_types=layers),
            vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                               num_attention_heads=2, image_size=28, patch_size=14),
            mm_tokens_per_image=4)
        model = (Gemma3ForConditionalGeneration(config) if family != kind
                 else Gemma3ForCausalLM(config.text_config))
    else:
        text = dict(shared, head_dim=8, num_hidden_layers=4, initializer_range=0.08,
                    tie_word_embeddings=family == kind,     # else said at the top alone
                    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
                    linear_value_head_dim=8,
                    rope_parameters=dict(rope_type="default", rope_theta=10000.0,
                                         partial_rotary_factor=1.0, mrope_section=[2, 1, 1]))
        vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2,
                      out_hidden_size=width, num_position_embeddings=16)
        config = Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True)
        model = (Qwen3_5ForConditionalGeneration(config) if family != kind
                 else Qwen3_5ForCausalLM(config.text_config))
    return model.eval()


def randomise(link, gain, seed=0):
    """The link with every parameter drawn at random; the last LayerNorm's gain is about `gain`."""
    generator = torch.Generator().manual_seed(seed)
    last = getattr(link, "post_ln", None) or getattr(link, "ln_target", None)
    with torch.no_grad():
        for module in link.modules():
            if isinstance(module, nn.Linear):
                scale = module.in_features ** -0.5
                module.weight.normal_(0, scale, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
            elif isinstance(module, nn.LayerNorm):
                factor = gain if module is last else 1.0
                module.weight.normal_(1, 0.3, generator=generator).mul_(factor)
                module.bias.normal_(0, 0.2, generator=generator).mul_(factor)
    return link


def new_agent(family, seed=0, template=CHAT_TEMPLATE):
    """An agent with random weights and a random inner link."""
    agent = Agent(new_model(family, seed), word_tokenizer(template))
    agent.inner = randomise(InnerLink(agent.width), agent.embedding_rms, seed + 1)
    agent.inner.requires_grad_(False)
    agent.close = TOLERANCE.get(family, 1e-4)
    return agent


THREE = Style(
    name="three",
    roles=(
        Role("planner", "random", "",
             prompt="{question} <|notes|> {solver}\nmend it {answer_format}",
             first="plan: {question} <|notes|> none"),
        Role("critic", "random", "",
             prompt="{question}\nnotes: {planner}\nown: {solver} .\ncheck: it",
             first="{question}\nnotes: {planner}\ncheck: it"),
        Role("solver", "random", "",
             prompt="{question}\nnotes: {critic} and\n{answer_format}\nplan: {planner}",
             first="{question}\n{answer_format}",
             own="{question}\n{answer_format}\nplan: {solver}"),
    ),
    edges=(Edge("outer_12", "planner", "critic"), Edge("outer_23", "critic", "solver"),
           Edge("outer_31", "solver", "planner"), Edge("outer_13", "planner", "solver"),
           Edge("outer_32", "solver", "critic")),
)


def new_mas(style=THREE, families=("qwen3", "llama", "qwen2")):
    """A random system over a style; each role's model is of another family."""
    agents = {role.name: new_agent(family, seed=10 + i)
              for i, (role, family) in enumerate(zip(style.roles, families))}
    outer = nn.ModuleDict()
    for i, edge in enumerate(style.edges):
        source, target = agents[edge.src], agents[edge.dst]
        outer[edge.key] = randomise(OuterLink(source.width, target.width), target.embedding_rms,
                                    seed=100 + i).requires_grad_(False)
    return MAS(style, agents, outer)


@pytest.fixture(params=FAMILIES)
def agent(request):
    """A fresh agent, of each family in turn."""
    return new_agent(request.param)


@pytest.fixture(scope="module")
def mas():
    """The three-family system."""
    return new_mas()


# ---- the oracles --------------------------------------------------------------------------------

def inner_equation(link, h):
    """R_in(h) = LN_post(h + W2 GELU(W1 LN_pre(h))), parameter by parameter."""
    w = dict(link.named_parameters())
    y = F.layer_norm(h, h.shape[-1:], w["pre_ln.weight"], w["pre_ln.bias"])
    y = F.gelu(y @ w["proj1.weight"].T + w["proj1.bias"])
    y = h + y @ w["proj2.weight"].T + w["proj2.bias"]
    return F.layer_norm(y, h.shape[-1:], w["post_ln.weight"], w["post_ln.bias"])


def outer_equation(link, x):
    """R_out(x) = LN_t(W3 x + W2 GELU(W1 LN_s(x))), parameter by parameter."""
    w = dict(link.named_parameters())
    y = F.layer_norm(x, x.shape[-1:], w["ln_source.weight"], w["ln_source.bias"])
    y = F.gelu(y @ w["proj1.weight"].T + w["proj1.bias"])
    y = y @ w["proj2.weight"].T + w["proj2.bias"]
    y = x @ w["residual_proj.weight"].T + w["residual_proj.bias"] + y
    return F.layer_norm(y, y.shape[-1:], w["ln_target.weight"], w["ln_target.bias"])


def plain_states(agent, embeds):
    """Hidden states of one unpadded row of embeddings, (1, T, d), by reference.py."""
    return reference.hidden_states(agent, embeds[0])[None]


def plain_think(agent, embeds, m):
    """m thoughts after one unpadded row of embeddings (1, T, d), by reference.py: (1, m, d)."""
    return reference.think(agent, embeds[0], m)[None]


@torch.no_grad()
def plain_write(agent, embeds, count):
    """Greedy token ids after one unpadded row of embeddings (1, T, d), by reference.py."""
    return reference.write(agent, embeds[0], count)


def embed_words(agent, ids):
    """Embeddings (1, T, d) of token ids."""
    return agent.model.get_input_embeddings()(torch.tensor([ids], dtype=torch.long))


def left_pad(rows):
    """(embeds (B, T, d), mask (B, T)) of rows (1, T_b, d), padded on the left by hand."""
    longest = max(row.shape[1] for row in rows)
    embeds = torch.zeros(len(rows), longest, rows[0].shape[2])
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for b, row in enumerate(rows):
        embeds[b, longest - row.shape[1]:] = row[0]
        mask[b, longest - row.shape[1]:] = 1
    return embeds, mask


def largest_difference(a, b):
    """max |a - b|; also fails where the shapes differ."""
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.fixture(scope="session")
def shipped():
    """The tiny system that comes with the project, loaded as a user would."""
    return load_mas_system("tiny", device="cpu")


def tiny_in_float64():
    """The shipped agents with new outer links, all in float64."""
    return in_float64(load_mas_system("tiny", device="cpu").with_fresh_outer(seed=1))


def in_float64(mas):
    """A system, turned into float64: rollouts amplify rounding."""
    for agent in mas.agents.values():
        agent.model.double()
        agent.inner.double()
        agent.dtype = torch.float64
    mas.outer.double()
    return mas

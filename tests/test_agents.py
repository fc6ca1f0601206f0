"""One agent: cached against uncached, batch against single, padded against unpadded, text in slots
against plain tokens, decoding against the library's generate and the exact distribution.

The agents are in float64, so two ways of computing agree to CLOSE."""
import gc
import shutil
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import (FAMILIES, QUESTIONS, VOCABULARY, byte_tokenizer, chat, embed_words, fast,
                     largest_difference, left_pad, lines_of, new_agent, new_model,
                     nothing_in_float32, plain_think, plain_write, read_plain, refuses,
                     spy_on_reading, widen, word_tokenizer, words)
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from agents import Agent
from cache import NewStateLayer
from checkpoints import load_agent, save_inner
from gpu.recorded import ROOM, Recorded
from support.errors import say_once
from writing import Sampling

M = 5                                                       # latent steps
CLOSE = 1e-9
# 6 to 21 tokens: a sliding window is shorter than some.
PROMPTS = [words(chat(question)) for question in QUESTIONS[:4]]
# Three families stand for all: plain, with sliding windows, with linear attention.
EIGHT = fast("qwen3", "gemma3", "qwen3_5", of=FAMILIES)
needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module", autouse=True)
def exact():
    with nothing_in_float32():
        yield


def exact_agent(family):
    """A fresh agent in float64."""
    agent = widen(new_agent(family))
    agent.family = family
    return agent


@pytest.fixture(params=EIGHT)
def agent(request):
    """A fresh agent in float64, of each family in turn."""
    return exact_agent(request.param)


def random_latents(agent, *lengths):
    """Latents (m, d) of these lengths."""
    generator = torch.Generator().manual_seed(0)
    return [0.2 * torch.randn(m, agent.width, generator=generator, dtype=agent.dtype)
            for m in lengths]


# ---- reading and thinking -----------------------------------------------------------------------

@torch.no_grad()
def test_think_batched_is_uncached_is_single(agent):
    """Cached on a left-padded batch = no cache, one by one = cached, one by one."""
    context = read_plain(agent, PROMPTS)
    batched = agent.think(context, M)
    assert torch.equal(agent.think(context, 1), context.hidden)
    for b, ids in enumerate(PROMPTS):
        plain = plain_think(agent, embed_words(agent, ids), M)
        assert largest_difference(batched[b:b + 1], plain) < CLOSE
        assert largest_difference(agent.think(read_plain(agent, [ids]), M), plain) < CLOSE


# ---- prompts with a shared prefix ---------------------------------------------------------------

SLOTTED = "{question} <|notes|> {critic} and"
TEXTS = ["s1 x7 1", "none", "s4 flip 7 s5 +3 0 .", "to to"]


def tokenized(agent, user, slots=("critic",), questions=QUESTIONS[:4], **texts):
    """Prompts as parts: latents of `slots` are heard, and the texts of others."""
    values = {"question": questions, "answer_format": ["end"] * len(questions), **texts}
    return agent.tokenize_prompts("", user, values, slots)


def prefix_of(agent, prompts):
    """What stands before the first slot, read: (token lists, Context)."""
    begun = [parts[0] for parts in prompts]
    with torch.no_grad():
        return begun, agent.read(*agent.embed([[tokens] for tokens in begun], {}))


def typed(agent, question, latents):
    """The prompt SLOTTED with latents (m, d) in its slot, typed by hand: (1, T, d)."""
    return torch.cat([embed_words(agent, words(f"<bos> <|user|> {question} <|notes|>")),
                      latents[None], embed_words(agent, words("and <|assistant|>"))], 1)


def test_latents_after_a_prefix(agent, monkeypatch):
    """Latents of one length, and of a length for each question: as one by one, unpadded and
    uncached. Only what follows the prefix is read. But after padding in the middle, a sliding
    window and a recurrent state would go wrong: then these models read the whole prompt."""
    prompts = tokenized(agent, SLOTTED)
    prefix = prefix_of(agent, prompts)
    for lengths in ((3, 3, 3, 3), (3, 1, 6, 2)):
        heard, shapes = random_latents(agent, *lengths), spy_on_reading(agent, monkeypatch)
        context = agent.read_prompts(prompts, {"critic": heard}, prefix)
        anew = len(set(lengths)) > 1 and agent.family not in ("qwen3", "llama", "qwen2")
        longest = max(len(begun) * anew + m + 2 for begun, m in zip(prefix[0], lengths))
        assert shapes == [(4, longest)]
        with torch.no_grad():
            thoughts = agent.think(context, M)
            for b, (question, latents) in enumerate(zip(QUESTIONS, heard)):
                plain = plain_think(agent, typed(agent, question, latents), M)
                assert largest_difference(thoughts[b:b + 1], plain) < CLOSE


@torch.no_grad()
@pytest.mark.parametrize("user, texts", [
    (SLOTTED, TEXTS), (SLOTTED, ["s1 x7 1"] * 4), (SLOTTED, ["s1", "", "s2 s3", ""]),
    ("{question} <|notes|> none", None), ("{question} start <|notes|> none and to", None),
    ("plan: {question} <|notes|>", None), ("{question}", None)])
def test_texts_after_a_prefix(agent, user, texts):
    """Texts of one length, of several, and empty ones. Prompts share all of the prefix, a part, or
    nothing. Or the prefix is the prompt, or longer. Oracle: all tokens read at once."""
    prompts = tokenized(agent, user, (), **({"critic": texts} if texts else {}))
    if texts:
        assert prompts == [[words(chat(f"{question} <|notes|> {text} and"))]
                           for question, text in zip(QUESTIONS, texts)]
    whole = agent.think(read_plain(agent, [tokens for [tokens] in prompts]), M)
    for prefix in (prefix_of(agent, tokenized(agent, SLOTTED)), prefix_of(agent, prompts),
                   prefix_of(agent, [[tokens + [3]] for [tokens] in prompts])):
        thoughts = agent.think(agent.read_prompts(prompts, {}, prefix), M)
        assert largest_difference(thoughts, whole) < CLOSE


TARGETS = [words("s1 x7 1 ."), words("none"), words("s4 flip 7 s5 +3 0 ."), words("to to")]


def test_gradients_are_the_plain_ones(agent):
    """Of thoughts and of an answer's loss, by latents in a slot and by the inner link. A padded
    batch with a cache, also after a prefix that was read without gradient: as uncached, alone."""
    agent.inner.requires_grad_(True)
    prompts, latents = tokenized(agent, SLOTTED), random_latents(agent, 3, 3, 3, 3)
    inputs = [*(one.requires_grad_() for one in latents), *agent.inner.parameters()]
    weights, plain = torch.randn(4, M, agent.width, dtype=agent.dtype), 0
    for question, heard, weight, target in zip(QUESTIONS, latents, weights, TARGETS):
        prompt = typed(agent, question, heard)
        embeds = torch.cat([prompt, embed_words(agent, target)], 1)
        logits = agent.model(inputs_embeds=embeds).logits[0, prompt.shape[1] - 1:-1]
        plain = plain + (plain_think(agent, prompt, M) * weight).sum() + F.cross_entropy(
            logits, torch.tensor(target), reduction="sum")
    wanted = torch.autograd.grad(plain, inputs)
    for prefix in (None, prefix_of(agent, prompts)):
        context = agent.read_prompts(prompts, {"critic": latents}, prefix)
        loss = torch.cat(agent.answer_loss(context, TARGETS)).sum()
        got = torch.autograd.grad((agent.think(context, M) * weights).sum() + loss, inputs)
        for a, b in zip(got, wanted):
            assert b.abs().max() > 0
            assert largest_difference(a, b) < CLOSE * max(1.0, b.abs().max().item())


def test_a_context_is_never_changed(agent):
    """Going on from it twice, in every way there is, gives the same twice."""
    prompts = tokenized(agent, SLOTTED)
    prefix = prefix_of(agent, prompts)
    latents = torch.ones(4, 3, agent.width)
    contexts = (agent.read_prompts(prompts, {"critic": latents}, prefix), prefix[1])
    before = [tuple(tensor.clone() for tensor in held(one)) for one in contexts]
    lengths = [one.cache.get_seq_length() for one in contexts]
    agent.end_tokens = {VOCABULARY[str(digit)] for digit in range(10)}   # some texts end early

    def go_on(context):
        targets = [words("s1 x7"), words("none"), words("s2 +1 0 ."), words("to")]
        more = torch.ones(4, 2, agent.width, dtype=agent.dtype)
        read_on = agent.read(more, torch.ones(4, 2, dtype=torch.long), context)
        return [agent.think(context, M), agent.follow(context, targets), read_on.hidden,
                torch.cat(agent.answer_loss(context, targets)), torch.tensor(
                    [token for ids in agent.write(context, 6) for token in ids]),
                agent.read_prompts(prompts, {"critic": 2 * latents}, prefix).hidden]

    with torch.no_grad():
        first, second = go_on(contexts[0]), go_on(contexts[0])
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    for one, tensors, length in zip(contexts, before, lengths):
        assert all(torch.equal(a, b) for a, b in zip(held(one), tensors))
        assert one.cache.get_seq_length() == length == one.mask.shape[1]


def held(context):
    """The tensors of a Context."""
    tensors = [context.mask, context.hidden]
    for layer in context.cache.layers:
        tensors += ([layer.conv_states[0], layer.recurrent_states[0]]
                    if isinstance(layer, NewStateLayer) else [layer.keys, layer.values])
    return tensors


@torch.no_grad()
def test_picked_contexts_are_those_prompts_read(agent):
    """Picked out of order and repeated, all, and picked twice. Oracles: slicing for what is held;
    each prompt alone for what follows. The original says what it said before."""
    context = read_plain(agent, PROMPTS)
    before, said = [tensor.clone() for tensor in held(context)], agent.write(context, 5)
    plain = torch.cat([plain_think(agent, embed_words(agent, ids), M) for ids in PROMPTS])
    for chosen in ([2], [1, 1, 1], [0, 1, 2, 3], [0, 1, 2, 3, 3, 2, 0]):
        picked = context.pick(chosen)
        assert all(torch.equal(a, b[chosen]) for a, b in zip(held(picked), before))
        assert largest_difference(agent.think(picked, M), plain[chosen]) < CLOSE
        assert agent.write(picked, 5) == [said[b] for b in chosen]
    more = torch.ones(4, 2, agent.width, dtype=agent.dtype)
    longer = agent.read(more, torch.ones(4, 2, dtype=torch.long), context)
    twice, once = longer.pick([3, 1, 1]).pick([2, 0]), longer.pick([1, 3])
    assert all(torch.equal(a, b) for a, b in zip(held(twice), held(once)))
    assert all(torch.equal(a, b) for a, b in zip(held(context), before))
    assert agent.write(context, 5) == said


# ---- single steps in fixed buffers --------------------------------------------------------------

def fixed_think(agent, context, m, buffers=None):
    """m thoughts by steps in fixed buffers, without a graph, and the buffers."""
    buffers = buffers or Recorded(agent.forward, context, m, graph=False)
    buffers.load(context)
    thoughts = [context.hidden]
    for _ in range(m - 1):
        thoughts.append(buffers.step(agent.inner(thoughts[-1])))
    return torch.cat(thoughts, 1), buffers


@torch.no_grad()
def test_steps_in_buffers_are_uncached_and_serve_again(agent):
    """Padded batches of other lengths go through the same buffers, one after the other. In between,
    a prompt goes to NaN there: it does not spoil the next one."""
    buffers = None
    for prompts in (PROMPTS[:2], [ids[:5] for ids in PROMPTS[2:]], PROMPTS[:2]):
        context = read_plain(agent, prompts)
        assert buffers is None or buffers.fits(context, M)
        thoughts, buffers = fixed_think(agent, context, M, buffers)
        plain = [plain_think(agent, embed_words(agent, ids), M) for ids in prompts]
        assert largest_difference(thoughts, torch.cat(plain)) < CLOSE
        embeds, mask = left_pad([embed_words(agent, ids) for ids in prompts])
        spoilt = agent.read(embeds * float("nan"), mask)
        assert fixed_think(agent, spoilt, 20, buffers)[0].isnan().all()
    assert not buffers.fits(read_plain(agent, PROMPTS[:1]), M)               # fewer questions
    assert not buffers.fits(context, ROOM)                                   # too little room
    assert buffers.room == ROOM - context.mask.shape[1]


@torch.no_grad()
def test_buffers_are_outgrown(agent):
    """Full buffers go on in larger ones, for some questions. Oracle: growing steps (see above)."""
    context = read_plain(agent, PROMPTS)
    thoughts, buffers = fixed_think(agent, context, M)
    assert not buffers.fits(buffers.context(), 1), "a context must not be loaded over itself"
    more, _ = fixed_think(agent, buffers.context().pick([2, 0]), 3)
    together = torch.cat([thoughts[[2, 0]], more[:, 1:]], 1)
    assert largest_difference(together, agent.think(context, M + 2)[[2, 0]]) < CLOSE


def on_the_gpu(family):
    """The same agent on a GPU and on the CPU."""
    there, here = exact_agent(family), exact_agent(family)
    return Agent(there.model.cuda(), there.tokenizer, there.inner.cuda()), here


@needs_a_gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cuda_graph_is_the_step(family):
    agent, here = on_the_gpu(family)
    embeds, mask = left_pad([embed_words(here, ids) for ids in PROMPTS])
    for mode in (torch.inference_mode, torch.no_grad, torch.no_grad):
        with mode():
            context, plain = agent.read(embeds.cuda(), mask.cuda()), here.read(embeds, mask)
            thoughts = agent.think(context, M).cpu()
            assert largest_difference(thoughts, here.think(plain, M)) < CLOSE
            assert agent.write(context, 8) == here.write(plain, 8)
    assert agent.recorder.recorded.graph is not None


@needs_a_gpu
def test_old_buffers_are_freed_before_new_ones_are_made():
    agent, here = on_the_gpu("qwen3")
    embeds, mask = left_pad([embed_words(here, [3] * 9)] * 4)
    with torch.no_grad():
        agent.think(agent.read(embeds.cuda(), mask.cuda()), M)
        old = weakref.ref(agent.recorder.recorded)
        agent.think(agent.read(embeds[:1].cuda(), mask[:1].cuda()), M)
        gc.collect()
    assert old() is None


# ---- prompts as tokens --------------------------------------------------------------------------

TEMPLATES = {one["name"]: one["template"] for one in lines_of("chat_templates.jsonl")}
ODD = lines_of("odd_texts.jsonl")


def byte_agent(template="plain", thinking=False):
    return Agent(new_model("llama"), byte_tokenizer(TEMPLATES[template]), thinking=thinking)


@pytest.mark.parametrize("case", lines_of("chats.jsonl"), ids=lambda case: case["why"])
def test_the_chat_around_a_question(case):
    """The question is `hi`. Oracle: the tokenizer over each part of the chat, typed. `n: E` and
    `la<` are one token each, so a text is split together with the words around it."""
    agent = byte_agent(case.get("template", "plain"), case.get("thinking", False))
    agent.tokenizer.add_tokens(["n: E", "la<"])
    assert len(agent.tokenizer("plan: Ella<")["input_ids"]) == 6
    values = {name: [text] for name, text in {"question": "hi", **case.get("texts", {})}.items()}
    slots = case.get("slots", [])
    [parts] = agent.tokenize_prompts(case.get("system", ""), case["user"], values, slots)
    assert parts == [part if part in slots else agent.tokenizer(part)["input_ids"]
                     for part in case["parts"]]


@pytest.mark.parametrize("template", ["plain", "raises", "ignores"])
def test_questions_and_texts_are_never_spliced(template):
    """Oracle: the chat written out by hand; every odd string goes through as plain text."""
    agent = byte_agent(template)
    user = "Q: {question}\nheard {critic}, {planner}; keep {other} \\boxed{}.\n{answer_format}!"
    values = {"question": ODD, "critic": ODD[::-1], "answer_format": ["\\boxed{x}."] * len(ODD)}
    texts = ODD[2:] + ODD[:2]
    whole = agent.tokenize_prompts("Be {brief}.", user, {**values, "planner": texts})
    cut = agent.tokenize_prompts("Be {brief}.", user, values, ("planner",))      # latents of his
    head = "<system>Be {brief}.<user>" if template == "plain" else "<user>Be {brief}.\n\n"
    for b, question in enumerate(ODD):
        before = f"{head}Q: {question}\nheard {values['critic'][b]}, "
        after = "; keep {other} \\boxed{}.\n\\boxed{x}.!<assistant>"
        for parts, wanted in ((whole[b], [before + texts[b] + after]),
                              (cut[b], [before, "planner", after])):
            assert parts == [one if one == "planner" else agent.tokenizer(one)["input_ids"]
                             for one in wanted]
            assert agent.tokenizer.decode(parts[0]) == wanted[0]


def test_a_template_that_drops_the_users_text():
    """A template that wants a list of parts gets a string, and writes none of it."""
    with refuses("template"):
        tokenized(byte_agent("parts"), SLOTTED)


def test_special_tokens_are_not_added():
    """A tokenizer that puts <bos> before every text must not do so before every piece."""
    agent = new_agent("llama")
    agent.tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", VOCABULARY["<bos>"])])
    assert agent.tokenizer("none")["input_ids"] == words("<bos> none")
    prompts = tokenized(agent, SLOTTED, (), critic=TEXTS)
    assert prompts[0] == [words(chat(f"{QUESTIONS[0]} <|notes|> {TEXTS[0]} and"))]
    before, _, after = tokenized(agent, SLOTTED)[0]
    assert before + after == words(chat(f"{QUESTIONS[0]} <|notes|> and"))


def test_the_tiny_tokenizer(shipped, capsys):
    """A text reads back as the tokens that an agent wrote. A text's unknown words are named."""
    agent, text = shipped.agents["critic"], "s1 x7 1 s2 flip 8 because 3 to 1 ."
    [ids] = agent.tokenize([text])
    assert len(ids) == 11 and agent.tokenizer.decode(ids, skip_special_tokens=True) == text
    say_once.cache_clear()
    for text, named in (("s1 <unk>", ""), ("what is flip ?", "words what, is, ?"),
                        ("this ?", "words this, ?"), ("this ?", "")):
        agent.tokenize(["s1 x7", text])
        said = capsys.readouterr().out
        assert said.count("<unk>") == said.count("\n") == bool(named) and named in said


def test_a_prompt_beyond_the_models_positions_is_told_once(capsys):
    agent = exact_agent("qwen3")
    agent.positions = 20
    for length in (20, 21, 30):
        agent.read(embed_words(agent, [3] * length), torch.ones(1, length, dtype=torch.long))
        assert ("20" in capsys.readouterr().out) == (length == 21)


# ---- writing ------------------------------------------------------------------------------------

def generate(agent, ids, count):
    """Oracle: the library's greedy decoding of one unpadded prompt; new tokens only."""
    out = agent.model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(),
                               max_new_tokens=count, do_sample=False,
                               eos_token_id=sorted(agent.end_tokens))
    return out[0, len(ids):].tolist()


def test_write_greedy_is_generate(agent):
    """A padded batch = the library = without any cache, one by one."""
    said = agent.write(read_plain(agent, PROMPTS), 8)
    assert said == [generate(agent, ids, 8) for ids in PROMPTS]
    assert said == [plain_write(agent, embed_words(agent, ids), 8) for ids in PROMPTS]
    assert len({tuple(ids) for ids in said}) > 1


def test_texts_that_end_early_leave(agent, monkeypatch):
    """Each end token is taken out of the middle of one text. The others go on as before. More than
    half of the questions that take a step have a text that still goes on."""
    context, left = read_plain(agent, PROMPTS), 0
    whole = agent.write(context, 10)
    for ends in ({whole[0][1]}, {whole[1][4]}, {whole[2][2], whole[3][5]}, {whole[3][7]}):
        agent.end_tokens = ends
        wanted = [next((text[:n] for n in range(1, 11) if text[n - 1] in ends), text)
                  for text in whole]
        shapes = spy_on_reading(agent, monkeypatch)
        assert agent.write(context, 10) == wanted
        assert len(shapes) == max(map(len, wanted)) - 1
        for step, (count, _) in enumerate(shapes, start=1):
            still = sum(len(text) > step for text in wanted)
            assert still <= count < 2 * still
            left += count < 4
    assert left, "no text ended early enough: no test"


def test_end_tokens_of_tokenizer_and_model_count():
    model = new_model("llama")
    model.generation_config.eos_token_id = [3, 4]
    assert Agent(model, word_tokenizer()).end_tokens == {3, 4, VOCABULARY["<eos>"]}
    model.generation_config.eos_token_id = None
    assert Agent(model, word_tokenizer()).end_tokens == {VOCABULARY["<eos>"]}


def test_stop_strings(agent):
    """A text ends after the first stop string in it, also of two words; the others go on."""
    context = read_plain(agent, PROMPTS)
    whole, decode, cut = agent.write(context, 10), agent.tokenizer.decode, 0
    for text in whole[:3]:
        for stop in (decode(text[2:4]), decode(text[1:2]), "no such text"):
            wanted = [next((ids[:n] for n in range(1, len(ids)) if stop in decode(ids[:n])), ids)
                      for ids in whole]
            assert agent.write(context, 10, stop=(stop, "nor this")) == wanted
            cut += wanted != whole
    assert cut > 0


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")
def test_repetition_penalty_is_the_librarys():
    """Oracle: generate from embeddings, which like us counts the new words only."""
    agent = exact_agent("llama")
    context = read_plain(agent, PROMPTS)
    said = agent.write(context, 10, Sampling(repetition_penalty=1.5).choose)
    assert said != agent.write(context, 10)
    for b, ids in enumerate(PROMPTS):
        out = agent.model.generate(
            inputs_embeds=embed_words(agent, ids), attention_mask=torch.ones(1, len(ids)).long(),
            max_new_tokens=10, do_sample=False, repetition_penalty=1.5)
        assert said[b] == out[0].tolist()


def test_sampling_batched_is_single(agent):
    """The same seed gives a question the same words, whatever shares its batch; others differ."""
    seeds, choose = [11, 12, 13, 14], Sampling(1.0, 0.95).choose
    agent.end_tokens = set(words("0 1 2 3 4 5 6 7 8 9"))      # so that texts leave on their way
    batched = agent.write(read_plain(agent, PROMPTS), 8, choose, seeds)
    assert batched == [agent.write(read_plain(agent, [ids]), 8, choose, [seed])[0]
                       for ids, seed in zip(PROMPTS, seeds)]
    same = read_plain(agent, [PROMPTS[0]] * 8)
    draws = agent.write(same, 8, choose, list(range(7)) + [0])
    assert len({tuple(ids) for ids in draws}) > 3 and draws[0] == draws[7]


def test_a_sample_does_not_depend_on_the_limit():
    """A text is asked for as many words as the longest of its batch: its own come first."""
    agent, choose = exact_agent("llama"), Sampling(1.0).choose
    agent.end_tokens = set()
    context = read_plain(agent, PROMPTS)
    long = agent.write(context, 40, choose, [1, 2, 3, 4])
    for limit in (1, 7, 15, 16, 17, 33):
        assert agent.write(context, limit, choose, [1, 2, 3, 4]) == [ids[:limit] for ids in long]


def assert_drawn_from(exact, agent, ids, count, draws=4000, **settings):
    """The `count`-th word after a prompt has the exact distribution, over many seeds: each
    frequency is within five standard errors, and nothing impossible was drawn."""
    context = read_plain(agent, [ids]).pick([0] * draws)
    agent.end_tokens = set()
    said = agent.write(context, count, Sampling(**settings).choose, list(range(draws)))
    assert {len(text) for text in said} == {count}
    drawn = torch.bincount(torch.tensor([text[-1] for text in said]), minlength=len(exact)) / draws
    allowed = 5 * (exact * (1 - exact) / draws).sqrt() + 2 / draws
    assert ((drawn - exact).abs() < allowed)[exact > 0].all()
    assert (drawn[exact == 0] == 0).all()
    assert (exact > 0.02).sum() > 2, "one sure word is no test"


@torch.no_grad()
def test_sampled_words_have_the_models_distribution():
    """Oracle: the full model's logits. For the second word: the sum of p(first) p(second | first).
    top_k, top_p, min_p: their definitions, over the sorted probabilities after the temperature."""
    agent, ids = exact_agent("qwen2"), PROMPTS[1]

    def softmax(ids, temperature=1):
        return (agent.model(torch.tensor([ids])).logits[0, -1] / temperature).softmax(-1)

    assert_drawn_from(softmax(ids), agent, ids, 1, temperature=1.0)
    second = sum(p * softmax([*ids, token]) for token, p in enumerate(softmax(ids)))
    assert_drawn_from(second, agent, ids, 2, temperature=1.0)
    p = softmax(ids, temperature=2)
    order = p.argsort(descending=True)
    nucleus = order[:int((p[order].cumsum(0) < 0.8).sum()) + 1]
    likely = (p >= 0.2 * p.max()).nonzero()[:, 0]
    for settings, kept in (({}, order), ({"top_k": 4}, order[:4]), ({"top_p": 0.8}, nucleus),
                           ({"min_p": 0.2}, likely)):
        assert 2 < len(kept) < len(p) + (not settings)
        exact = torch.zeros_like(p)
        exact[kept] = p[kept] / p[kept].sum()
        assert_drawn_from(exact, agent, ids, 1, temperature=2.0, **settings)


# ---- teacher forcing ----------------------------------------------------------------------------

@torch.no_grad()
def test_follow_and_loss_are_those_of_the_whole_model(agent):
    """Oracle: model(input_ids) over prompt and answer as plain tokens, one by one. State i is the
    hidden state at the prompt's last token (i = 0) or at the i-th told one."""
    context = read_plain(agent, PROMPTS)
    states, losses = agent.follow(context, TARGETS), agent.answer_loss(context, TARGETS)
    assert states.shape == (4, 1 + max(map(len, TARGETS)), agent.width)
    assert torch.equal(agent.follow(context, [[]] * 4), context.hidden)
    for b, (ids, target) in enumerate(zip(PROMPTS, TARGETS)):
        whole = agent.model(torch.tensor([ids + target]), output_hidden_states=True)
        plain = whole.hidden_states[-1][0, len(ids) - 1:]
        assert largest_difference(states[b, :1 + len(target)], plain) < CLOSE
        loss = F.cross_entropy(whole.logits[0, len(ids) - 1:-1], torch.tensor(target),
                               reduction="none")
        assert largest_difference(losses[b], loss) < CLOSE * max(1, loss.max())


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_rms(family):
    """Oracle: over the whole (small) table. Gemma's layer scales by the root of the width."""
    agent = new_agent(family)
    table = agent.model.get_input_embeddings().weight
    if "Gemma" in type(agent.model).__name__:
        table = table * agent.width ** 0.5
    assert agent.embedding_rms == pytest.approx(table.pow(2).mean().sqrt().item(), rel=1e-5)


# ---- loading ------------------------------------------------------------------------------------

def save_agent(agent, folder):
    """A released folder: whole model, tokenizer, inner link with its adapter_config.json."""
    agent.model.save_pretrained(folder)
    agent.tokenizer.save_pretrained(folder)
    save_inner(agent.inner, folder)


def load(folder):
    return load_agent(folder, torch.device("cpu"), torch.float32)


def assert_same_state(agent, loaded):
    """Both read the same, to the last bit."""
    assert torch.equal(read_plain(loaded, PROMPTS).hidden, read_plain(agent, PROMPTS).hidden)


@pytest.mark.parametrize("family", EIGHT)
def test_load_agent_beside_an_adapter_config(tmp_path, family, monkeypatch):
    """The loaded agent has what the saved one has, and the folder stays as it was. So it is where
    PEFT is installed: there the library takes any such folder for a PEFT adapter."""
    agent = new_agent(family)
    save_agent(agent, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "adapter_config.json" in before
    loaded = load(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    if family != "qwen3_5_conditional":          # the library loads its text part alone
        assert type(loaded.model) is type(agent.model)
    assert loaded.inner is None and loaded.end_tokens == agent.end_tokens
    assert torch.equal(loaded.model.lm_head.weight, loaded.embedding.weight)              # tied
    assert not (loaded.model.training or any(p.requires_grad for p in loaded.model.parameters()))
    assert_same_state(agent, loaded)
    assert loaded.tokenize(QUESTIONS) == [words(question) for question in QUESTIONS]
    assert loaded.tokenizer.chat_template == agent.tokenizer.chat_template
    for module in ("models.auto.auto_factory", "integrations.peft"):
        monkeypatch.setattr(f"transformers.{module}.is_peft_available", lambda: True)
    with pytest.raises(Exception):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_state(agent, load(tmp_path))


def test_load_agent_with_wrong_weights(tmp_path):
    """One missing; one for which the model has no use; and a text config beside a checkpoint for
    text and images, from which the library would load nothing, silently."""
    for family, named in (("qwen3", "model.layers.1.mlp.up_proj.weight"), ("llama", "model.odd"),
                          ("gemma3_conditional", "weight")):
        agent, file = new_agent(family), tmp_path / family / "model.safetensors"
        save_agent(agent, file.parent)
        state = load_file(file)
        if family == "gemma3_conditional":
            agent.model.config.text_config.save_pretrained(file.parent)
        elif state.pop(named, None) is None:
            state[named] = torch.zeros(2, 2)
        save_file(state, file, metadata={"format": "pt"})
        with refuses(file.parent, named):
            load(file.parent)


def test_an_untied_head_behind_links(tmp_path):
    """Untied as in Qwen3.5-9B; the smaller ones are tied (above), and say so at the top alone. In
    the hub's cache, a folder holds relative links. They are followed, and all of it is read."""
    model = new_model("qwen3_5_conditional")
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    torch.manual_seed(7)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    agent = Agent(model, word_tokenizer(), new_agent("qwen3_5").inner)
    save_agent(agent, tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{path.name}")
    loaded = load(tmp_path / "snapshot")
    shutil.rmtree(tmp_path / "blobs")
    assert_same_state(agent, loaded)
    assert torch.equal(loaded.model.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(loaded.model.lm_head.weight, loaded.embedding.weight)

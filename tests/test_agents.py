"""One agent: cached against uncached, batch against single, padded against unpadded, text in slots
against plain tokens, decoding against the library's generate and the exact distribution.

The agents are in float64, so two ways of computing agree to CLOSE."""
import gc
import shutil
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import (FAMILIES, QUESTIONS, VOCABULARY, WINDOW, byte_tokenizer, chat, embed_words,
                     largest_difference, left_pad, new_agent, new_model, nothing_in_float32,
                     plain_states, plain_think, plain_write, spy_on_reading, widen, word_tokenizer,
                     words)
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from agents import Agent
from cache import NewStateLayer
from checkpoints import load_agent, save_inner
from gpu.recorded import ROOM, Recorded
from support.errors import say_once
from tiny.build import new_tokenizer
from writing import Sampling

M = 5                                                       # latent steps
CLOSE = 1e-9
PROMPTS = [words(chat(question)) for question in QUESTIONS[:4]]      # 6 to 21 tokens
# Three families stand for all: plain, with sliding windows, with linear attention.
EIGHT = [family if family in ("qwen3", "gemma3", "qwen3_5") else
         pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
CPU = torch.device("cpu")
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


def read_plain(agent, prompts):
    """A Context of prompts of given token ids, padded on the left by hand."""
    return agent.read(*left_pad([embed_words(agent, ids) for ids in prompts]))


def random_latents(agent, *lengths):
    """Latents (m, d) of these lengths."""
    generator = torch.Generator().manual_seed(0)
    return [0.2 * torch.randn(m, agent.width, generator=generator, dtype=agent.dtype)
            for m in lengths]


# ---- reading and thinking -----------------------------------------------------------------------

def test_the_prompts_are_a_fair_test():
    """Different lengths, and a sliding window that is shorter than some and longer than none. It
    matters: the same weights without it think otherwise."""
    lengths = [len(ids) for ids in PROMPTS]
    assert len(set(lengths)) > 2 and max(lengths) > 2 * WINDOW and min(lengths) + M > WINDOW
    agent, wide = exact_agent("mistral"), exact_agent("mistral")
    wide.model.config.sliding_window = None
    embeds = embed_words(agent, PROMPTS[2])
    near, far = plain_states(agent, embeds), plain_states(wide, embeds)
    assert largest_difference(near[:, :WINDOW], far[:, :WINDOW]) < CLOSE
    assert largest_difference(near[:, -1:], far[:, -1:]) > 0.01


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
    """Texts of one length, of several, and empty ones. Then prompts that share all of the prefix, a
    part of it, or nothing. Last, nothing is left to read: the prefix is the prompt, or longer.
    Oracle: all tokens read at once."""
    prompts = tokenized(agent, user, (), **({"critic": texts} if texts else {}))
    if texts:
        assert prompts == [[words(chat(f"{question} <|notes|> {text} and"))]
                           for question, text in zip(QUESTIONS, texts)]
    whole = agent.think(read_plain(agent, [tokens for [tokens] in prompts]), M)
    for prefix in (prefix_of(agent, tokenized(agent, SLOTTED)), prefix_of(agent, prompts),
                   prefix_of(agent, [[tokens + [3]] for [tokens] in prompts])):
        thoughts = agent.think(agent.read_prompts(prompts, {}, prefix), M)
        assert largest_difference(thoughts, whole) < CLOSE


def test_gradients_of_thoughts(agent):
    """Of latents in a slot and of the inner link. A padded batch with a cache, and the same after a
    prefix that was read without gradient: as uncached, one by one."""
    agent.inner.requires_grad_(True)
    prompts, latents = tokenized(agent, SLOTTED), random_latents(agent, 3, 3, 3, 3)
    inputs = [*(one.requires_grad_() for one in latents), *agent.inner.parameters()]
    weights = torch.randn(4, M, agent.width, dtype=agent.dtype)
    plain = sum((plain_think(agent, typed(agent, question, heard), M) * weight).sum()
                for question, heard, weight in zip(QUESTIONS, latents, weights))
    wanted = torch.autograd.grad(plain, inputs)
    for prefix in (None, prefix_of(agent, prompts)):
        context = agent.read_prompts(prompts, {"critic": latents}, prefix)
        got = torch.autograd.grad((agent.think(context, M) * weights).sum(), inputs)
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
    assert torch.equal(agent.think(twice, M), agent.think(once, M))
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
    """Padded batches of other lengths go through the same buffers, one after the other."""
    buffers = None
    for prompts in (PROMPTS[:2], [ids[:5] for ids in PROMPTS[2:]], PROMPTS[:2]):
        context = read_plain(agent, prompts)
        assert buffers is None or buffers.fits(context, M)
        thoughts, buffers = fixed_think(agent, context, M, buffers)
        plain = [plain_think(agent, embed_words(agent, ids), M) for ids in prompts]
        assert largest_difference(thoughts, torch.cat(plain)) < CLOSE
    assert not buffers.fits(read_plain(agent, PROMPTS[:1]), M)               # fewer questions
    assert not buffers.fits(context, ROOM)                                   # too little room
    assert buffers.room == ROOM - context.mask.shape[1]


@torch.no_grad()
def test_buffers_are_outgrown(agent):
    """What stands in full buffers goes on in larger ones, for some of the questions. Oracle:
    growing steps, which are compared with reference.py above."""
    context = read_plain(agent, PROMPTS)
    thoughts, buffers = fixed_think(agent, context, M)
    assert not buffers.fits(buffers.context(), 1), "a context must not be loaded over itself"
    more, _ = fixed_think(agent, buffers.context().pick([2, 0]), 3)
    together = torch.cat([thoughts[[2, 0]], more[:, 1:]], 1)
    assert largest_difference(together, agent.think(context, M + 2)[[2, 0]]) < CLOSE


@torch.no_grad()
def test_old_buffers_leave_nothing_behind():
    """A prompt that went to NaN does not spoil the next one in the same buffers."""
    agent = exact_agent("qwen3")
    context = read_plain(agent, PROMPTS)
    before, buffers = fixed_think(agent, context, M)
    embeds, mask = left_pad([embed_words(agent, ids) for ids in PROMPTS])
    spoilt, _ = fixed_think(agent, agent.read(embeds * float("nan"), mask), 20, buffers)
    assert spoilt.isnan().all()
    assert torch.equal(fixed_think(agent, context, M, buffers)[0], before)


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

BODY = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}{% endfor %}<assistant>"
RAISES = ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}"
          "{% endif %}" + BODY)
IGNORES = BODY.replace("{% for m in messages %}",
                       "{% for m in messages if m['role'] != 'system' %}")
NASTY = ["what is {critic} {question}?", "{", "}} {{ x }} {% raw %} \\boxed{}", "{answer_format}",
         "\ue000critic\ue001", "a \ue000 b \ue001 c", "\ue001\ue000question\ue001\ue000",
         "{planner}", "", " \n spaces \t", "\\1 \\g<0>", "<user>"]


def byte_agent(template=BODY, **settings):
    return Agent(new_model("llama"), byte_tokenizer(template), **settings)


def test_text_is_tokenised_with_its_surroundings():
    """Oracle: the tokenizer over the whole chat, typed. `n: E` is one token of this vocabulary."""
    agent = byte_agent()
    agent.tokenizer.add_tokens(["n: E", "la<"])
    prompts = agent.tokenize_prompts("", "{question} plan: {critic}",
                                     {"question": ["hi"], "critic": ["Ella"]})
    chat = "<user>hi plan: Ella<assistant>"
    assert prompts == [[agent.tokenizer(chat)["input_ids"]]]
    assert len(prompts[0][0]) == len(chat) - 3 - 2
    [[before, slot, after]] = agent.tokenize_prompts(
        "", "{question} {critic}, {solver}", {"question": ["hi"], "critic": ["E"]}, ("solver",))
    assert (agent.tokenizer.decode(before), slot) == ("<user>hi E, ", "solver")
    assert agent.tokenizer.decode(after) == "<assistant>"


@pytest.mark.parametrize("template", [BODY, RAISES, IGNORES], ids=["system", "raises", "ignores"])
def test_questions_and_texts_are_never_spliced(template):
    """Oracle: the chat written out by hand; every odd string goes through as plain text."""
    agent = byte_agent(template)
    user = "Q: {question}\nheard {critic}, {planner}; keep {other} \\boxed{}.\n{answer_format}!"
    heard = {"critic": NASTY[1:] + NASTY[:1], "planner": NASTY[2:] + NASTY[:2]}
    values = {"question": NASTY, "answer_format": ["End in \\boxed{x}."] * len(NASTY)}
    prompts = agent.tokenize_prompts("Be {brief}.", user, {**values, **heard})
    head = "<system>Be {brief}.<user>" if template == BODY else "<user>Be {brief}.\n\n"
    for b, question in enumerate(NASTY):
        text = (f"{head}Q: {question}\nheard {heard['critic'][b]}, {heard['planner'][b]}; keep "
                "{other} \\boxed{}.\nEnd in \\boxed{x}.!<assistant>")
        [tokens] = prompts[b]
        assert agent.tokenizer.decode(tokens) == text
        assert tokens == agent.tokenizer(text, add_special_tokens=False)["input_ids"]
    # The same with latents of the planner: the prompt is cut at that slot, and nowhere else.
    prompts = agent.tokenize_prompts("", user, {**values, "critic": heard["critic"]}, ("planner",))
    for b, question in enumerate(NASTY):
        before, slot, after = prompts[b]
        assert slot == "planner"
        assert agent.tokenizer.decode(before) == (
            f"<user>Q: {question}\nheard {heard['critic'][b]}, ")
        assert agent.tokenizer.decode(after).startswith("; keep {other}")


def rendered(agent, user, system="", **values):
    """The text of one prompt about the question `hi`."""
    [[tokens]] = agent.tokenize_prompts(system, user, {"question": ["hi"], **values})
    return agent.tokenizer.decode(tokens)


SWITCH = BODY + "{% if not enable_thinking %}<no think>{% endif %}"


@pytest.mark.parametrize("template, thinking, system, user, wanted", [
    (RAISES, False, "", "{question}", "<user>hi<assistant>"),
    # A system text that the template trims keeps its own turn.
    (BODY, False, "Be brief.\n", "{question}", "<system>Be brief.<user>hi<assistant>"),
    (BODY, False, "", "{critic} {question} {critic}", "<user>C hi C<assistant>"),
    (SWITCH, False, "", "{question}", "<user>hi<assistant><no think>"),
    (SWITCH, True, "", "{question}", "<user>hi<assistant>")])
def test_the_chat_around_a_question(template, thinking, system, user, wanted):
    agent = byte_agent(template, thinking=thinking)
    assert rendered(agent, user, system, critic=["C"]) == wanted


@pytest.mark.parametrize("names", [["expert", "expert_b"], ["expert_b", "expert"]])
def test_one_slots_name_may_begin_anothers(names):
    agent, texts = byte_agent(), {"expert": ["A"], "expert_b": ["B"]}
    texts = {name: texts[name] for name in names}
    text = rendered(agent, "{question} {expert} {expert_b}.", **texts)
    assert text == "<user>hi A B.<assistant>"
    [parts] = agent.tokenize_prompts("", "{question} {expert} {expert_b}.", {"question": ["hi"]},
                                     names)
    assert [part for part in parts if isinstance(part, str)] == ["expert", "expert_b"]


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


def test_tiny_tokenizer_gives_words_back():
    """A text an agent of the tiny system wrote must read back as the tokens it wrote."""
    tokenizer, text = new_tokenizer(), "s1 x7 1 s2 flip 8 because 3 to 1 ."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == 11
    assert tokenizer.batch_decode([ids], skip_special_tokens=True) == [text]


@pytest.mark.parametrize("text, unknown", [("what is flip ?", True), ("s1 flip <unk>", False),
                                           ("s1 flip", False)])
def test_unknown_words_are_told_once(text, unknown, shipped, capsys):
    say_once.cache_clear()
    for _ in range(2):
        shipped.agents["critic"].tokenize(["s1 x7", text])
    said = capsys.readouterr().out
    assert said.count("<unk>") == unknown and said.count("\n") == unknown


def test_a_prompt_beyond_the_models_positions_is_told_once(capsys):
    agent = exact_agent("qwen3")
    agent.positions = 20
    for length in (20, 21, 30):
        agent.read(embed_words(agent, [3] * length), torch.ones(1, length, dtype=torch.long))
        assert ("20" in capsys.readouterr().out) == (length == 21)


# ---- writing ------------------------------------------------------------------------------------

def generate(agent, ids, count, **settings):
    """Oracle: the library's greedy decoding of one unpadded prompt; new tokens only."""
    settings = {"eos_token_id": sorted(agent.end_tokens), **settings}
    out = agent.model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(),
                               max_new_tokens=count, do_sample=False, **settings)
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


@pytest.mark.parametrize("family, count", [
    ("qwen3", 260), pytest.param("qwen3", 600, marks=pytest.mark.slow),
    pytest.param("qwen3_5", 260, marks=pytest.mark.slow)])
def test_a_long_text_is_generate(family, count):
    """Of more words than the first buffers would hold on a GPU."""
    agent = exact_agent(family)
    agent.end_tokens = {VOCABULARY["<pad>"]}
    written = agent.write(read_plain(agent, PROMPTS[:2]), count)
    assert written == [generate(agent, ids, count) for ids in PROMPTS[:2]]
    assert max(map(len, written)) == count, "no text was long: no test"


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


def frequencies(agent, ids, count, draws=4000, **settings):
    """How often each token is drawn as the `count`-th word after a prompt, over many seeds."""
    context = read_plain(agent, [ids]).pick([0] * draws)
    agent.end_tokens = set()
    said = agent.write(context, count, Sampling(**settings).choose, list(range(draws)))
    assert {len(text) for text in said} == {count}
    return torch.bincount(torch.tensor([text[-1] for text in said]),
                          minlength=len(VOCABULARY)) / draws


def assert_drawn_from(drawn, exact, draws=4000):
    """Each frequency is within five standard errors, and nothing impossible was drawn."""
    allowed = 5 * (exact * (1 - exact) / draws).sqrt() + 2 / draws
    assert ((drawn - exact).abs() < allowed)[exact > 0].all()
    assert (drawn[exact == 0] == 0).all()
    assert (exact > 0.02).sum() > 2, "one sure word is no test"


@torch.no_grad()
def next_logits(agent, ids):
    return agent.model(torch.tensor([ids])).logits[0, -1]


def test_sampled_words_have_the_models_distribution():
    """Oracle: softmax of the full model's logits, with and without temperature. For the second
    word: the sum over first words of p(first) p(second | first), by plain runs."""
    agent = exact_agent("qwen2")
    logits = next_logits(agent, PROMPTS[1])
    for temperature in (1.0, 2.0):
        drawn = frequencies(agent, PROMPTS[1], 1, temperature=temperature)
        assert_drawn_from(drawn, (logits / temperature).softmax(-1))
    second = sum(p * next_logits(agent, PROMPTS[1] + [token]).softmax(-1)
                 for token, p in enumerate(logits.softmax(-1)))
    assert_drawn_from(frequencies(agent, PROMPTS[1], 2, temperature=1.0), second)


def test_top_k_top_p_and_min_p():
    """Oracle: the definitions, over sorted probabilities after the temperature."""
    agent = exact_agent("qwen2")
    p = (next_logits(agent, PROMPTS[1]) / 2).softmax(-1)
    order = p.argsort(descending=True)
    nucleus = order[:int((p[order].cumsum(0) < 0.8).sum()) + 1]
    likely = (p >= 0.2 * p.max()).nonzero()[:, 0]
    cases = (({"top_k": 4}, order[:4]), ({"top_p": 0.8}, nucleus), ({"min_p": 0.2}, likely))
    for settings, kept in cases:
        assert 2 < len(kept) < len(p)
        exact = torch.zeros_like(p)
        exact[kept] = p[kept] / p[kept].sum()
        assert_drawn_from(frequencies(agent, PROMPTS[1], 1, temperature=2.0, **settings), exact)


# ---- teacher forcing ----------------------------------------------------------------------------

TARGETS = [words("s1 x7 1 ."), words("none"), words("s4 flip 7 s5 +3 0 ."), words("to to")]


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
        alone = agent.answer_loss(read_plain(agent, [ids]), [target])[0]
        assert largest_difference(losses[b], loss) < CLOSE * max(1, loss.max())
        assert largest_difference(alone, loss) < CLOSE * max(1, loss.max())


def test_answer_loss_gradient_is_the_whole_models(agent):
    """With respect to latents in the prompt; oracle: the model run on embeddings at once."""
    latents = [one[None].requires_grad_() for one in random_latents(agent, 3, 3, 3, 3)]
    prompts = [torch.cat([embed_words(agent, ids), slot], 1) for ids, slot in zip(PROMPTS, latents)]
    total = torch.cat(agent.answer_loss(agent.read(*left_pad(prompts)), TARGETS)).sum()
    plain = 0
    for prompt, target in zip(prompts, TARGETS):
        embeds = torch.cat([prompt, embed_words(agent, target)], 1)
        logits = agent.model(inputs_embeds=embeds).logits[0, prompt.shape[1] - 1:-1]
        plain = plain + F.cross_entropy(logits, torch.tensor(target), reduction="sum")
    got, wanted = torch.autograd.grad(total, latents), torch.autograd.grad(plain, latents)
    for a, b in zip(got, wanted):
        assert b.abs().max() > 0
        assert largest_difference(a, b) < CLOSE * max(1.0, b.abs().max().item())


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
    return load_agent(folder, CPU, torch.float32)


def assert_same_state(agent, loaded):
    """Both read the same, to the last bit."""
    assert torch.equal(read_plain(loaded, PROMPTS).hidden, read_plain(agent, PROMPTS).hidden)


@pytest.mark.parametrize("family", EIGHT)
def test_load_agent_beside_an_adapter_config(tmp_path, family):
    """The loaded agent has what the saved one has, and the folder stays as it was."""
    agent = new_agent(family)
    save_agent(agent, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "adapter_config.json" in before
    loaded = load(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    if family != "qwen3_5_conditional":          # the library loads its text part alone
        assert type(loaded.model) is type(agent.model)
    assert loaded.inner is None and loaded.end_tokens == agent.end_tokens
    state = {key.replace("language_model.", ""): value
             for key, value in agent.model.state_dict().items()}
    assert all(torch.equal(value, state[key.replace("language_model.", "")])
               for key, value in loaded.model.state_dict().items())
    assert torch.equal(loaded.head.weight, loaded.embedding.weight)              # tied
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert not loaded.model.training
    assert_same_state(agent, loaded)
    assert loaded.tokenize(QUESTIONS) == [words(question) for question in QUESTIONS]
    assert loaded.tokenizer.decode(PROMPTS[0]) == agent.tokenizer.decode(PROMPTS[0])
    assert loaded.tokenizer.chat_template == agent.tokenizer.chat_template


def test_load_agent_where_peft_is_installed(tmp_path, monkeypatch):
    """There the library takes any folder with an adapter_config.json for a PEFT adapter."""
    agent = new_agent("llama")
    save_agent(agent, tmp_path)
    for module in ("models.auto.auto_factory", "integrations.peft"):
        monkeypatch.setattr(f"transformers.{module}.is_peft_available", lambda: True)
    with pytest.raises(Exception):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_state(agent, load(tmp_path))


def test_load_agent_with_wrong_weights(tmp_path):
    """One missing; one for which the model has no use; and a text config beside a checkpoint for
    text and images, from which the library would load nothing, silently."""
    save_agent(new_agent("qwen3"), tmp_path / "few")
    save_agent(new_agent("llama"), tmp_path / "many")
    few, many = (load_file(tmp_path / name / "model.safetensors") for name in ("few", "many"))
    del few["model.layers.1.mlp.up_proj.weight"]
    many["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
    for name, state in (("few", few), ("many", many)):
        save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    agent = new_agent("gemma3_conditional")
    save_agent(agent, tmp_path / "text")
    agent.model.config.text_config.save_pretrained(tmp_path / "text")
    for name, weight in (("few", "layers.1.mlp.up_proj"), ("text", "weight"),
                         ("many", "model.layers.7.mlp.up_proj.weight")):
        with pytest.raises(ValueError, match=weight) as problem:
            load(tmp_path / name)
        assert str(tmp_path / name) in str(problem.value) and "\n" not in str(problem.value)


def test_an_untied_head_is_kept(tmp_path):
    """As in Qwen3.5-9B; the smaller ones are tied (above), and say so at the top alone."""
    model = new_model("qwen3_5_conditional")
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    torch.manual_seed(7)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    save_agent(Agent(model, word_tokenizer(), new_agent("qwen3_5").inner), tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(loaded.head.weight, model.lm_head.weight)
    assert not torch.equal(loaded.head.weight, loaded.embedding.weight)


def test_load_agent_needs_no_writable_folder(tmp_path):
    """A relative path and links in the folder (as in the hub's cache) are followed."""
    agent = new_agent("llama")
    save_agent(agent, tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{path.name}")
    loaded = load(tmp_path / "snapshot")
    shutil.rmtree(tmp_path / "blobs")
    assert_same_state(agent, loaded)


def test_models_that_cannot_be_agents():
    """Layers of an unknown kind; no chat template."""
    with pytest.raises(ValueError, match="chat template") as problem:
        Agent(new_model("llama"), word_tokenizer(None))
    assert "\n" not in str(problem.value)
    model = new_model("qwen3")
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ValueError, match="chunked_attention"):
        Agent(model, word_tokenizer())

"""One agent: cached against uncached, batch against single, padded against unpadded, spliced text
against plain tokens, decoding against the library's generate and the exact distribution."""
import gc
import json
import shutil
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import (FAMILIES, QUESTIONS, VOCABULARY, WINDOW, byte_tokenizer, chat, embed_words,
                      largest_difference, left_pad, new_agent, new_model, plain_states, plain_think,
                      plain_write, word_tokenizer, words)
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from agents import Agent
from support.sampling import Sampling
from cache import ROOM, NewStateLayer, Recorded, say_once
from support.checkpoints import load_agent, save_inner
from support.devices import pick_device
from tiny.build import new_tokenizer

M = 5                                                       # latent steps
PROMPTS = [words(chat(question)) for question in QUESTIONS[:4]]      # 6 to 21 tokens


def read_plain(agent, prompts):
    """A Context of prompts of given token ids, padded on the left by hand."""
    return agent.read(*left_pad([embed_words(agent, ids) for ids in prompts]))


# ---- reading and thinking -----------------------------------------------------------------------

def test_the_prompts_are_a_fair_test():
    """Different lengths, and a sliding window that is shorter than some and longer than none."""
    lengths = [len(ids) for ids in PROMPTS]
    assert len(set(lengths)) > 2 and max(lengths) > 2 * WINDOW
    assert min(lengths) + M > WINDOW


def test_the_window_of_the_mistral_matters():
    """The same weights without the window think otherwise; else no test here would see it."""
    agent, wide = new_agent("mistral"), new_agent("mistral")
    wide.model.config.sliding_window = None
    embeds = embed_words(agent, PROMPTS[2])
    near, far = plain_states(agent, embeds), plain_states(wide, embeds)
    assert largest_difference(near[:, :WINDOW], far[:, :WINDOW]) < agent.close
    assert largest_difference(near[:, -1:], far[:, -1:]) > 0.01


def test_think_batched_is_uncached_is_single(agent):
    """Cached on a left-padded batch = no cache, one by one = cached, one by one."""
    with torch.no_grad():
        batched = agent.think(read_plain(agent, PROMPTS), M)
        for b, ids in enumerate(PROMPTS):
            embeds = embed_words(agent, ids)
            plain = plain_think(agent, embeds, M)
            single = agent.think(agent.read(embeds, torch.ones(1, len(ids), dtype=torch.long)), M)
            assert largest_difference(batched[b:b + 1], plain) < agent.close
            assert largest_difference(single, plain) < agent.close


def test_first_thought_is_the_hidden_state_read_ended_on(agent):
    context = read_plain(agent, PROMPTS)
    assert torch.equal(agent.think(context, 1), context.hidden)


def test_reading_in_two_parts_is_reading_at_once(agent):
    """read(.., context): rows of different lengths, cut at the same place from the right."""
    embeds, mask = left_pad([embed_words(agent, ids) for ids in PROMPTS])
    first = agent.read(embeds[:, :-4], mask[:, :-4])
    second = agent.read(embeds[:, -4:], mask[:, -4:], first)
    whole = agent.read(embeds, mask)
    assert largest_difference(second.hidden, whole.hidden) < agent.close
    assert largest_difference(agent.think(second, M), agent.think(whole, M)) < agent.close


def test_gradients_through_cached_think(agent):
    """Of latents in a slot and of the inner link: cached padded batch = uncached, one by one."""
    agent.inner.requires_grad_(True)
    parameters = list(agent.inner.parameters())
    torch.manual_seed(0)
    latents = [(0.2 * torch.randn(1, 3, agent.width)).requires_grad_() for _ in PROMPTS]
    weights = torch.randn(len(PROMPTS), M, agent.width)

    def rows():
        return [torch.cat([embed_words(agent, ids[:-2]), slot, embed_words(agent, ids[-2:])], 1)
                for ids, slot in zip(PROMPTS, latents)]

    plain = sum((plain_think(agent, row, M) * weight).sum() for row, weight in zip(rows(), weights))
    cached = (agent.think(agent.read(*left_pad(rows())), M) * weights).sum()
    wanted = torch.autograd.grad(plain, latents + parameters)
    got = torch.autograd.grad(cached, latents + parameters)
    for a, b in zip(got, wanted):
        assert b.abs().max() > 0
        assert largest_difference(a, b) < agent.close * max(1.0, b.abs().max().item())


# ---- prompts with a shared prefix ---------------------------------------------------------------

SLOTTED = "{question} <|notes|> {critic} and"
TEXTS = ["s1 x7 1", "none", "s4 flip 7 s5 +3 0 .", "to to"]


def prompt(agent, user, slots=("critic",), questions=QUESTIONS[:4], **texts):
    """Rows of parts: latents of `slots` are heard, and the texts of others."""
    values = {"question": questions, "answer_format": ["end"] * len(questions), **texts}
    return agent.prompt("", user, values, slots)


def prefix_of(agent, rows):
    """What stands before the first slot, read: (token lists, Context)."""
    begun = [row[0] for row in rows]
    return begun, agent.read(*agent.embed([[tokens] for tokens in begun], {}))


def assert_same_context(agent, a, b):
    """Both lead to the same thoughts."""
    assert largest_difference(a.hidden, b.hidden) < agent.close
    assert largest_difference(agent.think(a, M), agent.think(b, M)) < agent.close


def test_read_prompt_with_prefix(agent):
    """Latents of one length, and of a length for each row: as without a prefix, and as one by one
    and unpadded."""
    rows = prompt(agent, SLOTTED)
    prefix = prefix_of(agent, rows)
    torch.manual_seed(0)
    ragged = [0.2 * torch.randn(n, agent.width) for n in (3, 1, 6, 2)]
    for heard in (0.2 * torch.randn(4, 3, agent.width), ragged):
        shared = agent.read_prompt(rows, {"critic": heard}, prefix)
        assert_same_context(agent, shared, agent.read_prompt(rows, {"critic": heard}))
        for b, (question, latents) in enumerate(zip(QUESTIONS, heard)):
            before = embed_words(agent, words(f"<bos> <|user|> {question} <|notes|>"))
            after = embed_words(agent, words("and <|assistant|>"))
            plain = plain_states(agent, torch.cat([before, latents[None], after], 1))[:, -1:]
            assert largest_difference(shared.hidden[b:b + 1], plain) < agent.close


def test_texts_in_slots_share_the_prefix(agent):
    """Texts of one length, of different lengths, and empty ones."""
    prefix = prefix_of(agent, prompt(agent, SLOTTED))
    for texts in (TEXTS, ["s1 x7 1"] * 4, [""] * 4, ["s1", "", "s2 s3", ""]):
        rows = prompt(agent, SLOTTED, (), critic=texts)
        assert_same_context(agent, agent.read_prompt(rows, {}, prefix), agent.read_prompt(rows, {}))
        typed = [words(chat(f"{question} <|notes|> {text} and"))
                 for question, text in zip(QUESTIONS, texts)]
        assert_same_context(agent, agent.read_prompt(rows, {}, prefix), read_plain(agent, typed))


def test_another_beginning_is_read_anew(agent):
    """A `first` prompt may share all of the prefix, a part of it, or nothing."""
    prefix = prefix_of(agent, prompt(agent, SLOTTED))
    for user in ("{question} <|notes|> none", "{question} start <|notes|> none and to",
                 "plan: {question} <|notes|>", "{question}"):
        rows = prompt(agent, user, slots=())
        assert_same_context(agent, agent.read_prompt(rows, {}, prefix), agent.read_prompt(rows, {}))


def test_prefix_is_the_whole_prompt(agent):
    """Nothing is left to read; and a prefix that is longer than the prompt."""
    rows = prompt(agent, "{question} <|notes|>", slots=())
    prefix = prefix_of(agent, rows)
    assert_same_context(agent, agent.read_prompt(rows, {}, prefix), prefix[1])
    shorter = [[row[0][:-2]] for row in rows]
    assert_same_context(agent, agent.read_prompt(shorter, {}, prefix),
                        agent.read_prompt(shorter, {}))


def test_gradients_through_a_prefix_are_the_same(agent):
    """The prefix is read without gradient: what the slot's latents get must not change."""
    segments = prompt(agent, SLOTTED)
    prefix = prefix_of(agent, segments)
    torch.manual_seed(0)
    latents = (0.2 * torch.randn(4, 3, agent.width)).requires_grad_()
    weights = torch.randn(4, M, agent.width)
    gradients = [
        torch.autograd.grad((agent.think(context, M) * weights).sum(), latents)[0]
        for context in (agent.read_prompt(segments, {"critic": latents}, prefix),
                     agent.read_prompt(segments, {"critic": latents}))]
    assert gradients[1].abs().max() > 0
    scale = max(1.0, gradients[1].abs().max().item())
    assert largest_difference(*gradients) < agent.close * scale


def test_a_context_is_never_changed(agent):
    """Going on from it twice, in every way there is, gives the same twice."""
    segments = prompt(agent, SLOTTED)
    prefix = prefix_of(agent, segments)
    latents = torch.ones(4, 3, agent.width)
    context = agent.read_prompt(segments, {"critic": latents}, prefix)
    contexts = (context, prefix[1])

    def held(layer):
        if isinstance(layer, NewStateLayer):
            return [layer.conv_states[0].clone(), layer.recurrent_states[0].clone()]
        return [layer.keys.clone(), layer.values.clone()]

    before = [(one.mask.clone(), one.hidden.clone(), one.cache.get_seq_length(),
               [held(layer) for layer in one.cache.layers]) for one in contexts]
    targets = [words("s1 x7"), words("none"), words("s2 +1 0 ."), words("to")]

    def go_on():
        agent.end_tokens = {VOCABULARY[str(digit)] for digit in range(10)}   # some rows end early
        more = torch.ones(4, 2, agent.width)
        read_on = agent.read(more, torch.ones(4, 2, dtype=torch.long), context)
        return [agent.think(context, M), agent.follow(context, targets), read_on.hidden,
                torch.cat(agent.answer_loss(context, targets)), torch.tensor(
                    [token for ids in agent.write(context, 6) for token in ids]),
                agent.read_prompt(segments, {"critic": 2 * latents}, prefix).hidden]

    with torch.no_grad():
        first, second = go_on(), go_on()
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    for one, (mask, last, length, layers) in zip(contexts, before):
        assert torch.equal(one.mask, mask) and torch.equal(one.hidden, last)
        assert one.cache.get_seq_length() == length == mask.shape[1]
        for layer, earlier in zip(one.cache.layers, layers):
            assert all(torch.equal(a, b) for a, b in zip(held(layer), earlier))


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
        for b, ids in enumerate(prompts):
            plain = plain_think(agent, embed_words(agent, ids), M)
            assert largest_difference(thoughts[b:b + 1], plain) < agent.close
    assert not buffers.fits(read_plain(agent, PROMPTS[:1]), M)               # other rows
    assert not buffers.fits(read_plain(agent, PROMPTS[:2]), ROOM)            # no room


@torch.no_grad()
def test_buffers_are_outgrown(agent):
    """What stands in full buffers goes on in larger ones, for some of the rows. Oracle: growing
    steps, which are compared with reference.py above."""
    context = read_plain(agent, PROMPTS)
    thoughts, buffers = fixed_think(agent, context, M)
    assert not buffers.fits(buffers.context(), 1), "a context must not be loaded over itself"
    more, _ = fixed_think(agent, buffers.context().rows([2, 0]), 3)
    together = torch.cat([thoughts[[2, 0]], more[:, 1:]], 1)
    assert largest_difference(together, agent.think(context, M + 2)[[2, 0]]) < agent.close


@torch.no_grad()
def test_old_buffers_leave_nothing_behind():
    """A prompt that went to NaN does not spoil the next one in the same buffers."""
    agent = new_agent("qwen3")
    context = read_plain(agent, PROMPTS)
    before, buffers = fixed_think(agent, context, M)
    embeds, mask = left_pad([embed_words(agent, ids) for ids in PROMPTS])
    spoilt, _ = fixed_think(agent, agent.read(embeds * float("nan"), mask), 20, buffers)
    assert spoilt.isnan().all()
    assert torch.equal(fixed_think(agent, context, M, buffers)[0], before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cuda_graph_is_the_step(family):
    there, here = new_agent(family), new_agent(family)
    agent = Agent(there.model.cuda(), there.tokenizer, there.inner.cuda())
    embeds, mask = left_pad([embed_words(here, ids) for ids in PROMPTS])
    for mode in (torch.inference_mode, torch.no_grad, torch.no_grad):
        with mode():
            context, plain = agent.read(embeds.cuda(), mask.cuda()), here.read(embeds, mask)
            thoughts = agent.think(context, M).cpu()
            assert largest_difference(thoughts, here.think(plain, M)) < 10 * here.close
            assert agent.write(context, 8) == here.write(plain, 8)
    assert agent.recorder.recorded.graph is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_old_buffers_are_freed_before_new_ones_are_made():
    there, here = new_agent("qwen3"), new_agent("qwen3")
    agent = Agent(there.model.cuda(), there.tokenizer, there.inner.cuda())
    embeds, mask = left_pad([embed_words(here, [3] * 9)] * 4)
    with torch.no_grad():
        agent.think(agent.read(embeds.cuda(), mask.cuda()), M)
        old = weakref.ref(agent.recorder.recorded)
        agent.think(agent.read(embeds[:1].cuda(), mask[:1].cuda()), M)
        gc.collect()
    assert old() is None


# ---- prompts as tokens --------------------------------------------------------------------------

def test_latents_take_the_place_of_words(agent):
    """Embeddings of a prompt with latents in its slot = of typed words with the latents between."""
    torch.manual_seed(0)
    heard = [0.2 * torch.randn(n, agent.width) for n in (3, 1, 6, 2)]
    rows = [torch.cat([embed_words(agent, words(f"<bos> <|user|> {question} <|notes|>")),
                       latents[None], embed_words(agent, words("and <|assistant|>"))], 1)
            for question, latents in zip(QUESTIONS, heard)]
    wanted, wanted_mask = left_pad(rows)
    embeds, mask = agent.embed(prompt(agent, SLOTTED), {"critic": heard})
    assert torch.equal(mask, wanted_mask)
    assert torch.equal(embeds * mask[..., None], wanted)


def test_text_is_tokenised_with_its_surroundings():
    """Oracle: the tokenizer over the whole chat, typed. `a b` is one token of this vocabulary."""
    agent = byte_agent()
    agent.tokenizer.add_tokens(["n: E", "la<"])
    rows = agent.prompt("", "{question} plan: {critic}", {"question": ["hi"], "critic": ["Ella"]})
    assert rows == [[agent.tokenizer("<user>hi plan: Ella<assistant>")["input_ids"]]]
    assert len(rows[0][0]) == len("<user>hi plan: Ella<assistant>") - 3 - 2
    rows = agent.prompt("", "{question} {critic}, {solver}", {"question": ["hi"], "critic": ["E"]},
                        ("solver",))
    before, slot, after = rows[0]
    assert (agent.tokenizer.decode(before), slot) == ("<user>hi E, ", "solver")
    assert agent.tokenizer.decode(after) == "<assistant>"


# A chat template with a system role; without one, refused aloud; without one, ignored silently.
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


@pytest.mark.parametrize("template", [BODY, RAISES, IGNORES], ids=["system", "raises", "ignores"])
def test_questions_and_texts_are_never_spliced(template):
    """Oracle: the chat written out by hand; every odd string goes through as plain text."""
    agent = byte_agent(template)
    user = "Q: {question}\nheard {critic}, {planner}; keep {other} \\boxed{}.\n{answer_format}!"
    heard = {"critic": NASTY[1:] + NASTY[:1], "planner": NASTY[2:] + NASTY[:2]}
    values = {"question": NASTY, "answer_format": ["End in \\boxed{x}."] * len(NASTY)}
    rows = agent.prompt("Be {brief}.", user, {**values, **heard})
    head = "<system>Be {brief}.<user>" if template == BODY else "<user>Be {brief}.\n\n"
    for b, question in enumerate(NASTY):
        text = (f"{head}Q: {question}\nheard {heard['critic'][b]}, {heard['planner'][b]}; keep "
                "{other} \\boxed{}.\nEnd in \\boxed{x}.!<assistant>")
        [tokens] = rows[b]
        assert agent.tokenizer.decode(tokens) == text
        assert tokens == agent.tokenizer(text, add_special_tokens=False)["input_ids"]
    # The same with latents of the planner: the prompt is cut at that slot, and nowhere else.
    rows = agent.prompt("", user, {**values, "critic": heard["critic"]}, ("planner",))
    for b, question in enumerate(NASTY):
        before, slot, after = rows[b]
        assert slot == "planner"
        assert agent.tokenizer.decode(before) == (
            f"<user>Q: {question}\nheard {heard['critic'][b]}, ")
        assert agent.tokenizer.decode(after).startswith("; keep {other}")


def rendered(agent, user, system="", **values):
    """The text of one prompt about the question `hi`."""
    [[tokens]] = agent.prompt(system, user, {"question": ["hi"], **values})
    return agent.tokenizer.decode(tokens)


def test_without_a_system_text_the_user_turn_stands_alone():
    assert rendered(byte_agent(RAISES), "{question}") == "<user>hi<assistant>"


def test_a_template_that_trims_keeps_the_system_role():
    """A system text with a newline at its end is no reason to leave its own turn."""
    text = rendered(byte_agent(), "{question}", "Be brief.\n")
    assert text == "<system>Be brief.<user>hi<assistant>"


def test_a_template_that_leaves_out_the_user_is_refused():
    agent = byte_agent("{% for m in messages %}<{{ m['role'] }}>{% endfor %}")
    with pytest.raises(ValueError, match="leaves out what the user says"):
        rendered(agent, "{question}")


@pytest.mark.parametrize("names", [["expert", "expert_b"], ["expert_b", "expert"]])
def test_one_slots_name_may_begin_anothers(names):
    agent, texts = byte_agent(), {"expert": ["A"], "expert_b": ["B"]}
    texts = {name: texts[name] for name in names}
    text = rendered(agent, "{question} {expert} {expert_b}.", **texts)
    assert text == "<user>hi A B.<assistant>"
    [row] = agent.prompt("", "{question} {expert} {expert_b}.", {"question": ["hi"]}, names)
    assert [part for part in row if isinstance(part, str)] == ["expert", "expert_b"]


def test_a_slot_may_occur_twice():
    text = rendered(byte_agent(), "{critic} {question} {critic}", critic=["C"])
    assert text == "<user>C hi C<assistant>"


def test_thinking_is_the_templates_switch():
    template = BODY + "{% if not enable_thinking %}<no think>{% endif %}"
    for thinking, end in ((False, "<no think>"), (True, "")):
        agent = byte_agent(template, thinking=thinking)
        assert rendered(agent, "{question}") == "<user>hi<assistant>" + end


def test_special_tokens_are_not_added():
    """A tokenizer that puts <bos> before every text must not do so before every piece."""
    agent = new_agent("llama")
    agent.tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", VOCABULARY["<bos>"])])
    assert agent.tokenizer("none")["input_ids"] == words("<bos> none")
    rows = prompt(agent, SLOTTED, (), critic=TEXTS)
    assert rows[0] == [words(chat(f"{QUESTIONS[0]} <|notes|> {TEXTS[0]} and"))]
    before, _, after = prompt(agent, SLOTTED)[0]
    assert before + after == words(chat(f"{QUESTIONS[0]} <|notes|> and"))


def test_no_chat_template_is_an_error():
    with pytest.raises(ValueError, match="no chat template") as problem:
        Agent(new_model("llama"), word_tokenizer(None))
    assert "\n" not in str(problem.value)


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
    assert said.count("does not know some words") == unknown and said.count("\n") == unknown


# ---- writing ------------------------------------------------------------------------------------

def generate(agent, ids, count, **settings):
    """Oracle: the library's greedy decoding of one unpadded prompt; new tokens only."""
    settings = {"eos_token_id": sorted(agent.end_tokens), **settings}
    out = agent.model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(),
                               max_new_tokens=count, do_sample=False, **settings)
    return out[0, len(ids):].tolist()


def test_write_greedy_is_generate(agent):
    """A padded batch = the library = without any cache, row by row."""
    said = agent.write(read_plain(agent, PROMPTS), 8)
    assert said == [generate(agent, ids, 8) for ids in PROMPTS]
    assert said == [plain_write(agent, embed_words(agent, ids), 8) for ids in PROMPTS]
    assert len({tuple(ids) for ids in said}) > 1


def test_rows_that_end_early_leave(agent):
    """End tokens are taken out of the middle of rows' own outputs, one after the other."""
    context = read_plain(agent, PROMPTS)
    whole, seen = agent.write(context, 10), set()
    for token in dict.fromkeys(token for ids in whole for token in ids):
        agent.end_tokens = {token}
        ids = agent.write(context, 10)
        assert ids == [row[:row.index(token) + 1] if token in row else row for row in whole]
        assert ids == [agent.write(read_plain(agent, [p]), 10)[0] for p in PROMPTS]
        seen.add(len({len(row) for row in ids}))
    assert max(seen) > 1, "no token ended the rows at different places: no test"


def test_end_tokens_of_tokenizer_and_model_count():
    model = new_model("llama")
    model.generation_config.eos_token_id = [3, 4]
    assert Agent(model, word_tokenizer()).end_tokens == {3, 4, VOCABULARY["<eos>"]}
    model.generation_config.eos_token_id = None
    assert Agent(model, word_tokenizer()).end_tokens == {VOCABULARY["<eos>"]}


def test_write_after_latents_is_uncached(agent):
    """Greedy words after a prompt with latents in it = everything run again at each word."""
    torch.manual_seed(0)
    latents = 0.2 * torch.randn(2, 3, agent.width)
    segments = prompt(agent, SLOTTED, questions=QUESTIONS[:2])
    said = agent.write(agent.read_prompt(segments, {"critic": latents}), 6)
    for b in range(2):
        before = words(f"<bos> <|user|> {QUESTIONS[b]} <|notes|>")
        row = torch.cat([embed_words(agent, before), latents[b:b + 1],
                         embed_words(agent, words("and <|assistant|>"))], 1)
        assert said[b] == plain_write(agent, row, 6)


def test_write_from_a_prefix_is_generate(agent):
    """Texts of different lengths stand after a prefix that was read before."""
    rows = prompt(agent, SLOTTED, (), critic=TEXTS)
    context = agent.read_prompt(rows, {}, prefix_of(agent, prompt(agent, SLOTTED)))
    typed = [words(chat(f"{question} <|notes|> {text} and"))
             for question, text in zip(QUESTIONS, TEXTS)]
    assert agent.write(context, 8) == [generate(agent, ids, 8) for ids in typed]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_a_long_text_is_generate(family):
    """Of more words than the first buffers would hold on a GPU."""
    agent = new_agent(family)
    agent.end_tokens = {VOCABULARY["<pad>"]}
    written = agent.write(read_plain(agent, PROMPTS[:2]), 600)
    assert written == [generate(agent, ids, 600) for ids in PROMPTS[:2]]
    assert max(map(len, written)) == 600, "no text was long: no test"


def test_stop_strings(agent):
    """A row ends after the first stop string in its own text; the others go on."""
    context = read_plain(agent, PROMPTS)
    whole, decode, cut = agent.write(context, 10), agent.tokenizer.decode, 0
    for row in whole:
        for stop in (decode(row[2:4]), decode(row[1:2]), "no such text"):
            wanted = []
            for ids in whole:
                ends = [n for n in range(1, len(ids)) if stop in decode(ids[:n])]
                wanted.append(ids[:ends[0]] if ends else ids)
            assert agent.write(context, 10, stop=(stop, "nor this")) == wanted
            cut += wanted != whole
    assert cut > 0


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")
def test_repetition_penalty_is_the_librarys():
    """Oracle: generate from embeddings, which like us counts the new words only."""
    agent = new_agent("llama")
    plain = agent.write(read_plain(agent, PROMPTS), 10)
    said = agent.write(read_plain(agent, PROMPTS), 10, sampling=Sampling(repetition_penalty=1.5))
    assert said != plain
    for b, ids in enumerate(PROMPTS):
        out = agent.model.generate(
            inputs_embeds=embed_words(agent, ids), attention_mask=torch.ones(1, len(ids)).long(),
            max_new_tokens=10, do_sample=False, repetition_penalty=1.5)
        assert said[b] == out[0].tolist()


def test_sampling_batched_is_single(agent):
    """The same seed gives a row the same words, whoever shares its batch; others differ."""
    seeds, options = [11, 12, 13, 14], dict(sampling=Sampling(1.0, 0.95))
    agent.end_tokens = set(words("0 1 2 3 4 5 6 7 8 9"))      # so that rows leave on their way
    batched = agent.write(read_plain(agent, PROMPTS), 8, seeds=seeds, **options)
    single = [agent.write(read_plain(agent, [ids]), 8, seeds=[seed], **options)[0]
              for ids, seed in zip(PROMPTS, seeds)]
    assert batched == single
    same = read_plain(agent, [PROMPTS[0]] * 8)
    draws = agent.write(same, 8, seeds=list(range(7)) + [0], **options)
    assert len({tuple(ids) for ids in draws}) > 3 and draws[0] == draws[7]


def test_a_sample_does_not_depend_on_the_limit():
    """A row of a batch is asked for as many words as the most patient row: its own come first."""
    agent = new_agent("llama")
    agent.end_tokens = set()
    context = read_plain(agent, PROMPTS)
    long = agent.write(context, 40, Sampling(1.0), seeds=[1, 2, 3, 4])
    for limit in (1, 7, 15, 16, 17, 33):
        assert agent.write(context, limit, Sampling(1.0), seeds=[1, 2, 3, 4]) == [
            ids[:limit] for ids in long]


def test_top_k_1_is_greedy(agent):
    context = read_plain(agent, PROMPTS)
    said = agent.write(context, 8, Sampling(1.7, top_k=1), seeds=[5, 6, 7, 8])
    assert said == agent.write(context, 8)


def frequencies(agent, ids, count, draws=4000, **settings):
    """How often each token is drawn as the `count`-th word after a prompt, over many seeds."""
    embeds = embed_words(agent, ids).expand(draws, -1, -1)
    context = agent.read(embeds, torch.ones(draws, len(ids), dtype=torch.long))
    agent.end_tokens = set()
    said = agent.write(context, count, Sampling(**settings), list(range(draws)))
    assert {len(row) for row in said} == {count}
    return torch.bincount(torch.tensor([row[-1] for row in said]),
                          minlength=len(VOCABULARY)) / draws


def assert_drawn_from(drawn, exact, draws=4000):
    """Each frequency is within five standard errors, and nothing impossible was drawn."""
    allowed = 5 * (exact * (1 - exact) / draws).sqrt() + 2 / draws
    assert ((drawn - exact).abs() < allowed)[exact > 0].all()
    assert (drawn[exact == 0] == 0).all()
    assert (exact > 0.02).sum() > 2, "one sure word is no test"


def next_logits(agent, ids):
    with torch.no_grad():
        return agent.model(torch.tensor([ids])).logits[0, -1]


def test_sampled_word_has_the_models_distribution():
    """Oracle: softmax of the full model's logits, with and without temperature."""
    agent = new_agent("qwen2")
    logits = next_logits(agent, PROMPTS[1])
    for temperature in (1.0, 2.0):
        drawn = frequencies(agent, PROMPTS[1], 1, temperature=temperature)
        assert_drawn_from(drawn, (logits / temperature).softmax(-1))


def test_second_sampled_word_has_the_models_distribution():
    """Oracle: the sum over first words of p(first) p(second | first), by plain runs."""
    agent = new_agent("qwen2")
    first = next_logits(agent, PROMPTS[1]).softmax(-1)
    second = sum(p * next_logits(agent, PROMPTS[1] + [token]).softmax(-1)
                 for token, p in enumerate(first))
    assert_drawn_from(frequencies(agent, PROMPTS[1], 2, temperature=1.0), second)


def test_top_k_top_p_and_min_p():
    """Oracle: the definitions, over sorted probabilities after the temperature."""
    agent = new_agent("qwen2")
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


def test_answer_loss_is_cross_entropy_of_the_whole_model(agent):
    """Oracle: logits of model(input_ids) over prompt and answer as plain tokens, token by token;
    a batch of different lengths = its rows one by one."""
    with torch.no_grad():
        batch = agent.answer_loss(read_plain(agent, PROMPTS), TARGETS)
        for ids, target, losses in zip(PROMPTS, TARGETS, batch):
            single = agent.answer_loss(read_plain(agent, [ids]), [target])[0]
            logits = agent.model(torch.tensor([ids + target])).logits[0, len(ids) - 1:-1]
            plain = F.cross_entropy(logits, torch.tensor(target), reduction="none")
            for found in (losses, single):
                assert largest_difference(found, plain) < agent.close * max(1, plain.max())


def test_answer_loss_gradient_is_the_whole_models(agent):
    """With respect to latents in the prompt; oracle: the model run on embeddings at once."""
    torch.manual_seed(0)
    latents = [(0.2 * torch.randn(1, 3, agent.width)).requires_grad_() for _ in PROMPTS]
    rows = [torch.cat([embed_words(agent, ids), slot], 1) for ids, slot in zip(PROMPTS, latents)]
    total = torch.cat(agent.answer_loss(agent.read(*left_pad(rows)), TARGETS)).sum()
    plain = 0
    for row, target in zip(rows, TARGETS):
        logits = agent.model(inputs_embeds=torch.cat([row, embed_words(agent, target)], 1)).logits
        plain = plain + F.cross_entropy(logits[0, row.shape[1] - 1:-1], torch.tensor(target),
                                        reduction="sum")
    got, wanted = torch.autograd.grad(total, latents), torch.autograd.grad(plain, latents)
    for a, b in zip(got, wanted):
        assert b.abs().max() > 0
        assert largest_difference(a, b) < agent.close * max(1.0, b.abs().max().item())


def test_follow_gives_the_states_of_a_plain_run(agent):
    """State i = the hidden state at the prompt's last token (i = 0) or the i-th told one."""
    with torch.no_grad():
        states = agent.follow(read_plain(agent, PROMPTS), TARGETS)
        assert states.shape == (4, 1 + max(map(len, TARGETS)), agent.width)
        for b, (ids, target) in enumerate(zip(PROMPTS, TARGETS)):
            plain = agent.model(torch.tensor([ids + target]), output_hidden_states=True)
            plain = plain.hidden_states[-1][0, len(ids) - 1:]
            assert largest_difference(states[b, :1 + len(target)], plain) < agent.close


def test_follow_nothing_is_the_last_state(agent):
    context = read_plain(agent, PROMPTS)
    assert torch.equal(agent.follow(context, [[]] * 4), context.hidden)


def test_embedding_rms(agent):
    """Oracle: over the whole (small) table. Gemma's layer scales by the root of the width."""
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


@pytest.mark.parametrize("family", FAMILIES)
def test_load_agent_beside_an_adapter_config(tmp_path, family):
    """The loaded agent writes what the saved one does, and the folder stays as it was."""
    agent = new_agent(family)
    save_agent(agent, tmp_path / "agent")
    assert (tmp_path / "agent" / "adapter_config.json").is_file()
    before = {path.name: path.read_bytes() for path in (tmp_path / "agent").iterdir()}
    loaded = load_agent(tmp_path / "agent", torch.device("cpu"), torch.float32)
    assert {path.name: path.read_bytes() for path in (tmp_path / "agent").iterdir()} == before
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
    context, again = read_plain(agent, PROMPTS), read_plain(loaded, PROMPTS)
    assert agent.write(context, 6) == loaded.write(again, 6)
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
    loaded = load_agent(tmp_path, torch.device("cpu"), torch.float32)
    assert largest_difference(read_plain(loaded, PROMPTS).hidden,
                              read_plain(agent, PROMPTS).hidden) < agent.close


def test_load_agent_with_a_missing_weight(tmp_path):
    save_agent(new_agent("qwen3"), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj") as problem:
        load_agent(tmp_path, torch.device("cpu"), torch.float32)
    assert str(tmp_path) in str(problem.value) and "\n" not in str(problem.value)


def test_load_agent_with_weights_that_have_no_place(tmp_path):
    """A text config beside a text-and-image checkpoint loads nothing, silently, in the library."""
    agent = new_agent("gemma3_conditional")
    save_agent(agent, tmp_path)
    agent.model.config.text_config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks the weights"):
        load_agent(tmp_path, torch.device("cpu"), torch.float32)
    save_agent(new_agent("llama"), tmp_path / "more")
    state = load_file(tmp_path / "more" / "model.safetensors")
    state["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
    save_file(state, tmp_path / "more" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no place for .'model.layers.7.mlp.up_proj.weight'"):
        load_agent(tmp_path / "more", torch.device("cpu"), torch.float32)


def test_an_untied_head_is_kept(tmp_path):
    """As in Qwen3.5-9B; the smaller ones are tied (above), and say so at the top alone."""
    model = new_model("qwen3_5_conditional")
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    torch.manual_seed(7)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    agent = Agent(model, word_tokenizer())
    agent.inner = new_agent("qwen3_5").inner
    save_agent(agent, tmp_path)
    loaded = load_agent(tmp_path, torch.device("cpu"), torch.float32)
    assert torch.equal(loaded.head.weight, model.lm_head.weight)
    assert not torch.equal(loaded.head.weight, loaded.embedding.weight)


def test_load_agent_without_a_chat_template(tmp_path):
    """The error names the folder that was given."""
    agent = new_agent("llama")
    save_agent(agent, tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="no chat template") as problem:
        load_agent(tmp_path, torch.device("cpu"), torch.float32)
    assert str(tmp_path) in str(problem.value)


def test_load_agent_needs_no_writable_folder(tmp_path):
    """A relative path and links in the folder (as in the hub's cache) are followed."""
    agent = new_agent("llama")
    save_agent(agent, tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{path.name}")
    loaded = load_agent(tmp_path / "snapshot", torch.device("cpu"), torch.float32)
    shutil.rmtree(tmp_path / "blobs")
    context = read_plain(loaded, PROMPTS)
    assert largest_difference(context.hidden, read_plain(agent, PROMPTS).hidden) < agent.close


def test_pick_device(capsys):
    assert pick_device("cpu") == (torch.device("cpu"), torch.float32)
    assert pick_device("cpu", "bfloat16")[1] is torch.bfloat16
    assert "device cpu, frozen models in bfloat16" in capsys.readouterr().out
    for wrong in (("toaster", "auto"), ("cpu", "float12")):
        with pytest.raises(ValueError, match="unknown"):
            pick_device(*wrong)


def test_layers_of_an_unknown_kind_are_refused():
    model = new_model("qwen3")
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ValueError, match="chunked_attention"):
        Agent(model, word_tokenizer())


# ---- rows of a context --------------------------------------------------------------------------

@pytest.mark.parametrize("places", [[2], [3, 0, 2], [1, 1, 1], [0, 1, 2, 3, 3, 2, 0]])
def test_rows_of_a_context_are_those_prompts_read(agent, places):
    """Rows picked out, out of order and repeated. Oracles: slicing for what is held; each prompt
    alone for what follows; the original says what it said before."""
    context = read_plain(agent, PROMPTS)
    mask, last = context.mask.clone(), context.hidden.clone()
    before = agent.write(context, 5)
    rows = context.rows(places)
    assert torch.equal(rows.mask, mask[places]) and torch.equal(rows.hidden, last[places])
    for layer, whole in zip(rows.cache.layers, context.cache.layers):
        if isinstance(layer, NewStateLayer):
            assert torch.equal(layer.conv_states[0], whole.conv_states[0][places])
            assert torch.equal(layer.recurrent_states[0], whole.recurrent_states[0][places])
        else:
            assert torch.equal(layer.keys, whole.keys[places])
            assert torch.equal(layer.values, whole.values[places])
    with torch.no_grad():
        thoughts = agent.think(rows, M)
        said = agent.write(rows, 5)
        for row, place in enumerate(places):
            embeds = embed_words(agent, PROMPTS[place])
            assert largest_difference(thoughts[row:row + 1],
                                      plain_think(agent, embeds, M)) < agent.close
            assert said[row] == plain_write(agent, embeds, 5)
        more = agent.read(torch.ones(len(places), 3, agent.width),
                          torch.ones(len(places), 3, dtype=torch.long), rows)
        assert more.hidden.shape[0] == len(places)
    assert torch.equal(context.mask, mask) and torch.equal(context.hidden, last)
    assert context.cache.get_seq_length() == mask.shape[1] and agent.write(context, 5) == before


def test_rows_of_rows_in_half_of_a_batch(agent):
    """Rows of rows, after latents have been read on; oracle: one step of picking."""
    context = agent.read(torch.ones(4, 2, agent.width), torch.ones(4, 2, dtype=torch.long),
                      read_plain(agent, PROMPTS))
    twice, once = context.rows([3, 1, 1]).rows([2, 0]), context.rows([1, 3])
    with torch.no_grad():
        assert torch.equal(agent.think(twice, M), agent.think(once, M))
    assert agent.write(twice, 5) == agent.write(once, 5)

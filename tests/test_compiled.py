"""Compiled layers equal the plain step, are compiled once for all, and are left out if they fail.

Here nothing is recorded. The steps run in the same buffers without a CUDA graph. Most tests use a
backend that compiles nothing (aot_eager, eager). tests/test_agents.py has what else needs a GPU.
"""
import shutil
from functools import partial

import pytest
import torch
import torch._inductor.config
from conftest import (FAMILIES, QUESTIONS, THREE, embed_words, largest_difference, left_pad,
                      new_agent, new_mas, plain_think, words)
from torch._dynamo.testing import CompileCounterWithBackend

from agents import Agent
from cache import ROOM, Recorded, say_once
from support import compiled
from support.compiled import CompiledForward, one_position, set_compile

M = 5
PROMPTS = [words(question)[:7 + i] for i, question in enumerate(QUESTIONS[:4])]


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No test finds what another one has compiled."""
    torch._dynamo.reset()
    say_once.cache_clear()


def read(agent, prompts):
    """The Context of prompts as token ids."""
    return agent.read(*left_pad([embed_words(agent, ids) for ids in prompts]))


@pytest.fixture
def recording(monkeypatch):
    """Agents take recorded steps here too, without a graph. recording(backend) compiles by it."""
    def use(backend, graph=False):
        monkeypatch.setattr(Agent, "steps", lambda self, *asked: self.recorder.steps(*asked))
        monkeypatch.setattr(compiled, "Recorded", partial(Recorded, graph=graph))
        monkeypatch.setattr(compiled, "CompiledForward", partial(CompiledForward, backend=backend))
    return use


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_layers_are_the_plain_step_and_one_graph(family, recording, capsys):
    """All layers and lengths go through the same graph. There is one for the first batch, one for
    batches of any other size and one for single rows. Oracle: reference.py for each prompt alone,
    and the words that growing steps write."""
    agent, plain = new_agent(family), new_agent(family)
    counter = CompileCounterWithBackend("aot_eager")
    recording(counter)
    agent.recorder.choice, plain.recorder.choice = "1", "0"
    long = [(ids * 60)[:ROOM + 9] for ids in PROMPTS]
    for prompts, graphs in ((PROMPTS, 1), (long, 1), ([ids[:5] for ids in PROMPTS[1:]], 2),
                            (PROMPTS[:2], 2), (PROMPTS[:1], 3), (long[:1], 3), (PROMPTS, 3)):
        thoughts = agent.think(read(agent, prompts), M)
        for b, ids in enumerate(prompts):
            alone = plain_think(plain, embed_words(plain, ids), M)
            assert largest_difference(thoughts[b:b + 1], alone) < agent.close
        assert counter.frame_count == graphs
    agent.end_tokens = plain.end_tokens = {7, 8, 9}                # some rows end early, and leave
    assert agent.write(read(agent, PROMPTS), 12) == plain.write(read(plain, PROMPTS), 12)
    assert counter.frame_count == 3
    assert agent.recorder.recorded.compiled is agent.recorder.compiled
    assert capsys.readouterr().out.startswith("layers are compiled from now on (--compile 1)\n")
    assert agent.body.config._attn_implementation == "sdpa"
    assert not any("forward" in vars(layer) for layer in agent.body.layers)


@torch.no_grad()
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a compiler")
@pytest.mark.parametrize("family", FAMILIES)
def test_inductor(family, recording):
    agent = new_agent(family)
    context = read(agent, PROMPTS[:2])
    wanted = agent.think(context, M)
    recording("inductor")
    agent.recorder.choice = "1"
    with torch._inductor.config.patch({"cpp.vec_isa_ok": False, "compile_threads": 1}):   # faster
        assert largest_difference(agent.think(context, M), wanted) < agent.close
    assert agent.recorder.recorded.compiled is agent.recorder.compiled
    assert not agent.recorder.compiled.broken


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_layers_in_a_cuda_graph(family):
    """A batch, then a single row; thoughts, then words. Oracle: the same agent on the CPU."""
    there, here = new_agent(family), new_agent(family)
    agent = Agent(there.model.cuda(), there.tokenizer, there.inner.cuda())
    agent.recorder.choice = "1"
    for prompts in (PROMPTS[:1], PROMPTS, PROMPTS):
        embeds, mask = left_pad([embed_words(here, ids) for ids in prompts])
        context, plain = agent.read(embeds.cuda(), mask.cuda()), here.read(embeds, mask)
        thoughts = agent.think(context, M).cpu()
        assert largest_difference(thoughts, here.think(plain, M)) < 10 * here.close
        assert agent.write(context, 8) == here.write(plain, 8)
        assert agent.recorder.recorded.graph is not None
        assert agent.recorder.recorded.compiled is agent.recorder.compiled


@torch.no_grad()
def test_a_system_of_compiled_agents_answers_the_same(recording):
    """Three models of three widths, several rounds, offloaded or not."""
    wanted = new_mas().answer(QUESTIONS, 2, 3, max_new_tokens=6)
    counter = CompileCounterWithBackend("eager")
    recording(counter)
    for offload in (False, True):
        mas = new_mas()
        mas.offload = offload
        for agent in mas.agents.values():
            agent.recorder.choice = "1"
        assert mas.answer(QUESTIONS, 2, 3, max_new_tokens=6) == wanted
    assert counter.frame_count == 3, "a graph for each model, the second time none"


@torch.no_grad()
def test_compiled_once_it_pays(recording, capsys):
    """auto: after so many steps of batches; from then on for single rows too. 0: never."""
    agent = new_agent("llama")
    recorder = agent.recorder
    recording("eager")
    recorder.asked = {True: 0, False: 1000 - 2 * (M - 1)}
    batch, row = read(agent, PROMPTS), read(agent, PROMPTS[:1])
    wanted = agent.think(row, M)
    agent.think(batch, M)
    assert recorder.compiled is None and recorder.asked == {True: M - 1, False: 1000 - (M - 1)}
    assert capsys.readouterr().out == (
        "steps are recorded; layers are compiled after 5000 steps of single rows, or 1000 of more "
        "rows (--compile auto)\n")
    agent.think(row, M)
    assert recorder.compiled is None                                 # a single row pays later
    old = recorder.recorded
    agent.think(batch, M)
    assert recorder.recorded.compiled and recorder.recorded is not old
    assert largest_difference(agent.think(row, M), wanted) < agent.close
    assert recorder.recorded.compiled
    assert capsys.readouterr().out == "layers are compiled from now on (--compile auto)\n"
    recorder.recorded, recorder.compiled, recorder.choice = None, None, "0"
    agent.think(batch, M)
    assert recorder.recorded.compiled is None


def test_steps_with_gradients_do_not_count():
    """They are never compiled."""
    agent = new_agent("llama")
    agent.think(read(agent, PROMPTS), M)
    assert agent.recorder.asked == {True: 0, False: 0}


@torch.no_grad()
@pytest.mark.parametrize("sizes, tuned", [((1, 4, 1), [True, False, True]),
                                          ((4, 1), [False, False])])
def test_which_rows_are_tuned(sizes, tuned, recording):
    """Single rows, unless a batch came first. Tuned code is used again after a batch."""
    agent = new_agent("llama")
    recording("eager")
    agent.recorder.choice = "1"
    for rows, wanted in zip(sizes, tuned):
        context = read(agent, PROMPTS[:rows])
        agent.think(context, 2)
        used, code = [], agent.recorder.compiled.step
        agent.recorder.compiled.step = {which: partial(noted, used, which, step)
                               for which, step in code.items()}
        agent.think(context, 2)
        agent.recorder.compiled.step = code
        assert used == [wanted] * len(agent.body.layers)


def noted(used, which, step, *given, **options):
    used.append(which)
    return step(*given, **options)


def failing(graph_module, example_inputs):
    raise RuntimeError("no compiler\nat all")


@torch.no_grad()
@pytest.mark.parametrize("backend, graph, complaints", [
    (failing, False, ["are not compiled: BackendCompilerFailed: backend='failing' raised: "]),
    ("eager", True, ["layers are not compiled: ", "no CUDA graph, so steps are launched"])])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_what_fails_is_left_away(family, backend, graph, complaints, recording, capsys):
    """Without a compiler, and without a card that records: a line each, and right results."""
    if graph and torch.cuda.is_available():
        pytest.skip("here a CUDA graph can be made")
    agent, plain = new_agent(family), new_agent(family)
    recording(backend, graph)
    agent.recorder.choice = "1"
    for prompts in (PROMPTS, PROMPTS, PROMPTS[:1], PROMPTS):
        thoughts = agent.think(read(agent, prompts), M)
        for b, ids in enumerate(prompts):
            alone = plain_think(plain, embed_words(plain, ids), M)
            assert largest_difference(thoughts[b:b + 1], alone) < agent.close
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 + len(complaints) and "are compiled from now" in said[0], said
    assert all(complaint in line for complaint, line in zip(complaints, said[1:])), said


@torch.no_grad()
def test_three_agents_complain_once(recording, capsys):
    wanted = new_mas().answer(QUESTIONS, 2, 3, max_new_tokens=6)
    recording(failing)
    mas = new_mas()
    for agent in mas.agents.values():
        agent.recorder.choice = "1"
    assert mas.answer(QUESTIONS, 2, 3, max_new_tokens=6) == wanted
    assert capsys.readouterr().out.count("\n") == 2


def full(*_):
    """A card without room. CUDA names other numbers each time."""
    raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {torch.rand(1)} MiB.")


@torch.no_grad()
@pytest.mark.parametrize("where, lines", [
    ("cache.fixed_layer", ["the card has no room for recorded steps"]),
    ("cache.Recorded.recording", ["layers are not compiled: OutOfMemoryError: CUDA out of memory",
                                  "no CUDA graph, so steps are launched kernel by kernel: Out"])])
def test_a_full_card_takes_plain_steps(where, lines, recording, monkeypatch, capsys):
    """While buffers are made, or while a step is recorded. Two shapes complain once. Later, with
    more room, layers are compiled."""
    agent, plain = new_agent("llama"), new_agent("llama")
    recording("eager", graph=True)
    agent.recorder.choice, plain.recorder.choice = "1", "0"
    wanted = [(plain.think(read(plain, prompts), M), plain.write(read(plain, prompts), 4))
              for prompts in (PROMPTS, PROMPTS[:1])]
    say_once.cache_clear(), capsys.readouterr()
    with monkeypatch.context() as crowded:
        crowded.setattr(where, full)
        for prompts, (thoughts, words) in zip((PROMPTS, PROMPTS[:1]), wanted):
            assert largest_difference(agent.think(read(agent, prompts), M), thoughts) < agent.close
            tried = agent.recorder.recorded
            assert agent.write(read(agent, prompts), 4) == words
            assert agent.recorder.recorded is tried      # a shape that fails is tried once
    said = capsys.readouterr().out.splitlines()[1:]
    assert len(said) == len(lines) and all(map(str.startswith, said, lines)), said
    recording("eager")
    agent.recorder.recorded = None
    agent.think(read(agent, PROMPTS), M)
    assert agent.recorder.recorded.compiled


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2),
                                          (torch.float16, 2e-3)])
@pytest.mark.parametrize("bias", [0, 120])
def test_attention_of_one_position(bias, dtype, close):
    """Oracle: the library's own in float32, with keys and values copied for the heads that share
    them. With a bias, as Qwen2 has it, scores go to 100,000: more than float16 holds."""
    q, k, v = (torch.randn(3, heads, n, 8) for heads, n in ((6, 1), (2, 10), (2, 10)))
    q, k, v = ((part + shift).to(dtype) for part, shift in ((q, bias), (k, bias), (v, 0)))
    """Oracle: the library's own, with keys and values copied for the heads that share them."""
    q, k, v = (torch.randn(3, heads, n, 8) for heads, n in ((6, 1), (2, 10), (2, 10)))
    mask = torch.rand(3, 1, 1, 10) < 0.7
    mask[..., 0] = True
    got, _ = one_position(None, q, k, v, mask, scaling=0.3)
    q, k, v = q.float(), *(part.float().repeat_interleave(3, 1) for part in (k, v))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
    assert largest_difference(got.float(), wanted.transpose(1, 2)) < close


def test_the_choice_is_checked():
    mas = new_mas(THREE)
    for choice in ("auto", 0, "0"):
        set_compile(mas.agents.values(), choice)
    assert {agent.recorder.choice for agent in mas.agents.values()} == {"0"}
    for wrong, complaint in (("yes", "auto, 0 or 1"), (1, "is for a GPU"), ("1", "is for a GPU")):
        with pytest.raises(ValueError, match=complaint):
            set_compile(mas.agents.values(), wrong)

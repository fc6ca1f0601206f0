"""Compiled layers equal the plain step, are compiled once for all, and are left out if they fail.

No CUDA graph is made on a CPU. There recorded steps run in the same buffers without one, and most
tests use a backend that compiles nothing. tests/test_agents.py has what else needs a GPU.
"""
import dataclasses
import shutil
from functools import partial

import pytest
import torch
import torch._inductor.config
from helpers import (FAMILIES, QUESTIONS, embed_words, fast, largest_difference, left_pad,
                     new_agent, new_mas, plain_think, widen, words)
from helpers import read_plain as read
from torch._dynamo.testing import CompileCounterWithBackend

from agents import Agent
from cache import Growing
from gpu.compiled import CompiledForward, one_position, set_compile
from gpu.recorded import ROOM, Recorded
from support.errors import say_once

M = 4
# Agents are in float64. But the library's norms and our scores are in float32 there too, as they
# are compiled. Rollouts amplify that rounding: to 8e-6 at most here.
CLOSE = 1e-4
PROMPTS = [words(question)[:7 + i] for i, question in enumerate(QUESTIONS[:4])]
# Two families stand for all: plain, and with linear attention. The cheapest one for Inductor.
EIGHT, ONE = fast("qwen3", "qwen3_5", of=FAMILIES), fast("qwen3", of=FAMILIES)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No test finds what another one has compiled, or said."""
    torch._dynamo.reset()
    say_once.cache_clear()


@pytest.fixture
def recording(monkeypatch):
    """recording(agent, backend): the agent takes recorded steps on this CPU too, compiled by a
    backend. graph: it also tries to make a CUDA graph."""
    def use(agent, backend, graph=False):
        monkeypatch.setattr("gpu.recorded.Recorded", partial(Recorded, graph=graph))
        agent.recorder.compiled = CompiledForward(agent, backend)
        agent.steps = lambda context, count: (agent.recorder.steps(context, count)
                                              or Growing(agent.read, context))
        return agent
    return use


def counting():
    """A backend that compiles nothing, and counts the graphs that it is given."""
    return CompileCounterWithBackend("eager")


def check_thoughts(agent, plain, prompts):
    """The agent's thoughts are those of reference.py for each prompt alone."""
    thoughts = agent.think(read(agent, prompts), M)
    for b, ids in enumerate(prompts):
        alone = plain_think(plain, embed_words(plain, ids), M)
        assert largest_difference(thoughts[b:b + 1], alone) < CLOSE


@torch.no_grad()
@pytest.mark.parametrize("family", EIGHT)
def test_compiled_layers_are_the_plain_step_and_one_graph(family, recording, capsys):
    """All layers and lengths go through the same graph. There is one for the first batch, one for
    batches of any other size and one for single questions. Words are those of growing steps."""
    counter, plain = counting(), widen(new_agent(family))
    agent = recording(widen(new_agent(family)), counter)
    long = [(ids * 60)[:ROOM + 9] for ids in PROMPTS]
    for prompts, graphs in ((PROMPTS, 1), (long, 1), ([ids[:5] for ids in PROMPTS[1:]], 2),
                            (PROMPTS[:2], 2), (PROMPTS[:1], 3), (long[:1], 3), (PROMPTS, 3)):
        check_thoughts(agent, plain, prompts)
        assert counter.frame_count == graphs
    agent.end_tokens = plain.end_tokens = {7, 8, 9}               # some texts end early, and leave
    assert agent.write(read(agent, PROMPTS), 12) == plain.write(read(plain, PROMPTS), 12)
    assert counter.frame_count == 3 and "compile" not in capsys.readouterr().out
    # The model is as it was: other calls find its own layers and attention.
    assert agent.body.config._attn_implementation == "sdpa"
    assert not any("forward" in vars(layer) for layer in agent.body.layers)


@torch.no_grad()
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a compiler")
@pytest.mark.parametrize("family", ONE)
def test_inductor(family, recording, capsys):
    agent = widen(new_agent(family))
    context = read(agent, PROMPTS[:2])
    wanted = agent.think(context, M)
    recording(agent, "inductor")
    with torch._inductor.config.patch({"cpp.vec_isa_ok": False, "compile_threads": 1}):   # faster
        found = agent.think(context, M)
    assert 0 < largest_difference(found, wanted) < CLOSE
    assert "compile" not in capsys.readouterr().out


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_layers_in_a_cuda_graph(family):
    """A batch, then a single question; thoughts, then words. Oracle: the same agent on the CPU."""
    there, here = new_agent(family), new_agent(family)
    agent = Agent(there.model.cuda(), there.tokenizer, there.inner.cuda())
    set_compile([agent], 1)
    for prompts in (PROMPTS[:1], PROMPTS, PROMPTS):
        embeds, mask = left_pad([embed_words(here, ids) for ids in prompts])
        context, plain = agent.read(embeds.cuda(), mask.cuda()), here.read(embeds, mask)
        thoughts = agent.think(context, M).cpu()
        close = 5e-3 if "qwen3_5" in family else 1e-3
        assert largest_difference(thoughts, here.think(plain, M)) < close
        assert agent.write(context, 8) == here.write(plain, 8)
        assert agent.recorder.recorded.graph is not None
        assert agent.recorder.recorded.compiled is agent.recorder.compiled


@torch.no_grad()
@pytest.mark.parametrize("families, graphs", [
    (["qwen3"] * 3, 1), pytest.param(["qwen3", "llama", "qwen2"], 3, marks=pytest.mark.slow)])
def test_a_system_of_compiled_agents_answers_the_same(families, graphs, recording):
    """Three models, two rounds, offloaded or not. Each kind of model has one graph, made once."""
    wanted = new_mas(families=families).answer(QUESTIONS, 2, 3, max_new_tokens=6)
    counter = counting()
    for offload in (False, True):
        mas = dataclasses.replace(new_mas(families=families), offload=offload)
        for agent in mas.agents.values():
            recording(agent, counter)
        assert mas.answer(QUESTIONS, 2, 3, max_new_tokens=6) == wanted
    assert counter.frame_count == graphs


@torch.no_grad()
@pytest.mark.parametrize("sizes, tuned", [((1, 4, 1), [True, False, True]),
                                          ((4, 1), [False, False])])
def test_which_steps_are_tuned(sizes, tuned, recording, monkeypatch):
    """Those of single questions, unless a batch came first. Tuned code is used again after a batch.
    (Here torch.compile compiles nothing. It notes whether its code was asked for with options.)"""
    used = []

    def compile(forward, options=None, **unused):
        return lambda *inputs, **more: used.append(bool(options)) or forward(*inputs, **more)

    monkeypatch.setattr(torch, "compile", compile)
    agent = recording(new_agent("llama"), "inductor")
    for size, wanted in zip(sizes, tuned):
        used.clear()
        agent.think(read(agent, PROMPTS[:size]), 2)
        assert set(used) == {wanted}


def failing(graph_module, example_inputs):
    """A backend that cannot compile."""
    raise RuntimeError("no compiler\nat all")


@torch.no_grad()
@pytest.mark.parametrize("backend, graph, named", [
    (failing, False, ["backend='failing'"]), ("eager", True, ["layers", "CUDA graph"])])
def test_what_fails_is_left_away(backend, graph, named, recording, capsys):
    """Without a compiler, or a card that records, results are right. One line says it for all."""
    if graph and torch.cuda.is_available():
        pytest.skip("here a CUDA graph can be made")
    for family in ("qwen3", "qwen3_5"):
        agent, plain = recording(widen(new_agent(family)), backend, graph), widen(new_agent(family))
        for prompts in (PROMPTS, PROMPTS[:1], PROMPTS):
            check_thoughts(agent, plain, prompts)
    check_lines(capsys, named)


def check_lines(capsys, named):
    """As many lines were printed as there are words in `named`, each with one of them."""
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(named) and all(map(str.__contains__, said, named)), said


@torch.no_grad()
@pytest.mark.parametrize("where, named", [
    ("transformers.cache_utils.StaticLayer.lazy_initialization", ["--batch_size"]),
    ("torch.cuda.CUDAGraph", ["layers", "CUDA graph"])])
def test_a_full_card_takes_plain_steps(where, named, recording, monkeypatch, capsys):
    """While buffers are made, or while a step is recorded. Two shapes complain once, and what has
    no room is tried once for each. Later, with more room, layers are compiled."""
    agent, plain, tried = widen(new_agent("llama")), widen(new_agent("llama")), []
    counter = counting()

    def full(*unused):
        tried.append(where)                              # CUDA names other numbers each time
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {len(tried)} MiB.")

    recording(agent, counter, graph=True)
    with monkeypatch.context() as crowded:
        crowded.setattr(where, full)
        for prompts in (PROMPTS, PROMPTS[:1]):
            check_thoughts(agent, plain, prompts)
            assert agent.write(read(agent, prompts), 4) == plain.write(read(plain, prompts), 4)
    check_lines(capsys, named)
    assert len(tried) == 4 and agent.recorder.compiled
    monkeypatch.setattr("gpu.recorded.Recorded", partial(Recorded, graph=False))
    check_thoughts(agent, plain, PROMPTS[:2])            # another shape, so it is recorded anew
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2),
                                          (torch.float16, 2e-3)])
@pytest.mark.parametrize("bias", [0, 120])
def test_attention_of_one_position(bias, dtype, close):
    """Oracle: the library's own in float64, with keys and values copied for the heads that share
    them. With a bias, as Qwen2 has it, products go to 100,000: more than float16 holds."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, heads, n, 8) for heads, n in ((6, 1), (2, 10), (2, 10)))
    q, k, v = ((one + shift).to(dtype) for one, shift in ((q, bias), (k, bias), (v, 0)))
    mask = torch.rand(3, 1, 1, 10) < 0.7
    mask[..., 0] = True
    got, _ = one_position(None, q, k, v, mask, scaling=0.3)
    q, k, v = q.double(), *(one.double().repeat_interleave(3, 1) for one in (k, v))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
    assert largest_difference(got.double(), wanted.transpose(1, 2)) < close + (bias and 0.05)

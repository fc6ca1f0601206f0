"""bench.py: its reference equals the plain equations, all sections run, and what it works out about
memory equals what real models and caches take. No test looks at a time."""
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import (FAMILIES, inner_equation, largest_difference, new_agent, outer_equation,
                      plain_states, plain_think)

import bench
import common
from agents import Agent
from styles import Edge, Role, Style

TINY = ["--dims", "tiny", "--device", "cpu", "--threads", "1", "--repeats", "1"]


@pytest.fixture
def ask(monkeypatch, capsys):
    """ask(flags) runs bench.py with --dims tiny: what it printed, and its JSON line."""
    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["bench.py", *TINY, *flags])
        monkeypatch.setattr(bench, "TINY_QUESTIONS", 4)
        bench.main()
        printed = capsys.readouterr().out
        return printed, json.loads(printed.splitlines()[-1])
    return run


@pytest.fixture
def small(monkeypatch):
    """A Bench of tiny dimensions, with lively random links."""
    monkeypatch.setattr(sys, "argv", ["bench.py", *TINY])
    return bench.Bench(bench.flags())


# ---- the run ------------------------------------------------------------------------------------

def test_every_section_runs(ask):
    """One run over all of them: the physics, a table each, one JSON line with everything."""
    printed, figures = ask()
    assert list(figures["sections"]) == list(bench.SECTIONS)
    assert figures["threads"] == 1 and figures["torch"] == torch.__version__
    assert figures["hardware"] and figures["dims"] == "tiny" and figures["layers"] == 2
    # 2 layers of d = 64, 4 heads and 2 of keys and values of 16, inner width 128; norms; R_in.
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 16 + 2 * 64
    assert figures["weights"] == 4 * (2 * layer + 64 + 2 * (64 * 64 + 64) + 4 * 64)
    expected = 1000 * figures["weights"] / figures["bandwidth"]
    assert figures["floor_ms"] == pytest.approx(expected)
    for name, section in figures["sections"].items():
        assert section["peak_memory_mb"] > 0
        assert section["rows"]
        for row in section["rows"]:
            if "ours_s" in row:
                low, high = row["ours_s"][1:]
                assert 0 < low <= row["ours_s"][0] <= high and row["ratio"] > 0
                assert row["case"] in printed
    lines = printed.splitlines()
    assert lines.index(next(line for line in lines if "no step at B = 1" in line)) < 5


def test_sections_are_selected(ask):
    printed, figures = ask("--sections", "head", "step", "--layers", "1")
    assert list(figures["sections"]) == ["head", "step"] and figures["layers"] == 1
    assert "rollout:" not in printed


def test_half_precision(ask):
    """Within its own tolerance, in every section that compares results."""
    _, figures = ask("--dtype", "bfloat16", "--sections", "rollout", "step", "head", "round",
                     "inner", "outer", "decode", "pass10")
    assert figures["dtype"] == "torch.bfloat16" and len(figures["sections"]) == 8


def test_each_agent_may_have_other_dimensions(ask, monkeypatch):
    """As with --dims light: three models, and links between their widths."""
    def configs(name, layers):
        return [bench.dims("qwen3", 32 * i, 64, 2, 4, 2, 256, head_dim=16) for i in (1, 2, 3)]

    monkeypatch.setattr(bench, "chosen_configs", configs)
    _, figures = ask("--sections", "round", "outer", "growth")
    assert len(figures["sections"]["round"]["rows"]) == 1


def test_light_is_the_models_of_sequential_light():
    widths = [config.hidden_size for config in bench.chosen_configs("light", 3)]
    assert widths == [2048, 2048, 1536]
    assert {config.num_hidden_layers for config in bench.chosen_configs("light", 3)} == {3}
    assert [config.num_hidden_layers for config in bench.chosen_configs("light", 0)] == [28, 16, 28]


@pytest.mark.parametrize("flags, complaint", [
    (["--sections", "nothing"], "invalid choice: 'nothing'"),
    (["--dims", "qwen9"], "invalid choice: 'qwen9'"),
    (["--layers", "-1"], "must be at least 0"),
    (["--device", "tpu"], "unknown device 'tpu'")])
def test_wrong_flags_are_one_line(flags, complaint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        common.run(bench.main)
    complained = capsys.readouterr().err
    assert stopped.value.code == 2 and complained.count("\n") == 1 and complaint in complained


# ---- equality before any time -------------------------------------------------------------------

def wrong_think(agent, past, m):
    """Thoughts of which the last one is wrong."""
    thoughts = RIGHT["think"](agent, past, m)
    return torch.cat([thoughts[:, :-1], -thoughts[:, -1:]], 1)


def wrong_write(agent, past, *arguments, **options):
    said = RIGHT["write"](agent, past, *arguments, **options)
    said.ids[-1][-1] += 1
    return said


RIGHT = {"think": Agent.think, "write": Agent.write}


@pytest.mark.parametrize("section, name, wrong", [
    ("rollout", "think", wrong_think), ("round", "think", wrong_think),
    ("outer", "think", wrong_think), ("decode", "write", wrong_write)])
def test_a_wrong_result_is_an_error(section, name, wrong, ask, monkeypatch, capsys):
    monkeypatch.setattr(Agent, name, wrong)
    with pytest.raises(RuntimeError, match="no time is worth anything"):
        ask("--sections", section)
    assert "apart" not in capsys.readouterr().out               # no row, so no time, was printed


def test_a_wrong_loss_is_an_error(ask, monkeypatch):
    right = bench.train_inner.inner_loss
    monkeypatch.setattr(bench.train_inner, "inner_loss",
                        lambda *given: [1.01 * part for part in right(*given)])
    with pytest.raises(RuntimeError, match="no time is worth anything"):
        ask("--sections", "inner")


def test_apart():
    """In float32 the largest difference, in half precision a relative one; shapes must agree."""
    a = torch.tensor([3.0, 4.0])
    assert bench.apart(a, a) == 0 and bench.apart(a, a + torch.tensor([0, 0.5])) == 0.5
    assert bench.apart([a, a], [a, a - 2]) == 2
    assert bench.apart(a, torch.zeros(3)) == float("inf")
    assert bench.apart(a.bfloat16(), 2 * a.bfloat16()) == 0.5
    assert not bench.apart(a, a * float("nan")) <= 1
    with pytest.raises(ValueError):
        bench.apart([a], [a, a])


# ---- the reference ------------------------------------------------------------------------------

def test_reference_rollout(agent):
    """Equals the plain equations, for every family."""
    embeds = agent.embedding(torch.tensor([[5, 9, 14, 3, 8]]))
    got = bench.published_rollout(agent, embeds, 4)
    assert largest_difference(got, plain_think(agent, embeds, 4)) <= agent.close


def test_reference_rounds(mas):
    """What is sent in two rounds, by the equations; R_out(R_in(H)) along the style's edges."""
    thoughts = {}

    def think(agent, embeds):
        thoughts[len(thoughts)] = agent, plain_think(agent, embeds, 3)
        return thoughts[len(thoughts) - 1][1]

    last, embeds, sent = bench.published_rounds(mas, ["start 3 s1 x7"], 2, think, mas.agents.get)
    assert last is mas.agents["solver"] and len(thoughts) == 5 and embeds.shape[2] == last.width
    turns = [(1, "planner"), (1, "critic"), (1, "solver"), (2, "planner"), (2, "critic")]
    assert len(sent) == sum(edge.src == who for _, who in turns for edge in mas.style.edges)
    for (agent, H), (round, who) in zip(thoughts.values(), turns):
        for edge in mas.style.edges:
            if edge.src == who:
                expected = outer_equation(mas.outer[edge.key], inner_equation(agent.inner, H))
                assert largest_difference(sent[round, edge.key], expected) <= 1e-5


def test_reference_training(small):
    """Inner: the loss of the first step. Outer, teacher forcing at R = 1: the answer's loss."""
    agent, style = small.agent, small.mas.style
    question, gold = bench.some_words(5), bench.some_words(4, seed=1)
    prompt = torch.tensor([agent.tokenize([f"w1 {question} w2"])[0]])
    ids = torch.tensor(agent.tokenize([gold]))
    states = plain_states(agent, agent.embedding(torch.cat([prompt, ids], 1)))[0]   # (T + n, d)
    got = inner_equation(agent.inner, states[-5:-1])
    expected = 1 - F.cosine_similarity(got, agent.embedding(ids)[0], dim=-1).mean()
    link = agent.inner.requires_grad_(True)
    losses = bench.published_inner_steps(agent, style, link, [(question, "math", {}, gold)], 1)
    assert losses == pytest.approx([expected.item()], abs=1e-5)

    link.requires_grad_(False)
    small.mas.outer.requires_grad_(True)
    loss = bench.published_outer_loss(small.mas, [{"question": question, "text": gold}], 1, 3,
                                      "teacher")
    heard = prompt                                      # the planner has heard nothing
    for key in ("to_critic", "to_solver"):
        embeds = heard if heard.dim() == 3 else agent.embedding(heard)
        states = plain_states(agent, torch.cat([embeds, agent.embedding(ids)], 1))[:, -4:]
        said = outer_equation(small.mas.outer[key], inner_equation(agent.inner, states))
        heard = torch.cat([agent.embedding(prompt[:, :-1]), said, agent.embedding(prompt[:, -1:])],
                          1)
    states = plain_states(agent, torch.cat([heard, agent.embedding(ids)], 1))[0, -5:-1]
    assert loss == pytest.approx(F.cross_entropy(agent.model.lm_head(states), ids[0]).item(),
                                 abs=1e-5)
    assert small.mas.outer["to_solver"].proj1.weight.grad.abs().max() > 0


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen3_5_conditional"])
def test_model_memory_is_the_real_one(family):
    """Weights and buffers of the loaded model; keys, values and states after really reading.

    (Of a conditional Qwen3.5 the text model is loaded, which is the other one here.)"""
    agent = new_agent(family)
    weights, cache, width = bench.model_memory(agent.model.config, torch.float32, 3, 7)
    past = agent.read(torch.randn(3, 7, agent.width), torch.ones(3, 7, dtype=torch.long))
    held = 0
    for layer in past.cache.layers:
        tensors = ([layer.keys, layer.values] if hasattr(layer, "keys")
                   else [*layer.conv_states.values(), *layer.recurrent_states.values()])
        held += sum(tensor.nbytes for tensor in tensors)
    assert weights == sum(one.nbytes for one in (*agent.model.parameters(),
                                                 *agent.model.buffers()))
    assert cache == held > 0 and width == agent.width


def test_style_memory_counts_a_shared_model_once(mas):
    """The three-family system, and a style whose two roles share a base model."""
    configs = {name: agent.model.config for name, agent in mas.agents.items()}
    roles = tuple(Role(role.name, role.name, "", role.prompt, role.first)
                  for role in mas.style.roles)
    size = bench.style_memory(Style("three", roles, mas.style.edges), configs, torch.float32, 2, 5)
    links = [*mas.outer.parameters()]
    links += [weight for agent in mas.agents.values() for weight in agent.inner.parameters()]
    assert size["links"] == sum(weight.nbytes for weight in links)
    assert size["weights"] == sum(one.nbytes for agent in mas.agents.values()
                                  for one in (*agent.model.parameters(), *agent.model.buffers()))
    assert size["largest"] == max(sum(one.nbytes for one in (*agent.model.parameters(),
                                                             *agent.model.buffers()))
                                  for agent in mas.agents.values())
    two = Style("two", (Role("a", "planner", "", "{question}\n{b}"),
                        Role("b", "planner", "", "{question}\n{a}")),
                (Edge("ab", "a", "b"), Edge("ba", "b", "a")))
    shared = bench.style_memory(two, configs, torch.float32, 2, 5)
    one = bench.model_memory(configs["planner"], torch.float32, 2, 5)
    assert shared["weights"] == shared["largest"] == one[0] and shared["cache"] == 2 * one[1]


def test_memory_table(capsys):
    """Every real style is in it; the links of two are those of the paper's table."""
    bench.memory_table(tokens=10)
    lines = {tuple(line.split()[:2]): line.split()[2:]
             for line in capsys.readouterr().out.splitlines()}
    assert len(lines) == 12
    assert lines["sequential_light", "bfloat16"][2] == f"{4 * (21.5 + 53.0) / 1000:.2f}"
    assert lines["sequential_scaled", "float32"][2] == f"{4 * (45.1 + 112.0) / 1000:.2f}"

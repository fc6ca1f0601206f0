"""bench.py: what it works out equals what real models and caches take."""
import pytest
import torch
from conftest import FAMILIES, new_agent

import bench
from styles import Edge, Role, Style


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
    two = Style("two", (Role("a", "planner", "", "{question}\n{b}"),
                        Role("b", "planner", "", "{question}\n{a}")),
                (Edge("ab", "a", "b"), Edge("ba", "b", "a")))
    shared = bench.style_memory(two, configs, torch.float32, 2, 5)
    one = bench.model_memory(configs["planner"], torch.float32, 2, 5)
    assert shared["weights"] == one[0] and shared["cache"] == 2 * one[1]


def test_memory_table(capsys):
    """Every real style is in it; the links of two are those of the paper's table."""
    bench.memory_table(tokens=10)
    lines = {tuple(line.split()[:2]): line.split()[2:]
             for line in capsys.readouterr().out.splitlines()}
    assert len(lines) == 12
    assert lines["sequential_light", "bfloat16"][1] == f"{4 * (21.5 + 53.0) / 1000:.2f}"
    assert lines["sequential_scaled", "float32"][1] == f"{4 * (45.1 + 112.0) / 1000:.2f}"

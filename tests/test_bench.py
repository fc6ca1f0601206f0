"""bench.py: all sections run, what is compared agrees, a section that fails loses no other one, and
what it works out about memory equals what real models and caches take. No test looks at a time."""
import argparse
import json
import sys

import pytest
import torch
from conftest import FAMILIES, new_agent

import bench
import reference
from agents import Agent
from styles import Edge, Role, Style
from support import dimensions, flags
from support.compared import plain_think

TINY = ["--dims", "tiny", "--device", "cpu", "--threads", "1", "--repeats", "1"]


@pytest.fixture
def ask(monkeypatch, capsys):
    """ask(flags) runs bench.py with --dims tiny: what it printed, and its JSON line."""
    def run(*options):
        monkeypatch.setattr(sys, "argv", ["bench.py", *TINY, *options])
        code = 0
        try:
            bench.main()
        except SystemExit as stopped:
            code = stopped.code
        printed = capsys.readouterr().out
        return printed, json.loads(printed.splitlines()[-1]), code
    return run


@pytest.fixture
def small():
    """A Bench of tiny dimensions."""
    return bench.Bench(argparse.Namespace(dims="tiny", layers=0, device="cpu", dtype="auto",
                                          threads=1, repeats=1, compile="auto"))


# ---- the run ------------------------------------------------------------------------------------

def test_every_section_runs(ask):
    """One run over all of them: a table each, and one JSON line with everything."""
    printed, figures, code = ask()
    assert code == 0 and "FAILED" not in printed
    assert list(figures["sections"]) == list(bench.SECTIONS)
    assert figures["threads"] == 1 and figures["torch"] == torch.__version__
    assert figures["dims"] == "tiny" and figures["dtype"] == "torch.float32"
    for name, rows in figures["sections"].items():
        assert f"\n{name}: " in printed and rows
        for row in rows:
            if "ours_s" in row:
                assert len(row["ours_s"]) == len(row["reference_s"]) == 1
                assert row["ours_s"][0] > 0 and row["ratio"] > 0 and row["case"] in printed
                assert row["apart"] is None or 0 <= row["apart"] <= 1e-3
                assert (row["apart"] is None) == (name == "step")
    counts = {name: len(rows) for name, rows in figures["sections"].items()}
    assert counts == {"step": 2, "rollout": 2, "answer": 1, "training": 3, "decoding": 1,
                      "memory": 10}


def test_the_physics(ask):
    """The floor is the time of reading the weights of a step."""
    printed, figures, _ = ask("--sections", "step")
    timed, memory = figures["sections"]["step"]
    # 2 layers of d = 64, 4 heads and 2 of keys and values of 16, inner width 128; norms; R_in.
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 16 + 2 * 64
    assert memory["weights"] == 4 * (2 * layer + 64 + 2 * (64 * 64 + 64) + 4 * 64)
    assert timed["reference_s"][0] == pytest.approx(memory["weights"] / memory["bandwidth"])
    assert f"{memory['bandwidth'] / 1e9:.1f} GB/s" in printed


def test_sections_and_layers_are_selected(ask):
    printed, figures, _ = ask("--sections", "decoding", "rollout", "--layers", "1")
    assert list(figures["sections"]) == ["decoding", "rollout"] and figures["layers"] == 1
    assert "\ntraining:" not in printed and "2 layers" not in printed
    assert all("1 layers" in row["case"] for row in figures["sections"]["rollout"])


def test_half_precision(ask):
    """In every section that compares results, ours is about as near to float32 as the reference."""
    _, figures, code = ask("--dtype", "bfloat16", "--sections", "step", "rollout", "answer",
                           "training", "decoding")
    assert code == 0 and figures["dtype"] == "torch.bfloat16"
    apart = [row["apart"] for row in figures["sections"]["rollout"]]
    assert max(apart) <= 0.1


@torch.no_grad()
def test_the_batch_of_the_reference_is_the_reference():
    agent = dimensions.new_agent("tiny", 0, torch.device("cpu"), torch.float32)
    texts = dimensions.some_texts(8, 3)
    for text, thoughts in zip(texts, plain_think(agent, texts, 4), strict=True):
        alone = reference.think(agent, reference.embed(agent, [text]), 4)
        torch.testing.assert_close(thoughts, alone, atol=1e-4, rtol=1e-3)


@pytest.fixture
def wide(monkeypatch):
    """The planner of "tiny" is a model of 4 layers of width 2048."""
    real = dimensions.real_dims()
    wide = dimensions.dims("qwen3", 2048, 6144, 4, 16, 8, 256, head_dim=128)
    monkeypatch.setattr(dimensions, "real_dims", lambda: {"wide": wide, "tiny": real["tiny"]})
    monkeypatch.setitem(bench.DIMS, "tiny", ["wide", "tiny", "tiny"])


@torch.no_grad()
def test_weights_are_drawn_so_that_results_can_be_compared(wide, ask):
    """With the library's own spread, a rollout of this width is chaotic: a small push on the prompt
    grows with each thought. With ours it does not. So half precision can be judged."""
    for spread, low, high in ((0.02 * 2048 ** 0.5, 20, 1000), (0.3, 0.5, 3)):
        torch.manual_seed(0)
        agent = dimensions.new_agent("wide", 0, torch.device("cpu"), torch.float32, spread)
        embeds, mask = agent.embed([[list(range(3, 19))]], {})
        push = 1e-3 * torch.randn_like(embeds) * embeds.std()
        before, after = (agent.think(agent.read(x, mask), 12)[0] for x in (embeds, embeds + push))
        grown = (after - before).norm(dim=-1) / before.norm(dim=-1) / 1e-3
        assert low < grown[-1] < high and (spread == 0.3 or grown[-1] > 8 * grown[0]), grown
    _, figures, code = ask("--dtype", "bfloat16", "--sections", "rollout")
    assert code == 0 and all(row["apart"] < 0.05 for row in figures["sections"]["rollout"])


def test_half_precision_is_judged_by_float32(small, monkeypatch):
    """Ours may be twice as far from the reference's float32 result as the reference's own."""
    small.dtype = torch.bfloat16
    monkeypatch.setattr(bench, "in_float32", lambda system: "float32")
    right = torch.ones(100)

    def sides(off):
        return (lambda system: [right * (1 if system == "float32" else 1.01)],
                lambda system: [right * (1 + off)])
    for off in (0.019, -0.019):
        small.compare("near", None, *sides(off))
        assert small.rows[-1]["apart"] == pytest.approx(0.019, rel=1e-3)
    for off in (0.021, -0.021, float("nan")):
        with pytest.raises(RuntimeError, match="far: our result is .* and 0.02 is allowed"):
            small.compare("far", None, *sides(off))


@torch.no_grad()
def test_a_copy_in_float32():
    """It has the same weights and computes in float32. The original stays what it is."""
    torch.manual_seed(0)
    mas = bench.Bench(argparse.Namespace(dims="tiny", layers=0, device="cpu", dtype="bfloat16",
                                         threads=1, repeats=1, compile="auto")).mas
    twin = bench.in_float32(mas)
    for name, agent in mas.agents.items():
        assert agent.dtype == agent.embedding.weight.dtype == torch.bfloat16
        thoughts = [one.think(bench.read(one, ["w5 w6"]), 2) for one in (agent, twin.agents[name])]
        assert thoughts[0].dtype == torch.bfloat16 and thoughts[1].dtype == torch.float32
        assert 0 < bench.apart(thoughts[:1], thoughts[1:]) < 0.05
    weights = zip(mas.outer.parameters(), twin.outer.parameters())
    assert all(torch.equal(a.float(), b) and b.dtype == torch.float32 for a, b in weights)


def test_each_agent_may_have_other_dimensions(ask, monkeypatch):
    """As with --dims light: three models, and links between their widths."""
    configs = {f"width {width}": dimensions.dims("qwen3", width, 64, 2, 4, 2, 256, head_dim=16)
               for width in (32, 64, 96)}
    monkeypatch.setattr(dimensions, "real_dims", lambda: configs)
    monkeypatch.setitem(bench.DIMS, "tiny", list(configs))
    _, figures, code = ask("--sections", "answer", "training")
    assert code == 0 and len(figures["sections"]["training"]) == 3


def test_light_is_the_models_of_sequential_light():
    configs = [dimensions.real_dims()[base] for base in bench.DIMS["light"]]
    assert [config.hidden_size for config in configs] == [2048, 2048, 1536]
    assert [config.num_hidden_layers for config in configs] == [28, 16, 28]


def test_layers_of_an_agent():
    """As many as were asked for, or all of them."""
    for layers, expected in ((1, 1), (0, 2)):
        agent = bench.new_agent("tiny", layers, torch.device("cpu"), torch.float32)
        assert len(agent.body.layers) == expected and not agent.end_tokens


@pytest.mark.parametrize("options, complaint", [
    (["--sections", "nothing"], "invalid choice: 'nothing'"),
    (["--dims", "qwen9"], "invalid choice: 'qwen9'"),
    (["--layers", "-1"], "must be at least 0"),
    (["--capture", "off"], "unrecognized arguments"),
    (["--device", "tpu"], "unknown device 'tpu'")])
def test_wrong_flags_are_one_line(options, complaint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", *options])
    with pytest.raises(SystemExit) as stopped:
        flags.run(bench.main)
    complained = capsys.readouterr().err
    assert stopped.value.code == 2 and complained.count("\n") == 1 and complaint in complained


# ---- one comparison -----------------------------------------------------------------------------

def test_repeats_and_patience(small, monkeypatch):
    """Both take turns `repeats` times, but only twice where that takes long."""
    turns = []
    sides = [lambda _: turns.append("reference"), lambda _: turns.append("ours")]
    small.args.repeats = 3
    small.compare("quick", None, *sides, agree=False)
    assert turns == ["reference", "ours"] * 3 and len(small.rows[0]["ours_s"]) == 3
    monkeypatch.setattr(bench, "PATIENCE", 0)
    small.compare("slow", None, *sides, agree=False)
    assert len(turns) == 10 and len(small.rows[1]["reference_s"]) == 2


def test_apart():
    """|a - b| / |b|, the largest of a list. Sizes must agree, and a NaN is never close."""
    a = torch.tensor([3.0, 4.0])
    assert bench.apart([a], [a]) == 0
    assert bench.apart([a, a], [a, 2 * a]) == pytest.approx(0.5)
    assert bench.apart([2 * a, a], [a, a]) == pytest.approx(1)
    assert bench.apart([a.bfloat16()], [2 * a.bfloat16()]) == pytest.approx(0.5)
    for ours in ([a * float("nan"), a], [a, a * float("nan")]):
        assert not bench.apart(ours, [a, a]) <= 1
    with pytest.raises(RuntimeError):
        bench.apart([a], [torch.ones(3)])
    with pytest.raises(ValueError):
        bench.apart([a], [a, a])


# ---- equality before any time -------------------------------------------------------------------

RIGHT = {"think": Agent.think, "write": Agent.write, "answer_loss": Agent.answer_loss}


def wrong_think(agent, context, m):
    """Thoughts of which the last one is wrong."""
    thoughts = RIGHT["think"](agent, context, m)
    return torch.cat([thoughts[:, :-1], -thoughts[:, -1:]], 1)


def wrong_write(agent, context, *arguments, **options):
    """Words of which the last one is another one."""
    written = RIGHT["write"](agent, context, *arguments, **options)
    return [[*tokens[:-1], (tokens[-1] + 99) % 256] for tokens in written]


def test_the_inner_losses_are_of_a_link_that_learns(ask):
    """Both sides of that row: the same losses, and they fall."""
    agent = new_agent("qwen3")
    texts = [" ".join(["w1 w2 w3 w4"] * 3)] * 2
    again, once = (bench.inner_losses(agent, texts, way) for way in (True, False))
    assert len(once) == bench.EPOCHS and torch.equal(torch.stack(again), torch.stack(once))
    assert once[-1] < once[0]


def wrong_loss(agent, context, targets):
    """A cross-entropy that is 1 % too large."""
    return [1.01 * losses for losses in RIGHT["answer_loss"](agent, context, targets)]


@pytest.mark.parametrize("section, name, wrong", [
    ("rollout", "think", wrong_think), ("answer", "think", wrong_think),
    ("training", "think", wrong_think), ("training", "answer_loss", wrong_loss),
    ("decoding", "write", wrong_write)])
def test_a_wrong_result_is_an_error(section, name, wrong, ask, monkeypatch):
    """It names its section, and no time is printed for it. Other sections still run."""
    monkeypatch.setattr(Agent, name, wrong)
    printed, figures, code = ask("--sections", section, "step")
    assert code == 1 and f"section {section} FAILED: RuntimeError: " in printed
    *before, last = figures["sections"][section]
    assert "no time is worth anything" in last["why"] and "ours_s" not in last
    assert all(row["case"].startswith("inner") for row in before)      # rows that are right
    assert len(figures["sections"]["step"]) == 2


def test_a_failing_section_loses_no_other_one(ask, monkeypatch):
    def broken(self):
        raise KeyError("nothing\nis here")

    monkeypatch.setattr(bench.Bench, "rollout", broken)
    broken.__doc__ = "Broken."
    printed, figures, code = ask("--sections", "step", "rollout", "decoding")
    assert code == 1 and printed.count("FAILED") == 1 and "section rollout FAILED" in printed
    assert [len(rows) for rows in figures["sections"].values()] == [2, 1, 1]


# ---- memory -------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen3_5_conditional"])
def test_model_memory_is_the_real_one(family):
    """Weights and buffers of the loaded model; keys, values and states after really reading.

    (Of a conditional Qwen3.5 the text model is loaded, which is the other one here.)"""
    agent = new_agent(family)
    weights, cache, width = dimensions.model_memory(agent.model.config, torch.float32, 3, 7)
    context = agent.read(torch.randn(3, 7, agent.width), torch.ones(3, 7, dtype=torch.long))
    held = 0
    for layer in context.cache.layers:
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
    three = Style("three", roles, mas.style.edges)
    size = dimensions.style_memory(three, configs, torch.float32, 2, 5)
    links = [*mas.outer.parameters()]
    links += [weight for agent in mas.agents.values() for weight in agent.inner.parameters()]
    assert size["links"] == sum(weight.nbytes for weight in links)
    models = [sum(one.nbytes for one in (*agent.model.parameters(), *agent.model.buffers()))
              for agent in mas.agents.values()]
    assert size["weights"] == sum(models) and size["largest"] == max(models)
    two = Style("two", (Role("a", "planner", "", "{question}\n{b}", "{question}"),
                        Role("b", "planner", "", "{question}\n{a}")),
                (Edge("ab", "a", "b"), Edge("ba", "b", "a")))
    shared = dimensions.style_memory(two, configs, torch.float32, 2, 5)
    one = dimensions.model_memory(configs["planner"], torch.float32, 2, 5)
    assert shared["weights"] == shared["largest"] == one[0] and shared["cache"] == 2 * one[1]


def test_memory_table(capsys):
    """Every real style is in it; the links of two are those of the paper's table."""
    rows = dimensions.memory_table(tokens=10)
    printed = capsys.readouterr().out
    lines = {tuple(line.split()[:2]): line.split()[2:] for line in printed.splitlines()}
    assert len(lines) == 12 and len(rows) == 10 and "recalled" in printed
    assert lines["sequential_light", "bfloat16"][2] == f"{4 * (21.5 + 53.0) / 1000:.2f}"
    assert lines["sequential_scaled", "float32"][2] == f"{4 * (45.1 + 112.0) / 1000:.2f}"
    for row in rows:
        assert lines[row["case"], row["dtype"]][0] == f"{row['weights'] / 1e9:.2f}"

"""python -m bench: all sections run, equal results come before any time, a section that fails loses
no other one, and the memory it works out is the memory that real models and caches take."""
import argparse
import json
from dataclasses import replace

import pytest
import torch
from helpers import FAMILIES, fast, lines_of, new_agent, nothing_in_float32, read_plain, widen

import reference
from agents import Agent
from bench import __main__ as bench
from bench import card, models, parts
from bench.both_sides import apart, in_float32, plain_think, read
from bench.library import WAYS, library_agent
from bench.reading import reading_agent

TINY = ["--dims", "tiny", "--device", "cpu", "--threads", "1", "--repeats", "1"]


@pytest.fixture
def ask(run):
    """ask(flags) runs the bench with --dims tiny: what it printed, its JSON line, its exit code."""
    def ask(*options):
        code, printed, _ = run(bench, *TINY, *options)
        return printed, json.loads(printed.splitlines()[-1]), code
    return ask


def small(dtype="auto"):
    return bench.Bench(argparse.Namespace(dims="tiny", layers=0, device="cpu", dtype=dtype,
                                          threads=1, repeats=1, compile=None))


def test_every_section_runs(ask):
    """One run over all of them: a table each, and one JSON line with everything."""
    printed, figures, code = ask()
    assert code == 0 and "FAILED" not in printed
    counts = {name: len(lines) for name, lines in figures["sections"].items()}
    assert counts == {"step": 2, "rollout": 2, "answer": 1, "training": 2, "decoding": 1,
                      "memory": 2} and list(counts) == list(bench.SECTIONS)
    assert figures["threads"] == 1 and figures["torch"] == torch.__version__
    assert (figures["dims"], figures["dtype"], figures["compile"]) == ("tiny", "torch.float32", 0)
    for name, lines in figures["sections"].items():
        assert f"\n{name}: " in printed
        for line in lines:
            assert line["case"] in printed or line["case"] == "bandwidth"
            if "ours_s" in line:
                assert len(line["ours_s"]) == len(line["reference_s"]) == 1
                assert line["ours_s"][0] > 0 and line["ratio"] > 0
                assert line["apart"] is None if name == "step" else 0 <= line["apart"] <= 1e-3
    # The floor is the time of reading the weights of a step: 2 layers (d = 64, 4 heads and 2 of
    # keys and values of 16, inner width 128), norms, and R_in.
    timed, memory = figures["sections"]["step"]
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 16 + 2 * 64
    assert memory["weights"] == 4 * (2 * layer + 64 + 2 * (64 * 64 + 64) + 4 * 64)
    assert timed["reference_s"][0] == pytest.approx(memory["weights"] / memory["bandwidth"])
    assert f"{memory['bandwidth'] / 1e9:.1f} GB/s" in printed
    check_memory(printed, figures["sections"]["memory"])


def check_memory(printed, lines):
    """The table of memory has these lines. The links have the paper's numbers of parameters."""
    paper = {"sequential_light": 4 * (21.5 + 53.0), "sequential_scaled": 4 * (45.1 + 112.0)}  # MB
    table = {tuple(line.split()[:2]): line.split()[2:] for line in printed.splitlines()}
    for line in lines:
        weights, largest, links, cache = map(float, table[line["case"], line["dtype"]])
        assert weights == round(line["weights"] / 1e9, 2) >= largest > cache > 0
        assert links == round(paper.get(line["case"], 1000 * links) / 1000, 2)


@pytest.mark.slow
def test_memory_of_all_styles_in_both_dtypes(capsys):
    lines = models.memory_table(tokens=10)
    assert len(lines) == 10
    check_memory(capsys.readouterr().out, lines)


def test_each_agent_may_have_other_dimensions(ask, monkeypatch):
    """As with --dims light: three models, and links between their widths. In half precision too."""
    configs = {family: models.dims(family, width, 64, 2, 4, 2, 256, head_dim=16)
               for family, width in (("qwen3", 32), ("llama", 64), ("qwen2", 96))}
    light = [models.real_dims()[base] for base in bench.DIMS["light"]]
    assert [(one.hidden_size, one.num_hidden_layers) for one in light] == [
        (2048, 28), (2048, 16), (1536, 28)]
    monkeypatch.setattr(models, "real_dims", lambda: configs)
    monkeypatch.setitem(bench.DIMS, "tiny", list(configs))
    chosen = ["training", "step", "rollout", "answer", "decoding"]
    for dtype in ("float32", "bfloat16"):
        printed, figures, code = ask("--dtype", dtype, "--layers", 1, "--sections", *chosen)
        assert code == 0 and (figures["dtype"], figures["layers"]) == (f"torch.{dtype}", 1)
        assert list(figures["sections"]) == chosen and "\nmemory:" not in printed
        assert all("1 layers" in line["case"] for line in figures["sections"]["rollout"])
    # Llama's config brings an end token. Here no text ends before its length.
    llama = models.new_agent("llama", 1, torch.device("cpu"), torch.float32)
    assert len(llama.body.layers) == 1 and not llama.end_tokens


@pytest.mark.parametrize("options, named", lines_of("wrong_bench.jsonl"))
def test_wrong_flags_are_one_line(options, named, run):
    code, _, errors = run(bench, *options)
    assert code == 2 and len(errors) == 1 and named in errors[0]


def test_repeats_and_patience(monkeypatch):
    """Both take turns `repeats` times, but only twice where that takes long. Times are per step."""
    turns, one = [], small()
    sides = [lambda _: turns.append("reference"), lambda _: turns.append("ours")]
    one.args.repeats = 3
    one.compare("quick", None, *sides, agree=False)
    assert turns == ["reference", "ours"] * 3 and len(one.lines[0]["ours_s"]) == 3
    monkeypatch.setattr(bench, "PATIENCE", 0)
    one.compare("slow", None, *sides, per=10**12, agree=False)
    assert len(turns) == 10 and len(one.lines[1]["reference_s"]) == 2
    assert max(one.lines[1]["ours_s"]) < 1e-9 < min(one.lines[0]["ours_s"])


def test_half_precision_is_judged_by_float32():
    """Ours may be twice as far from the reference's float32 result as the reference's own."""
    one, right = small("bfloat16"), torch.ones(100)

    def theirs(agent):
        return [right * (1 if agent.dtype == torch.float32 else 1.01)]

    for off in (0.019, -0.019):
        one.compare("near", one.agent, theirs, lambda _: [right * (1 + off)])
        assert one.lines[-1]["apart"] == pytest.approx(0.019, rel=1e-3)
    for off in (0.021, -0.021, float("nan")):
        with pytest.raises(RuntimeError, match="far.*0.02 is allowed"):
            one.compare("far", one.agent, theirs, lambda _: [right * (1 + off)])


def test_the_batch_of_the_reference_is_the_reference():
    agent = models.new_agent("tiny", 0, torch.device("cpu"), torch.float64)
    texts = models.some_texts(8, 3)
    for text, thoughts in zip(texts, plain_think(agent, texts, 4), strict=True):
        alone = reference.think(agent, reference.embed(agent, [text]), 4)
        torch.testing.assert_close(thoughts, alone, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_weights_are_drawn_so_that_results_can_be_compared(ask, monkeypatch):
    """With the spread 0.9, which is the library's at width 2048, a small push on the prompt grows
    with each thought. With ours it does not. So half precision can be judged."""
    configs = {"wide": models.dims("qwen3", 512, 1536, 4, 8, 4, 256, head_dim=64),
               "tiny": models.real_dims()["tiny"]}
    monkeypatch.setattr(models, "real_dims", lambda: configs)
    monkeypatch.setitem(bench.DIMS, "tiny", ["wide", "tiny", "tiny"])
    for spread, low, high in (({"spread": 0.9}, 12, 1000), ({}, 0.5, 3)):
        torch.manual_seed(0)
        agent = models.new_agent("wide", 0, torch.device("cpu"), torch.float32, **spread)
        embeds, mask = agent.embed([[list(range(3, 19))]], {})
        push = 1e-3 * torch.randn_like(embeds) * embeds.std()
        before, after = (agent.think(agent.read(x, mask), 12)[0] for x in (embeds, embeds + push))
        grown = (after - before).norm(dim=-1) / before.norm(dim=-1) / 1e-3
        assert low < grown[-1] < high and (not spread or grown[-1] > 4 * grown[0]), grown
    _, figures, code = ask("--dtype", "bfloat16", "--sections", "rollout")
    assert code == 0 and all(line["apart"] < 0.05 for line in figures["sections"]["rollout"])


SPOILT = {
    "think": lambda H: torch.cat([H[:, :-1], -H[:, -1:]], 1),                   # the last thought
    "write": lambda texts: [[*ids[:-1], (ids[-1] + 99) % 256] for ids in texts],    # or word
    "answer_loss": lambda losses: [1.01 * loss for loss in losses],
    "follow": lambda states: {}["nothing\nis here"]}


@pytest.mark.parametrize("section, method, problem", [
    ("rollout", "think", "RuntimeError"), ("answer", "think", "RuntimeError"),
    ("training", "think", "RuntimeError"), ("training", "answer_loss", "RuntimeError"),
    ("training", "follow", "KeyError"), ("decoding", "write", "RuntimeError")])
def test_a_wrong_result_is_an_error(section, method, problem, ask, monkeypatch):
    """It names its section, and no time is printed for it. Other sections still run."""
    right, spoil = getattr(Agent, method), SPOILT[method]
    monkeypatch.setattr(Agent, method, lambda *given, **more: spoil(right(*given, **more)))
    printed, figures, code = ask("--sections", section, "step")
    assert code == 1 and printed.count("FAILED") == 1
    assert f"section {section} FAILED: {problem}: " in printed
    assert [list(line) for line in figures["sections"][section]] == [["case", "why"]]
    assert len(figures["sections"]["step"]) == 2


def bytes_of(tensors):
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("family", FAMILIES[:-1])      # of the last one, the text model is loaded
def test_model_memory_is_the_real_one(family):
    """Weights and buffers of the loaded model; keys, values and states after really reading."""
    agent = new_agent(family)
    weights, cache, width = models.model_memory(agent.model.config, torch.float32, 3, 7)
    context = agent.read(torch.randn(3, 7, agent.width), torch.ones(3, 7, dtype=torch.long))
    held = [tensor for layer in context.cache.layers for tensor in (
        [layer.keys, layer.values] if hasattr(layer, "keys")
        else [*layer.conv_states.values(), *layer.recurrent_states.values()])]
    assert weights == bytes_of([*agent.model.parameters(), *agent.model.buffers()])
    assert cache == bytes_of(held) > 0 and width == agent.width


def test_style_memory_counts_a_shared_model_once(mas):
    configs = {name: agent.model.config for name, agent in mas.agents.items()}
    taken = {name: models.model_memory(configs[name], torch.float32, 2, 5)[:2] for name in configs}
    for bases in (["planner", "planner", "solver"], ["planner", "critic", "solver"]):
        roles = tuple(replace(role, model=base) for role, base in zip(mas.style.roles, bases))
        size = models.style_memory(replace(mas.style, roles=roles), configs, torch.float32, 2, 5)
        weights = [taken[base][0] for base in set(bases)]
        assert size["weights"] == sum(weights) and size["largest"] == max(weights)
        assert size["cache"] == sum(taken[base][1] for base in bases)
    inner = [agent.inner for agent in mas.agents.values()]
    assert size["links"] == bytes_of(torch.nn.ModuleList([mas.outer, *inner]).parameters())


@torch.no_grad()
@pytest.mark.parametrize("family", fast("qwen3", of=FAMILIES))
def test_the_experiments_compute_our_thoughts(family):
    """The library's steps, and prompts of rounded lengths. At the second turn buffers are used."""
    torch._dynamo.reset()
    with nothing_in_float32():
        agent = widen(new_agent(family))
        prompts = [[5, 6, 7, 8], [9, 4, 3], [3] * 7]
        wanted = agent.think(read_plain(agent, prompts), 5)
        for one in (*(library_agent(agent, way) for way in WAYS), reading_agent(agent, 8)) * 2:
            assert apart([one.think(read_plain(one, prompts), 5)], [wanted]) < 1e-9


def test_the_script_for_a_card_loses_nothing(tmp_path, monkeypatch, run):
    """A part fails, and one is stopped after its first figure. The next ones run all the same."""
    figure = {"part": "step", "case": "B=1", "reference_s": [4e-3], "ours_s": [2e-3], "ratio": 2}
    scripts = {"tests": "raise SystemExit(3)", "full": "pass", "step": "import sys, time\n"
               "print(sys.argv[1], file=open(sys.argv[2], 'a'), flush=True)\ntime.sleep(99)"}
    monkeypatch.setattr(card, "LIMITS", [("tests", 9), ("step", 0.4), ("full", 9)])
    monkeypatch.setattr(card, "command", lambda part, folder, *unused: [
        "-c", scripts[part], json.dumps(figure), str(folder / "lines.jsonl")])
    assert run(card, tmp_path, "--cpu")[0] == 1
    parts.Card("prompt", tmp_path, cpu=True).prompt()                     # and a real part
    found = card.write_results(tmp_path)
    assert {part: one.get("code") for part, one in found.items()} == {
        "tests": 3, "step": 124, "full": 0, "prompt": None} and found["step"]["lines"] == [figure]
    assert [line["apart"] <= 1e-4 for line in found["prompt"]["lines"]] == [True] * 3
    assert (tmp_path / "rows.txt").read_text().startswith("| step: B=1 | 4.00 ms (4.00 to 4.00) |")

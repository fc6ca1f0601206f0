"""The links against their equations, and their files against the released layout."""
import json
import os

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import inner_equation, largest_difference, outer_equation, randomise

from link import KINDS, InnerLink, OuterLink, kind_name
from support.checkpoints import (load_inner, load_outer, load_weights, save_inner, save_outer,
                                 save_weights)

RELEASED_KINDS = {      # as published
    "1layer": "linear_adapter", "1layer_res": "linear_res_adapter", "2layer": "adapter",
    "2layer_res": "res_adapter", "2layer_ln": "ln_adapter", "2layer_ln_res": "ln_res_adapter"}
INNER_LAYERS = {        # the modules of each kind, by their released names
    "1layer": {"proj1"}, "1layer_res": {"proj1"}, "2layer": {"proj1", "proj2"},
    "2layer_res": {"proj1", "proj2"}, "2layer_ln": {"proj1", "proj2", "pre_ln", "post_ln"},
    "2layer_ln_res": {"proj1", "proj2", "pre_ln", "post_ln"}}
OUTER_LAYERS = {
    "1layer": {"proj1"}, "1layer_res": {"proj1", "residual_proj"}, "2layer": {"proj1", "proj2"},
    "2layer_res": {"proj1", "proj2", "residual_proj"},
    "2layer_ln": {"proj1", "proj2", "ln_source", "ln_target"},
    "2layer_ln_res": {"proj1", "proj2", "residual_proj", "ln_source", "ln_target"}}
LN = ("weight", "bias")


def random_inner(width=6, kind="2layer_ln_res", seed=0):
    return randomise(InnerLink(width, kind), 1.0, seed)


def random_outer(kind="2layer_ln_res", seed=0):
    return randomise(OuterLink(6, 4, kind), 1.0, seed)


def released(width, target=None, seed=0):
    """A bf16 state dict as released, made by hand: inner, or outer to a target width."""
    torch.manual_seed(seed)
    if target is None:
        shapes = {"proj1": (width, width), "proj2": (width, width), "pre_ln": (width,),
                  "post_ln": (width,)}
    else:
        shapes = {"proj1": (2 * target, width), "proj2": (target, 2 * target),
                  "residual_proj": (target, width), "ln_source": (width,), "ln_target": (target,)}
    state = {}
    for name, shape in shapes.items():
        state[f"{name}.weight"] = torch.randn(shape).bfloat16()
        state[f"{name}.bias"] = torch.randn(shape[:1]).bfloat16()
    return state


def holds(link, state):
    """Whether a link's parameters are exactly those of a state dict."""
    own = link.state_dict()
    return set(own) == set(state) and all(torch.equal(own[k], state[k].float()) for k in own)


def one_line(problem, *parts):
    """Whether an error is one line that holds all parts."""
    text = str(problem.value)
    return "\n" not in text and all(str(part) in text for part in parts)


# ---- the equations ------------------------------------------------------------------------------

def test_kinds_are_the_published_ones():
    assert KINDS == RELEASED_KINDS
    for ours, published in RELEASED_KINDS.items():
        assert kind_name(ours) == kind_name(published) == kind_name("outer_" + published) == ours
    with pytest.raises(ValueError, match="3layer.*1layer.*2layer_ln_res"):
        kind_name("3layer")


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("kind", RELEASED_KINDS)
def test_inner_is_its_equation(kind, published):
    """Oracle: the equation with plain tensor operations; GELU by its error function."""
    link = random_inner(6, RELEASED_KINDS[kind] if published else kind)
    assert link.kind == kind
    w, h = link.state_dict(), torch.randn(2, 3, 6)
    y = h
    if "ln" in kind:
        y = F.layer_norm(h, (6,), w["pre_ln.weight"], w["pre_ln.bias"])
    y = y @ w["proj1.weight"].T + w["proj1.bias"]
    if kind.startswith("2"):
        y = y / 2 * (1 + torch.erf(y / 2 ** 0.5))
        y = y @ w["proj2.weight"].T + w["proj2.bias"]
    if kind.endswith("res"):
        y = h + y
    if "ln" in kind:
        y = F.layer_norm(y, (6,), w["post_ln.weight"], w["post_ln.bias"])
    assert largest_difference(link(h), y) < 1e-5


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("kind", RELEASED_KINDS)
def test_outer_is_its_equation(kind, published):
    """Oracle: the equation with plain tensor operations."""
    link = random_outer("outer_" + RELEASED_KINDS[kind] if published else kind)
    assert link.kind == kind
    w, x = link.state_dict(), torch.randn(2, 3, 6)
    y = x
    if "ln" in kind:
        y = F.layer_norm(x, (6,), w["ln_source.weight"], w["ln_source.bias"])
    y = y @ w["proj1.weight"].T + w["proj1.bias"]
    if kind.startswith("2"):
        y = y / 2 * (1 + torch.erf(y / 2 ** 0.5))
        y = y @ w["proj2.weight"].T + w["proj2.bias"]
    if kind.endswith("res"):
        y = x @ w["residual_proj.weight"].T + w["residual_proj.bias"] + y
    if "ln" in kind:
        y = F.layer_norm(y, (4,), w["ln_target.weight"], w["ln_target.bias"])
    assert link(x).shape == (2, 3, 4)
    assert largest_difference(link(x), y) < 1e-5


def test_the_tests_own_references_agree():
    """conftest's equations, which the other tests rely on, against the default links."""
    inner, outer, h = random_inner(), random_outer(), torch.randn(2, 3, 6)
    assert largest_difference(inner(h), inner_equation(inner, h)) < 1e-5
    assert largest_difference(outer(h), outer_equation(outer, h)) < 1e-5


@pytest.mark.parametrize("kind", RELEASED_KINDS)
def test_parameter_names_and_widths_are_the_released_ones(kind):
    """Oracle: the published names and shapes."""
    inner, outer = InnerLink(6, kind), OuterLink(6, 4, kind)
    assert set(inner.state_dict()) == {f"{n}.{p}" for n in INNER_LAYERS[kind] for p in LN}
    assert set(outer.state_dict()) == {f"{n}.{p}" for n in OUTER_LAYERS[kind] for p in LN}
    assert outer.widths == (6, 4)
    assert inner.proj1.weight.shape == (6, 6)
    if kind.startswith("2"):
        hidden = 8 if "ln" in kind else 4
        assert outer.proj1.weight.shape == (hidden, 6)
        assert outer.proj2.weight.shape == (4, hidden)
    else:
        assert outer.proj1.weight.shape == (4, 6)


def test_gain_sets_the_last_layernorm():
    """Oracle: what a LayerNorm of that gain puts out, vectors of RMS `gain`."""
    x = torch.randn(50, 64)
    for link in (InnerLink(64, gain=0.05), OuterLink(64, 32, gain=0.05)):
        assert abs(link(x).pow(2).mean().sqrt().item() - 0.05) < 1e-4
    assert torch.equal(InnerLink(8, gain=0.05).pre_ln.weight, torch.ones(8))
    assert torch.equal(OuterLink(8, 4, gain=0.05).ln_source.weight, torch.ones(8))
    assert torch.equal(InnerLink(8).post_ln.weight, torch.ones(8))


# ---- released files -----------------------------------------------------------------------------

def write_released_inner(folder, names, manifest=None):
    """A released agent folder: {file name: state dict}, adapter_config.json, a manifest or none."""
    for name, state in names.items():
        torch.save(state, folder / name)
    (folder / "adapter_config.json").write_text('{"adapter_type": "ln_res_adapter"}')
    if manifest:
        tasks = {task: {"adapter.pt": name} for task, name in manifest.items()}
        (folder / "innerlink_config.json").write_text(json.dumps({"tasks": tasks}))


def test_released_inner_folder_with_a_file_per_task(tmp_path):
    math, code = released(6, seed=1), released(6, seed=2)
    names = {"adapter(math).pt": math, "adapter(code).pt": code}
    write_released_inner(tmp_path, names, {"math": "adapter(math).pt", "code": "adapter(code).pt"})
    link = load_inner(tmp_path, 6)
    assert holds(link, math) and holds(load_inner(tmp_path, 6, "code"), code)
    assert link.kind == "2layer_ln_res" and link.proj1.weight.dtype == torch.float32
    h = torch.randn(3, 6)
    assert largest_difference(link(h), inner_equation(link, h)) < 1e-5


def test_inner_lookup_order(tmp_path):
    """The manifest before adapter(TASK) before adapter."""
    states = [released(6, seed=seed) for seed in range(4)]
    write_released_inner(tmp_path, {"adapter.pt": states[0]})
    assert holds(load_inner(tmp_path, 6, "math"), states[0])
    write_released_inner(tmp_path, {"adapter(math).pt": states[1], "adapter(code).pt": states[2]})
    assert holds(load_inner(tmp_path, 6, "math"), states[1])
    assert holds(load_inner(tmp_path, 6, "code"), states[2])
    assert holds(load_inner(tmp_path, 6, "choice"), states[1])      # all but code goes as math
    write_released_inner(tmp_path, {"special.pt": states[3]}, {"math": "special.pt"})
    assert holds(load_inner(tmp_path, 6, "math"), states[3])
    assert holds(load_inner(tmp_path, 6, "code"), states[2])


@pytest.mark.parametrize("nested", [False, True])
def test_released_outer_folder(tmp_path, nested):
    """Both forms of outerlink_config.json: a flat list, and one per task."""
    widths = {"outer_12": (6, 4), "outer_21": (4, 6)}

    def adapters(task):
        entries = []
        for seed, (key, (source, target)) in enumerate(widths.items()):
            state = released(source, target, seed + ord(task[0]))
            torch.save(state, tmp_path / f"{key}({task}).pt")
            entries.append({"legacy_key": key, "filename": f"{key}({task}).pt", "in_dim": source,
                            "out_dim": target, "adapter_type": "outer_ln_res_adapter"})
        return entries

    content = {"format_version": 1, "paradigm": "sequential",
               "legacy_config_filename": "outer_adapter_config.json"}
    if nested:
        content["tasks"] = {task: {"adapters": adapters(task)} for task in ("math", "code")}
    else:
        content["adapters"] = adapters("math")
    (tmp_path / "outerlink_config.json").write_text(json.dumps(content))
    for task in ("math", "code") if nested else ("math",):
        links = load_outer(tmp_path, widths, task)
        assert set(links) == set(widths)
        for key in widths:
            assert holds(links[key], torch.load(tmp_path / f"{key}({task}).pt"))
    if nested:
        del content["tasks"]["code"]
        (tmp_path / "outerlink_config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="outerlink_config.json"):
            load_outer(tmp_path, widths, "code")


# ---- roundtrips ---------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", RELEASED_KINDS)
def test_inner_roundtrip(tmp_path, kind):
    """safetensors gives the same bits back, pt what rounding to bf16 leaves."""
    link = random_inner(6, kind)
    save_inner(link, tmp_path / "st")
    save_inner(link, tmp_path / "pt", format="pt")
    assert holds(load_inner(tmp_path / "st", 6), link.state_dict())
    rounded = {key: value.bfloat16() for key, value in link.state_dict().items()}
    assert holds(load_inner(tmp_path / "pt", 6), rounded)
    assert not holds(load_inner(tmp_path / "pt", 6), link.state_dict())
    written = torch.load(tmp_path / "pt" / "adapter(math).pt", weights_only=True)
    assert {value.dtype for value in written.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "pt" / "adapter_config.json").read_text())
    assert config == {"adapter_type": RELEASED_KINDS[kind]}


@pytest.mark.parametrize("format", ["safetensors", "pt"])
def test_outer_roundtrip(tmp_path, format):
    links = {"outer_12": random_outer(seed=1), "outer_13": random_outer("2layer_res", seed=2)}
    save_outer(links, tmp_path, "three", format=format)
    again = load_outer(tmp_path, {key: (6, 4) for key in links})
    for key, link in links.items():
        state = link.state_dict()
        if format == "pt":
            state = {name: value.bfloat16() for name, value in state.items()}
        assert holds(again[key], state) and again[key].kind == link.kind
    manifest = json.loads((tmp_path / "outerlink_config.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["adapters"][0] == {
        "legacy_key": "outer_12", "filename": f"outer_12.{format}", "in_dim": 6, "out_dim": 4,
        "adapter_type": "outer_ln_res_adapter"}


def test_a_second_task_keeps_the_first(tmp_path):
    math, code = random_inner(seed=1), random_inner(seed=2)
    save_inner(math, tmp_path, "math")
    save_inner(code, tmp_path, "code", format="pt")
    manifest = json.loads((tmp_path / "innerlink_config.json").read_text())
    assert manifest == {"tasks": {"math": {"adapter.pt": "adapter(math).safetensors"},
                                  "code": {"adapter.pt": "adapter(code).pt"}}}
    assert holds(load_inner(tmp_path, 6, "math"), math.state_dict())
    assert holds(load_inner(tmp_path, 6, "code"),
                 {key: value.bfloat16() for key, value in code.state_dict().items()})


# ---- errors -------------------------------------------------------------------------------------

def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError) as problem:
        load_weights(random_inner(), tmp_path / "adapter.pt")
    assert one_line(problem, tmp_path / "adapter.pt")
    with pytest.raises(FileNotFoundError) as problem:
        load_inner(tmp_path, 6, "code")
    assert one_line(problem, tmp_path, "adapter(code).pt", "adapter.pt")
    with pytest.raises(FileNotFoundError) as problem:
        load_outer(tmp_path, {"outer_12": (6, 4)})
    assert one_line(problem, tmp_path, "outerlink_config.json")
    save_outer({"outer_12": random_outer()}, tmp_path)
    (tmp_path / "outer_12.safetensors").unlink()
    with pytest.raises(FileNotFoundError) as problem:
        load_outer(tmp_path, {"outer_12": (6, 4)})
    assert one_line(problem, tmp_path / "outer_12.safetensors")


@pytest.mark.parametrize("format", ["safetensors", "pt"])
def test_a_file_cut_short_is_named(tmp_path, format):
    path = tmp_path / save_weights(random_inner(), tmp_path, "adapter", format)
    whole = path.read_bytes()
    for kept in (0, 1, 3, 7, 8, 9, 30, 100, len(whole) // 2, len(whole) - 25, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError) as problem:
            load_weights(random_inner(), path)
        assert one_line(problem, path), kept


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {"proj1.weight": 1.0}])
def test_a_pt_file_of_something_else_is_named(tmp_path, content):
    torch.save(content, tmp_path / "adapter.pt")
    with pytest.raises(ValueError) as problem:
        load_weights(random_inner(), tmp_path / "adapter.pt")
    assert one_line(problem, tmp_path / "adapter.pt")


def test_other_widths_are_named(tmp_path):
    save_inner(random_inner(8), tmp_path)
    with pytest.raises(ValueError) as problem:
        load_inner(tmp_path, 6)
    assert one_line(problem, tmp_path / "adapter(math).safetensors", "[8", "[6")
    save_outer({"outer_12": random_outer()}, tmp_path)
    with pytest.raises(ValueError) as problem:
        load_outer(tmp_path, {"outer_12": (6, 5)})
    assert one_line(problem, tmp_path / "outerlink_config.json", "outer_12", "6 -> 4", "6 -> 5")


def test_another_kind_is_named(tmp_path):
    """Told by the parameters' names, whatever adapter_config.json says, or if there is none."""
    link = random_inner(6, "2layer_res")
    save_inner(link, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"adapter_type": "ln_res_adapter"}')
    with pytest.raises(ValueError) as problem:
        load_inner(tmp_path, 6)
    assert one_line(problem, tmp_path / "adapter(math).safetensors", "pre_ln")
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError) as problem:
        load_inner(tmp_path, 6)
    assert one_line(problem, tmp_path / "adapter(math).safetensors", "pre_ln")
    assert holds(load_inner(tmp_path, 6, kind="2layer_res"), link.state_dict())


def test_a_manifest_of_other_edges_is_named(tmp_path):
    save_outer({"outer_12": random_outer()}, tmp_path)
    for widths in ({"outer_el": (6, 4)}, {"outer_12": (6, 4), "outer_21": (4, 6)}, {}):
        with pytest.raises(ValueError) as problem:
            load_outer(tmp_path, widths)
        assert one_line(problem, tmp_path / "outerlink_config.json", "outer_12")


@pytest.mark.parametrize("content", ["{", "", '["ln_res_adapter"]', '{"adapter_type": "lora"}'])
def test_a_bad_adapter_config_is_named(tmp_path, content):
    """Not JSON, and the config of something that is not one of our links."""
    save_inner(random_inner(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError) as problem:
        load_inner(tmp_path, 6)
    assert one_line(problem, tmp_path / "adapter_config.json")


@pytest.mark.parametrize("content", ["{", "[]", '{"adapters": [{"legacy_key": "outer_12"}]}'])
def test_a_bad_outer_manifest_is_named(tmp_path, content):
    save_outer({"outer_12": random_outer()}, tmp_path)
    (tmp_path / "outerlink_config.json").write_text(content)
    with pytest.raises(ValueError) as problem:
        load_outer(tmp_path, {"outer_12": (6, 4)})
    assert one_line(problem, tmp_path / "outerlink_config.json")


class Malicious:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_malicious_pickle_is_refused(tmp_path):
    """weights_only: the pickle's call must not happen. (It does when loaded without.)"""
    path = tmp_path / "adapter.pt"
    torch.save({"proj1.weight": Malicious(tmp_path / "broken_in")}, path)
    with pytest.raises(ValueError) as problem:
        load_weights(random_inner(), path)
    assert one_line(problem, path)
    assert not (tmp_path / "broken_in").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "broken_in").exists()


def test_safetensors_are_readable_without_us(tmp_path):
    """Oracle: the safetensors library itself."""
    link = random_inner()
    save_inner(link, tmp_path)
    assert holds(link, safetensors.torch.load_file(tmp_path / "adapter(math).safetensors"))

"""The links against their equations, and their files against the released layout."""
import json
import os

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from helpers import inner_equation, largest_difference, outer_equation, randomise, refuses

from checkpoints import load_inner, load_outer, load_weights, save_inner, save_outer
from link import KINDS, RELEASED, InnerLink, OuterLink, kind_name

ALIASES = {name: ours for ours, published in KINDS.items()
           for name in (ours, published, f"outer_{published}")}
FORMATS = ("safetensors", "pt")
WIDTHS = {"outer_12": (6, 4), "outer_21": (4, 6)}


def random_inner(width=6, kind=RELEASED, seed=0):
    return randomise(InnerLink(width, kind), 1.0, seed)


def random_outer(kind=RELEASED, seed=0, widths=(6, 4)):
    return randomise(OuterLink(*widths, kind), 1.0, seed)


def released(width, target=None, seed=0):
    """A bf16 state dict as released, made by hand: inner, or outer to a target width."""
    torch.manual_seed(seed)
    if target is None:
        shapes = {"proj1": (width, width), "proj2": (width, width), "pre_ln": (width,),
                  "post_ln": (width,)}
    else:
        shapes = {"proj1": (2 * target, width), "proj2": (target, 2 * target),
                  "residual_proj": (target, width), "ln_source": (width,), "ln_target": (target,)}
    return {f"{name}.{part}": torch.randn(shape if part == "weight" else shape[:1]).bfloat16()
            for name, shape in shapes.items() for part in ("weight", "bias")}


def in_format(link, format):
    """The state dict that a link has after it was saved: rounded to bf16 as .pt."""
    return {name: value.bfloat16() if format == "pt" else value
            for name, value in link.state_dict().items()}


def holds(link, state):
    """Whether a link's parameters are exactly those of a state dict."""
    own = link.state_dict()
    return set(own) == set(state) and all(torch.equal(own[k], state[k].float()) for k in own)


# ---- the equations ------------------------------------------------------------------------------

def test_kinds_are_the_published_ones():
    assert KINDS == {
        "1layer": "linear_adapter", "1layer_res": "linear_res_adapter", "2layer": "adapter",
        "2layer_res": "res_adapter", "2layer_ln": "ln_adapter", "2layer_ln_res": "ln_res_adapter"}
    assert RELEASED == "2layer_ln_res"
    with refuses("3layer", *KINDS):
        kind_name("3layer")


@pytest.mark.parametrize("name", ALIASES)
@pytest.mark.parametrize("inner", [True, False])
def test_a_link_is_its_equation(name, inner):
    """Of each kind, by our name or a published one. Oracle: the equation with plain tensor
    operations; GELU by its error function."""
    link, kind = random_inner(6, name) if inner else random_outer(name), ALIASES[name]
    first, last = ("pre_ln", "post_ln") if inner else ("ln_source", "ln_target")
    assert link.kind == kind_name(name) == kind
    w, x = link.double().state_dict(), torch.randn(2, 3, 6, dtype=torch.float64)
    y = x
    if "ln" in kind:
        y = F.layer_norm(y, (6,), w[f"{first}.weight"], w[f"{first}.bias"])
    y = y @ w["proj1.weight"].T + w["proj1.bias"]
    if kind.startswith("2"):
        y = y / 2 * (1 + torch.erf(y / 2 ** 0.5))
        y = y @ w["proj2.weight"].T + w["proj2.bias"]
    if kind.endswith("res"):
        y = y + (x if inner else x @ w["residual_proj.weight"].T + w["residual_proj.bias"])
    if "ln" in kind:
        y = F.layer_norm(y, y.shape[-1:], w[f"{last}.weight"], w[f"{last}.bias"])
    assert largest_difference(link(x), y) < 1e-9


def test_the_tests_own_references_agree():
    """helpers.py's equations, which the other tests rely on, against the default links."""
    inner, outer = random_inner().double(), random_outer().double()
    h = torch.randn(2, 3, 6, dtype=torch.float64)
    assert largest_difference(inner(h), inner_equation(inner, h)) < 1e-9
    assert largest_difference(outer(h), outer_equation(outer, h)) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_parameter_names_and_widths_are_the_released_ones(kind):
    inner, outer = InnerLink(6, kind), OuterLink(6, 4, kind)
    shared = {"proj1"} | ({"proj2"} if "2layer" in kind else set())
    ends = [{"pre_ln", "post_ln"}, {"ln_source", "ln_target"}] if "ln" in kind else [set(), set()]
    residual = {"residual_proj"} if "res" in kind else set()
    for link, modules in ((inner, shared | ends[0]), (outer, shared | ends[1] | residual)):
        assert set(link.state_dict()) == {f"{name}.{part}" for name in modules
                                          for part in ("weight", "bias")}
    assert outer.widths == (6, 4) and inner.proj1.weight.shape == (6, 6)
    hidden = 8 if "ln" in kind else 4
    assert outer.proj1.weight.shape == (hidden, 6)
    assert "2layer" not in kind or outer.proj2.weight.shape == (4, hidden)


def test_gain_sets_the_last_layernorm():
    """Oracle: what a LayerNorm of that gain puts out, vectors of RMS `gain`."""
    x = torch.randn(50, 64)
    for link in (InnerLink(64, gain=0.05), OuterLink(64, 32, gain=0.05)):
        assert abs(link(x).pow(2).mean().sqrt().item() - 0.05) < 1e-4
    for first in (InnerLink(8, gain=0.05).pre_ln, OuterLink(8, 4, gain=0.05).ln_source,
                  InnerLink(8).post_ln):
        assert torch.equal(first.weight, torch.ones(8))


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
    assert link.kind == RELEASED and link.proj1.weight.dtype == torch.float32


def test_inner_lookup_order(tmp_path):
    """The manifest before adapter(TASK) before adapter."""
    states = [released(6, seed=seed) for seed in range(4)]

    def found(*tasks):
        """Which of the states each task gets."""
        links = [load_inner(tmp_path, 6, task) for task in tasks]
        return [i for link in links for i, state in enumerate(states) if holds(link, state)]

    write_released_inner(tmp_path, {"adapter.pt": states[0]})
    assert found("math", "code") == [0, 0]
    write_released_inner(tmp_path, {"adapter(math).pt": states[1], "adapter(code).pt": states[2]})
    assert found("math", "code", "choice") == [1, 2, 1]             # all but code goes as math
    write_released_inner(tmp_path, {"special.pt": states[3]}, {"math": "special.pt"})
    assert found("math", "code") == [3, 2]


@pytest.mark.parametrize("nested", [False, True])
def test_released_outer_folder(tmp_path, nested):
    """Both forms of outerlink_config.json: a flat list, and one per task."""
    path = tmp_path / "outerlink_config.json"

    def adapters(task):
        entries = []
        for seed, (key, (source, target)) in enumerate(WIDTHS.items()):
            state = released(source, target, seed + ord(task[0]))
            torch.save(state, tmp_path / f"{key}({task}).pt")
            entries.append({"legacy_key": key, "filename": f"{key}({task}).pt", "in_dim": source,
                            "out_dim": target, "adapter_type": "outer_ln_res_adapter"})
        return entries

    tasks = ("math", "code") if nested else ("math",)
    listed = {task: {"adapters": adapters(task)} for task in tasks}
    path.write_text(json.dumps({"format_version": 1, "paradigm": "sequential",
                                "legacy_config_filename": "outer_adapter_config.json",
                                **({"tasks": listed} if nested else listed["math"])}))
    for task in tasks:
        links = load_outer(tmp_path, WIDTHS, task)
        assert set(links) == set(WIDTHS)
        for key in WIDTHS:
            assert holds(links[key], torch.load(tmp_path / f"{key}({task}).pt"))
    if nested:
        path.write_text(json.dumps({"tasks": {"math": listed["math"]}}))
        with refuses(path, "code"):
            load_outer(tmp_path, WIDTHS, "code")


@pytest.mark.parametrize("keep", [(), ("adapter_type",), ("in_dim", "out_dim")])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_that_says_little(tmp_path, kind, format, keep):
    """The weights say the kind and the widths, whatever else the manifest says. Links for other
    models are still refused."""
    links = {key: random_outer(kind, seed, WIDTHS[key]) for seed, key in enumerate(WIDTHS)}
    save_outer(links, tmp_path, format=format)
    path = tmp_path / "outerlink_config.json"
    manifest = json.loads(path.read_text())
    manifest["adapters"] = [
        {"source": "a", **{name: entry[name] for name in ("legacy_key", "filename", *keep)}}
        for entry in manifest["adapters"]]
    path.write_text(json.dumps(manifest))
    for key, link in load_outer(tmp_path, WIDTHS).items():
        assert (link.kind, link.widths) == (kind, WIDTHS[key])
        assert holds(link, in_format(links[key], format))
    with refuses(path, "outer_12", "(6, 4)", "(6, 5)"):
        load_outer(tmp_path, {"outer_12": (6, 5), "outer_21": (5, 6)})


# ---- roundtrips ---------------------------------------------------------------------------------

@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_inner_roundtrip(tmp_path, format, kind):
    """safetensors gives the same bits back, pt what rounding to bf16 leaves. Oracle: the libraries
    that read the files without us."""
    link = random_inner(6, kind)
    save_inner(link, tmp_path, format=format)
    assert holds(load_inner(tmp_path, 6), in_format(link, format))
    file = tmp_path / f"adapter(math).{format}"
    written = torch.load(file) if format == "pt" else safetensors.torch.load_file(file)
    assert {value.dtype for value in written.values()} == {
        torch.bfloat16 if format == "pt" else torch.float32}
    assert holds(link, written) == (format != "pt")
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "adapter_type": KINDS[kind]}


@pytest.mark.parametrize("format", FORMATS)
def test_outer_roundtrip(tmp_path, format):
    links = {"outer_12": random_outer(seed=1), "outer_13": random_outer("2layer_res", seed=2)}
    save_outer(links, tmp_path, "three", format=format)
    again = load_outer(tmp_path, {key: (6, 4) for key in links})
    for key, link in links.items():
        assert holds(again[key], in_format(link, format)) and again[key].kind == link.kind
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
    assert holds(load_inner(tmp_path, 6, "code"), in_format(code, "pt"))


# ---- errors -------------------------------------------------------------------------------------

def test_missing_files(tmp_path):
    with refuses(tmp_path / "adapter.pt", kind=FileNotFoundError):
        load_weights(random_inner(), tmp_path / "adapter.pt")
    with refuses(tmp_path, "adapter(code).pt", "adapter.pt", kind=FileNotFoundError):
        load_inner(tmp_path, 6, "code")
    one = {"outer_12": (6, 4)}
    with refuses(tmp_path, "outerlink_config.json", kind=FileNotFoundError):
        load_outer(tmp_path, one)
    save_outer({"outer_12": random_outer()}, tmp_path)
    (tmp_path / "outer_12.safetensors").unlink()
    with refuses(tmp_path / "outer_12.safetensors", kind=FileNotFoundError):
        load_outer(tmp_path, one)


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_cut_short_is_named(tmp_path, format):
    link, path = random_outer(), tmp_path / f"outer_12.{format}"
    save_outer({"outer_12": link}, tmp_path, format=format)
    whole = path.read_bytes()
    for kept in (0, 1, 3, 7, 8, 9, 30, 100, len(whole) // 2, len(whole) - 25, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with refuses(path):
            load_weights(link, path)
        with refuses(path):
            load_outer(tmp_path, {"outer_12": (6, 4)})


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {"proj1.weight": 1.0},
                                     {"weight": torch.ones(2)}])
def test_a_pt_file_of_something_else_is_named(tmp_path, content):
    save_outer({"outer_12": random_outer()}, tmp_path, format="pt")
    path = tmp_path / "outer_12.pt"
    torch.save(content, path)
    with refuses(path):
        load_weights(random_inner(), path)
    with refuses(path):
        load_outer(tmp_path, {"outer_12": (6, 4)})


def test_other_widths_are_named(tmp_path):
    save_inner(random_inner(8), tmp_path)
    with refuses(tmp_path / "adapter(math).safetensors", "[8", "[6"):
        load_inner(tmp_path, 6)


def test_another_kind_is_named(tmp_path):
    """Told by the parameters' names, whatever adapter_config.json says, or if there is none."""
    link, config = random_inner(6, "2layer_res"), tmp_path / "adapter_config.json"
    save_inner(link, tmp_path)
    config.write_text('{"adapter_type": "ln_res_adapter"}')
    with refuses(tmp_path / "adapter(math).safetensors", "pre_ln"):
        load_inner(tmp_path, 6)
    config.unlink()
    with refuses(tmp_path / "adapter(math).safetensors", "pre_ln"):
        load_inner(tmp_path, 6)
    assert holds(load_inner(tmp_path, 6, kind="2layer_res"), link.state_dict())


@pytest.mark.parametrize("widths", [{"outer_el": (6, 4)}, WIDTHS, {}])
def test_a_manifest_of_other_edges_is_named(tmp_path, widths):
    save_outer({"outer_12": random_outer()}, tmp_path)
    with refuses(tmp_path / "outerlink_config.json", "outer_12"):
        load_outer(tmp_path, widths)


@pytest.mark.parametrize("content", ["{", "", '["ln_res_adapter"]', '{"adapter_type": "lora"}'])
def test_a_bad_adapter_config_is_named(tmp_path, content):
    """Not JSON, and the config of something that is not one of our links."""
    save_inner(random_inner(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(content)
    with refuses(tmp_path / "adapter_config.json"):
        load_inner(tmp_path, 6)


@pytest.mark.parametrize("content", ["{", "[]", '{"adapters": [{"legacy_key": "outer_12"}]}'])
def test_a_bad_outer_manifest_is_named(tmp_path, content):
    save_outer({"outer_12": random_outer()}, tmp_path)
    path = tmp_path / "outerlink_config.json"
    path.write_text(content)
    with refuses(path):
        load_outer(tmp_path, {"outer_12": (6, 4)})


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
    with refuses(path):
        load_weights(random_inner(), path)
    assert not (tmp_path / "broken_in").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "broken_in").exists()

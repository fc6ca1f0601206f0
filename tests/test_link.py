"""The links against their equations, and their files against the released layout."""
import json
import os

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from helpers import (holds, inner_equation, largest_difference, lines_of, new_agent,
                     outer_equation, randomise, refuses, widen)

import checkpoints
from checkpoints import load_inner, load_outer, load_weights, save_inner, save_outer
from link import KINDS, RELEASED, InnerLink, OuterLink, kind_name
from soft_words import soft_words

PUBLISHED = {
    "1layer": "linear_adapter", "1layer_res": "linear_res_adapter", "2layer": "adapter",
    "2layer_res": "res_adapter", "2layer_ln": "ln_adapter", "2layer_ln_res": "ln_res_adapter"}
ALIASES = {name: ours for ours, published in PUBLISHED.items()
           for name in (ours, published, f"outer_{published}")}
NEW = {"2layer_ln_res_bent": "bent_adapter", "1layer_dimmed": "dimmed_adapter"}
FORMATS = ("safetensors", "pt")
WIDTHS = {"outer_12": (6, 4), "outer_21": (4, 6)}
ONE = {"outer_12": (6, 4)}


def random_inner(width=6, kind=RELEASED, seed=0):
    return randomise(InnerLink(width, kind), 1.0, seed)


def random_outer(kind=RELEASED, seed=0, widths=(6, 4)):
    return randomise(OuterLink(*widths, kind), 1.0, seed)


def in_format(link, format):
    """The state dict that a link has after it was saved: rounded to bf16 as .pt."""
    state = link.state_dict()
    return {name: value.bfloat16() for name, value in state.items()} if format == "pt" else state


# ---- the equations ------------------------------------------------------------------------------

def test_kinds_are_the_published_ones():
    """And a participant may add others."""
    assert KINDS.items() >= PUBLISHED.items() and RELEASED == "2layer_ln_res"
    with refuses("3layer", *KINDS):
        kind_name("3layer")


@pytest.mark.parametrize("name", ALIASES)
@pytest.mark.parametrize("inner", [True, False])
def test_a_link_is_its_equation(name, inner):
    """Of each kind, by our name or a published one. Oracle: the equation with plain tensor
    operations; GELU by its error function. It has the released names, and the released width
    between its two layers. The other tests use the equations of helpers.py."""
    link, kind = random_inner(6, name) if inner else random_outer(name), ALIASES[name]
    first, last = ("pre_ln", "post_ln") if inner else ("ln_source", "ln_target")
    assert link.kind == kind_name(name) == kind
    w, x = link.double().state_dict(), torch.randn(2, 3, 6, dtype=torch.float64)
    used = set()

    def weights(module):
        used.update({f"{module}.weight", f"{module}.bias"})
        return w[f"{module}.weight"], w[f"{module}.bias"]

    def linear(module, x):
        weight, bias = weights(module)
        return x @ weight.T + bias

    y = F.layer_norm(x, (6,), *weights(first)) if "ln" in kind else x
    y = linear("proj1", y)
    assert y.shape[-1] == (6 if inner else 8 if "ln" in kind else 4)
    if kind.startswith("2"):
        y = linear("proj2", y / 2 * (1 + torch.erf(y / 2 ** 0.5)))
    if kind.endswith("res"):
        y = y + (x if inner else linear("residual_proj", x))
    if "ln" in kind:
        y = F.layer_norm(y, y.shape[-1:], *weights(last))
    assert largest_difference(link(x), y) < 1e-9 and set(w) == used
    assert inner or link.widths == (6, 4)
    if kind == RELEASED:
        helped = (inner_equation if inner else outer_equation)(link, x)
        assert largest_difference(helped, y) < 1e-9


def test_gain_sets_the_last_layernorm():
    """Oracle: what a LayerNorm of that gain puts out, vectors of RMS `gain`."""
    x = torch.randn(50, 64)
    for link in (InnerLink(64, gain=0.05), OuterLink(64, 32, gain=0.05)):
        assert abs(link(x).pow(2).mean().sqrt().item() - 0.05) < 1e-4
    for first in (InnerLink(8, gain=0.05).pre_ln, OuterLink(8, 4, gain=0.05).ln_source,
                  InnerLink(8).post_ln):
        assert torch.equal(first.weight, torch.ones(8))


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_soft_words_are_their_equation(family):
    """Oracle: the sum over the vocabulary, word by word. Gemma's embedding also scales its words.
    Near T = 0 nothing is left but the likeliest word."""
    agent = new_agent(family)
    widen(agent)
    h = torch.randn(2, 3, agent.width, dtype=torch.float64)
    weights = (agent.logits(h).double() / 0.7).exp()                                # (2, 3, V)
    words = agent.embedding(torch.arange(weights.shape[-1])).double()               # (V, d)
    mean = sum(weights[..., i, None] * word for i, word in enumerate(words))
    for name, wanted in (("soft_words:0.7", mean),
                         ("soft_words:1e-9", words[agent.logits(h).argmax(-1)])):
        wanted = wanted / wanted.pow(2).mean(-1, keepdim=True).sqrt() * agent.embedding_rms
        assert largest_difference(soft_words(name, agent)(h), wanted) < 1e-9
    assert soft_words("soft_words", agent).temperature == 1
    for wrong in ("hot", "0", "-1", "nan", "inf"):
        with refuses(f"soft_words:{wrong}", "temperature"):
            soft_words(f"soft_words:{wrong}", agent)


# ---- released files -----------------------------------------------------------------------------

def test_released_inner_folders(tmp_path):
    """The manifest counts before adapter(TASK), and that before adapter."""
    names = ("adapter.pt", "adapter(math).pt", "adapter(code).pt", "special.pt")
    states = {name: in_format(random_inner(seed=seed), "pt") for seed, name in enumerate(names)}
    (tmp_path / "adapter_config.json").write_text('{"adapter_type": "ln_res_adapter"}')

    def found(*tasks):
        """The files that the tasks' links come from."""
        links = [load_inner(tmp_path, 6, task) for task in tasks]
        assert {(link.kind, link.proj1.weight.dtype) for link in links} == {
            (RELEASED, torch.float32)}
        return [name for link in links for name, state in states.items() if holds(link, state)]

    torch.save(states["adapter.pt"], tmp_path / "adapter.pt")
    assert found("math", "code") == ["adapter.pt", "adapter.pt"]
    for name in names:
        torch.save(states[name], tmp_path / name)
    math, code = names[1:3]
    assert found("math", "code", "choice") == [math, code, math]     # all but code goes as math
    for manifest in ({"math": "special.pt"}, {"math": code, "code": math}):
        tasks = {task: {"adapter.pt": name} for task, name in manifest.items()}
        (tmp_path / "innerlink_config.json").write_text(json.dumps({"tasks": tasks}))
        assert found("math", "code") == [manifest["math"], manifest.get("code", code)]


# ---- roundtrips ---------------------------------------------------------------------------------

@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", [one for one in KINDS if {*one.split("_")} <= InnerLink.PARTS])
def test_inner_roundtrip(tmp_path, format, kind):
    """safetensors keeps the bits, and pt rounds to bf16. Oracle: the libraries' own readers."""
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


KEYS = ("legacy_key", "filename", "in_dim", "out_dim", "adapter_type")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_outer_roundtrip(tmp_path, kind, format):
    """The manifest says kind and widths. Links for other models are refused."""
    links = {"outer_12": random_outer(kind, 1), "outer_21": random_outer("2layer_res", 2, (4, 6))}
    save_outer(links, tmp_path, format=format)
    path = tmp_path / "outerlink_config.json"
    manifest = json.loads(path.read_text())
    assert manifest.keys() == {"format_version", "paradigm", "adapters", "legacy_config_filename"}
    assert manifest["format_version"] == 1 and manifest["adapters"][0] == dict(zip(
        KEYS, ("outer_12", f"outer_12.{format}", 6, 4, f"outer_{KINDS[kind]}")))
    for key, link in load_outer(tmp_path, WIDTHS).items():
        assert (link.kind, link.widths) == (links[key].kind, WIDTHS[key])
        assert holds(link, in_format(links[key], format))
    with refuses(path, "outer_12", "(6, 4)", "(6, 5)"):
        load_outer(tmp_path, {"outer_12": (6, 5), "outer_21": (5, 6)})


def with_new_parts(link):
    """A link's class as a participant changes it: a new last step, and a new parameter."""
    class New(link):
        PARTS = {*link.PARTS, "bent", "dimmed"}

        def __init__(self, *given):
            super().__init__(*given)
            self.gate = torch.nn.Parameter(torch.tensor(0.3)) if "dimmed" in self.kind else 1.0

        def forward(self, x):
            y = super().forward(x) * self.gate
            return y.tanh() if "bent" in self.kind else y
    return New


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", NEW)
def test_a_new_kind_is_loaded_as_it_was_saved(kind, format, tmp_path, monkeypatch):
    """The manifests name it, and the parameters' names cannot. Where its class does not build it,
    it is refused: as a new link, and from a file."""
    monkeypatch.setitem(KINDS, kind, NEW[kind])
    for new, widths in ((InnerLink, (6,)), (OuterLink, (6, 4))):
        with refuses(new.__name__, kind):
            new(*widths, kind)
    inner, outer = with_new_parts(InnerLink), with_new_parts(OuterLink)
    monkeypatch.setattr(checkpoints, "InnerLink", inner)
    monkeypatch.setattr(checkpoints, "OuterLink", outer)
    links, x = [inner(6, kind), outer(6, 4, kind)], torch.randn(3, 6)
    save_inner(links[0], tmp_path, "math", format)
    save_inner(random_inner(6, "1layer_res"), tmp_path, "code")            # has the same names
    save_outer({"outer_12": links[1]}, tmp_path, format=format)
    for link, again in zip(links, (load_inner(tmp_path, 6), load_outer(tmp_path, ONE)["outer_12"])):
        link = link.bfloat16().float() if format == "pt" else link
        assert again.kind == kind and torch.equal(again(x), link(x))
    assert load_inner(tmp_path, 6, "code").kind == "1layer_res"
    monkeypatch.undo()
    with refuses(tmp_path / "outerlink_config.json", NEW[kind]):
        load_outer(tmp_path, ONE)


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
    with refuses(tmp_path, "outerlink_config.json", kind=FileNotFoundError):
        load_outer(tmp_path, ONE)
    save_outer({"outer_12": random_outer()}, tmp_path)
    (tmp_path / "outer_12.safetensors").unlink()
    with refuses(tmp_path / "outer_12.safetensors", kind=FileNotFoundError):
        load_outer(tmp_path, ONE)


@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_file_is_named(tmp_path, format):
    """It is cut short, or it is a .pt file of something else."""
    link, path = random_outer(), tmp_path / f"outer_12.{format}"
    save_outer({"outer_12": link}, tmp_path, format=format)
    whole = path.read_bytes()
    damaged = [whole[:kept] for kept in (0, 1, 3, 7, 8, 9, 30, 100, len(whole) // 2,
                                         len(whole) - 25, len(whole) - 1)]
    for content in (torch.zeros(3), [1, 2], {"proj1.weight": 1.0}, {"weight": torch.ones(2)}):
        torch.save(content, path)
        damaged.append(path.read_bytes())
    for content in damaged:
        path.write_bytes(content)
        for load in (lambda: load_weights(link, path), lambda: load_outer(tmp_path, ONE)):
            with refuses(path):
                load()


def test_another_link_is_named(tmp_path):
    """Of other widths, or of another kind: the parameters' names tell, not adapter_config.json."""
    file, config = tmp_path / "adapter(math).safetensors", tmp_path / "adapter_config.json"
    save_inner(random_inner(8), tmp_path)
    with refuses(file, "[8", "[6"):
        load_inner(tmp_path, 6)
    link = random_inner(6, "2layer_res")
    save_inner(link, tmp_path)
    config.write_text('{"adapter_type": "ln_res_adapter"}')
    with refuses(file, "pre_ln"):
        load_inner(tmp_path, 6)
    config.unlink()
    with refuses(file, "pre_ln"):
        load_inner(tmp_path, 6)
    assert holds(load_inner(tmp_path, 6, kind="2layer_res"), link.state_dict())


@pytest.mark.parametrize("widths", [{"outer_el": (6, 4)}, WIDTHS, {}])
def test_a_manifest_of_other_edges_is_named(tmp_path, widths):
    save_outer({"outer_12": random_outer()}, tmp_path)
    with refuses(tmp_path / "outerlink_config.json", "outer_12", *widths):
        load_outer(tmp_path, widths)


@pytest.mark.parametrize("file, content, task, named", lines_of("bad_manifests.jsonl"))
def test_a_bad_manifest_is_named(file, content, task, named, tmp_path):
    """It is not JSON, that of something that is not one of our links, or for another task."""
    save_inner(random_inner(), tmp_path)
    save_outer({"outer_12": random_outer()}, tmp_path)
    (tmp_path / file).write_text(content)
    with refuses(tmp_path / file, *named):
        load_inner(tmp_path, 6)
        load_outer(tmp_path, ONE, task)


def test_a_malicious_pickle_is_refused(tmp_path):
    """weights_only: the pickle's call must not happen. (It does when loaded without.)"""
    class Malicious:
        def __reduce__(self):                       # unpickling this makes a folder
            return os.mkdir, (str(tmp_path / "broken_in"),)

    path = tmp_path / "adapter.pt"
    torch.save({"proj1.weight": Malicious()}, path)
    with refuses(path, "safetensors") as problem:
        load_weights(random_inner(), path)
    assert "weights_only" not in str(problem.value)           # torch advises to switch it off
    assert not (tmp_path / "broken_in").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "broken_in").exists()

"""The two RecursiveLinks, the only things that are ever trained, and how they are saved and loaded.

    R_in (h) = LN_post(  h  + W2 GELU(W1 LN_pre(h)))    inner: an agent's thought -> its next input
    R_out(x) = LN_t   (W3 x + W2 GELU(W1 LN_s  (x)))    outer: a thought -> another agent's input

(the paper's links; the LayerNorms come with the released weights.) Both turn hidden states after a
model's final norm into something that model, or the next, can read in place of a token embedding.

**Scale.** A LayerNorm with gain 1 sends vectors of RMS 1, token embeddings have an RMS of .02 to
.2, and the inner loss, a cosine, neither sees the length nor gives a gradient towards it. So the
last gain can start at the RMS of the embeddings it has to pass for (`gain=embedding_rms`). In the
tiny system that makes a better start and no better end: of the planner's latents at steps 3..6,
.97 .56 .64 .67 read as the text would through an untrained link of gain 1, 1.00 .71 .72 .74 through
a scale-matched one, and all of them, either way, after train_inner.py (--scale_match 0 and 1).

Files. Weights are safetensors, or with format="pt" the released layout (`torch.save` of a bf16
state dict). Beside them stand the released manifests, so that either project reads the other's:
`adapter_config.json` and `innerlink_config.json` with an inner link, `outerlink_config.json` with
the outer ones. The parameters keep their released names.
"""
import json
import os
import pickle
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F

# What reading a damaged .pt or .safetensors file may raise.
DAMAGED = (OSError, RuntimeError, EOFError, KeyError, IndexError, TypeError, ValueError,
           pickle.UnpicklingError, safetensors.SafetensorError)

# Our name of a kind (the paper's link ablation) -> the published name of the inner one.
# An outer link's published name is the same with "outer_" before it.
KINDS = {
    "1layer": "linear_adapter",
    "1layer_res": "linear_res_adapter",
    "2layer": "adapter",
    "2layer_res": "res_adapter",
    "2layer_ln": "ln_adapter",              # published as an outer kind only
    "2layer_ln_res": "ln_res_adapter",      # the one that was released
}


def kind_name(name):
    """Our name of a link kind, from ours or the published one. Raises ValueError if unknown."""
    plain = name.removeprefix("outer_")
    for ours, published in KINDS.items():
        if plain in (ours, published):
            return ours
    raise ValueError(f"unknown link kind '{name}': choose one of {', '.join(KINDS)}")


class InnerLink(nn.Module):
    """R_in, width -> width: turns a latent thought into the same agent's next input embedding.

    kind: one of KINDS; gain: what the last LayerNorm's gain starts at (kinds without a LayerNorm
    have none to set). Inputs and outputs are (.., width)."""

    def __init__(self, width, kind="2layer_ln_res", gain=1.0):
        super().__init__()
        self.kind = kind_name(kind)
        self.residual = self.kind.endswith("_res")
        self.proj1 = nn.Linear(width, width)
        if self.kind.startswith("2layer"):
            self.proj2 = nn.Linear(width, width)
        if "_ln" in self.kind:
            self.pre_ln, self.post_ln = nn.LayerNorm(width), nn.LayerNorm(width)
            nn.init.constant_(self.post_ln.weight, gain)

    def forward(self, h):
        """R_in(h): (.., width) -> (.., width)."""
        normed = "_ln" in self.kind
        y = self.proj1(self.pre_ln(h) if normed else h)        # W1 LN_pre(h)
        if self.kind.startswith("2layer"):
            y = self.proj2(F.gelu(y))                          # W2 GELU(..)
        if self.residual:
            y = h + y
        return self.post_ln(y) if normed else y


class OuterLink(nn.Module):
    """R_out, src_width -> dst_width: carries what one agent sends into another's embedding space.

    kind and gain as for InnerLink; the hidden width is 2 dst_width with LayerNorms, dst_width
    without. Inputs are (.., src_width), outputs (.., dst_width)."""

    def __init__(self, src_width, dst_width, kind="2layer_ln_res", gain=1.0):
        super().__init__()
        self.kind = kind_name(kind)
        self.widths = (src_width, dst_width)
        two_layers, normed = self.kind.startswith("2layer"), "_ln" in self.kind
        hidden_width = 2 * dst_width if normed else dst_width
        self.proj1 = nn.Linear(src_width, hidden_width)
        if two_layers:
            self.proj2 = nn.Linear(hidden_width, dst_width)
        if self.kind.endswith("_res"):
            self.residual_proj = nn.Linear(src_width, dst_width)
        if normed:
            self.ln_source, self.ln_target = nn.LayerNorm(src_width), nn.LayerNorm(dst_width)
            nn.init.constant_(self.ln_target.weight, gain)

    def forward(self, x):
        """R_out(x): (.., src_width) -> (.., dst_width)."""
        normed = "_ln" in self.kind
        y = self.proj1(self.ln_source(x) if normed else x)     # W1 LN_s(x)
        if self.kind.startswith("2layer"):
            y = self.proj2(F.gelu(y))                          # W2 GELU(..)
        if self.kind.endswith("_res"):
            y = self.residual_proj(x) + y                      # W3 x + ..
        return self.ln_target(y) if normed else y


# ---- files --------------------------------------------------------------------------------------

def write_whole(path, write):
    """Write a file through `write(temporary path)`, then rename: a reader never sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    write(beside)
    os.replace(beside, path)


def write_json(path, value):
    """`value` as indented JSON, written whole."""
    write_whole(path, lambda part: part.write_text(json.dumps(value, indent=2) + "\n"))


def read_json(path, kind=(dict, list)):
    """A JSON file's content. Raises ValueError naming the file if it is no JSON of this kind."""
    try:
        content = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise ValueError(f"{path} is not JSON ({problem}): write it again") from problem
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds a {type(content).__name__}, which does not belong there")
    return content


def save_weights(link, folder, stem, format="safetensors"):
    """Save one link as folder/stem.FORMAT and return the file's name.

    safetensors keeps fp32; pt is the released layout, a bf16 state dict."""
    name = f"{stem}.{format}"
    state = {key: value.detach().cpu().contiguous() for key, value in link.state_dict().items()}
    if format == "safetensors":
        write_whole(Path(folder) / name, lambda part: safetensors.torch.save_file(state, part))
    elif format == "pt":
        state = {key: value.bfloat16() for key, value in state.items()}
        write_whole(Path(folder) / name, lambda part: torch.save(state, part))
    else:
        raise ValueError(f"unknown format '{format}': choose safetensors or pt")
    return name


def load_weights(link, path):
    """Fill a link from a .pt or .safetensors file, strictly; the link keeps its own dtype (fp32).

    Raises FileNotFoundError for a missing file, ValueError for a damaged one, for other
    parameter names (another kind) or for other widths."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"link file {path} is missing: train it or copy it there")
    try:
        if path.suffix == ".pt":
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            state = safetensors.torch.load_file(path)
    except DAMAGED as problem:
        raise ValueError(f"link file {path} is damaged: copy or train it again") from problem
    expected = link.state_dict()
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise ValueError(f"link file {path} holds no link: copy or train it again")
    if set(state) != set(expected):
        odd = ", ".join(sorted(map(str, set(state) ^ set(expected))))
        raise ValueError(f"link file {path} is not of kind {link.kind} (differs in {odd}): "
                         "name the kind it was trained with")
    for name, value in state.items():
        if value.shape != expected[name].shape:
            raise ValueError(f"link file {path}: {name} is {tuple(value.shape)}, these models "
                             f"need {tuple(expected[name].shape)}: it belongs to other models")
    link.load_state_dict({name: value.float() for name, value in state.items()})


def link_task(kind):
    """The name under which links for a kind of question are filed: code, or math for all others."""
    return "code" if kind == "code" else "math"


def save_inner(link, folder, task="math", format="safetensors"):
    """Save an agent's inner link with its manifests; task None: the one link serves all tasks."""
    write_json(Path(folder) / "adapter_config.json", {"adapter_type": KINDS[link.kind]})
    manifest = Path(folder) / "innerlink_config.json"
    stem = "adapter" if task is None else f"adapter({link_task(task)})"
    name = save_weights(link, folder, stem, format)
    for old in Path(folder).glob("adapter*"):      # what an earlier training left would come first
        if old.suffix in (".pt", ".safetensors") and old.name != name and (
                task is None or old.stem == stem):
            old.unlink()
    if task is None:
        manifest.unlink(missing_ok=True)
        return
    task = link_task(task)
    tasks = read_json(manifest, dict).get("tasks", {}) if manifest.is_file() else {}
    write_json(manifest, {"tasks": {**tasks, task: {"adapter.pt": name}}})


def load_inner(folder, width, task="math", kind="2layer_ln_res"):
    """The inner link of an agent of hidden width `width` from `folder`.

    Looked up as in the released repos: the manifest's file for the task, `adapter(TASK)`,
    `adapter`. Its kind is the one in adapter_config.json, else `kind`."""
    folder, task = Path(folder), link_task(task)
    manifest, config = folder / "innerlink_config.json", folder / "adapter_config.json"
    try:
        tasks = read_json(manifest, dict).get("tasks", {}) if manifest.is_file() else {}
        listed = [str(name) for name in tasks.get(task, {}).values()]
    except AttributeError as problem:
        raise ValueError(f"{manifest} is not of the form {{tasks: {{TASK: {{name: file}}}}}}"
                         ) from problem
    names = listed or [f"{stem}.{format}" for stem in (f"adapter({task})", "adapter")
                                      for format in ("pt", "safetensors")]
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        where = f", as {manifest.name} says" if listed else ""
        raise FileNotFoundError(f"no inner link for task '{task}' in {folder} (looked for "
                                f"{', '.join(names)}{where}): run train_inner.py with "
                                f"--save_dir {folder}")
    if config.is_file():
        kind = str(read_json(config, dict).get("adapter_type", kind))
    try:
        link = InnerLink(width, kind)
    except ValueError as problem:
        raise ValueError(f"{config}: {problem}") from problem
    load_weights(link, found[0])
    return link


def save_outer(links, folder, style="", format="safetensors", task=None):
    """Save outer links {edge key: OuterLink} with the released manifest; task: the only one they
    are for, if so."""
    adapters = []
    for key, link in links.items():
        name = save_weights(link, folder, key, format)
        adapters.append({"legacy_key": key, "filename": name,
                         "adapter_type": "outer_" + KINDS[link.kind],
                         "in_dim": link.widths[0], "out_dim": link.widths[1]})
    write_json(Path(folder) / "outerlink_config.json",
               {"format_version": 1, "paradigm": style, "adapters": adapters,
                **({"task": link_task(task)} if task else {}),
                "legacy_config_filename": "outer_adapter_config.json"})


def load_outer(folder, widths, task="math"):
    """Outer links from `folder` for `widths` = {edge key: (src_width, dst_width)}.

    The manifest lists them flat (`adapters`) or by task (`tasks.TASK.adapters`). Raises
    ValueError if it names other edges or widths: links of another style or of other models."""
    manifest = Path(folder) / "outerlink_config.json"
    if not manifest.is_file():
        raise FileNotFoundError(f"no outer links in {folder} (outerlink_config.json is missing): "
                                f"run train_outer.py with --save_dir {folder}")
    content = read_json(manifest, dict)
    tasks = content.get("tasks")
    if content.get("task", link_task(task)) != link_task(task):
        raise ValueError(f"{manifest} holds links for task '{content['task']}', not "
                         f"'{link_task(task)}': train them, or choose other questions")
    if isinstance(tasks, dict) and not content.get("adapters") and link_task(task) not in tasks:
        raise ValueError(f"{manifest} has no links for task '{link_task(task)}', only for "
                         f"{', '.join(tasks) or 'none'}: train them, or choose other questions")
    try:
        adapters = content.get("adapters") or tasks[link_task(task)]["adapters"]
        listed = {str(entry["legacy_key"]): (kind_name(entry["adapter_type"]),
                                             int(entry["in_dim"]), int(entry["out_dim"]),
                                             str(entry["filename"])) for entry in adapters}
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        raise ValueError(f"{manifest} is not a list of links ({problem!r})") from problem
    if set(listed) != set(widths):
        raise ValueError(f"{manifest} holds the links {', '.join(sorted(listed)) or 'none'}, this "
                         f"style needs {', '.join(sorted(widths))}: they belong to another style")
    links = {}
    for key, (src_width, dst_width) in widths.items():
        kind, in_width, out_width, name = listed[key]
        if (in_width, out_width) != (src_width, dst_width):
            raise ValueError(f"{manifest}: {key} goes {in_width} -> {out_width}, but {src_width} "
                             f"-> {dst_width} is needed: it belongs to other models")
        links[key] = OuterLink(src_width, dst_width, kind)
        load_weights(links[key], Path(folder) / name)
    return links

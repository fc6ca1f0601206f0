"""From names to loaded parts: which file holds what, in a folder here or in a repo on the hub.

    an agent's folder     config.json, model.safetensors, tokenizer.json, ..    the frozen model
                          adapter.pt, or adapter(math).pt and adapter(code).pt  its inner link
                          adapter_config.json, innerlink_config.json            kind and file names
    the outer links'      outer_12.pt, ..                                       one link per edge
    folder                outerlink_config.json                                 kinds and widths

The manifests say what a file name cannot:

    adapter_config.json     {"adapter_type": "ln_res_adapter"}              the inner link's kind
                            (and "code": "adapter", where that task's link is of another kind)
    innerlink_config.json   {"tasks": {"math": {"adapter.pt": "adapter(math).pt"}, ..}}
    outerlink_config.json   {"adapters": [{"legacy_key": "outer_12", "filename": "outer_12.pt",
                             "adapter_type": "outer_ln_res_adapter", "in_dim": 2048,
                             "out_dim": 2048}, ..], ..}, or the same under tasks.TASK

This is the layout of the released checkpoints. We read it, and `--save_format pt` writes it (in
bfloat16), so that either project reads the links of the other. Our own default is safetensors in
float32. Links that were trained here have a train_args.json beside them. It names the base models
on which they were trained.
"""
import os
import shutil
import tempfile
from pathlib import Path

import safetensors.torch
import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from agents import Agent
from chats import as_role
from link import KINDS, RELEASED, InnerLink, OuterLink
from proof import need_proved
from soft_words import is_soft_words, soft_words
from support.devices import pick_device
from support.errors import blame, need
from support.files import read_json, write_json, write_whole

PROJECT = Path(__file__).resolve().parent
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken")


# ---- links --------------------------------------------------------------------------------------

def link_task(kind):
    """The task whose links serve a kind of question: code, or math for all other kinds."""
    return "code" if kind == "code" else "math"


def save_weights(link, folder, stem, format="safetensors"):
    """Write one link as folder/stem.FORMAT and return the file's name. safetensors: in float32. pt:
    the released layout, a state dict in bfloat16."""
    path = Path(folder) / f"{stem}.{format}"
    dtype = torch.bfloat16 if format == "pt" else torch.float32
    state = {key: value.to("cpu", dtype).contiguous() for key, value in link.state_dict().items()}
    write_whole(path, lambda part: torch.save(state, part) if format == "pt"
                else part.write_bytes(safetensors.torch.save(state)))
    return path.name


def read_weights(path):
    """A link file's state dict {name: tensor}."""
    if path.suffix == ".pt":
        return torch.load(path, map_location="cpu", weights_only=True)    # a pickle could run code
    with open(path, "rb") as file:         # 300,000 tensors would take a minute, a link has ten
        size = int.from_bytes(file.read(8), "little")
    need(size < 100_000, f"its list of tensors has {size} bytes")
    return safetensors.torch.load_file(path)


def load_weights(link, path):
    """Fill a link from a file. Every name and shape has to fit. Raises FileNotFoundError, or
    ValueError if the file is damaged or holds a link of another kind or for other models."""
    with blame(f"link file {path} is damaged, or it holds no {link.kind} link for these models"):
        link.load_state_dict(read_weights(path))


def save_inner(link, folder, task="math", format="safetensors"):
    """Write an agent's inner link with its manifests. task None: one link serves all tasks.

    The manifest names the new file for its tasks. So load_inner no longer finds the links of an
    earlier training in the same folder."""
    stem = "adapter" if task is None else f"adapter({link_task(task)})"
    name = save_weights(link, folder, stem, format)
    manifest, config = Path(folder) / "innerlink_config.json", Path(folder) / "adapter_config.json"
    tasks, kind = read_json(manifest).get("tasks", {}), KINDS[link.kind]
    served = ("math", "code") if task is None else (link_task(task),)
    # The other task may have a link of another kind. Then the config names both.
    kinds = read_json(config) if tasks.keys() - set(served) else {}
    kinds = {"adapter_type": kind, **kinds, **dict.fromkeys(served, kind)}
    write_json(manifest, {"tasks": {**tasks, **{one: {"adapter.pt": name} for one in served}}})
    write_json(config, {one: kind for one, kind in kinds.items()
                        if one == "adapter_type" or kind != kinds["adapter_type"]})


def load_inner(folder, width, task="math", kind=RELEASED):
    """The inner link of an agent of this width. We look in the publishers' order: the file that the
    manifest names for the task, then adapter(TASK), then adapter. kind: the kind of a link whose
    folder does not name one. Raises FileNotFoundError, or ValueError for a link that does not fit.
    """
    folder, task = Path(folder), link_task(task)
    with blame(f"{folder}/innerlink_config.json is not {{tasks: {{TASK: {{name: file}}}}}}"):
        named = read_json(folder / "innerlink_config.json").get("tasks", {}).get(task, {})
        names = list(named.values()) or [f"{stem}.{format}" for stem in (f"adapter({task})",
                                         "adapter") for format in ("pt", "safetensors")]
        found = [folder / name for name in names if (folder / name).is_file()]
    need(found, f"no inner link for task '{task}' in {folder} (looked for {', '.join(names)}): run "
         f"train_inner.py --save_dir {folder}", FileNotFoundError)
    config = folder / "adapter_config.json"
    with blame(config):
        kinds = read_json(config)
        link = InnerLink(width, kinds.get(task) or kinds.get("adapter_type", kind))
    load_weights(link, found[0])
    return link


def save_outer(links, folder, style="", format="safetensors", task=None):
    """Write outer links {edge key: OuterLink} with the released manifest. task: the one task that
    they serve. None: they serve all tasks."""
    adapters = [{"legacy_key": key, "filename": save_weights(link, folder, key, format),
                 "adapter_type": "outer_" + KINDS[link.kind],
                 "in_dim": link.widths[0], "out_dim": link.widths[1]}
                for key, link in links.items()]
    manifest = {"format_version": 1, "paradigm": style, "adapters": adapters,
                "legacy_config_filename": "outer_adapter_config.json"}
    if task:
        manifest["task"] = link_task(task)
    write_json(Path(folder) / "outerlink_config.json", manifest)


def read_outer(path, told):
    """The outer link in a file. told: its entry in the manifest, with its kind and widths."""
    link = OuterLink(told["in_dim"], told["out_dim"], told["adapter_type"])
    load_weights(link, path)
    return link


def load_outer(folder, widths, task="math"):
    """Outer links {edge key: OuterLink} for widths {edge key: (src_width, dst_width)}.

    The manifest lists them flat, or by task. Raises FileNotFoundError if it is missing, ValueError
    if its links are for another task, another style or other models."""
    folder, task = Path(folder), link_task(task)
    path = folder / "outerlink_config.json"
    need(path.is_file(), f"no outer links in {folder} ({path.name} is missing): run "
         f"train_outer.py --save_dir {folder}", FileNotFoundError)

    with blame(path):
        manifest = read_json(path)
        tasks = [manifest["task"]] if manifest.get("task") else list(manifest.get("tasks", [task]))
        need(task in tasks, f"its links are for task {', '.join(tasks) or 'none'}, not '{task}': "
             "train them, or choose other questions")
        entries = manifest.get("adapters") or manifest["tasks"][task]["adapters"]
        links = {one["legacy_key"]: read_outer(folder / one["filename"], one) for one in entries}
        found = {key: link.widths for key, link in links.items()}
        need(found == widths, f"it holds the links {found} (by widths), but this system needs "
             f"{widths}: they belong to another style or to other models")
    return links


# ---- frozen models ------------------------------------------------------------------------------

def local_folder(name, revision=None, who=""):
    """A folder as given, or within the project, or fetched from the hub. Raises FileNotFoundError.
    `who` is named in the error."""
    for folder in (Path(name).expanduser(), PROJECT / name):
        if folder.is_dir():
            return folder
    at = f" (revision {revision})" if revision else ""
    # Gated, private, misspelt, offline: the hub's own words say what is wrong.
    with blame(f"{who and who + ': '}{name}{at} is neither a folder here nor on the hub",
               FileNotFoundError):
        # Llama's repos hold the weights a second time in original/.
        return Path(snapshot_download(name, revision=revision, ignore_patterns=["original/*"]))


def load_agent(folder, device, dtype, trust_remote_code=False, thinking=False):
    """The Agent of a folder that holds a whole causal language model, without an inner link.

    An adapter_config.json beside a model makes transformers take the folder for a PEFT adapter and
    fail. So the model is loaded through a view: a folder of links to all other files. Raises
    ValueError if it does not load."""
    with tempfile.TemporaryDirectory() as view, blame(
            f"{folder} does not load as a causal language model with tokenizer", hide=view,
            show=folder):
        shutil.copytree(Path(folder).resolve(), view, copy_function=os.symlink, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("adapter_config.json"))
        if "peft_type" in read_json(Path(folder) / "adapter_config.json"):
            print(f"{folder}: the PEFT adapter beside the model is not used: merge it into the "
                  "model first (merge_and_unload)", flush=True)
        settings = {"trust_remote_code": trust_remote_code}
        config = AutoConfig.from_pretrained(view, **settings)
        need(any(list(Path(view).glob(name)) for name in TOKENIZER_FILES),
             "it has no tokenizer file")                 # the library would make an empty one
        # AutoTokenizer may replace the folder's way of splitting words by that of its family. If
        # there is a tokenizer.json, that file is the truth.
        has_json = (Path(view) / "tokenizer.json").is_file()
        reader = PreTrainedTokenizerFast if has_json else AutoTokenizer
        tokenizer = reader.from_pretrained(view, **settings)
        model, report = AutoModelForCausalLM.from_pretrained(
            view, config=config, dtype=dtype, output_loading_info=True, **settings)
        missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
        if config.tie_word_embeddings and missing == ["lm_head.weight"]:
            # The config of a model of text and images may say "tied" at its top alone.
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
            missing = []
        # Without this error the library would go on with random weights.
        need(not missing + unexpected, f"it lacks the weights {missing[:3]} and cannot use "
             f"{unexpected[:3]}: config.json is not that of this checkpoint")
    tokenizer.name_or_path = str(folder)
    return Agent(model.to(device), tokenizer, thinking=thinking)


# ---- whole systems ------------------------------------------------------------------------------

def base_model(folder):
    """The base model of an inner link: the one beside it, else the one of the link's training, else
    None. Another model of the same width would load without an error and give nonsense."""
    if (folder / "config.json").is_file():
        return folder
    return read_json(folder / "train_args.json").get("model_name_or_path")


def notes_of(name):
    """train_args.json of the links in a folder here. {} if there is none, or if the links are on
    the hub. latent_length is left out if the training sent one state per token of a text (teacher).
    Raises ValueError for a number that cannot be."""
    notes = {}
    for folder in (Path(name).expanduser(), PROJECT / name) if name else ():
        notes = notes or read_json(folder / "train_args.json")
    for key in ("latent_length", "num_recursive_rounds"):
        need(notes.get(key, 1) in range(1, 10_000),
             f"{name}/train_args.json has {key} {notes.get(key)!r}: it is a number from 1 to 9999")
    if notes.get("latents") == "teacher":
        notes.pop("latent_length", None)
    return notes


def load_agents(style, device="auto", dtype="auto", task="math", trust_remote_code=False,
                override=None, revision=None, models=None, inner_kind=RELEASED, thinking=False,
                offload=False, need_links=True):
    """{role name: Agent with its inner link, all frozen}.

    device: one, or several with commas. Each agent goes to the device with the least on it, and
    only thoughts (B, m, d) cross over. override: {role: folder or hub id} instead of the role's
    repo, or soft_words (see soft_words.py). models: {role: base model}. inner_kind: as `kind` of
    load_inner. need_links=False: a role without an inner link gets a new one, and a line says so. A
    role that nobody hears gets one if no folder is named: its link is never used. Raises ValueError
    or FileNotFoundError, naming style and role."""
    devices = [pick_device(name.strip(), dtype) for name in str(device).split(",")]
    filled, loaded, agents = [0] * len(devices), {}, {}
    for role in style.roles:
        who = f"style {style.name}, role {role.name}"
        repo = (override or {}).get(role.name) or role.repo
        speaks = any(edge.src == role.name for edge in style.edges)    # if not, no link is needed
        need(repo or not (need_links and speaks), f"{who}: no repo with an inner link: name one in "
             "the style or in ckpt_override")
        soft = is_soft_words(repo)
        folder = local_folder(repo, revision, who) if repo and not soft else None
        model = (models or {}).get(role.name) or folder and base_model(folder) or role.model
        base = local_folder(model, who=who).resolve()
        if base not in loaded:                        # two roles may share one frozen model
            emptiest = filled.index(min(filled))
            agent = loaded[base] = load_agent(base, *devices[emptiest], thinking=thinking,
                                              trust_remote_code=trust_remote_code)
            need_proved(agent)
            if offload:                               # MAS.agent brings the weights back
                agent.model.to("cpu")
                agent.recorder.recorded = None        # it knows where the weights were
            filled[emptiest] += agent.model.get_memory_footprint()
        agent = agents[role.name] = as_role(loaded[base], role)
        if soft:
            agent.inner = soft_words(repo, agent)
        elif folder is None:
            if speaks:
                print(f"{who}: no inner link, so it gets a new, untrained one", flush=True)
            with torch.random.fork_rng(devices=[]):      # the caller's random numbers stay
                torch.default_generator.manual_seed(42)
                agent.inner = InnerLink(agent.width, inner_kind, agent.embedding_rms)
        else:
            agent.inner = load_inner(folder, agent.width, task, inner_kind)
        agent.inner.to(agent.device).requires_grad_(False)
    return agents


def outer_folder(style, override, revision=None, need_links=True):
    """The folder of a style's outer links. If none is named: None if they are not needed, else
    ValueError."""
    name = override.get("outer", style.repo)
    need(name or not need_links, f"style {style.name} has no repo with outer links: name one in "
         "the style or as outer in ckpt_override")
    return local_folder(name, revision, f"style {style.name}, outer links") if name else None


def load_outer_links(folder, style, agents, task="math"):
    """The outer links in a folder as a ModuleDict."""
    widths = {edge.key: (agents[edge.src].width, agents[edge.dst].width) for edge in style.edges}
    return placed(load_outer(folder, widths, task), style, agents)


def new_outer_links(style, agents, kinds, scale_match=True, seed=42):
    """Untrained outer links as a ModuleDict. kinds: {edge key: kind}, by default the released one.
    scale_match: whether their gain starts at the RMS of the hearing agent's embeddings."""
    links = {}
    with torch.random.fork_rng(devices=[]):              # the caller's random numbers stay
        torch.default_generator.manual_seed(seed)
        for edge in style.edges:
            source, target = agents[edge.src], agents[edge.dst]
            gain = target.embedding_rms if scale_match else 1.0
            links[edge.key] = OuterLink(source.width, target.width,
                                        kinds.get(edge.key, RELEASED), gain)
    return placed(links, style, agents)


def placed(links, style, agents):
    """Links {edge key: OuterLink} as a ModuleDict, frozen. A link lives where the hearing agent
    lives, so R_in(H) (B, m, d) is what crosses over."""
    for edge in style.edges:
        links[edge.key].to(agents[edge.dst].device).requires_grad_(False)
    return torch.nn.ModuleDict(links)

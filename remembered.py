"""What outer links remember of their training: the base models, the inner links, the prompts.

An outer link translates the thoughts that its agents had in training. It would load beside other
models or other inner links of the same widths, and give nonsense without a word. So train_outer.py
writes into train_args.json where both were, and a fingerprint of each inner link:

    {"pro_model": "", "pro_inner": "out/pro", "inner_links": {"pro": "1f0c..", "contra": "a94e.."},
     "prompts": "77b2..", "num_recursive_rounds": 3, "latent_length": 6, ..}

Released links, and those of earlier revisions, have no fingerprints. They load without the check.
"""
import os
from pathlib import Path

from checkpoints import notes_of
from support.errors import need
from support.files import fingerprint


def fingerprints(style, agents):
    """What a training adds to its train_args.json, {"prompts": .., "inner_links": {role: ..}}. The
    inner link of a role that does not speak is never used, so it has none."""
    links = {edge.src: agents[edge.src].inner for edge in style.edges}
    return {"prompts": fingerprint([], style.words()),
            "inner_links": {role: fingerprint([link], link.kind) for role, link in links.items()}}


def trained_with(folder, style, override):
    """What the outer links in a folder were trained with: (notes, models, inner links).

    notes: its train_args.json, and for the rest what the style trains with. models: {role: base
    model}; an override that brings its own model counts more. inner links: {role: folder}; an
    override counts more, and the style's own counts where nothing else is named ("": no link)."""
    notes = {**style.settings.get("train_outer", {}), **notes_of(folder)}

    def place(name):
        """Where a folder of the training is now. If it lies beside the outer links as it did then,
        that one counts."""
        path = notes.get(name)
        moved = path and os.path.relpath(path, notes.get("save_dir", "."))
        moved = moved and os.path.normpath(os.path.join(folder, moved))
        return moved if moved and os.path.isdir(moved) else path

    inner = {role.name: override.get(role.name) or place(f"{role.name}_inner") or role.repo
             for role in style.roles}
    models = {role: place(f"{role}_model") for role in inner
              if not (Path(override.get(role) or "/") / "config.json").is_file()}
    return notes, models, inner


def need_as_trained(folder, style, agents, inner, override):
    """Compare the loaded agents with those that the outer links in a folder were trained with.

    inner: {role: folder, or "" for a new link}. Other prompts or edges are a printed line, and so
    is another inner link that the override names. Any other inner link is a ValueError, naming role
    and folder."""
    trained, now = notes_of(folder), fingerprints(style, agents)
    if trained.get("prompts", now["prompts"]) != now["prompts"]:
        print(f"the links in {folder} were trained with other prompts or edges than those of style "
              f"{style.name}", flush=True)
    for role, found in now["inner_links"].items():
        if inner[role] and trained.get("inner_links", {}).get(role, found) != found:
            says = (f"role {role}: the inner link in {inner[role]} is not the one that the outer "
                    f"links in {folder} were trained with")
            need(role in override, f"{says}: train the outer links again, or go on all the same: "
                 f"add {role}={inner[role]} to --ckpt_override")
            print(says, flush=True)

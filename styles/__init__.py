"""A style is data: who takes part, who hears whom, and what each one is asked.

    Role(name, model, repo, prompt)      one agent. prompt: a text, or {kind of question: text}
    Edge(key, src, dst)                  src's thoughts reach dst through the outer link `key`
    Style(name, roles, edges)            roles speak in order, and the last one writes the answer

In a prompt, {question}, {answer_format}, a slot {role name} for each role that is heard, and any
other {column} of the data are filled in. A column gives one role an input that the others have not.
A role has up to three prompts, all written out:

              when it is asked                                               its slots
    prompt    the role has heard all whom it hears                           all of them
    first     round 1, where some of them speak later                        those that spoke
              the last role, asked alone (methods `single`, `single_loop`)   none
    own       the last role alone, hearing its own last text (single_loop)   its own name
              If its `first` has slots, `own` is asked first, with an empty slot.

A style is a file of this folder that makes a Style, or any other .py file, given by its path.
Nothing has to be registered. To change a shipped style, make a file that imports it and uses
dataclasses.replace. The prompts of all styles are our own words. The released links were trained
under other words, so they may score lower here than published (see docs/published_prompts.py).
"""
import importlib
import pkgutil
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from support.errors import need
from support.sources import run_file

# The published names of roles and styles. Flags and data may use them as well.
PUBLISHED_ROLES = {
    "refiner": "critic", "hie_math_expert": "math", "hie_code_expert": "code",
    "hie_science_expert": "science", "hie_summarizer": "summarizer", "distill_expert": "expert",
    "distill_learner": "learner", "deliberation_reflector": "reflector",
    "deliberation_toolcaller": "toolcaller"}
PUBLISHED_DESIGNS = {"sequential": "sequential_light", "hie": "mixture",
                     "distill": "distillation", "deliberation": "deliberation"}

# The kinds of questions, and what {answer_format} stands for in the prompts of each.
KINDS = ("math", "choice", "code", "search")
ANSWER_FORMAT = {
    "math": "End with the final answer as \\boxed{...}.",
    "choice": "End with the letter of the one right option as \\boxed{...}.",
    "code": "End with the whole program in one ```python block.",
    "search": "End with the shortest possible answer as \\boxed{...}.",
}


@dataclass(frozen=True)
class Role:
    """One agent: its base model, the repo or folder with its trained inner link, what it is asked.

    prompt, first, own: one text for all kinds of questions, or {kind: text}. target: the columns of
    the data with its gold text, of which the first one present counts. A cell is a text (said in
    every round) or a list with one text per round (the last one repeats). chat=False: its prompt is
    all that the model reads, and it writes one line. (Base models have no chat template.)"""
    name: str
    model: str
    repo: str
    prompt: str | dict
    first: str | dict = ""
    own: str | dict = ""
    target: tuple = ()
    system: str = ""
    chat: bool = True


@dataclass(frozen=True)
class Edge:
    """A directed connection. `key` is the name of its outer link in the released files."""
    key: str
    src: str
    dst: str


@dataclass(frozen=True)
class Style:
    """A checked system. settings: {script or data set: {flag: default}}, for flags not given, and
    under "device" where it runs (support/devices.py). links_by_task: an agent has one inner link
    for code and another one for everything else."""
    name: str
    roles: tuple
    edges: tuple
    repo: str = ""
    tools: tuple = ()
    settings: dict = field(default_factory=dict)
    links_by_task: bool = False

    def __post_init__(self):
        # Only alone() makes a style with the edge `own`, from a style that was checked.
        if [edge.key for edge in self.edges] != ["own"]:
            check(self)

    def role(self, name):
        """The role of that name, ours or the published one. Raises ValueError if there is none."""
        found = [role for role in self.roles if role.name in (name, PUBLISHED_ROLES.get(name))]
        need(found, f"style {self.name} has no role '{name}': choose one of "
             f"{', '.join(role.name for role in self.roles)}")
        return found[0]

    def heard_by(self, name):
        """Names of the roles that `name` hears, in order of speaking."""
        sources = {edge.src for edge in self.edges if edge.dst == name}
        return [role.name for role in self.roles if role.name in sources]

    def heard_first(self, name):
        """Names of the roles that `name` has heard in round 1: those that speak before it."""
        names = [role.name for role in self.roles]
        return [other for other in self.heard_by(name) if names.index(other) < names.index(name)]

    def words_for(self, role, kind, heard):
        """What `role` is asked about a question of `kind`, having heard the roles in `heard`.

        Raises ValueError if the style has no words with just these slots."""
        which = "prompt" if set(heard) == set(self.heard_by(role.name)) else "first"
        text = getattr(role, which)
        text = text.get(kind) if isinstance(text, dict) else text
        slots = {other.name for other in self.roles if text and f"{{{other.name}}}" in text}
        called = f"{which}` or `own" if list(heard) == [role.name] else which     # see alone()
        wanted = ", ".join(f"{{{name}}}" for name in heard) or "nobody"
        need(text and slots == set(heard), f"style {self.name}: role {role.name} has no `{called}`"
             f" prompt for kind '{kind}' with a slot for those heard there ({wanted}) and no other "
             "slot: add it, or change the edges")
        return text

    def words(self):
        """Who is asked what, and who hears whom: what links get used to in training."""
        return ([(role.name, role.prompt, role.first, role.chat and role.system)
                 for role in self.roles], self.edges)

    def alone(self):
        """The last role by itself, hearing its own last text: methods single and single_loop.

        If it hears itself in the rounds too, its `first` has slots. Then it is asked `own` at the
        beginning too, with nothing in the slot."""
        last = self.roles[-1]
        first, early = last.first, self.heard_first(last.name)
        if early and early != self.heard_by(last.name):
            first = without_slot(last.own, last.name)
        return replace(self, roles=(replace(last, prompt=last.own, first=first),),
                       edges=(Edge("own", last.name, last.name),))


def without_slot(words, name):
    """A prompt, one text or {kind: text}, with nothing in the slot of a role."""
    if isinstance(words, dict):
        return {kind: without_slot(text, name) for kind, text in words.items()}
    return words.replace(f"{{{name}}}", "")


# ---- checks -------------------------------------------------------------------------------------

def check(style):
    """Raise ValueError, naming style, role and fix, for a style that cannot work. Types are left to
    Python: it says itself that one Edge without a comma is not a tuple of Edges."""
    who, names = f"style {style.name}", [role.name for role in style.roles]
    need(names, f"{who} has no roles: name at least one")
    need(all(isinstance(one, dict) for one in style.settings.values()),
         f"{who}: its settings are not {{script or data set: {{flag: default}}}}")
    for what, items in (("roles", names), ("edges", [edge.key for edge in style.edges]),
                        ("ways", [f"{edge.src} -> {edge.dst}" for edge in style.edges])):
        for item in items:
            need(items.count(item) == 1,
                 f"{who}: two {what} are called {item}: rename one, or take one out")
    for name in names:
        need(not re.fullmatch(r"question|answer_format|outer|agent\d+", name),
             f"{who}: a role cannot be called {name}, a word of prompts or flags: rename it")
    for role in style.roles:
        need(role.chat or not role.system, f"{who}: role {role.name} has a system text but no chat:"
             " put the text into its prompts, or leave chat=False out")
    for edge in style.edges:
        for end in (edge.src, edge.dst):
            need(end in names, f"{who}: edge {edge.key} names role {end}, which does not exist: "
                 f"use one of {', '.join(names)}")
        # The key names a file, a flag and a module of a ModuleDict.
        need(re.fullmatch(r"\w+", edge.key) and not hasattr(torch.nn.ModuleDict, edge.key)
             and edge.key not in ("own", "training", "outer_adapter", "lr_scheduler"),
             f"{who}: edge key '{edge.key}' is taken or cannot name a file: use other letters")
    need(style.heard_by(names[-1]),
         f"{who}: {names[-1]}, the last role, hears nobody: add an edge to it")
    check_prompts(style)


def check_prompts(style):
    """Ask now for every prompt that a run can ask for: a missing one would cost hours later.

    A role is asked when it has heard everyone, and in round 1, when it has heard those who speak
    before it. The last role can also be asked alone, and then hear its own text."""
    asked, known = [], {"question", "answer_format", *(role.name for role in style.roles)}
    for role in style.roles:
        who = f"style {style.name}: role {role.name}"
        need(role.model, f"{who} has no model: name a hub id or a folder")
        for prompts in (role.prompt, role.first, role.own):
            odd = sorted(set(prompts) - set(KINDS)) if isinstance(prompts, dict) else []
            need(not odd, f"{who} has prompts for the unknown kinds {', '.join(odd)}: use "
                 f"{', '.join(KINDS)}")
        asked += [(role, style.heard_by(role.name)), (role, style.heard_first(role.name))]
    last = style.alone().roles[0]
    asked += [(replace(last, prompt=words, first=words), told)
              for words, told in ((last.first, []), (last.prompt, [last.name])) if words]
    for role, told in asked:
        prompt = style.role(role.name).prompt
        for kind in prompt if isinstance(prompt, dict) and prompt else KINDS[:1]:
            text = style.words_for(role, kind, told)
            who, found = f"style {style.name}: role {role.name}", names_in(text)
            need(found - known or "question" in found, f"{who} is asked {text!r}, without "
                 "{question} or another column of the data: add it")
            for odd in found - known:                    # a column, if its name is not a slip
                meant = [name for name in known if name.lower() == odd.lower()]
                need(not meant, f"{who}: its prompt holds {{{odd}}}: write {{{''.join(meant)}}}")


def names_in(prompt):
    """The {names} in a prompt. Braces after a backslash command, like \\boxed{x}, are not names."""
    return {found[2] for found in re.finditer(r"(\\\w+)?{([A-Za-z_]\w*)}", prompt) if not found[1]}


# ---- finding a style ----------------------------------------------------------------------------

def all_styles():
    """{name: Style} of all files of this folder. Each is imported, so it must not be a script."""
    modules = [importlib.import_module(f"{__name__}.{info.name}")
               for info in pkgutil.iter_modules(__path__)]
    return {value.name: value for module in modules for value in vars(module).values()
            if isinstance(value, Style)}


def get_style(name):
    """The Style of that name in this folder, or the last one that a .py file makes, or `name`
    itself if it is a Style. Published design names work too. Raises ValueError if there is none,
    FileNotFoundError if the .py file is missing."""
    if isinstance(name, Style):
        return name
    path, styles = Path(str(name)), all_styles()         # None is an unknown name too
    if path.suffix == ".py":
        made = [value for value in run_file(path, "style file").values()
                if isinstance(value, Style)
                and value not in styles.values()]        # a shipped style was only imported
        need(made, f"style file {path} makes no style of its own: let it make one")
        return made[-1]
    name = PUBLISHED_DESIGNS.get(name, name)
    need(name in styles, f"unknown style '{name}': choose one of {', '.join(sorted(styles))}, or "
         "give a .py file that makes one")
    return styles[name]

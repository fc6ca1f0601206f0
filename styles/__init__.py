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

A style is a file of this folder that makes a Style, or any other .py file, given by its path.
Nothing has to be registered. To change a shipped style, make a file that imports it and uses
dataclasses.replace. The prompts of all styles are our own words. The released links were trained
under other words, so they may score lower here than published.
"""
import importlib
import pkgutil
import re
import runpy
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

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

    target: the data columns with its gold text, of which the first one present counts. A cell is a
    text (said in every round) or a list with one text a round (the last one repeats)."""
    name: str
    model: str
    repo: str
    prompt: str | dict
    first: str | dict = ""
    own: str | dict = ""
    target: tuple = ()
    system: str = ""


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
        # A style of one role that hears itself is made by alone(), of a style that was checked.
        if not (len(self.roles) == 1 and self.edges and self.edges[0].src == self.edges[0].dst):
            check(self)

    def role(self, name):
        """The role of that name, ours or the published one. Raises ValueError if there is none."""
        for role in self.roles:
            if role.name in (name, PUBLISHED_ROLES.get(name)):
                return role
        names = ", ".join(role.name for role in self.roles)
        raise ValueError(f"style {self.name} has no role '{name}': choose one of {names}")

    def heard_by(self, name):
        """Names of the roles that `name` hears, in order of speaking."""
        sources = {edge.src for edge in self.edges if edge.dst == name}
        return [role.name for role in self.roles if role.name in sources]

    def heard_first(self, name):
        """Names of the roles that `name` has heard in round 1: those that speak before it."""
        names = [role.name for role in self.roles]
        return [other for other in self.heard_by(name) if names.index(other) < names.index(name)]

    def prompt(self, role, kind, heard):
        """What `role` is asked about a question of `kind`, having heard the roles in `heard`.

        Raises ValueError if the style has no words with just these slots."""
        which = "prompt" if set(heard) == set(self.heard_by(role.name)) else "first"
        text = getattr(role, which)
        text = text.get(kind) if isinstance(text, dict) else text
        slots = {other.name for other in self.roles if text and f"{{{other.name}}}" in text}
        if not text or slots != set(heard):
            which = "own" if list(heard) == [role.name] else which              # see alone()
            wanted = ", ".join(f"{{{name}}}" for name in heard) or "nobody"
            raise ValueError(f"style {self.name}: role {role.name} has no `{which}` prompt for "
                             f"kind '{kind}' with a slot for those heard there ({wanted}) and no "
                             "other slot: add it, or change the edges")
        return text

    def words(self):
        """Who is asked what, and who hears whom: what links get used to in training."""
        return ([(role.name, role.prompt, role.first, role.system) for role in self.roles],
                self.edges)

    def alone(self):
        """The last role by itself, hearing its own last text: methods single and single_loop."""
        last = replace(self.roles[-1], prompt=self.roles[-1].own)
        return replace(self, roles=(last,), edges=(Edge("own", last.name, last.name),))


# ---- checks -------------------------------------------------------------------------------------

def check(style):
    """Raise ValueError, naming style, role and fix, for a style that cannot work."""
    def need(fine, what):
        if not fine:
            raise ValueError(f"style {style.name}: {what}")

    for what, kind, items in (("roles", Role, style.roles), ("edges", Edge, style.edges)):
        need(isinstance(items, tuple) and items and all(isinstance(one, kind) for one in items),
             f"its {what} are no tuple of {kind.__name__}: write ({kind.__name__}(..), ..), with a "
             "comma even after a single one")
    need(isinstance(style.settings, dict) and all(isinstance(one, dict)
                                                  for one in style.settings.values()),
         "its settings are no dict of dicts: write {script or data set: {flag: default}}")
    names, keys = [role.name for role in style.roles], [edge.key for edge in style.edges]
    ways = [f"{edge.src} -> {edge.dst}" for edge in style.edges]
    for what, items in (("roles", names), ("edges", keys), ("ways", ways)):
        for item in items:
            need(items.count(item) == 1, f"two {what} are called {item}: rename one, or take one "
                 "out")
    for name in names:
        need(not re.fullmatch(r"question|answer_format|outer|agent\d+", name),
             f"a role cannot be called {name}, a word of prompts or flags: rename it")
    for edge in style.edges:
        for end in (edge.src, edge.dst):
            need(end in names, f"edge {edge.key} names role {end}, which does not exist: use one "
                 "of " + ", ".join(names))
        # The key names a file, a flag and a module of a ModuleDict.
        need(re.fullmatch(r"\w+", edge.key) and not hasattr(torch.nn.ModuleDict, edge.key)
             and edge.key not in ("training", "outer_adapter", "lr_scheduler"),
             f"edge key '{edge.key}' is taken, or no file name: use other letters, digits and _")
    need(style.heard_by(names[-1]), f"nobody is heard by {names[-1]}, the last role, which writes: "
         "add an edge to it")
    check_prompts(style, need)


def check_prompts(style, need):
    """Every prompt that a run can ask for is asked for now: once everyone was heard, in round 1,
    and where a role that hears only earlier ones is asked alone."""
    asked = []
    for role in style.roles:
        need(role.model, f"role {role.name} has no model: name a hub id or a folder")
        need(isinstance(role.target, tuple), f"role {role.name}: target is no tuple of columns, "
             "like ('plan',)")
        for prompts in (role.prompt, role.first, role.own):
            odd = sorted(set(prompts) - set(KINDS)) if isinstance(prompts, dict) else []
            need(not odd, f"role {role.name} has prompts for the unknown kinds {', '.join(odd)}: "
                 f"use {', '.join(KINDS)}")
        heard, early = style.heard_by(role.name), style.heard_first(role.name)
        alone = [[]] if role.first and heard == early else []
        asked += [(style, role, told) for told in (heard, early, *alone)]
    last, names = style.roles[-1], {role.name for role in style.roles}
    if last.own:
        asked.append((style.alone(), style.alone().roles[0], [last.name]))
    for one, role, told in asked:
        for kind in role.prompt if isinstance(role.prompt, dict) and role.prompt else KINDS[:1]:
            text = one.prompt(role, kind, told)
            need(names_in(text) - names - {"answer_format"}, f"role {role.name} is asked '{text}', "
                 "which holds no {question} and no other column of the data: add it")


def names_in(prompt):
    """The {names} in a prompt. Braces after a backslash command, like \\boxed{x}, are none."""
    return {found[2] for found in re.finditer(r"(\\\w+)?{([A-Za-z_]\w*)}", prompt)
            if not found[1]}


# ---- finding a style ----------------------------------------------------------------------------

def styles_in(variables):
    """The Styles among {name: value}, in order."""
    return [value for value in variables.values() if isinstance(value, Style)]


def all_styles():
    """{name: Style} of all files of this folder."""
    modules = [importlib.import_module(f"{__name__}.{info.name}")
               for info in pkgutil.iter_modules(__path__)]
    return {style.name: style for module in modules for style in styles_in(vars(module))}


def get_style(name):
    """The Style of that name in this folder, or the last one that a .py file makes, or `name`
    itself if it is a Style. Published design names work too. Raises ValueError if there is none."""
    if isinstance(name, Style):
        return name
    path, styles = Path(name), all_styles()
    if path.suffix == ".py":
        try:
            made = styles_in(runpy.run_path(str(path)))
        except (Exception, SystemExit) as problem:       # a user's program may raise anything
            raise ValueError(f"style file {path} does not run: {type(problem).__name__}: {problem}"
                             ) from problem
        made = [style for style in made if style not in styles.values()]     # not only imported
        if not made:
            raise ValueError(f"style file {path} makes no style of its own: let it make one")
        return made[-1]
    name = PUBLISHED_DESIGNS.get(name, name)
    if name not in styles:
        raise ValueError(f"unknown style '{name}': choose one of {', '.join(sorted(styles))}, or "
                         "give a .py file that makes one")
    return styles[name]

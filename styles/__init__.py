"""A style is data: who takes part, who hears whom, and what each one is asked.

    Role(name, model, repo, prompt)      one agent; prompt: a str, or {kind of question: str}
    Edge(key, src, dst)                  src's thoughts reach dst through outer link `key`
    Style(name, roles, edges)            roles speak in order; the last one writes the answer

In a prompt `{question}`, `{answer_format}` and a slot `{role name}` for each role it hears are
replaced; every other brace stays. `first` is the prompt of a role that has heard nothing yet;
without it, each line of `prompt` that holds an unfilled slot is left out. A style is a file of
this folder that makes a Style, or any other .py file given by its path; nothing has to be
registered.

The prompts of all styles are our own words. The released links were trained under others, so they
may score lower here than published; `evaluate.py --prompts FILE.json` puts other words in.
"""
import dataclasses
import importlib
import importlib.util
import pkgutil
import re
from dataclasses import dataclass, field
from pathlib import Path

# The published names of roles and styles, which flags and data may use as well.
PUBLISHED_ROLES = {
    "refiner": "critic", "hie_math_expert": "math", "hie_code_expert": "code",
    "hie_science_expert": "science", "hie_summarizer": "summarizer", "distill_expert": "expert",
    "distill_learner": "learner", "deliberation_reflector": "reflector",
    "deliberation_toolcaller": "toolcaller"}
PUBLISHED_DESIGNS = {"sequential": "sequential_light", "hie": "mixture",
                     "distill": "distillation", "deliberation": "deliberation"}

KINDS = ("math", "choice", "code", "search")
ANSWER_FORMAT = {
    "math": "End with the final answer as \\boxed{...}.",
    "choice": "End with the letter of the one right option as \\boxed{...}.",
    "code": "End with the whole program in one ```python block.",
    "search": "End with the shortest possible answer as \\boxed{...}.",
}

# What the prompts of the real styles are put together from (see per_kind).
TASK = {
    "math": "Problem:\n{question}",
    "choice": "Multiple-choice question:\n{question}",
    "code": "Programming task:\n{question}",
    "search": "Question:\n{question}",
}
SOLVE = {
    "math": "Solve the problem step by step. {answer_format}",
    "choice": "Weigh the options one by one, then choose. {answer_format}",
    "code": "Write the program. {answer_format}",
    "search": "Put the facts together, then answer. {answer_format}",
}


def per_kind(*parts):
    """{kind: prompt}, each put together from parts that are a str or a {kind: str}."""
    return {kind: "\n\n".join(part if isinstance(part, str) else part[kind] for part in parts)
            for kind in KINDS}


def benchmark_settings(batch_size, latent_length, math500_tokens=2000):
    """Style.settings for evaluate.py: the published decoding budgets, and {data set: m}. Without
    other flags the latent system alone is asked, in three rounds, as the publishers do."""
    tokens = {"math500": math500_tokens, "aime25": 16000, "aime26": 16000, "gpqa": 4000,
              "medqa": 4000, "mbppplus": 4000, "livecodebench": 4000}
    settings = {name: {"max_new_tokens": count} for name, count in tokens.items()}
    for name in ("mbppplus", "livecodebench"):
        settings[name]["temperature"] = 0.2
    for name, m in latent_length.items():
        settings[name]["latent_length"] = m
    evaluate = {"batch_size": batch_size, "method": ["latent"], "num_recursive_rounds": [3]}
    return {"evaluate": evaluate, **settings}


@dataclass(frozen=True)
class Role:
    """One agent: its base model, the repo or folder with its trained inner link, what it is asked.

    `target` names the data columns with its gold text, the first one present counts; a cell is a
    string (said in every round) or a list of one text a round (the last one repeats)."""
    name: str
    model: str
    repo: str
    prompt: str | dict
    first: str | dict = ""
    target: tuple = ()
    system: str = ""
    own: str = ""                # what introduces its own last text, in method single_loop


@dataclass(frozen=True)
class Edge:
    """A directed connection; `key` is the name of its outer link in the released files."""
    key: str
    src: str
    dst: str


@dataclass(frozen=True)
class Style:
    """A checked system. `settings`: {script or data set: {flag: default}}, for flags not given;
    links_by_task: whether an agent has an inner link for code and another for all else."""
    name: str
    roles: tuple
    edges: tuple
    repo: str = ""
    tools: tuple = ()
    settings: dict = field(default_factory=dict)
    links_by_task: bool = False

    def __post_init__(self):
        check(self)

    def role(self, name):
        """The role called `name`. Raises ValueError, listing the names there are."""
        for role in self.roles:
            if role.name in (name, PUBLISHED_ROLES.get(name)):
                return role
        names = ", ".join(role.name for role in self.roles)
        raise ValueError(f"style {self.name} has no role '{name}': choose one of {names}")

    def heard_by(self, name):
        """Names of the roles that `name` hears, in order of speaking."""
        sources = {edge.src for edge in self.edges if edge.dst == name}
        return [role.name for role in self.roles if role.name in sources]

    def prompt(self, role, kind, heard):
        """What `role` is asked about a question of `kind`, having heard the roles in `heard`."""
        if not heard and role.first:
            return by_kind(self, role, role.first, kind)
        unfilled = [f"{{{name}}}" for name in self.heard_by(role.name) if name not in heard]
        text = by_kind(self, role, role.prompt, kind)
        return without_lines(text, lambda line: any(slot in line for slot in unfilled))

    def alone(self):
        """The last role by itself, hearing its own last text: methods single and single_loop."""
        last = self.roles[-1]
        slots = [f"{{{name}}}" for name in self.heard_by(last.name)]

        def own(prompt):
            if isinstance(prompt, dict):
                return {kind: own(text) for kind, text in prompt.items()}
            text = without_lines(prompt, lambda line: not any(
                part in line for part in ("{question}", slots[0])) and any(
                slot in line for slot in slots))
            for slot in slots[1:]:
                text = text.replace(slot, "")
            lines = [f"{last.own} {slots[0]}" if last.own and slots[0] in line else line
                     for line in text.split("\n")]
            return "\n".join(lines).replace(slots[0], f"{{{last.name}}}")

        return dataclasses.replace(self, edges=(Edge("own", last.name, last.name),),
                                   roles=(dataclasses.replace(last, prompt=own(last.prompt)),))


def without_lines(text, left_out):
    """The text without the lines for which left_out(line) holds, nor the gaps they leave."""
    kept = "\n".join(line for line in text.split("\n") if not left_out(line))
    return kept if kept == text else kept.replace("\n\n\n", "\n\n").strip("\n")


def by_kind(style, role, prompt, kind):
    """The prompt for a kind of question. Raises ValueError if the role has none for it."""
    if isinstance(prompt, str):
        return prompt
    if kind not in prompt:
        raise ValueError(f"style {style.name}: role {role.name} has no prompt for kind '{kind}', "
                         f"only for {', '.join(prompt)}: add it to the style or choose other data")
    return prompt[kind]


def check(style):
    """Raise ValueError, naming style, role and fix, for a style that cannot work."""
    def wrong(what):
        raise ValueError(f"style {style.name}: {what}")

    for what, kind, items in (("roles", Role, style.roles), ("edges", Edge, style.edges)):
        if not isinstance(items, tuple) or not all(isinstance(item, kind) for item in items):
            wrong(f"its {what} are no tuple of {kind.__name__}: write ({kind.__name__}(..), ..), "
                  "with a comma even behind a single one")
    names = [role.name for role in style.roles]
    if not names:
        wrong("it has no roles: give it at least one")
    for name in names:
        if names.count(name) > 1:
            wrong(f"two roles are called {name}: rename one")
        if name in ("question", "answer_format", "outer") or re.fullmatch(r"agent\d+", name):
            wrong(f"a role cannot be called {name}, a word that prompts or flags use: rename it")
    keys = [edge.key for edge in style.edges]
    ways = [(edge.src, edge.dst) for edge in style.edges]
    for edge in style.edges:
        if keys.count(edge.key) > 1:
            wrong(f"two edges are called {edge.key}: rename one")
        if ways.count((edge.src, edge.dst)) > 1:
            wrong(f"two edges lead from {edge.src} to {edge.dst}: take one out")
        if edge.key in ("outer_adapter", "lr_scheduler"):
            wrong(f"edge key '{edge.key}' makes a flag that is taken: rename it")
        if not re.fullmatch(r"\w+", edge.key):
            wrong(f"edge key '{edge.key}' is a file name: letters, digits and _ only")
        for end in (edge.src, edge.dst):
            if end not in names:
                wrong(f"edge {edge.key} names role {end}, which does not exist: "
                      f"use one of {', '.join(names)}")
    if not style.heard_by(names[-1]):
        wrong(f"nobody is heard by {names[-1]}, the last role, which writes: add an edge to it")
    for role in style.roles:
        check_prompts(style, role, names, wrong)


def check_prompts(style, role, names, wrong):
    """Each prompt of a role needs {question} and just the slots of the roles that it hears."""
    if not isinstance(role.target, tuple):
        wrong(f"role {role.name}: target is a tuple of column names, like ('plan',)")
    if not role.model:
        wrong(f"role {role.name} has no model: name a hub id or a folder")
    heard = style.heard_by(role.name)
    for field_name in ("prompt", "first"):
        prompts = getattr(role, field_name)
        prompts = prompts if isinstance(prompts, dict) else {"": prompts}
        if not prompts and field_name == "prompt":
            wrong(f"role {role.name} has no prompt: give it one")
        for kind, text in prompts.items():
            where = f"role {role.name}, {field_name}" + (f" for {kind}" if kind else "")
            if kind and kind not in KINDS:
                wrong(f"{where}: unknown kind of question: use {', '.join(KINDS)}")
            if not text and field_name == "first":
                continue
            slots = set(re.findall("{(" + "|".join(map(re.escape, names)) + ")}", text))
            if "{question}" not in text:
                wrong(f"{where}: there is no {{question}} in it: add it")
            if field_name == "first" and slots:
                wrong(f"{where}: it holds slot {{{sorted(slots)[0]}}}, but it is used before "
                      "anything is heard: take the slot out")
            if field_name == "prompt" and slots != set(heard):
                odd = sorted(slots ^ set(heard))[0]
                if odd in heard:
                    wrong(f"{where}: it hears {odd} but holds no slot {{{odd}}}: add one")
                wrong(f"{where}: slot {{{odd}}} can never be filled: add an edge "
                      f"{odd} -> {role.name}")
            # Nothing is heard by the last role when it is asked alone, nor before anyone spoke.
            unheard = role is style.roles[-1] or names.index(role.name) <= min(
                map(names.index, heard), default=-1)
            if unheard and not role.first and any(
                    "{question}" in line and any(f"{{{slot}}}" in line for slot in slots)
                    for line in text.split("\n")):
                wrong(f"{where}: {{question}} shares its line with a slot, and goes with it when "
                      "nothing is heard: put it on its own line, or give a `first`")


def all_styles():
    """{name: Style} of every Style that a file of this folder makes."""
    modules = [importlib.import_module(f"{__name__}.{info.name}")
               for info in pkgutil.iter_modules(__path__)]
    found = [value for module in modules for value in vars(module).values()]
    return {style.name: style for style in found if isinstance(style, Style)}


def get_style(style):
    """The Style called `style` in this folder, the one in a .py file given by its path, or `style`
    itself if it is one already. Published design names work too.

    Raises ValueError for an unknown name, listing the known ones."""
    if isinstance(style, Style):
        return style
    path, name = Path(style), PUBLISHED_DESIGNS.get(style, style)
    if path.suffix == ".py":
        if not path.is_file():
            raise ValueError(f"style file {path} does not exist: check --style")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as problem:              # somebody's program: it may raise anything
            raise ValueError(f"style file {path} does not run: {type(problem).__name__}: {problem}"
                             ) from problem
        shipped = map(id, all_styles().values())
        made = {id(value): value for value in vars(module).values() if isinstance(value, Style)}
        made = [made[key] for key in made.keys() - set(shipped)]
        if len(made) != 1:
            raise ValueError(f"style file {path} makes {len(made)} styles: let it make one")
        return made[0]
    styles = all_styles()
    if name not in styles:
        raise ValueError(f"unknown style '{style}': choose one of {', '.join(sorted(styles))}, or "
                         "give a .py file that makes one")
    return styles[name]

"""A system of agents from a style, and the recursion, which exists once: here.

Two rounds of a planner, a critic and a solver (m latent thoughts a turn):

    round 1                                          round 2
    planner   --H-->  critic   --H-->  solver  --H--> planner   --H-->  critic  --H-->  solver
    has heard         reads,           reads,         reads,            reads,          reads,
    nothing yet,      thinks           thinks         thinks            thinks          WRITES
    reads, thinks

Each arrow carries R_out(R_in(H)), m vectors that take the place of words in the next agent's
prompt. Only the last agent, in the last round, writes. Training takes its answer's loss in that
place; evaluation, benchmarks and the text baselines go through the same loop.
"""
import copy
import dataclasses
import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import errors, snapshot_download

from agents import apply_link, load_agent, pick_device
from link import OuterLink, load_inner, load_outer, read_json
from styles import ANSWER_FORMAT, KINDS, get_style
from tools import next_call, require_sandbox, run_tool

PROJECT = Path(__file__).resolve().parent
TOOL_TAGS, MAX_CALLS = ("</python>", "</search>"), 5       # calls per answer
METHODS = ("latent", "zero", "shuffle", "text", "text_brief", "single", "single_loop")
WORDS = ("text", "text_brief", "single", "single_loop")     # methods whose messages are texts


# ---- the recursion ------------------------------------------------------------------------------

@dataclass
class Run:
    """What happened. Rounds count from 1; B questions, m latent steps, d widths."""
    thoughts: dict = field(default_factory=dict)    # (round, role): (B, m, d) before any link
    sent: dict = field(default_factory=dict)        # (round, edge key): (B, m, d_dst)
    texts: dict = field(default_factory=dict)       # (round, role): B texts, methods in words
    decoded_tokens: list = field(default_factory=list)    # per question, all roles
    latent_steps: int = 0                           # per question
    last_turn: tuple = ()                           # (agent, role, round, read): not taken yet
    draft: object = None                            # what that turn wrote


def recurse(mas, questions, rounds, latent_length, kind="math", method="latent", trace=False,
            turn=None, writing=None):
    """Run the rounds up to the last role's last turn, which is left to the caller: a Run.

    kind: of all questions, or a list with one for each; latent_length: m.
    method: latent, or a control (zero: zeros are sent; shuffle: another question's latents), or
    in words (text; text_brief; single: the last role alone; single_loop: hearing itself). turn(
    agent, role, round, read) -> H replaces thinking, and is how the trainers look in. writing:
    see Draft, with `brief`. trace keeps thoughts and messages."""
    check_request(questions, rounds, latent_length, kind, method)
    style = mas.style
    if method in ("single", "single_loop"):
        rounds = rounds * len(style.roles) if method == "single_loop" else 1
        style = style.alone()
    turn = turn or (lambda agent, role, round, read: agent.think(read(), latent_length))
    run, prompts = Run(), Prompts(mas, style, questions, kind)
    run.decoded_tokens = [0] * (len(questions) // (writing or {}).get("repeats", 1))
    heard = {role.name: {} for role in style.roles}

    for round in range(1, rounds + 1):
        for role in style.roles:
            agent, name = mas.wake(role.name), role.name
            read = prompts.reader(role, dict(heard[name]), reuse=rounds > 1)
            if round == rounds and role is style.roles[-1]:
                run.last_turn = (agent, name, round, read)
                return run
            if method in WORDS:
                turn_now = (agent, name, round, read)
                said = write(mas, run, turn_now, questions, writing, method).texts()
            else:
                H = turn(agent, name, round, read)                            # (B, m, d)
                run.latent_steps += len(H[0])
                if trace:
                    run.thoughts[round, name] = H
            for edge in style.edges:
                if edge.src == name:
                    # R_out(R_in(H)), (B, m, d_dst). In training gradients flow back from here
                    # through both links, the thinking and whatever was heard before it; they
                    # stop at the prompts (read without gradient) and at the frozen weights.
                    message = said if method in WORDS else mas.send(edge, H, method)
                    heard[edge.dst][name] = message
                    if trace and method not in WORDS:
                        run.sent[round, edge.key] = message


class Draft:
    """What one turn writes: samples of an answer to each question, with what tools put between.

    rows[p]: whose prompt draft p stands behind; told[p]: its tokens by now; decoded[p]: how many of
    them were decoded, not put there. options: arguments of Agent.write, `seed`, `samples` (drafts
    a prompt) and `repeats` (how often in a row each question stands in the list)."""

    def __init__(self, turn, questions, options):
        options = {"max_new_tokens": 1000, "seed": 42, "samples": 1, "repeats": 1, **options}
        self.agent, role, round, self.read = turn
        seed, samples = options.pop("seed"), options.pop("samples")
        self.per_question = samples * options.pop("repeats")
        stop = options.pop("stop", ())
        self.stop = (stop,) if isinstance(stop, str) else tuple(stop)
        self.max_new_tokens, self.options = options.pop("max_new_tokens"), options
        self.rows = [row for row in range(len(questions)) for _ in range(samples)]
        self.seeds = [text_seed(seed, role, round, questions[row], p % self.per_question)
                      for p, row in enumerate(self.rows)]
        self.told, self.decoded = [[] for _ in self.rows], [0] * len(self.rows)
        self.newest = [[] for _ in self.rows]                   # what go_on wrote last

    def go_on(self, drafts, limits, stop=()):
        """Write on in these drafts, up to so many words more in each, or to behind a stop string.

        All samples of a question start from one reading of its prompt; what stands behind the
        prompt by now is read along with it."""
        rows, told = [self.rows[p] for p in drafts], [self.told[p] for p in drafts]
        past = self.read(rows, told) if any(told) else self.read().rows(rows)
        seeds = [text_seed(self.seeds[p], len(self.told[p])) for p in drafts]
        said = self.agent.write(past, max(limits), seeds=seeds, stop=self.stop + stop,
                                **self.options)
        for p, ids, limit in zip(drafts, said.ids, limits):
            self.newest[p] = ids[:limit]
            self.told[p] = self.told[p] + self.newest[p]
            self.decoded[p] += len(self.newest[p])

    def add(self, p, text, plain=False):
        """Put text behind draft p, in place of its end token (plain: see Agent.tokenize)."""
        while self.told[p] and self.told[p][-1] in self.agent.end_tokens:
            self.told[p] = self.told[p][:-1]
        self.told[p] = self.told[p] + self.agent.tokenize([text], plain)[0]

    def use_tools(self, drafts, tools, search):
        """Run the calls that drafts end in, side by side, and add the results; returns the drafts
        that go on: those that stopped at a tag (be it a stray one) and have words left."""
        calls, going = {}, []
        for p in drafts:
            text = self.agent.tokenizer.decode(self.newest[p])
            ends = [text.find(tag) + len(tag) for tag in TOOL_TAGS if tag in text]
            if ends and self.decoded[p] < self.max_new_tokens:
                going.append(p)
                call = next_call(text[:min(ends)])           # a token may reach beyond the tag
                if call and call[0] in tools:
                    calls[p] = call
        with ThreadPoolExecutor(MAX_CALLS) as pool:
            results = pool.map(lambda call: run_tool(*call, search), calls.values())
            for p, result in zip(calls, results):
                self.add(p, result, plain=True)
        return going

    def text(self, p):
        """Draft p as it stands."""
        return self.agent.tokenizer.decode(self.told[p], skip_special_tokens=True).strip()

    def texts(self):
        """One text a draft: a question's samples stand side by side."""
        return [self.text(p) for p in range(len(self.rows))]


def write(mas, run, turn, questions, writing, method=""):
    """Let the agent of a turn write, tools included: a Draft; the run counts its tokens."""
    options = dict(writing or {})
    brief_length = options.pop("brief", None)
    if method == "text_brief":
        if not brief_length:
            raise ValueError("method text_brief needs a task that has a brief message length")
        options["max_new_tokens"] = min(brief_length, options.get("max_new_tokens", brief_length))
    draft = Draft(turn, questions, options)
    tools = mas.style.tools if turn[1] == mas.style.roles[-1].name else ()
    drafts = list(range(len(draft.rows)))
    for calls_left in range(MAX_CALLS if tools else 0, -1, -1):
        limits = [draft.max_new_tokens - draft.decoded[p] for p in drafts]
        draft.go_on(drafts, limits, TOOL_TAGS if calls_left else ())
        drafts = draft.use_tools(drafts, tools, mas.search) if calls_left else []
        if not drafts:
            break
    for p, count in enumerate(draft.decoded):
        run.decoded_tokens[p // draft.per_question] += count
    run.texts[turn[2], turn[1]] = draft.texts()
    return draft


def text_seed(*parts):
    """A seed for one text, from what it is about: the same in any batch, order or resumed run."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def check_request(questions, rounds, latent_length, kind, method):
    """Raise ValueError for a request that cannot be served."""
    if not isinstance(kind, str) and len(kind) != len(questions):
        raise ValueError(f"{len(kind)} kinds for {len(questions)} questions: give one for all, or "
                         "one for each")
    for one in [kind] if isinstance(kind, str) else dict.fromkeys(kind):
        if one not in KINDS:
            raise ValueError(f"unknown kind of question '{one}': choose one of {', '.join(KINDS)}")
    if method not in METHODS:
        raise ValueError(f"unknown method '{method}': choose one of {', '.join(METHODS)}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds}")
    if latent_length < 1 and method not in WORDS:
        raise ValueError(f"latent length must be at least 1, not {latent_length}: for an answer "
                         "without latents use method single")
    if not questions:
        raise ValueError("there are no questions")
    if method == "shuffle" and len(questions) < 2:
        raise ValueError("method shuffle needs at least two questions in a batch")


class Prompts:
    """The prompts of one batch of questions; what does not change over the rounds is read once."""

    def __init__(self, mas, style, questions, kind):
        self.mas, self.style, self.questions = mas, style, questions
        self.kinds = [kind] * len(questions) if isinstance(kind, str) else list(kind)
        self.segments, self.prefixes = {}, {}

    def _segments(self, role, heard):
        """The role's B prompts given whom it has heard (see Agent.prompt), kind by kind."""
        key = role.name, tuple(heard)
        if key not in self.segments:
            rows = [None] * len(self.questions)
            for kind in dict.fromkeys(self.kinds):
                places = [i for i, other in enumerate(self.kinds) if other == kind]
                segments = self.mas.agents[role.name].prompt(
                    role.system, self.style.prompt(role, kind, heard), heard,
                    [self.questions[i] for i in places], ANSWER_FORMAT[kind])
                for row, i in enumerate(places):
                    rows[i] = [part if isinstance(part, str) else part[row] for part in segments]
            if len({tuple(isinstance(part, str) and part for part in row) for row in rows}) > 1:
                raise ValueError(f"style {self.style.name}: role {role.name} hears the others in a "
                                 "different order for different kinds of question, which one "
                                 "batch cannot mix: use batches of one, or the same order")
            self.segments[key] = [segment[0] if isinstance(segment[0], str) else list(segment)
                                  for segment in zip(*rows)]
        return self.segments[key]

    def reader(self, role, heard, reuse):
        """read(rows=None, told=None) -> Past of the role's prompts with `heard` in their slots; of
        these rows alone and with `told`, a token list for each, behind them, if given.

        The part before the first slot never changes: it is read once, without gradient, and
        reused over rounds; reuse=False (a single round outside training) spares that detour."""
        agent, segments = self.mas.agents[role.name], self._segments(role, list(heard))
        if (reuse or torch.is_grad_enabled()) and role.name not in self.prefixes:
            full = self._segments(role, self.style.heard_by(role.name))
            self.prefixes[role.name] = agent.read_prefix(full)
        prefix = self.prefixes.get(role.name)

        def read(rows=None, told=None):
            if rows is None:
                return agent.read_prompt(segments, heard, prefix)
            part = [one if isinstance(one, str) else [one[row] for row in rows]
                    for one in segments]
            said = {name: [value[row] for row in rows] for name, value in heard.items()}
            begun = prefix and ([prefix[0][row] for row in rows], prefix[1].rows(rows))
            return agent.read_prompt([*part, told], said, begun)

        return read


# ---- the system ---------------------------------------------------------------------------------

@dataclass
class MAS:
    """A loaded system: agents by role, outer links by edge key (missing while untrained).

    offload: only the agent whose turn it is has its weights on its device, the others' rest in
    main memory; for answering only. search: query -> text, for styles with that tool."""
    style: object
    agents: dict
    outer: torch.nn.ModuleDict
    task: str = "math"
    offload: bool = False
    search: object = None

    def wake(self, role):
        """The agent of a role, ready for its turn."""
        agent = self.agents[role]
        if self.offload:
            for other in self.agents.values():
                if other.model is not agent.model:
                    other.rest()
            agent.wake()
        return agent

    def send(self, edge, H, method="latent"):
        """R_out(R_in(H)) along an edge: (B, m, d_src) -> (B, m, d_dst), or a control in its place.

        In training H may also be B tensors (m_b, d) of different length: links work position by
        position."""
        source, target = self.agents[edge.src], self.agents[edge.dst]
        if not torch.is_tensor(H):
            return self.send(edge, torch.cat(list(H))).split([len(h) for h in H])
        message = apply_link(self.outer[edge.key], apply_link(source.inner, H, source.dtype)
                             .to(target.device), target.dtype)
        if method == "zero":
            return torch.zeros_like(message)
        return message.roll(1, 0) if method == "shuffle" else message

    def with_fresh_outer(self, kinds=None, scale_match=True, seed=42):
        """The same agents with new, untrained outer links; kinds: {edge key: kind of link}."""
        torch.manual_seed(seed)
        links = torch.nn.ModuleDict()
        for edge in self.style.edges:
            source, target = self.agents[edge.src], self.agents[edge.dst]
            gain = target.embedding_rms if scale_match else 1.0
            kind = (kinds or {}).get(edge.key, "2layer_ln_res")
            link = OuterLink(source.width, target.width, kind, gain)
            links[edge.key] = link.to(target.device).requires_grad_(False)
        return dataclasses.replace(self, outer=links)

    @torch.no_grad()
    def respond(self, questions, rounds=3, latent_length=32, kind="math", method="latent",
                trace=False, samples=1, **writing):
        """One batch of B questions, answered: (B * samples texts, Run).

        Samples share all that is no word: prompts, latents and the last prompt are read once. Where
        the agents' messages are words, each sample is a run of its own. `writing`: see Draft."""
        if samples < 1:
            raise ValueError(f"samples must be at least 1, not {samples}")
        if samples > 1 and method in ("text", "text_brief", "single_loop"):
            kinds = [kind] * len(questions) if isinstance(kind, str) else kind
            questions = [question for question in questions for _ in range(samples)]
            kind = [one for one in kinds for _ in range(samples)]
            writing = {**writing, "repeats": samples}
        else:
            writing = {**writing, "samples": samples}
        run = recurse(self, questions, rounds, latent_length, kind, method, trace,
                      writing={**writing, "samples": 1})
        run.draft = write(self, run, run.last_turn, questions, writing)
        return run.draft.texts(), run

    def answer(self, questions, rounds=3, latent_length=32, kind="math", method="latent",
               max_new_tokens=1000, temperature=0.0, top_p=1.0, seed=42, batch_size=32, **writing):
        """Answers to any number of questions: a list of texts.

        Sampling (temperature above 0) draws from a seed per question, so a text does not depend
        on the batch it is in."""
        if isinstance(questions, str) or batch_size < 1 or temperature < 0:
            raise ValueError("answer() takes a list of questions, a batch_size of at least 1 and a "
                             "temperature of at least 0")
        texts, kinds = [], [kind] * len(questions) if isinstance(kind, str) else kind
        check_request(questions, rounds, latent_length, kinds, method)
        for chunk in chunks(list(zip(questions, kinds)), batch_size):
            asked, their_kinds = zip(*chunk)
            texts += self.respond(list(asked), rounds, latent_length, their_kinds, method,
                                  seed=seed, max_new_tokens=max_new_tokens, top_p=top_p,
                                  temperature=temperature, **writing)[0]
        return texts


def chunks(items, size):
    """Items in the fewest batches of at most `size`, all of nearly the same length."""
    count = -(-len(items) // size)
    return [items[len(items) * i // count: len(items) * (i + 1) // count] for i in range(count)]


HUB_ERRORS = {       # in this order: a gated repo is also one that is not found
    errors.GatedRepoError: "is gated: accept its terms on its hub page, then run `hf auth login`",
    errors.RepositoryNotFoundError: "is no repo of the hub, or a private one: check the name, and "
                                    "`hf auth login` if it is yours",
    errors.RevisionNotFoundError: "has no such revision: check it, or leave it away",
    errors.HfHubHTTPError.__bases__[0]: "could not be fetched: check name and network",   # httpx
    OSError: "is neither a folder here nor to be had from the hub: check name and network",
    ValueError: "is neither a folder here nor a name the hub knows: check it"}


def local_folder(name, revision=None, who=""):
    """A folder as given, or within the project, or fetched from the hub; `who` needs it."""
    for folder in (Path(name).expanduser(), PROJECT / name):
        if folder.is_dir():
            return folder
    try:
        # Llama's repos hold the weights a second time in original/.
        return Path(snapshot_download(name, revision=revision, ignore_patterns=["original/*"]))
    except tuple(HUB_ERRORS) as problem:
        says = next(text for kind, text in HUB_ERRORS.items() if isinstance(problem, kind))
        at = f" (revision {revision})" if revision else ""
        raise FileNotFoundError(f"{who + ': ' if who else ''}{name}{at} {says} "
                                f"[{type(problem).__name__}]") from problem


def by_role(style, override):
    """{role or "outer": folder} of a ckpt_override, under our names of the roles."""
    return {key if key == "outer" else style.role(key).name: folder
            for key, folder in (override or {}).items()}


def base_model(folder):
    """The base model that goes with an inner link: the folder itself if it holds one, else the one
    its link was trained on (another of the same width would fit, and be wrong), else ""."""
    if (folder / "config.json").is_file():
        return folder
    notes = folder / "train_args.json"
    return notes.is_file() and read_json(notes, dict).get("model_name_or_path")


def load_agents(style, device="auto", dtype="auto", task="math", trust_remote_code=False,
                ckpt_override=None, revision=None, models=None, inner_kind="2layer_ln_res",
                thinking=False, offload=False, capture="record"):
    """A system without outer links: every agent with its inner link, all frozen.

    device: one, or several with commas: each agent goes to the one with the least on it; only
    thoughts, (B, m, d), cross over. ckpt_override: {role: folder or hub id} used in place of a
    role's repo; models: {role: base model}. A repo without a model (links trained here) goes with
    the role's base model. inner_kind: for repos that do not say. capture: see Steps."""
    style = get_style(style)
    override = by_role(style, ckpt_override)
    for edge in style.edges:
        if hasattr(torch.nn.ModuleDict(), edge.key):
            raise ValueError(f"style {style.name}: edge key '{edge.key}' is a name that torch uses "
                             "itself: rename it")
    places = [pick_device(name.strip(), dtype) for name in device.split(",")]
    filled, bases, agents = [0] * len(places), {}, {}
    for role in style.roles:
        who = f"style {style.name}, role {role.name}"
        if not override.get(role.name, role.repo):
            raise ValueError(f"{who}: no repo with an inner link: name one in the style or in "
                             "ckpt_override")
        folder = local_folder(override.get(role.name, role.repo), revision, who)
        model = (models or {}).get(role.name) or base_model(folder) or role.model
        base = local_folder(model, who=who).resolve()
        if base not in bases:                           # two roles may share one frozen model
            place = filled.index(min(filled))
            bases[base] = load_agent(base, *places[place], trust_remote_code, thinking, offload,
                                     capture)
            filled[place] += bases[base].model.get_memory_footprint()
        agent = agents[role.name] = copy.copy(bases[base])
        agent.inner = load_inner(folder, agent.width, task, inner_kind).to(agent.device)
        agent.inner.requires_grad_(False)
    return MAS(style, agents, torch.nn.ModuleDict(), task, offload)


def load_mas_system(style, device="auto", dtype="auto", task="math", trust_remote_code=False,
                    ckpt_override=None, revision=None, thinking=False, offload=False,
                    allow_unsafe_code=False, capture="record"):
    """A whole system, ready to answer.

    style: a name or a Style; ckpt_override: {role or "outer": folder or hub id}; task chooses
    among the links of repos that hold several; revision: of the style's repos; offload: see MAS;
    allow_unsafe_code: let the tools run programs even where nothing confines them; capture: how
    single steps run, see Steps.
    Raises ValueError or OSError, naming the file."""
    style = get_style(style)
    override = by_role(style, ckpt_override)
    if "python" in style.tools:
        require_sandbox(allow_unsafe_code)
    folder = override.get("outer", style.repo)
    if not folder:
        raise ValueError(f"style {style.name} has no repo with outer links: name one in the "
                         "style or as outer in ckpt_override")
    folder = local_folder(folder, revision, f"style {style.name}, outer links")
    notes = folder / "train_args.json"         # links trained here: over these base models
    notes = read_json(notes, dict) if notes.is_file() else {}
    models = {role.name: notes.get(f"{role.name}_model") for role in style.roles}
    for role, given in override.items():
        if (Path(given) / "config.json").is_file():         # it brings its own
            models.pop(role, None)
    mas = load_agents(style, device, dtype, task, trust_remote_code, override, revision, models,
                      thinking=thinking, offload=offload, capture=capture)
    widths = {edge.key: (mas.agents[edge.src].width, mas.agents[edge.dst].width)
              for edge in mas.style.edges}
    links = load_outer(folder, widths, task)
    for edge in mas.style.edges:
        mas.outer[edge.key] = links[edge.key].to(mas.agents[edge.dst].device).requires_grad_(False)
    return mas

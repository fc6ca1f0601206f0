"""The recursion, and the system of agents that it runs over. Training and answering both use it.

Two rounds of a planner, a critic and a solver:

    round 1                                          round 2
    planner   --H-->  critic   --H-->  solver  --H--> planner   --H-->  critic  --H-->  solver
    has heard         reads,           reads,         reads,            reads,          reads,
    nothing yet,      thinks           thinks         thinks            thinks          WRITES
    reads, thinks

Each arrow is an outer link. It carries R_out(R_in(H)): m vectors that stand in the next
agent's prompt where words would stand. No agent writes a word before the last agent's last turn.

Answering and training differ in that last turn only. So recurse() stops before it and hands it to
the caller. MAS.respond writes an answer there. train_outer.py takes the cross-entropy of the gold
answer there. In the turns before it agents think, unless the caller passes a `take_turn` of its
own: the trainer passes one that also computes a loss.

Where gradients flow. In training, the loss of the last turn flows back through the frozen last
agent into the vectors that it heard. From there it flows through R_out, R_in and the whole rollout
of the agent that sent them, into the vectors that this agent heard, and so on, turn by turn, back
to round 1. It ends at the words of the prompts, because no link made their embeddings. (The words
before the first slot are even read without a graph.) The weights of agents and inner links are
frozen, so they keep nothing. Only the outer links keep their share of the gradient. A link gets one
share from every round, because all rounds use the same link.

Shapes: B questions, m latent thoughts, d hidden width. Rounds count from 1.
"""
from dataclasses import dataclass, field, replace
from numbers import Integral

import torch

from agents import apply_link
from checkpoints import load_agents, load_outer_links, new_outer_links, outer_folder
from gpu.compiled import set_compile
from link import RELEASED
from prompts import WORDS, BatchPrompts, Request, Turn
from remembered import need_as_trained, trained_with
from styles import KINDS, get_style
from support.batches import chunks, others
from support.devices import settle
from support.errors import need, say_once
from tools.sandbox import require_sandbox
from writing import Sampling, Writing, write_message, write_turn


@dataclass
class Recursion:
    """What happened in a run of recurse()."""
    thoughts: dict = field(default_factory=dict)    # (round, role): H (B, m, d), before any link
    sent: dict = field(default_factory=dict)        # (round, edge key): R_out(R_in(H)), (B, m, d)
    texts: dict = field(default_factory=dict)       # (round, role): B texts; at the end B * samples
    latent_steps: int = 0                           # thoughts per question, of all roles together
    decoded: list = field(default_factory=list)     # words per question, of all roles together
    last_turn: Turn = None                          # recurse() stops before it
    drafts: list = field(default_factory=list)      # what was written last, as Drafts


# ---- what can be sent ---------------------------------------------------------------------------

# A control changes what arrives: change(edge, message, asked) -> a message of the same shape. To
# add one, name such a function here. recurse(change=..) takes any of them. (Where agents exchange
# texts, the message is a list of B texts.) asked: B entries, equal where the question is the same.
# `zero` sends nothing: what does the last agent know by itself? `shuffle` sends the message about
# another question of the batch. It has the right form and the wrong content, so it shows what the
# form alone is worth.
CONTROLS = {"zero": lambda edge, message, asked: torch.zeros_like(message),
            "shuffle": lambda edge, message, asked: message[others(asked)]}


# ---- the recursion ------------------------------------------------------------------------------

def recurse(mas, questions, rounds=None, latent_length=None, kind="math", method="latent",
            trace=False, take_turn=None, writing=Writing(), columns=None, change=None):
    """Run all rounds up to the last agent's last turn, which the caller does. Returns a Recursion.

    questions: B texts, or a whole Request. rounds, latent_length (m), kind, method, columns: see
    MAS.request. take_turn(turn) -> H (B, m, d) is called instead of thinking. writing: how texts
    are written. trace: keep thoughts and messages in the Recursion. change: see CONTROLS. Raises
    ValueError for a request that cannot be served."""
    request, style = mas.request(questions, rounds, latent_length, kind=kind, method=method,
                                 columns=columns), mas.style
    if request.method in ("single", "single_loop"):
        # The last role works alone: once, or for as many turns as all roles have together.
        turns = request.rounds * len(style.roles) if request.method == "single_loop" else 1
        request, style = replace(request, rounds=turns), style.alone()
    # The rest is the same for every method. Only what an agent says differs: m vectors that it has
    # thought, or a text that it has written.
    in_words, change = request.method in WORDS, change or CONTROLS.get(request.method)
    prompts = BatchPrompts(mas, style, request)
    run = Recursion(decoded=[0] * (len(request.questions) // writing.repeats))
    take_turn = take_turn or (lambda turn: turn.agent.think(turn.read(), request.latent_length))
    # What each role has heard by now. A role that has not yet heard all its partners gets its
    # `first` prompt, which has slots only for those that spoke before it.
    heard = {role.name: {} for role in style.roles}         # {who: {from whom: the last message}}

    for round in range(1, request.rounds + 1):
        for role in style.roles:
            # 1. The agent gets its prompt, with the messages of the others in their slots.
            turn = prompts.turn(role, round, dict(heard[role.name]))
            if round == request.rounds and role is style.roles[-1]:
                # Nobody would hear its thoughts. The caller lets it write, or takes its loss.
                run.last_turn = turn
                return run
            # 2. It thinks (and in training takes its own loss), or in the baselines it writes.
            if in_words:
                said = write_message(mas, run, turn, request=request, writing=writing)   # B texts
            else:
                said = take_turn(turn)                                                # H (B, m, d)
                run.latent_steps += len(said[0])
                if trace:
                    run.thoughts[round, role.name] = said
            # 3. What it said goes along each of its edges. A later message of the same agent
            #    replaces the earlier one, so an agent hears only the newest thoughts.
            for edge in style.edges:
                if edge.src == role.name:
                    message = said if in_words else mas.send(edge, said)  # R_out(R_in(H)) (B, m, d)
                    message = change(edge, message, prompts.asked()) if change else message
                    heard[edge.dst][role.name] = message
                    if trace and not in_words:
                        run.sent[round, edge.key] = message


# ---- the system ---------------------------------------------------------------------------------

@dataclass
class MAS:
    """A multi-agent system: agents by role, outer links by edge key.

    offload: only the agent whose turn it is has its weights on its device. The weights of all
    others are in main memory. search: query -> text, for a style with that tool. rounds and
    latent_length: those that the links were trained with, None where nobody knows."""
    style: object
    agents: dict
    outer: torch.nn.ModuleDict
    offload: bool = False
    search: object = None
    rounds: int | None = None
    latent_length: int | None = None

    def request(self, questions, rounds=None, latent_length=None, kind="math", method="latent",
                columns=None):
        """A checked and complete Request. Every run is checked here, and nowhere else. (A Request
        is returned as it is, whatever else is given.)

        rounds and latent_length: by default what the links were trained with, else 3 and 32. kind:
        of all questions, or a list with one for each. method: latent, a control, or one of WORDS.
        columns: the row of data of each question, where prompts hold a {column}. Raises ValueError
        for a request that cannot be served."""
        if isinstance(questions, Request):
            return questions
        rounds = (self.rounds or 3) if rounds is None else rounds
        m = (self.latent_length or 32) if latent_length is None else latent_length
        need(isinstance(questions, (list, tuple)) and questions
             and all(isinstance(one, str) and one.strip() for one in questions), "questions are a "
             "list of texts, none of them empty: for a single one write [question]")
        kinds = [kind] * len(questions) if isinstance(kind, str) else list(kind)
        columns = list(columns or [{}] * len(questions))
        need(len(columns) == len(questions), f"{len(questions)} questions need as many rows in "
             f"columns, not {len(columns)}")
        need(len(kinds) == len(questions) and set(kinds) <= set(KINDS), f"{len(questions)} "
             f"questions need as many kinds, of {', '.join(KINDS)}, not {kind!r}")
        methods = ("latent", *CONTROLS, *WORDS)
        need(method in methods, f"unknown method '{method}': choose one of {', '.join(methods)}")
        need(all(isinstance(one, Integral) for one in (rounds, m)) and rounds >= 1
             and (m >= 1 or method in WORDS), "rounds and latent length are whole numbers of at "
             f"least 1, not {rounds} and {m}: for an answer without latents use method single")
        if self.latent_length not in (None, m) and method not in WORDS:
            say_once(f"asked with {m} thoughts a turn, but trained with {self.latent_length}")
        return Request(list(questions), kinds, columns, rounds, latent_length=m, method=method)

    def agent(self, role):
        """The agent of a role, its weights on its device."""
        agent = self.agents[role]
        if self.offload:
            for other in self.agents.values():
                if other.model is not agent.model:
                    other.model.to("cpu")
                    other.recorder.recorded = None       # a recording of weights that have moved
            agent.model.to(agent.device)
        return agent

    def send(self, edge, said):
        """What arrives at edge.dst: R_out(R_in(H)), (B, m, d) -> (B, m, d_dst).

        Both links are applied here, one after the other: R_in makes the thought an input of the
        agent itself, and R_out translates that input for the other agent. A link works on each
        position alone, so in training H may also be a list of B tensors (m_b, d)."""
        if not torch.is_tensor(said):
            return self.send(edge, torch.cat(list(said))).split([len(h) for h in said])
        source, target = self.agents[edge.src], self.agents[edge.dst]
        inward = apply_link(source.inner, said, source.dtype).to(target.device)     # R_in(H)
        return apply_link(self.outer[edge.key], inward, target.dtype)               # R_out(R_in(H))

    def with_fresh_outer(self, kinds=None, scale_match=True, seed=42):
        """The same agents with new, untrained outer links. kinds: {edge key: kind of link}, by
        default those of the links that are there, else the released kind."""
        kinds = kinds or {key: link.kind for key, link in (self.outer or {}).items()}
        return replace(self, outer=new_outer_links(self.style, self.agents, kinds, scale_match,
                                                   seed))

    @torch.no_grad()
    def respond(self, questions, rounds=None, latent_length=None, kind="math", method="latent",
                trace=False, writing=Writing(), columns=None, change=None):
        """Answer one batch of B questions: (B * writing.samples texts, Recursion).

        The recursion runs without gradients, and then the last agent's last turn is written. All K
        samples of a question share prompts and latents; only the written answers differ. Where the
        agents exchange words, each sample is a conversation of its own."""
        request = self.request(questions, rounds, latent_length, kind=kind, method=method,
                               columns=columns)
        B, K = len(request.questions), writing.samples
        if K > 1 and request.method in ("text", "text_brief", "single_loop"):
            # K = 2 asks the questions 0, 0, 1, 1, .. so that no two samples share a conversation.
            request = request.pick([b for b in range(B) for _ in range(K)])
            writing = replace(writing, samples=1, repeats=K)
        run = recurse(self, request, trace=trace, writing=writing, change=change)
        texts = write_turn(self, run, run.last_turn, questions=request.questions, writing=writing)
        return texts, run                                             # texts: B * K of them

    def answer(self, questions, rounds=None, latent_length=None, kind="math", method="latent",
               max_new_tokens=1000, temperature=0.0, top_p=1.0, seed=42, batch_size=32,
               change=None):
        """Answers to any number of questions: a list of texts.

        rounds, latent_length, kind, method: see request. A text does not depend on the batch it is
        in: sampling (temperature above 0) draws from a seed of the question's own."""
        need(batch_size >= 1, f"batch_size is at least 1, not {batch_size}")
        request = self.request(questions, rounds, latent_length, kind=kind, method=method)
        writing, texts = Writing(max_new_tokens, Sampling(temperature, top_p), seed), []
        # The whole request was checked before the first batch: no answer is lost to a late error.
        for numbers in chunks(range(len(questions)), batch_size):
            texts += self.respond(request.pick(numbers), writing=writing, change=change)[0]
        return texts


def load_mas_system(style, device="auto", dtype="auto", task="math", trust_remote_code=False,
                    ckpt_override=None, revision=None, thinking=False, offload=False,
                    allow_unsafe_code=False, need_links=True, threads=0, compile=0):
    """A whole system, ready to answer.

    style: a name, a .py file or a Style. ckpt_override: {role or "outer": folder or hub id}, used
    instead of the style's own. task: chooses among the links of repos that hold several. revision:
    of the style's repos. offload: see MAS. allow_unsafe_code: let tools run programs even where
    nothing confines them. need_links: False puts new, untrained links where none are found, which
    is enough for baselines in words and for controls. device, threads: see support/devices.py.
    compile: 0 or 1, see gpu/compiled.py. Raises ValueError or OSError, naming the file.
    """
    style = get_style(style)
    need(task in KINDS, f"unknown task '{task}': choose one of {', '.join(KINDS)}")
    device = settle(style, device, threads)
    # Roles may be given by their published names.
    override = {key if key == "outer" else style.role(key).name: folder
                for key, folder in (ckpt_override or {}).items()}
    if "python" in style.tools:
        require_sandbox(allow_unsafe_code)
    folder = outer_folder(style, override, revision, need_links)
    # The links know the system they were trained in: models, inner links, m, R.
    notes, models, inner = trained_with(folder, style, override)
    agents = load_agents(
        style, device, dtype, task=task, override=inner, revision=revision, models=models,
        trust_remote_code=trust_remote_code, thinking=thinking, offload=offload,
        inner_kind=notes.get("inner_adapter_type_fallback", RELEASED), need_links=need_links)
    need_as_trained(folder, style, agents, inner=inner, override=override)
    set_compile(agents.values(), compile)
    outer = (load_outer_links(folder, style, agents, task) if folder
             else new_outer_links(style, agents, kinds={}))
    return MAS(style, agents, outer, offload, rounds=notes.get("num_recursive_rounds"),
               latent_length=notes.get("latent_length"))

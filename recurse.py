"""The recursion, and the system of agents that it runs over. Training and answering both use it.

Two rounds of a planner, a critic and a solver:

    round 1                                          round 2
    planner   --H-->  critic   --H-->  solver  --H--> planner   --H-->  critic  --H-->  solver
    has heard         reads,           reads,         reads,            reads,          reads,
    nothing yet,      thinks           thinks         thinks            thinks          WRITES
    reads, thinks

Each arrow is an outer link. It carries R_out(R_in(H)): m vectors that take the place of words in
the next agent's prompt. No agent writes a word before the last agent's last turn.

That last turn is the only place where answering and training differ. So recurse() stops before it
and hands it to the caller. MAS.respond writes an answer there. train_outer.py takes the
cross-entropy of the gold answer there. The turns before it think, unless the caller passes a
`take_turn` of its own: the trainer passes one that also computes a loss.

Where gradients flow. In training, the loss of the last turn flows back through the frozen last
agent into the vectors that it heard. From there it flows through R_out, R_in and the whole rollout
of the agent that sent them, into the vectors that this agent heard, and so on, turn by turn, back
to round 1. It ends at the words of the prompts: no link made their embeddings. (The words before
the first slot are even read without a graph.) The weights of agents and inner links are frozen, so
they keep nothing. Only the outer links keep their share of
the gradient. A link gets one share from every round, because all rounds use the same link.

Shapes: B questions, m latent thoughts, d hidden width. Rounds count from 1.
"""
import dataclasses
from dataclasses import dataclass, field

import torch

from agents import apply_link
from link import RELEASED, OuterLink
from styles import KINDS, get_style
from support.checkpoints import load_agents, load_outer_links, outer_folder, trained_with
from support.compiled import set_compile
from support.devices import settle
from support.errors import need
from support.prompts import LATENT, WORDS, Prompts, Turn, check_request
from support.sampling import Sampling
from support.sandbox import require_sandbox
from writing import Writing, text_of, write

@dataclass
class Run:
    """What happened in a run."""
    thoughts: dict = field(default_factory=dict)    # (round, role): H (B, m, d), before any link
    sent: dict = field(default_factory=dict)        # (round, edge key): R_out(R_in(H)), (B, m, d)
    texts: dict = field(default_factory=dict)       # (round, role): B texts
    latent_steps: int = 0                           # thoughts a question, of all roles together
    decoded: list = field(default_factory=list)     # words a question, of all roles together
    last_turn: Turn = None                          # recurse() stops before it
    drafts: list = field(default_factory=list)      # what was written last, as Drafts


# ---- the recursion ------------------------------------------------------------------------------

def recurse(mas, questions, rounds=None, latent_length=None, kind="math", method="latent",
            trace=False, take_turn=None, writing=Writing(), columns=None):
    """Run all rounds up to the last agent's last turn, which is left to the caller: a Run.

    rounds, latent_length (m): by default, those that the links were trained with. kind: of all
    questions, or a list with one for each. method: see LATENT and WORDS. take_turn(turn) -> H (B,
    m, d) is called in place of thinking. writing: how texts are written. trace: keep thoughts and
    messages in the Run. columns: the row of each question, where prompts hold a {column}. Raises
    ValueError for a request that cannot be served."""
    rounds, latent_length = mas.as_trained(rounds, latent_length)
    kinds = check_request(questions, rounds, latent_length, kind, method)
    style = mas.style
    if method in ("single", "single_loop"):
        # The last role works alone: once, or for as many turns as all roles have together.
        rounds = rounds * len(style.roles) if method == "single_loop" else 1
        style = style.alone()
    # All that follows is the same for every method. Only what an agent says differs: m vectors that
    # it has thought, or a text that it has written.
    prompts = Prompts(mas, style, questions, kinds, columns, method in WORDS)
    run = Run(decoded=[0] * (len(questions) // writing.repeats))
    take_turn = take_turn or (lambda turn: turn.agent.think(turn.read(), latent_length))
    # What each role has heard by now. At first nobody has heard anything, so in round 1 a role is
    # asked its `first` prompt, with slots for those alone who have spoken before it.
    heard = {role.name: {} for role in style.roles}         # {who: {from whom: the last message}}

    for round in range(1, rounds + 1):
        for role in style.roles:
            # 1. The agent gets its prompt, with the messages of the others in their slots. (In all
            #    rounds the beginning of a prompt is the same, so it is read once.)
            turn = prompts.turn(role, round, dict(heard[role.name]), reuse=rounds > 1)
            if round == rounds and role is style.roles[-1]:
                # Nobody would hear its thoughts. The caller lets it write, or takes its loss.
                run.last_turn = turn
                return run
            # 2. It thinks, or in the baselines it writes. (In training, take_turn also takes the
            #    role's own loss.)
            if method in WORDS:
                said = write_message(mas, run, turn, questions, writing, method)     # B texts
            else:
                said = take_turn(turn)                                               # H (B, m, d)
                run.latent_steps += len(said[0])
            # 3. What it said goes along each of its edges. A later message of the same agent takes
            #    the place of the earlier one, so an agent hears the newest thoughts alone.
            for edge in style.edges:
                if edge.src == role.name:
                    message = mas.send(edge, said, method)            # R_out(R_in(H)) (B, m, d_dst)
                    heard[edge.dst][role.name] = message
                    if trace and method in LATENT:
                        run.thoughts[round, role.name] = said
                        run.sent[round, edge.key] = message


def write_message(mas, run, turn, questions, writing, method):
    """What an agent says in words to the others: B texts.

    text_brief cuts a text off after writing.brief words, where its essence ends. That makes the
    fair baseline for latents: it also spares the others' time, but somebody has to know the length.
    """
    limit = writing.max_new_tokens
    if method == "text_brief":
        need(writing.brief, "method text_brief needs a task that has a brief message length")
        limit = min(writing.brief, limit)
    writing = dataclasses.replace(writing, samples=1, max_new_tokens=limit)
    return write_turn(mas, run, turn, questions, writing)


def write_turn(mas, run, turn, questions, writing):
    """Write one turn: its texts. The Run keeps the drafts and counts their words."""
    tools = mas.style.tools if turn.role == mas.style.roles[-1].name else ()
    run.drafts = write(turn, questions, writing, tools, mas.search)
    for draft in run.drafts:
        run.decoded[draft.row // writing.repeats] += draft.decoded
    run.texts[turn.round, turn.role] = [text_of(turn, draft) for draft in run.drafts]
    return run.texts[turn.round, turn.role]


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

    def as_trained(self, rounds=None, latent_length=None):
        """(rounds, latent_length). What is not given is as the links were trained, else 3 and 32.
        """
        return ((self.rounds or 3) if rounds is None else rounds,
                (self.latent_length or 32) if latent_length is None else latent_length)

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

    def send(self, edge, said, method="latent"):
        """What arrives at edge.dst: R_out(R_in(H)), (B, m, d) -> (B, m, d_dst).

        Both links are applied here, one after the other: R_in makes the thought an input of the
        agent itself, and R_out translates that input for the other agent. A link works on each
        position alone, so in training H may also be a list of B tensors (m_b, d).

        Texts arrive as they are. The controls send something else: `zero` sends zeros, so it shows
        what the last agent knows without the others. `shuffle` sends the message of another
        question, so it shows what a message is worth that has the right form and the wrong content.
        """
        if method in WORDS:
            return said
        if not torch.is_tensor(said):
            lengths = [len(h) for h in said]
            return self.send(edge, torch.cat(list(said)), method).split(lengths)
        source, target = self.agents[edge.src], self.agents[edge.dst]
        inward = apply_link(source.inner, said, source.dtype).to(target.device)     # R_in(H)
        message = apply_link(self.outer[edge.key], inward, target.dtype)            # R_out(R_in(H))
        if method == "zero":
            return torch.zeros_like(message)
        return message.roll(1, 0) if method == "shuffle" else message

    def with_fresh_outer(self, kinds=None, scale_match=True, seed=42):
        """The same agents with new, untrained outer links. kinds: {edge key: kind of link}, by
        default those of the links that are there, else the released kind."""
        kinds = kinds or {key: link.kind for key, link in (self.outer or {}).items()}
        torch.manual_seed(seed)
        links = torch.nn.ModuleDict()
        for edge in self.style.edges:
            source, target = self.agents[edge.src], self.agents[edge.dst]
            gain = target.embedding_rms if scale_match else 1.0       # see link.py
            link = OuterLink(source.width, target.width, kinds.get(edge.key, RELEASED), gain)
            links[edge.key] = link.to(target.device).requires_grad_(False)
        return dataclasses.replace(self, outer=links)

    @torch.no_grad()
    def respond(self, questions, rounds=None, latent_length=None, kind="math", method="latent",
                trace=False, writing=Writing(), columns=None):
        """Answer one batch of B questions: (B * writing.samples texts, Run).

        The recursion runs without gradients, and then the last agent's last turn is written. All K
        samples of a question share prompts and latents; only the written answers differ. Where the
        agents exchange words, each sample is a run of its own."""
        rounds, latent_length = self.as_trained(rounds, latent_length)
        K = writing.samples
        if K > 1 and method in ("text", "text_brief", "single_loop"):
            kinds = check_request(questions, rounds, latent_length, kind, method)
            questions = [question for question in questions for _ in range(K)]
            kind = [one for one in kinds for _ in range(K)]
            columns = columns and [row for row in columns for _ in range(K)]
            writing = dataclasses.replace(writing, samples=1, repeats=K)
        run = recurse(self, questions, rounds, latent_length, kind, method, trace, None, writing,
                      columns)
        return write_turn(self, run, run.last_turn, questions, writing), run

    def answer(self, questions, rounds=None, latent_length=None, kind="math", method="latent",
               max_new_tokens=1000, temperature=0.0, top_p=1.0, seed=42, batch_size=32):
        """Answers to any number of questions: a list of texts.

        rounds, latent_length: by default, those that the links were trained with. A text does not
        depend on the batch it is in: sampling (temperature above 0) draws from a seed of the
        question's own."""
        need(batch_size >= 1, f"batch_size is at least 1, not {batch_size}")
        rounds, latent_length = self.as_trained(rounds, latent_length)
        kinds, texts = check_request(questions, rounds, latent_length, kind, method), []
        writing = Writing(max_new_tokens, Sampling(temperature, top_p), seed)
        for batch in chunks(list(zip(questions, kinds)), batch_size):
            asked, theirs = map(list, zip(*batch))
            texts += self.respond(asked, rounds, latent_length, theirs, method, writing=writing)[0]
        return texts


def chunks(items, size):
    """Items in the fewest batches of at most `size`, all of nearly the same length."""
    count = -(-len(items) // size)
    return [items[len(items) * i // count: len(items) * (i + 1) // count] for i in range(count)]


def load_mas_system(style, device="auto", dtype="auto", task="math", trust_remote_code=False,
                    ckpt_override=None, revision=None, thinking=False, offload=False,
                    allow_unsafe_code=False, need_links=True, threads=0, compile="auto"):
    """A whole system, ready to answer.

    style: a name, a .py file or a Style. ckpt_override: {role or "outer": folder or hub id}, in
    place of the style's own. task: chooses among the links of repos that hold several. revision: of
    the style's repos. offload: see MAS. allow_unsafe_code: let tools run programs even where
    nothing confines them. need_links: False puts new, untrained links where none are found, which
    is enough for baselines in words and for controls. device, threads: see support/devices.py.
    compile: auto, 0 or 1, see support/compiled.py. Raises ValueError or OSError, naming the file.
    """
    style = get_style(style)
    need(task in KINDS, f"unknown task '{task}': choose one of {', '.join(KINDS)}")
    device = settle(style, device, threads)
    override = {key if key == "outer" else style.role(key).name: folder
                for key, folder in (ckpt_override or {}).items()}
    if "python" in style.tools:
        require_sandbox(allow_unsafe_code)
    folder = outer_folder(style, override, revision, need_links)
    # The links know the system they were trained in: models, inner links, m, R.
    notes, models, inner = trained_with(folder, style, override)
    agents = load_agents(style, device, dtype, task, trust_remote_code, {**override, **inner},
                         revision, models, notes.get("inner_adapter_type_fallback", RELEASED),
                         thinking, offload, need_links)
    set_compile(agents.values(), compile)
    notes = {**style.settings.get("train_outer", {}), **notes}
    mas = MAS(style, agents, None, offload, rounds=notes.get("num_recursive_rounds"),
              latent_length=notes.get("latent_length"))
    if folder is None:
        return mas.with_fresh_outer()
    return dataclasses.replace(mas, outer=load_outer_links(folder, style, agents, task))

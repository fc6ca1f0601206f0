"""What an agent is asked in a turn, and which part of that prompt was read before.

A prompt is a list of parts: token ids, and names of slots where latents will stand.

    style      "{question} <|notes|> {planner}"                         what the critic is asked
    chat       "<bos> <|user|> {question} <|notes|> {planner} <|assistant|>"
    parts      [[1, 4, 8, 25, .., 6], "planner", [7]]                   for one question

Once a role has heard its partners, it is asked in the same words in every round. Only the content
of its slots changes. So two things are kept over the rounds of a batch: the parts, and the Context
of their beginning, up to the first slot. The question stands there, so the beginning is most of the
prompt.

Shapes: B questions, m latent thoughts, d hidden width.
"""
from dataclasses import dataclass, replace

import torch

from styles import ANSWER_FORMAT, names_in
from support.errors import need

# Baselines in words: the agents exchange texts, or the last agent works alone.
WORDS = ("text", "text_brief", "single", "single_loop")

LOOSE = 3       # tokens before a slot that may be split in another way once a text stands in it


@dataclass(frozen=True)
class Request:
    """What is asked. MAS.request checks it and fills the gaps, once for each run."""
    questions: list              # B texts
    kinds: list                  # the kind of each question
    columns: list                # the row of data of each question, {column: cell}
    rounds: int                  # R
    latent_length: int           # m
    method: str                  # latent, a control, or one of WORDS

    def pick(self, chosen):
        """The request for some of the questions, by their numbers. A number may come twice."""
        return replace(self, questions=[self.questions[b] for b in chosen],
                       kinds=[self.kinds[b] for b in chosen],
                       columns=[self.columns[b] for b in chosen])


@dataclass
class Turn:
    """One agent's turn in one round: its B prompts, and what stands in their slots."""
    agent: object
    role: str
    round: int
    prompts: list                # B lists of parts
    latents: dict                # {role heard: B latents (m, d)}
    prefix: tuple | None         # (B token lists, their Context), the beginning that was read

    def read(self, chosen=None, after=None):
        """The Context of all B prompts. With `chosen`, the prompts with these numbers alone are
        read, and after[i] holds the tokens of the draft that follows chosen[i]."""
        if chosen is None:
            return self.agent.read_prompts(self.prompts, self.latents, self.prefix)
        longer = [[*self.prompts[b], tokens] for b, tokens in zip(chosen, after)]
        latents = {name: [said[b] for b in chosen] for name, said in self.latents.items()}
        prefix = self.prefix and ([self.prefix[0][b] for b in chosen], self.prefix[1].pick(chosen))
        return self.agent.read_prompts(longer, latents, prefix)


class BatchPrompts:
    """The prompts of one request's questions, for all roles of a style.

    Where agents exchange texts, a text is put into its slot before the prompt is split into tokens.
    It may then join with the last characters before the slot into one token, so LOOSE tokens of the
    beginning are not kept."""

    def __init__(self, mas, style, request):
        self.mas, self.style, self.request = mas, style, request
        self.loose = LOOSE if request.method in WORDS else 0
        self.made = {}               # {(role, slots): B prompts without texts of others}
        self.prefixes = {}           # {role: (B token lists, their Context)}, what was read before

    def prompts(self, role, texts, slots):
        """A role's B prompts as lists of parts (see Agent.tokenize_prompts).

        texts: {role heard: B texts}. slots: roles whose latents are heard. A batch may mix kinds of
        questions: each question is asked in the words for its kind, and the prompts come out in the
        order of the questions. Prompts without texts never change, so they are kept."""
        if not texts and (role.name, slots) in self.made:
            return self.made[role.name, slots]
        agent, prompts = self.mas.agents[role.name], [None] * len(self.request.questions)
        for kind in set(self.request.kinds):
            alike = [b for b, other in enumerate(self.request.kinds) if other == kind]
            asked = self.request.pick(alike)
            said = {name: [words[b] for b in alike] for name, words in texts.items()}
            made = role_prompts(agent, self.style, role, kind=kind, questions=asked.questions,
                                columns=asked.columns, texts=said, slots=slots)
            for b, parts in zip(alike, made):
                prompts[b] = parts
        if not texts:
            self.made[role.name, slots] = prompts
        return prompts

    def asked(self):
        """B tuples of all roles' prompts, with empty slots. Equal ones ask the same question."""
        return list(zip(*(self.prompts(role, {}, tuple(self.style.heard_by(role.name)))
                          for role in self.style.roles)))

    def prefix(self, role):
        """The beginning of a role's prompts, up to the first slot, read once: (B token lists, their
        Context), or None if there is nothing to share. No link made its embeddings, so it has no
        gradient."""
        if role.name not in self.prefixes:
            prompts = self.prompts(role, {}, tuple(self.style.heard_by(role.name)))
            begun = [parts[0][:len(parts[0]) - self.loose] for parts in prompts]
            self.prefixes[role.name] = None
            if all(begun) and not any(isinstance(tokens, str) for tokens in begun):
                context = self.mas.agents[role.name].read_prompts([[one] for one in begun], {})
                self.prefixes[role.name] = begun, context
        return self.prefixes[role.name]

    def turn(self, role, round, heard):
        """The Turn of a role that has heard {role: B messages} by now.

        The prompt's beginning is read once and reused. With a single round and without gradients
        there is nothing to reuse, so the prompt is read in one piece."""
        agent = self.mas.agent(role.name)
        texts = {name: said for name, said in heard.items() if isinstance(said[0], str)}
        latents = {name: said for name, said in heard.items() if name not in texts}
        prompts = self.prompts(role, texts, tuple(latents))
        reuse = self.request.rounds > 1 or torch.is_grad_enabled()
        return Turn(agent, role.name, round, prompts=prompts, latents=latents,
                    prefix=self.prefix(role) if reuse else None)


def role_prompts(agent, style, role, kind, questions, columns, texts, slots=()):
    """A role's prompts for B questions of one kind, as lists of parts (Agent.tokenize_prompts).

    columns: the row of data of each question. texts: {role heard: B texts}. slots: roles whose
    latents are heard. Raises ValueError if a row lacks a {column} that the prompt names."""
    words = style.words_for(role, kind, [*texts, *slots])
    values = {**texts, "question": questions,
              "answer_format": [ANSWER_FORMAT[kind]] * len(questions)}
    for name in names_in(words) - {*values, *slots}:
        need(all(isinstance(row.get(name), (str, int, float)) for row in columns), f"a prompt holds"
             f" {{{name}}}, but the rows have no column '{name}': add it to the data, or change the"
             " style")
        values[name] = [str(row[name]) for row in columns]
    return agent.tokenize_prompts(role.system, words, values, slots)

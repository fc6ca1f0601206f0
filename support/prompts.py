"""The prompts of one batch of questions, and what was already read of them.

A prompt is a row of parts: token ids, and names of slots where latents will stand.

    style      "{question} <|notes|> {planner}"                         what the critic is asked
    chat       "<bos> <|user|> {question} <|notes|> {planner} <|assistant|>"
    row        [[1, 4, 8, 25, .., 6], "planner", [7]]                   for one question

A role's prompt has the same words in every round; only what stands in its slots changes. So two
things are kept over the rounds of a batch: the rows, and the Context of their beginning, up to the
first slot. The question stands there, so the beginning is most of the prompt.

Shapes: B questions, m latent thoughts, d hidden width.
"""
from dataclasses import dataclass
from numbers import Integral

import torch

from styles import ANSWER_FORMAT, KINDS, names_in
from support.errors import need

# The system itself, and two controls that send something else in place of its messages.
LATENT = ("latent", "zero", "shuffle")
# Baselines in words: the agents exchange texts, or the last agent works alone.
WORDS = ("text", "text_brief", "single", "single_loop")

LOOSE = 3       # tokens before a slot that may be split in another way once a text stands in it


@dataclass
class Turn:
    """One agent's turn in one round.

    read() reads the agent's prompts, with what it has heard in their slots, and returns a Context.
    read(rows, after) reads the prompts of these rows alone, with so many tokens more after each.
    """
    agent: object
    role: str
    round: int
    read: callable


class Prompts:
    """The prompts of one batch of questions, for all roles of a style.

    kinds: the kind of each question. columns: the row of each question, as {column: cell}. words:
    the agents exchange texts, and no latents. A text is put into its slot before the prompt is
    split into tokens. It may then join with the last characters before the slot into one token, so
    LOOSE tokens of the beginning are not kept."""

    def __init__(self, mas, style, questions, kinds, columns=None, words=False):
        self.mas, self.style, self.questions, self.kinds = mas, style, questions, kinds
        self.columns = columns or [{}] * len(questions)
        self.loose = LOOSE if words else 0
        self.made = {}               # (role, slots): rows of prompts without texts of others
        self.prefixes = {}           # role: (B token lists, their Context), what was already read

    def rows(self, role, texts, slots):
        """A role's B prompts as rows of parts (see Agent.prompt).

        texts: {role heard: B texts}. slots: roles whose latents are heard. A batch may mix kinds of
        questions: each question is asked in the words for its kind, and the rows come out in the
        order of the questions. Rows without texts are kept, because they never change."""
        if not texts and (role.name, slots) in self.made:
            return self.made[role.name, slots]
        rows = [None] * len(self.questions)
        for kind in set(self.kinds):
            places = [b for b, other in enumerate(self.kinds) if other == kind]

            def of_kind(values):
                return [values[b] for b in places]

            made = prompt_rows(self.mas.agents[role.name], self.style, role, kind,
                               of_kind(self.questions), of_kind(self.columns),
                               {name: of_kind(said) for name, said in texts.items()}, slots)
            for b, row in zip(places, made):
                rows[b] = row
        if not texts:
            self.made[role.name, slots] = rows
        return rows

    def prefix(self, role):
        """The beginning of a role's prompts, up to the first slot, read once and without gradient:
        (B token lists, their Context), or None if there is nothing to share."""
        if role.name not in self.prefixes:
            rows = self.rows(role, {}, tuple(self.style.heard_by(role.name)))
            begun = [row[0][:len(row[0]) - self.loose] for row in rows]
            self.prefixes[role.name] = None
            if all(begun) and not any(isinstance(tokens, str) for tokens in begun):
                agent = self.mas.agents[role.name]
                with torch.no_grad():
                    context = agent.read(*agent.embed([[tokens] for tokens in begun], {}))
                self.prefixes[role.name] = begun, context
        return self.prefixes[role.name]

    def turn(self, role, round, heard, reuse):
        """The Turn of a role that has heard {role: B messages}.

        The prompt's beginning is read once and reused. With a single round and without gradients
        there is nothing to reuse (reuse=False), so the prompt is read in one piece."""
        agent = self.mas.agent(role.name)
        texts = {name: said for name, said in heard.items() if isinstance(said[0], str)}
        latents = {name: said for name, said in heard.items() if name not in texts}
        rows = self.rows(role, texts, tuple(latents))
        prefix = self.prefix(role) if reuse or torch.is_grad_enabled() else None

        def read(places=None, after=None):
            """The Context of all rows; or of some, with the tokens of a draft after each."""
            if places is None:
                return agent.read_prompt(rows, latents, prefix)
            longer = [[*rows[b], tokens] for b, tokens in zip(places, after)]
            messages = {name: [said[b] for b in places] for name, said in latents.items()}
            begun = prefix and ([prefix[0][b] for b in places], prefix[1].rows(places))
            return agent.read_prompt(longer, messages, begun)

        return Turn(agent, role.name, round, read)


def prompt_rows(agent, style, role, kind, questions, columns, texts, slots=()):
    """A role's prompts for B questions of one kind, as rows of parts (see Agent.prompt).

    columns: the row of each question. texts: {role heard: B texts}. slots: roles whose latents are
    heard. Raises ValueError if a row lacks a {column} that the prompt names."""
    words = style.prompt(role, kind, [*texts, *slots])
    values = {**texts, "question": questions,
              "answer_format": [ANSWER_FORMAT[kind]] * len(questions)}
    for name in names_in(words) - {*values, *slots}:
        need(all(isinstance(row.get(name), (str, int, float)) for row in columns), f"a prompt holds"
             f" {{{name}}}, but the rows have no column '{name}': add it to the data, or change the"
             " style")
        values[name] = [str(row[name]) for row in columns]
    return agent.prompt(role.system, words, values, slots)


def check_request(questions, rounds, latent_length, kind, method):
    """The kind of each question. Raises ValueError for a request that cannot be served."""
    need(isinstance(questions, (list, tuple)) and all(isinstance(one, str) and one.strip()
                                                      for one in questions),
         "questions are a list of texts, none of them empty: for a single one write [question]")
    kinds = [kind] * len(questions) if isinstance(kind, str) else list(kind)
    need(questions, "there are no questions")
    need(len(kinds) == len(questions) and set(kinds) <= set(KINDS), f"kind {kind!r} "
         f"is none of {', '.join(KINDS)}, and no list of these with one for each question")
    need(method in LATENT + WORDS, f"unknown method '{method}': choose one of "
         + ", ".join(LATENT + WORDS))
    need(all(isinstance(one, Integral) for one in (rounds, latent_length)) and rounds >= 1
         and (latent_length >= 1 or method in WORDS), "rounds and latent length are whole numbers "
         f"of at least 1, not {rounds} and {latent_length}: for an answer without latents use "
         "method single")
    need(method != "shuffle" or len(questions) > 1, "method shuffle needs at least two questions "
         "in a batch")
    return kinds

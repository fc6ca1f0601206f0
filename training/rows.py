"""Training rows: a question, and what each role should say about it.

    {"question": "..", "plan": "..", "refined_plan": "..", "answer": ".."}

The row above is one of a sequential style: the planner's target is ("plan",), the critic's
("refined_plan",), the solver's ("answer",). A role's `target` names the columns with its gold text,
and the first one present counts. A cell is a text, which the role says in every round, or a list
with one text per round, of which the last one repeats.

Two more columns are used where a row has them: task_family, the kind of its question
(math, choice, code, search), and fn_name, for code that is tested by calling a function. A prompt
may hold any column of the row as {column}.
"""
from collections import Counter
from dataclasses import dataclass, field

from prompts import role_prompts
from styles import KINDS
from support.errors import need
from support.sources import read_rows
from tasks import generated_task, get_task, task_names

LONGEST = 200_000        # characters of a text. A longer one would take minutes and all memory.


def load_rows(args):
    """The training rows [dict] of the flags: from a task that makes its own, a local .json or
    .jsonl, or the hub.

    Raises ValueError or OSError, naming the file, where there are none."""
    name, limit = args.dataset_name, args.num_samples
    need(name, "no training data: give --dataset_name")
    task = generated_task(name)
    if task:
        return task.train_rows(limit if limit > 0 else 4800, args.seed)
    found = read_rows(name, split=args.dataset_split, field=args.dataset_json_field)
    rows = [row for _, row in found]
    need(rows, f"{name} holds no rows")
    return rows[:limit] if limit > 0 else rows


def kind_of(row, default):
    """The kind of a row's question: its task_family where it has one, else the run's."""
    return str(row.get("task_family") or default).lower()


def question_of(row):
    """A row's question, with the name that its function has to have, where the row gives one."""
    name = row.get("fn_name")
    return row["question"] + (f"\nThe function has to be called `{name}`." if name else "")


def role_texts(role, row):
    """The role's gold texts in rounds 1, 2, .. of a row; [] if the row has none of its columns."""
    for column in role.target:
        cell = row.get(column)
        texts = cell if isinstance(cell, list) else [cell]
        if texts and all(map(is_text, texts)):
            return texts
    return []


def role_text(role, row, round=1):
    """The role's gold text in a round, or "". The last text listed repeats."""
    texts = role_texts(role, row)
    return texts[min(round, len(texts)) - 1] if texts else ""


def keep_usable(rows, roles):
    """The rows that have a question and a text for each of `roles`. Prints how many others there
    are and what is wrong with them. Raises ValueError if no row is left, or for an unknown
    task_family."""
    usable, faults = [], Counter()
    for row in rows:
        if not isinstance(row, dict):
            faults["the row is not an object {column: cell}"] += 1
            continue
        need(kind_of(row, "math") in KINDS, f"a row has the task_family '{kind_of(row, '')}': known"
             f" are {', '.join(KINDS)}")
        wrong = [] if is_text(row.get("question")) else [fault(row, ("question",))]
        wrong += [fault(row, role.target) for role in roles if not role_texts(role, row)]
        faults.update(wrong)
        if not wrong:
            usable.append(row)
    told = ", ".join(f"{what} ({count})" for what, count in faults.items())
    if faults:
        print(f"left out {len(rows) - len(usable)} of {len(rows)} rows: {told}", flush=True)
    need(usable, f"no usable row: {told}")
    return usable


def need_room(agents, texts):
    """Raise ValueError, before any work, for a text with more tokens than a model has positions.

    texts: {name of a row: its texts}. Reading such a text takes minutes and gives nonsense."""
    agent = min(agents, key=lambda agent: agent.positions)
    for name, text in ((name, text) for name in texts for text in texts[name]):
        # Short texts need not be tokenised.
        count = len(text) > agent.positions and len(agent.tokenize([text])[0])
        need(count <= agent.positions, f"row {name}: '{text[:30]} ..' has {count} tokens, but "
             f"{agent.name} was made for {agent.positions}: shorten the text or leave it out")


def is_text(cell):
    """Whether a cell holds a text with something in it, and not a whole book."""
    return isinstance(cell, str) and bool(cell.strip()) and len(cell) <= LONGEST


def fault(row, columns):
    """Why none of these columns of a row gives a text."""
    there = [column for column in columns if row.get(column) is not None]
    if not there:
        return f"no column {' or '.join(columns) or '(the style names no target)'}"
    number = isinstance(row[there[0]], (int, float))
    return f"{there[0]} is " + ("a number: write it as a text" if number else
                                f"not a text of 1 to {LONGEST} characters")


def flags_to_ask(trained_on, settings, kind):
    """The flags with which evaluate.py asks a system questions like those of its training.

    trained_on: the data set, or the .py file, that made the training rows. None: the style's
    settings tell, by the data set that is asked without flags, else by the first one with this
    kind of questions."""
    if trained_on:
        return f"--dataset {trained_on} --show 2"
    alike = [name for name in settings if name in task_names() and get_task(name).kind == kind]
    name = settings.get("evaluate", {}).get("dataset") or next(iter(alike), None)
    return f"--dataset {name}" if name else "--dataset FILE --task ..   (see docs/benchmarks.md)"


# ---- what a role is asked and says ---------------------------------------------------------------

@dataclass
class RoleText:
    """One turn of a role in words: what it is asked, what it has heard, and what it says."""
    style: object = field(repr=False)       # a fingerprint of texts leaves its settings out
    role: object = field(repr=False)        # (a run knows its role anyway)
    question: str
    kind: str
    heard: dict                 # {role heard: its text}
    row: dict                   # the row's columns, which a prompt may hold
    text: str                   # its gold text, "" if the row has none


def role_texts_of(style, role, rows, kind):
    """The RoleTexts of a role, round by round for each row."""
    return [turn_in_words(style, role, row, round, kind) for row in rows
            for round in range(1, max(1, len(role_texts(role, row))) + 1)]


def turn_in_words(style, role, row, round, kind):
    """The RoleText of a role in a round.

    A role that speaks before this one is heard in the same round, a role that speaks after it in
    the round before. If the row lacks one of these texts, the role is asked as if it had heard
    nobody."""
    earlier = style.heard_first(role.name)
    heard = {name: role_text(style.role(name), row, round if name in earlier else round - 1)
             for name in (earlier if round == 1 else style.heard_by(role.name))}
    return RoleText(style, role, question=question_of(row), kind=kind_of(row, kind), row=row,
                    text=role_text(role, row, round), heard=heard if all(heard.values()) else {})


def read_role_texts(agent, texts):
    """The Context of the prompts of RoleTexts, each with the texts it has heard in its slots."""
    prompts = []
    for one in texts:
        said = {name: [text] for name, text in one.heard.items()}
        prompts += role_prompts(agent, one.style, one.role, kind=one.kind, columns=[one.row],
                                questions=[one.question], texts=said)
    return agent.read(*agent.embed(prompts, {}))

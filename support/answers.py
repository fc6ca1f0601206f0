"""One batch of questions, answered by one method and scored: the lines of results.jsonl.

    lines = answer_batch(mas, task, batch, "latent", rounds, plan)       one line for each question

A line says what was asked and how, what came out, whether that is right, and what it cost:

    {"style": "tiny", "dataset": "tiny", "method": "latent", "rounds": 3,
     "id": "tiny-0", "question": "start 3 s1 x7 ..", "gold": "5",
     "outputs": ["s12 x7 5 answer 5 .."],      the texts: one, or --num_rollouts of them
     "parsed": ["5"], "correct": [true],       what was read in each text; None where nothing was
     "notes": [""], "retried": 0,              what decided; how many texts were asked once more
     "decoded_tokens": 12, "latent_steps": 48, "seconds": 0.004, "peak_memory_mb": 480.0}

A line with an "error" is asked again by --resume. With plan.measure "loss" a line has "nats" (a
token of the gold answer) in place of what was read and scored. in_words() reads the latents of a
question as words, and show() prints them.
"""
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from recurse import chunks, recurse, write_turn
from support import report
from support.errors import need
from support.rows import role_text
from tasks import Score
from writing import Writing, go_on, insert, text_of

NOT_SCORED = "not scored"


@dataclass
class Plan:
    """What is asked, and how. It is the same for all methods of an evaluation."""
    methods: list                # names of report.METHODS
    rounds: list                 # each method is asked with each of these numbers of rounds
    latent_length: int           # m
    batch_size: int              # questions at once
    writing: Writing             # how the answers are written
    answer_retry: int = 0        # 1: an answer that cannot be read is asked for once more
    measure: str = "accuracy"    # or loss: nats a token of the gold answer, and nothing is decoded


def possible_methods(style, task, batches, wanted=()):
    """The methods asked for, or all that this style, task and batches can serve.

    Raises ValueError for a method that was asked for and cannot be served."""
    last, few = style.roles[-1], min(map(len, batches)) < 2
    why_not = {
        "text_brief": "" if task.brief else f"{task.name} has no brief message length",
        "shuffle": "it needs at least two questions in a batch (--batch_size)" if few else "",
        "single": "" if last.first else "its last role has no `first` prompt",
        "single_loop": "" if last.own and last.first else "its last role lacks `first` or `own`"}
    for method in wanted:
        need(not why_not.get(method), f"method {method}: {why_not.get(method)}")
    return list(wanted) or [name for name in report.METHODS if not why_not.get(name)]


def in_batches(examples, size):
    """Batches of questions of like length, so that little is padding."""
    return chunks(sorted(examples, key=lambda example: len(example.question)), size)


def answer_batch(mas, task, batch, method, rounds, plan):
    """Answer and score a batch of Examples by one method: a line for each question.

    A batch that breaks (out of memory) is halved. A question that breaks alone is recorded with its
    error, and the run goes on. For `untrained`, mas has the new links."""
    try:
        measured = losses_of if plan.measure == "loss" else answers_to
        values = measured(mas, task, batch, method, rounds, plan)
    except RuntimeError as problem:
        if isinstance(problem, torch.AcceleratorError) and not isinstance(
                problem, torch.OutOfMemoryError):
            raise                                # the card itself has failed: so would all the rest
        values = [{"error": f"{type(problem).__name__}: {problem}".split("\n")[0]} for _ in batch]
    # Only here, after the except block, are the tensors freed that its traceback held.
    if "seconds" not in values[0] and len(batch) > 1 and method != "shuffle":
        torch.cuda.empty_cache()
        return [line for half in (batch[:len(batch) // 2], batch[len(batch) // 2:])
                for line in answer_batch(mas, task, half, method, rounds, plan)]
    about = {"style": mas.style.name, "dataset": task.name, "method": method, "rounds": rounds}
    nothing = {"outputs": [], "parsed": [], "correct": [], "notes": [], "retried": 0,
               "decoded_tokens": 0, "latent_steps": 0, "seconds": 0.0, "peak_memory_mb": 0.0}
    return [{**about, "id": example.id, "question": example.question, "gold": example.gold,
             **nothing, **value} for example, value in zip(batch, values)]


def request(batch, method, rounds, plan):
    """The arguments of recurse() and MAS.respond() for a batch of Examples."""
    return {"questions": [example.question for example in batch], "rounds": rounds,
            "latent_length": plan.latent_length, "kind": [example.kind for example in batch],
            "method": "latent" if method == "untrained" else method, "writing": plan.writing,
            "columns": [example.row for example in batch]}


def answers_to(mas, task, batch, method, rounds, plan):
    """Outputs, scores and costs of one batch: a dict for each question.

    The clock runs while the system answers, and stands still while answers are scored. Time is
    shared equally among the questions of a batch."""
    report.reset_peak_memory()
    (texts, run), seconds = report.timed(mas.respond, **request(batch, method, rounds, plan))
    scores, unread = score(task, batch, texts, range(len(texts))), []
    if task.retry and plan.answer_retry:
        unread = [place for place, one in enumerate(scores) if one.parsed is None]
    if unread:
        seconds += report.timed(ask_again, run, task, texts, unread, plan.writing)[1]
        for place, new in zip(unread, score(task, batch, texts, unread)):
            scores[place] = new
    answers, K = [], plan.writing.samples
    for i in range(len(batch)):
        mine = scores[i * K:(i + 1) * K]
        answers.append({
            "outputs": texts[i * K:(i + 1) * K], "parsed": [one.parsed for one in mine],
            "correct": [one.correct for one in mine], "notes": [one.note for one in mine],
            "retried": sum(place // K == i for place in unread), "decoded_tokens": run.decoded[i],
            "latent_steps": run.latent_steps, "seconds": seconds / len(batch),
            "peak_memory_mb": report.peak_memory_mb()})
        for one in mine:
            if one.note.startswith(NOT_SCORED):
                answers[-1]["error"] = one.note
    return answers


@torch.no_grad()
def losses_of(mas, task, batch, method, rounds, plan):
    """Nats a token of the gold answer after the last agent's last prompt: a dict a question.

    This is far more sensitive than accuracy: every token of every question counts."""
    texts = [gold_text(mas.style.roles[-1], example, rounds) for example in batch]

    def ask():
        run = recurse(mas, **request(batch, method, rounds, plan))
        turn = run.last_turn
        return run, turn.agent.answer_loss(turn.read(), turn.agent.tokenize(texts))

    (run, losses), seconds = report.timed(ask)                                 # B tensors (n,)
    return [{"outputs": [text], "nats": loss.mean().item(), "seconds": seconds / len(batch),
             "decoded_tokens": run.decoded[i], "latent_steps": run.latent_steps}
            for i, (text, loss) in enumerate(zip(texts, losses))]


def gold_text(role, example, round):
    """The gold answer as the last role should write it: a solution from the row's columns, where
    they say more than the answer, else the answer, in a box where prompts ask for one."""
    for text in (example.row.get("solution"), role_text(role, example.row, round)):
        if isinstance(text, str) and len(text) > len(example.gold):
            return text
    words = role.prompt if isinstance(role.prompt, str) else role.prompt.get(example.kind, "")
    return f"\\boxed{{{example.gold}}}" if "{answer_format}" in words else example.gold


def score(task, batch, texts, places):
    """A Score for each of the texts at these places. The texts of a question stand side by side.

    Programs and judges run side by side, but at most one per processor: their time limits are wall
    time, so a crowded machine would fail right programs."""
    K = len(texts) // len(batch)                         # texts of each question

    def one(place):
        try:
            return task.score(batch[place // K], texts[place])
        except (RuntimeError, ValueError, OSError) as problem:    # a service away, damaged tests:
            return Score(False, "", f"{NOT_SCORED}: {problem}")   # the text itself is kept

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(one, places))


@torch.no_grad()
def ask_again(run, task, texts, unread, writing):
    """Put the beginning of an answer after each unread text, and let it go on, as published."""
    beginning, words = task.retry
    drafts = [run.drafts[place] for place in unread]
    for draft in drafts:
        insert(run.last_turn, draft, beginning)
    go_on(run.last_turn, drafts, writing, [words] * len(drafts))
    for place, draft in zip(unread, drafts):
        texts[place] = text_of(run.last_turn, draft)
        run.decoded[place // writing.samples] += len(draft.newest)


@torch.no_grad()
def in_words(mas, example, plan):
    """What the agents think about a question, turn by turn, read through their vocabulary heads.

    A list of (round, role, "thinks", m words, one for each thought). Its last entry is the last
    turn, (round, role, "writes", [the written text])."""
    run = recurse(mas, [example.question], max(plan.rounds), plan.latent_length, example.kind,
                  trace=True, columns=[example.row])
    turns = []
    for (round, role), H in run.thoughts.items():
        agent = mas.agent(role)
        tokens = agent.head(H[0]).argmax(-1).tolist()                              # m tokens
        turns.append((round, role, "thinks", agent.tokenizer.convert_ids_to_tokens(tokens)))
    last = run.last_turn
    mas.agent(last.role)                                # its weights on its device (--offload)
    text, *_ = write_turn(mas, run, last, [example.question], plan.writing)
    return [*turns, (last.round, last.role, "writes", [text])]


def show(mas, examples, plan):
    """Print problems with the latents of every turn, in words."""
    for example in examples:
        print(f"\n{example.question}    (gold: {example.gold})")
        for round, role, does, words in in_words(mas, example, plan):
            print(f"  round {round}  {role:10s} {does}  {' '.join(words)}")

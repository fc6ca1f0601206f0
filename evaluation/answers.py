"""One batch of questions, answered by one method and scored: the lines of results.jsonl.

    lines = answer_batch(mas, Job(task, plan, "latent", rounds, examples))   a line per question

A line says what was asked and how, what came out, whether that is right, and what it cost:

    {"style": "tiny", "dataset": "tiny", "method": "latent", "rounds": 3,
     "id": "tiny-0", "question": "start 3 s1 x7 ..", "gold": "5",
     "outputs": ["s12 x7 5 answer 5 .."],      the texts: one, or --num_rollouts of them
     "parsed": ["5"], "correct": [true],       what was read in each text; None where nothing was
     "notes": [""], "retried": 0,              what decided; how many texts were asked once more
     "decoded_tokens": 12, "latent_steps": 48, "seconds": 0.004, "peak_memory_mb": 480.0}

A line with an "error" is asked again by --resume. With plan.measure "loss" a line has "nats" (per
token of the gold answer), and nothing was read or scored.
"""
import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from prompts import WORDS
from recurse import CONTROLS, recurse
from support.batches import by_length
from support.devices import Clock, peak_memory_mb, reset_peak_memory
from support.errors import need
from support.files import fingerprint, read_json, write_json
from tasks import Score
from training.rows import role_text
from writing import Writing, go_on, insert, text_of

# The methods in the order of the table: baselines in words, controls, the system itself.
METHODS = (*WORDS, "untrained", *CONTROLS, "latent")
NOT_SCORED = "not scored"
# A line of a question that failed. Every line has these names.
NOTHING = {"style": "", "dataset": "", "method": "", "rounds": 1, "id": "", "question": "",
           "gold": "", "outputs": [], "parsed": [], "correct": [], "notes": [], "retried": 0,
           "decoded_tokens": 0, "latent_steps": 0, "seconds": 0.0, "peak_memory_mb": 0.0}


@dataclass
class Plan:
    """What is asked, and how. It is the same for all methods of an evaluation."""
    methods: list                # of METHODS
    rounds: list                 # each method is asked with each of these numbers of rounds
    latent_length: int           # m
    batch_size: int              # questions at once
    writing: Writing             # how the answers are written
    answer_retry: int = 0        # 1: an answer that cannot be read is asked for once more
    measure: str = "accuracy"    # or loss: nats per token of the gold answer, nothing is decoded


def m_and_rounds(training):
    """m and R of a training, as flags of evaluate.py. It asks with 1, 2, .. and R rounds."""
    m, R = training.get("latent_length"), training.get("num_recursive_rounds")
    found = {"latent_length": m, "num_recursive_rounds": R and list(range(1, R + 1))}
    return {name: value for name, value in found.items() if value}


def possible_methods(style, task, batches, wanted=()):
    """The methods asked for, or all that this style, task and batches can serve.

    Raises ValueError for a method that was asked for and cannot be served."""
    last, begins = style.alone().roles[0], "own" if style.roles[-1].first else "first"
    few = min(len({repr((one.question, one.row)) for one in batch}) for batch in batches) < 2
    why_not = {
        "text_brief": "" if task.brief else f"{task.name} has no brief message length",
        "shuffle": "it needs two different questions in a batch (--batch_size)" if few else "",
        "single": "" if last.first else f"its last role lacks `{begins}`",
        "single_loop": "" if last.first and last.prompt else
                       f"its last role lacks `{'own' if last.first else begins}`"}
    for method in wanted:
        need(not why_not.get(method), f"method {method}: {why_not.get(method)}")
    return list(wanted) or [name for name in METHODS if not why_not.get(name)]


def in_batches(examples, size):
    """Batches of questions of like length, so that little is padding."""
    numbers = by_length([len(example.question) for example in examples], size)
    return [[examples[i] for i in batch] for batch in numbers]


@dataclass
class Job:
    """One batch of questions, to be asked by one method."""
    task: object
    plan: Plan
    method: str
    rounds: int
    examples: list               # B Examples

    def request(self, mas):
        """What mas is asked. (For `untrained`, mas has new links.)"""
        return mas.request([one.question for one in self.examples], self.rounds,
                           self.plan.latent_length, kind=[one.kind for one in self.examples],
                           method="latent" if self.method == "untrained" else self.method,
                           columns=[one.row for one in self.examples])


def answer_batch(mas, job):
    """Answer and score a batch of Examples by one method: a line for each question.

    A batch that breaks (out of memory) is halved. A question that breaks alone is recorded with its
    error, and the run goes on."""
    try:
        values = losses_of(mas, job) if job.plan.measure == "loss" else answers_to(mas, job)
    except RuntimeError as problem:
        if isinstance(problem, torch.AcceleratorError) and not isinstance(
                problem, torch.OutOfMemoryError):
            raise                                # the card itself has failed: so would all the rest
        says = f"{type(problem).__name__}: {problem}".split("\n")[0]
        values = [{"error": says} for _ in job.examples]
    # The traceback keeps the batch's tensors alive. So they are freed only after the except block.
    half = len(job.examples) // 2
    if "seconds" not in values[0] and half and job.method != "shuffle":
        torch.cuda.empty_cache()
        return [line for examples in (job.examples[:half], job.examples[half:])
                for line in answer_batch(mas, replace(job, examples=examples))]
    about = {**NOTHING, "style": mas.style.name, "dataset": job.task.name, "method": job.method,
             "rounds": job.rounds}
    return [{**about, "id": example.id, "question": example.question, "gold": example.gold,
             **value} for example, value in zip(job.examples, values)]


def answers_to(mas, job):
    """Outputs, scores and costs of one batch: a dict for each question.

    The clock runs while the system answers, and stands still while answers are scored. Time is
    shared equally among the questions of a batch."""
    task, writing, K = job.task, job.plan.writing, job.plan.writing.samples
    reset_peak_memory()
    with Clock() as clock:
        texts, run = mas.respond(job.request(mas), writing=writing)
    seconds, scores, unread = clock.seconds, score(job, texts, range(len(texts))), []
    if task.retry and job.plan.answer_retry:
        unread = [i for i, one in enumerate(scores) if one.parsed is None]
    if unread:
        with Clock() as clock:
            ask_again(run, job, texts, unread)
        seconds += clock.seconds
        for i, new in zip(unread, score(job, texts, unread)):
            scores[i] = new
    answers = []
    for b in range(len(job.examples)):
        mine = scores[b * K:(b + 1) * K]
        error = {"error": one.note for one in mine if one.note.startswith(NOT_SCORED)}
        answers.append({
            "outputs": texts[b * K:(b + 1) * K], "parsed": [one.parsed for one in mine],
            "correct": [one.correct for one in mine], "notes": [one.note for one in mine],
            "retried": sum(i // K == b for i in unread), "decoded_tokens": run.decoded[b],
            "latent_steps": run.latent_steps, "seconds": seconds / len(job.examples),
            "peak_memory_mb": peak_memory_mb(), **error})
    return answers


@torch.no_grad()
def losses_of(mas, job):
    """Nats per token of the gold answer after the last agent's last prompt: a dict per question.

    This is far more sensitive than accuracy: every token of every question counts."""
    texts = [gold_text(mas.style.roles[-1], example, job.rounds) for example in job.examples]
    with Clock() as clock:
        run = recurse(mas, job.request(mas), writing=job.plan.writing)
        agent = run.last_turn.agent
        losses = agent.answer_loss(run.last_turn.read(), agent.tokenize(texts))    # B tensors (n,)
    return [{"outputs": [text], "nats": loss.mean().item(), "seconds": clock.seconds / len(texts),
             "decoded_tokens": run.decoded[b], "latent_steps": run.latent_steps}
            for b, (text, loss) in enumerate(zip(texts, losses))]


def gold_text(role, example, round):
    """The gold answer as the last role should write it: a solution from the row's columns, where
    they say more than the answer, else the answer, in a box where prompts ask for one."""
    for text in (example.row.get("solution"), role_text(role, example.row, round)):
        if isinstance(text, str) and len(text) > len(example.gold):
            return text
    words = role.prompt if isinstance(role.prompt, str) else role.prompt.get(example.kind, "")
    return f"\\boxed{{{example.gold}}}" if "{answer_format}" in words else example.gold


def score(job, texts, numbers):
    """A Score for each of the texts with these numbers. The texts of a question stand side by side.

    Programs and judges run side by side, but at most one per processor: their time limits are wall
    time, so a crowded machine would fail right programs."""
    def one(i):
        try:
            return job.task.score(job.examples[i // job.plan.writing.samples], texts[i])
        except (RuntimeError, ValueError, OSError) as problem:    # a service away, damaged tests:
            return Score(False, "", f"{NOT_SCORED}: {problem}")   # the text itself is kept

    pool = ThreadPoolExecutor(torch.get_num_threads())
    try:
        return list(pool.map(one, numbers))
    finally:                                  # after Ctrl-C no further one is begun
        pool.shutdown(wait=False, cancel_futures=True)


# ---- the parts on the disk ----------------------------------------------------------------------

def write_part(part, lines):
    """Write the lines of a finished batch, and a hash of them."""
    write_json(part, {"lines": lines, "hash": fingerprint([], json.dumps(lines))})


def finished(part, job):
    """Whether a part is there as write_part wrote it, with an answer to each question of a job and
    without an error."""
    with contextlib.suppress(ValueError, KeyError):           # torn, missing, or not ours
        saved = read_json(part)
        if saved["hash"] == fingerprint([], json.dumps(saved["lines"])):
            asked = [(line["question"], line["method"], line["rounds"]) for line in saved["lines"]
                     if "error" not in line]
            return asked == [(one.question, job.method, job.rounds) for one in job.examples]
    return False


@torch.no_grad()
def ask_again(run, job, texts, unread):
    """Put the beginning of an answer after each unread text, and let it go on, as published."""
    (beginning, words), turn, writing = job.task.retry, run.last_turn, job.plan.writing
    drafts = [run.drafts[i] for i in unread]
    for draft in drafts:
        insert(turn, draft, beginning)
    go_on(turn, drafts, writing, limits=[words] * len(drafts))
    for i, draft in zip(unread, drafts):
        texts[i] = text_of(turn, draft)
        run.decoded[i // writing.samples] += len(draft.newest)

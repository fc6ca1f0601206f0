"""Ask a system questions by several methods and numbers of rounds, and score them side by side.

    python evaluate.py                                  # the shipped tiny links, all methods
    python evaluate.py --show 2                         # what the latents say, agent by agent
    python evaluate.py --style sequential_light --dataset math500 --method latent text single
    python evaluate.py --style sequential_light --dataset my.jsonl --task choice

Methods: `latent` is the system. Baselines in words: `text` (agents exchange texts), `text_brief`
(texts cut to their essence), `single` (the last agent alone), `single_loop` (it hears its own text
for as many turns). Controls: `untrained` (fresh outer links), `zero` (zeros are sent), `shuffle`
(another question's latents). All share prompts, loop, decoding and scoring.

OUT/results.jsonl has a line a question and method, OUT/summary.json and OUT/summary.png the table.
An answer that cannot be read is asked for once more (--answer_retry); what stays unread is wrong.
"""
import contextlib
import importlib.util
import json
import math
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import common
from link import read_json, write_json, write_whole
from recurse import WORDS, chunks, load_mas_system, recurse, write
from styles import get_style
from tasks import Score, get_task, pass_at_k, task_names
from tools import read_keys, search_web

ALL_METHODS = ("text", "text_brief", "single", "single_loop", "untrained", "zero", "shuffle",
               "latent")
NO_SCORE = "not scored"
ROUNDLESS = ("single",)           # methods for which the number of rounds means nothing


def flags():
    """(the published flags and ours, the style)."""
    parser = common.Parser(__doc__.split("\n")[0])
    common.add_system_flags(parser)
    add = parser.add_argument
    add("--dataset", default="tiny", help="a data set of tasks/, or a .json/.jsonl file")
    add("--task", default="", help="what a file holds: a data set of tasks/, or maths, choice, "
                                   "coding, search")
    add("--dataset_split", default="", help="of a data set on the hub, in place of the usual one")
    add("--offload", action="store_true",
        help="one agent on the device at a time, the others in main memory")
    add("--method", nargs="+", choices=ALL_METHODS,
        help="default: all that the data set and the batches can serve")
    add("--num_recursive_rounds", nargs="+", type=common.at_least(1), default=[1, 2, 3])
    add("--num_samples", type=common.sample_count, default=-1, help="questions, -1 for all")
    add("--sample_seed", type=int, default=None,
        help="draw num_samples questions by this seed, in place of the first ones")
    add("--num_rollouts", type=common.at_least(1), default=None,
        help="answers drawn per question (default: 10 for the AIME, else 1); more than one gives "
             "pass@k")
    add("--answer_retry", type=int, default=1, choices=[0, 1],
        help="where no answer can be read, put `Final Answer: \\boxed{` behind it and go on")
    add("--batch_size", type=common.at_least(1), default=32)
    add("--latent_length", type=common.LATENT_LENGTH, default=32, help="m")
    add("--max_new_tokens", type=common.at_least(1), default=2000)
    add("--temperature", type=common.at_least(0, float), default=0.6, help="0 is greedy")
    add("--top_p", type=common.at_least(0, float, high=1.0), default=0.95)
    add("--top_k", type=common.at_least(0), default=0)
    add("--min_p", type=common.at_least(0, float, high=1.0), default=0.0)
    add("--repetition_penalty", type=common.at_least(0.01, float), default=1.0)
    add("--ckpt_override", nargs="*", action="extend", default=[], metavar="KEY=PATH",
        help="a role's folder, or outer=FOLDER for the outer links")
    add("--tavily_keys_file", default="", help="keys for web search, one a line")
    add("--allow_unsafe_code", action="store_true",
        help="run model-written programs even where there is no sandbox")
    add("--out", default="out/evaluate")
    add("--show", type=common.at_least(0), default=0, metavar="N",
        help="instead of scoring, print N problems with the latents in words")
    early = common.early_flags()
    style = get_style(early.style or "tiny")
    name = early.task or early.dataset
    settings = {**style.settings.get("evaluate", {}),
                **(style.settings.get(name, {}) if name in task_names() else {})}
    args = common.parse_flags(parser, settings)
    return args, common.with_prompts(style, args.prompts)


def parse_override(pairs):
    """{key: path} from KEY=PATH arguments. Raises ValueError for anything else."""
    for pair in pairs:
        if not all(pair.partition("=")):
            raise ValueError(f"--ckpt_override takes KEY=PATH, not '{pair}'")
    keys = [pair.split("=", 1)[0] for pair in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"--ckpt_override names a key twice: {' '.join(pairs)}")
    return dict(pair.split("=", 1) for pair in pairs)


# ---- one method -------------------------------------------------------------------------------

def answer_batch(mas, task, batch, method, rounds, options):
    """Answer and score one batch of Examples: result lines, one per question.

    For `untrained` the system comes with fresh outer links, and is asked as for `latent`.
    options: latent_length, samples, answer_retry and the arguments of Agent.write. Where a batch
    breaks (out of memory), its questions are asked one by one; one that breaks alone is recorded
    with its error."""
    line = {"style": mas.style.name, "dataset": task.name, "method": method, "rounds": rounds}
    try:
        answers, failure = answers_to(mas, task, batch, method, rounds, options), ""
    except RuntimeError as problem:
        if isinstance(problem, torch.AcceleratorError) and not isinstance(
                problem, torch.OutOfMemoryError):
            raise                                    # the card itself has failed: so would all else
        failure = " ".join([f"{type(problem).__name__}:", *str(problem).split("\n")[:1]])
    if failure and len(batch) > 1 and method != "shuffle":      # here the broken batch is let go of
        torch.cuda.empty_cache()
        return [line for example in batch
                for line in answer_batch(mas, task, [example], method, rounds, options)]
    if failure:
        count = options["samples"]
        answers = [{"outputs": [], "parsed": [None] * count, "correct": [False] * count,
                    "notes": [""] * count, "retried": 0, "error": failure, "decoded_tokens": 0,
                    "latent_steps": 0, "seconds": 0.0, "peak_memory_mb": 0.0} for _ in batch]
    return [{**line, "id": example.id, "question": example.question, "gold": example.gold,
             **answer} for example, answer in zip(batch, answers)]


def answers_to(mas, task, batch, method, rounds, options):
    """Outputs, scores and costs of one batch, a dict per question."""
    writing = {key: value for key, value in options.items()
               if key not in ("latent_length", "answer_retry")}
    cards = {agent.device for agent in mas.agents.values() if agent.device.type == "cuda"}
    for card in cards:
        torch.cuda.reset_peak_memory_stats(card)
    started = time.perf_counter()
    texts, run = mas.respond([example.question for example in batch], rounds,
                             options["latent_length"], [example.kind for example in batch],
                             "latent" if method == "untrained" else method,
                             brief=task.brief, **writing)
    for card in cards:
        torch.cuda.synchronize(card)
    seconds = time.perf_counter() - started
    count = options["samples"]
    scores, unread = score_answers(task, batch, texts, count), []
    if task.retry and options["answer_retry"]:
        unread = [p for p, score in enumerate(scores) if score.parsed is None]
    if unread:
        started = time.perf_counter()
        texts = retry(run, task, unread)
        seconds += time.perf_counter() - started
        scores = [new if p in unread else old for p, (old, new) in enumerate(
            zip(scores, score_answers(task, batch, texts, count, unread)))]
    answers = []
    for i, tokens in enumerate(run.decoded_tokens):
        mine = slice(i * count, (i + 1) * count)
        answers.append({
            "outputs": texts[mine], "parsed": [score.parsed for score in scores[mine]],
            "correct": [score.correct for score in scores[mine]],
            "notes": [score.note for score in scores[mine]],
            **{"error": score.note for score in scores[mine] if score.note.startswith(NO_SCORE)},
            "retried": sum(p // count == i for p in unread), "decoded_tokens": tokens,
            "latent_steps": run.latent_steps, "seconds": seconds / len(batch),
            "peak_memory_mb": peak_memory_mb(cards)})
    return answers


def score_answers(task, batch, texts, count, wanted=None):
    """A Score for each text (of those in `wanted` only), `count` texts a question. Programs and
    judges run side by side, but no more of them than there are processors, since their time is
    limited: as many as torch itself takes."""
    def score(p):
        if wanted is not None and p not in wanted:
            return None
        try:
            return task.score(batch[p // count], texts[p])
        except (RuntimeError, ValueError, OSError) as problem:    # a service away, damaged tests:
            return Score(False, "", f"{NO_SCORE}: {problem}")     # what was generated is kept

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(score, range(len(texts))))


@torch.no_grad()
def retry(run, task, unread):
    """Put the beginning of an answer behind the drafts that hold none, and let them go on: all
    texts, anew."""
    beginning, words = task.retry
    for p in unread:
        run.draft.add(p, beginning)
    run.draft.go_on(unread, [words] * len(unread))
    for p in unread:
        run.decoded_tokens[p // run.draft.per_question] += len(run.draft.newest[p])
    return run.draft.texts()


def in_batches(examples, size):
    """Batches of questions of like length, so that little is padding."""
    return chunks(sorted(examples, key=lambda example: len(example.question)), size)


def make_plan(methods, depths, batches):
    """[(method, rounds, batch)] of a whole evaluation. The methods take turns on each batch, so
    that whatever else the machine does meets them all alike: their times stand side by side."""
    return [(method, 1 if method in ROUNDLESS else rounds, batch)
            for rounds in sorted(set(depths)) for batch in batches
            for method in dict.fromkeys(methods)
            if method not in ROUNDLESS or rounds == min(depths)]


def warm_up(mas, batch):
    """One short untimed answer: first calls pay for what later ones find ready."""
    with contextlib.suppress(RuntimeError):              # whoever fails here fails again, and is
        mas.respond([example.question for example in batch[:2]], 1, 1, batch[0].kind,
                    max_new_tokens=2)                    # recorded then


def peak_memory_mb(cards):
    """Peak memory: of the GPUs since the last reset, on a CPU of the whole process so far."""
    if cards:
        return sum(torch.cuda.max_memory_allocated(card) for card in cards) / 2**20
    import resource                    # not on Windows, where there is no such figure to be had
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin"
                                                                 else 2**10)


def wilson(right, n, z=1.96):
    """95 % interval [low, high] of a share right / n (Wilson score interval)."""
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def summarise(lines):
    """Summary rows, one a method and number of rounds (and seed): counts, shares, and means per
    question; in the order of ALL_METHODS."""
    groups = {}
    for line in lines:
        key = (ALL_METHODS.index(line["method"]), line["rounds"], line.get("seed", 0))
        groups.setdefault(key, []).append(line)
    return [summary_row(groups[key]) for key in sorted(groups)]


def summary_row(lines):
    """The row of the lines of one method and number of rounds.

    accuracy: the share of right answers, and where several were drawn per question also pass@k,
    k being all of them. Intervals: Wilson, or a bootstrap over the questions."""
    n, shares = len(lines), [sum(line["correct"]) / len(line["correct"]) for line in lines]
    samples = max(len(line["correct"]) for line in lines)
    names = ("style", "dataset", "method", "rounds", "seed")
    row = {key: lines[0][key] for key in names if key in lines[0]}
    interval = wilson(sum(shares), n) if samples == 1 else bootstrap(shares)
    row.update(n=n, accuracy=sum(shares) / n, ci95=interval)
    if samples > 1:
        passed = [pass_at_k(len(line["correct"]), sum(line["correct"]), len(line["correct"]))
                  for line in lines]
        row.update(samples=samples, pass_at_k=sum(passed) / n, pass_at_k_ci95=bootstrap(passed))
    whole = [line for line in lines if line["outputs"]] or lines    # a failed one costs nothing
    parsed = [text for line in whole for text in line["parsed"]]
    notes = [note for line in whole for note in line.get("notes", [])]
    row.update(unparsed=parsed.count(None) / len(parsed),
               retried=sum(line["retried"] for line in whole) / len(parsed),
               judge_invalid=notes.count("judge: invalid") / len(parsed),
               errors=sum("error" in line for line in lines))
    for key in ("decoded_tokens", "latent_steps", "seconds"):
        row[key] = sum(line[key] for line in whole) / len(whole)
    row["peak_memory_mb"] = max(line["peak_memory_mb"] for line in lines)
    return row


def bootstrap(values, resamples=2000):
    """95 % interval [low, high] of the mean of values, drawn anew with replacement."""
    rng, n = random.Random(0), len(values)
    means = sorted(sum(rng.choices(values, k=n)) / n for _ in range(resamples))
    return [means[int(0.025 * resamples)], means[int(0.975 * resamples)]]


# ---- tables and pictures ------------------------------------------------------------------------

def print_table(rows, interval="95 % interval"):
    """The rows as a table on the screen; `interval` says what row["ci95"] holds."""
    print(f"\n{'method':12s} {'rounds':>6s} {'accuracy':>8s}  {interval:16s} "
          f"{'unparsed':>8s} {'tokens':>7s} {'latent':>6s} {'ms':>7s}   (means per question)")
    for row in rows:
        low, high = row["ci95"]
        more = f"  pass@{row['samples']} {row['pass_at_k']:.3f}" if "samples" in row else ""
        more += f"  {row['errors']} failed" if row["errors"] else ""
        print(f"{row['method']:12s} {row['rounds']:6d} {row['accuracy']:8.3f}  "
              f"{low:.3f} - {high:.3f}    {row['unparsed']:8.3f} {row['decoded_tokens']:7.1f} "
              f"{row['latent_steps']:6.0f} {1000 * row['seconds']:7.2f}{more}")


def print_comparison(rows, task, examples):
    """What the latents save against text, and the best any method could reach."""
    by = {(row["method"], row["rounds"]): row for row in rows}
    deepest = max(row["rounds"] for row in rows)
    for other in ("text", "text_brief"):
        if (other, deepest) in by and ("latent", deepest) in by:
            theirs, ours = by[other, deepest], by["latent", deepest]
            if theirs["errors"] or ours["errors"]:
                continue                         # not the same questions: no fair comparison
            fewer = 1 - ours["decoded_tokens"] / theirs["decoded_tokens"]
            print(f"latent against {other} at {deepest} rounds: "
                  f"{100 * (ours['accuracy'] - theirs['accuracy']):+.1f} points, "
                  f"{100 * fewer:.1f} % fewer decoded tokens, "
                  f"{theirs['seconds'] / ours['seconds']:.2f} x as fast")
    if task.ceiling:
        depths = sorted({row["rounds"] for row in rows})
        print("expected of a perfect system by rounds (what does not fit is guessed): "
              + ", ".join(f"{depth}: {task.ceiling(examples, depth):.3f}" for depth in depths))


def plot(rows, path):
    """Accuracy and decoded tokens by rounds, a line a method."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for place, method in enumerate(methods):
        points = sorted((row["rounds"], row["accuracy"], row["decoded_tokens"], *row["ci95"])
                        for row in rows if row["method"] == method)
        depths, accuracy, tokens, low, high = zip(*points)
        shift = 0.04 * (place - (len(methods) - 1) / 2)       # side by side where they coincide
        depths = [depth + shift for depth in depths]
        control = method in ("untrained", "zero", "shuffle")
        color = "black" if method == "latent" else f"C{ALL_METHODS.index(method)}"
        style = {"color": color, "marker": "osD^vP*X"[place % 8],
                 "label": method, "linestyle": ":" if control else "-", "markersize": 5}
        below = [max(0.0, share - end) for share, end in zip(accuracy, low)]
        above = [max(0.0, end - share) for share, end in zip(accuracy, high)]
        left.errorbar(depths, accuracy, [below, above], capsize=2, **style)
        right.plot(depths, tokens, **style)
    left.set(xlabel="rounds", ylabel="accuracy", ylim=(0, 1.02), title="accuracy (95 % intervals)")
    right.set(xlabel="rounds", ylabel="tokens per question", title="decoded tokens")
    depths = sorted({row["rounds"] for row in rows})
    for axes in (left, right):
        axes.set_xticks(depths)
        axes.grid(alpha=0.3)
    right.legend(fontsize=8, loc="upper left")
    write_whole(path, lambda part: figure.savefig(part, format="png", dpi=120))
    pyplot.close(figure)


def need_matplotlib():
    """Raise ValueError now, rather than after an hour, if the picture cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("matplotlib is missing, which draws summary.png: pip install matplotlib")


@torch.no_grad()
def show(mas, examples, options, rounds):
    """Print problems with the latents of every turn, read through the vocabulary head."""
    writing = {key: value for key, value in options.items()
               if key not in ("latent_length", "answer_retry", "samples")}
    for example in examples:
        run = recurse(mas, [example.question], rounds, options["latent_length"], example.kind,
                      trace=True)
        print(f"\n{example.question}    (gold: {example.gold})")
        for (round, role), H in run.thoughts.items():
            agent = mas.wake(role)
            words = agent.tokenizer.convert_ids_to_tokens(agent.head(H[0]).argmax(-1).tolist())
            print(f"  round {round}  {role:10s} thinks  {' '.join(words)}")
        mas.wake(run.last_turn[1])
        draft = write(mas, run, run.last_turn, [example.question], writing)
        print(f"  round {rounds}  {mas.style.roles[-1].name:10s} writes  {draft.text(0)}")


# ---- the comparison at the end of train_outer ---------------------------------------------------

def compare(trained, args, folder):
    """Score trained = {seed: (system before, after)} on the task that made the training rows.

    Baselines in words know no outer link and run once; fresh links (`untrained`: before), trained
    ones (`latent`: after) and the controls run for each seed. Writes folder/summary.json and .png;
    returns the rows."""
    task, seeds = get_task(args.dataset_name), list(trained)
    style = trained[seeds[0]][1].style
    options = {"batch_size": 32, "max_new_tokens": 1000, "temperature": 0.0,
               **style.settings.get(task.name, {}), "latent_length": args.latent_length,
               "samples": 1, "answer_retry": 0}
    batches = in_batches(task.load(args.eval_samples), options.pop("batch_size"))
    methods = [method for method in ALL_METHODS if method != "text_brief" or task.brief]
    plan = make_plan(methods, range(1, args.num_recursive_rounds + 1), batches)
    warm_up(trained[seeds[0]][1], batches[0])
    lines = []
    for method, rounds, batch in common.progress(plan, "before and after"):
        for seed in seeds[:1] if method in WORDS else seeds:
            before, after = trained[seed]
            mas = before if method == "untrained" else after
            new = answer_batch(mas, task, batch, method, rounds, {**options, "seed": seed})
            lines += [{**line, "seed": seed} for line in new]
    rows = summarise(lines)
    write_json(folder / "summary.json", {"settings": vars(args), "rows": rows})
    pooled = pool(rows)
    print_table(pooled, "lowest - highest" if len(seeds) > 1 else "95 % interval")
    print_comparison(pooled, task, [example for batch in batches for example in batch])
    plot(pooled, folder / "summary.png")
    return rows


def pool(rows):
    """Rows that differ in their seed alone, as one: means, and in place of the interval the
    lowest and the highest accuracy. A row that stands alone stays as it is."""
    groups = {}
    for row in rows:
        groups.setdefault((row["method"], row["rounds"]), []).append(row)
    pooled = []
    for group in groups.values():
        row = dict(group[0])
        if len(group) > 1:
            for key in ("accuracy", "unparsed", "decoded_tokens", "latent_steps", "seconds"):
                row[key] = sum(other[key] for other in group) / len(group)
            accuracies = [other["accuracy"] for other in group]
            row["ci95"] = [min(accuracies), max(accuracies)]
        pooled.append(row)
    return pooled


# ---- main ---------------------------------------------------------------------------------------

def open_results(out, settings, resume, asked):
    """{key of a question and method: its line} of a run with the same settings that asked the same
    {(id, question)}; without resume older results are moved aside.

    A batch of which a line is missing, or failed, is answered again as a whole (see main), so that
    a resumed run equals an unbroken one."""
    results, summary = out / "results.jsonl", out / "summary.json"
    if not resume:
        out.mkdir(parents=True, exist_ok=True)
        if results.exists():
            os.replace(results, out / "results.previous.jsonl")
        write_json(summary, {"settings": settings, "rows": []})
        results.write_text("")
        return {}
    if not results.is_file() or not summary.is_file():
        raise FileNotFoundError(f"nothing to resume: {results} is missing; leave --resume away")
    earlier = read_json(summary, dict).get("settings", {})
    odd = [key for key in settings if earlier.get(key) != settings[key]
           and key not in ("device", "offload", "capture")]      # they change no answer
    if odd:
        raise ValueError(f"{out} holds another run ({', '.join(odd)} differ): use the same flags, "
                         "or another --out")
    common.drop_torn_line(results)
    lines = common.read_json_lines(results)
    if any((line.get("id"), line.get("question")) not in asked for line in lines):
        raise ValueError(f"{results} holds answers to other questions: use the same data, or "
                         "another --out")
    return {line_key(line): line for line in lines if "error" not in line}


def line_key(line):
    """What a line of results.jsonl is about."""
    return line["method"], line["rounds"], line["id"]


def write_lines(out, plan, lines):
    """Write {key: line} as results.jsonl, in the order of the plan; returns them as a list."""
    order = [(method, rounds, example.id) for method, rounds, batch in plan for example in batch]
    kept = [lines[key] for key in order if key in lines]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    write_whole(out / "results.jsonl", lambda part: part.write_text(text))
    return kept


def choose_questions(args):
    """(task, its questions): all, the first --num_samples, or as many drawn by --sample_seed."""
    is_file = args.dataset.endswith((".json", ".jsonl"))
    if is_file and not args.task:
        raise ValueError(f"--dataset {args.dataset} is a file: say what it holds with --task "
                         "(math500, .., or maths, choice, coding, search)")
    if args.task and not is_file:
        raise ValueError("--task says what a file holds: give a .json or .jsonl as --dataset")
    task = get_task(args.task, args.dataset) if is_file else get_task(args.dataset)
    split, count = args.dataset_split or None, args.num_samples if args.num_samples > 0 else None
    if args.sample_seed is not None and count is None:
        raise ValueError("--sample_seed draws --num_samples questions: say how many")
    if args.sample_seed is None:
        return task, task.load(count, split)
    examples = task.load(None, split)
    return task, random.Random(args.sample_seed).sample(examples, min(count, len(examples)))


def choose_methods(args, task, batches):
    """Set args.method: those asked for, or all that this task and these batches can serve. Raises
    ValueError now for one that was asked for and cannot be."""
    why_not = {}
    if not task.brief:
        why_not["text_brief"] = f"{task.name} has no brief message length: leave it away"
    if min(map(len, batches)) < 2:
        why_not["shuffle"] = ("it needs at least two questions in a batch: raise --batch_size or "
                              "--num_samples, or leave it away")
    for method in args.method or []:
        if method in why_not and not args.show:
            raise ValueError(f"method {method}: {why_not[method]}")
    args.method = args.method or [name for name in ALL_METHODS if name not in why_not]


def web_search(keys_file):
    """search(query) -> text, for a style with that tool; None, and a note, if there is no key."""
    try:
        keys = read_keys(keys_file or None)
    except ValueError as problem:
        if keys_file:
            raise
        print(f"note: the search tool will say that it is not available ({problem})")
        return None
    return lambda query: search_web(query, keys)


def answer_all(mas, task, batches, options, args, settings):
    """Answer every batch by every method: result lines in the order of the plan. Each rank takes
    its share of the batches; the first one puts all together."""
    out, ranks, depths = Path(args.out), common.RANKS, args.num_recursive_rounds
    own = out / f"rank{common.RANK}" if ranks > 1 else out            # where this rank writes
    asked = {(example.id, example.question) for batch in batches for example in batch}
    lines = open_results(own, settings, args.resume, asked)
    plan = [(method, rounds, batch)
            for method, rounds, batch in make_plan(args.method, depths, batches[common.RANK::ranks])
            if any((method, rounds, example.id) not in lines for example in batch)]
    for method, rounds, batch in plan:            # batches broken off are answered as a whole
        for example in batch:
            lines.pop((method, rounds, example.id), None)
    whole_plan = make_plan(args.method, depths, batches)
    write_lines(own, whole_plan, lines)
    kinds = {key: link.kind for key, link in mas.outer.items()}
    fresh = mas.with_fresh_outer(kinds, seed=args.seed)
    warm_up(mas, batches[0])
    for method, rounds, batch in common.progress(plan, "evaluate"):
        new = answer_batch(fresh if method == "untrained" else mas, task, batch, method, rounds,
                           options)
        with open(own / "results.jsonl", "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in new)
        lines.update({line_key(line): line for line in new})
    if ranks > 1:
        torch.distributed.barrier()
        parts = [out / f"rank{rank}" / "results.jsonl" for rank in range(ranks)]
        lines = {line_key(line): line for part in parts for line in common.read_json_lines(part)}
    return write_lines(out, whole_plan, lines) if common.RANK == 0 else []


def main():
    """Ask, score, and write results.jsonl, summary.json and summary.png; or --show."""
    args, style = flags()
    if not args.show:
        need_matplotlib()
    task, examples = choose_questions(args)
    batches = in_batches(examples, args.batch_size)
    choose_methods(args, task, batches)
    if task.ready and not args.show:
        task.ready(args.allow_unsafe_code)
    options = {key: getattr(args, key) for key in (
        "latent_length", "max_new_tokens", "temperature", "top_p", "top_k", "min_p",
        "repetition_penalty", "seed", "answer_retry")}
    options["samples"] = args.num_rollouts = args.num_rollouts or task.samples
    mas = load_mas_system(style, args.device, args.dtype, task.kind, bool(args.trust_remote_code),
                          parse_override(args.ckpt_override), args.revision,
                          bool(args.enable_thinking), args.offload, args.allow_unsafe_code,
                          args.capture)
    if "search" in mas.style.tools:
        mas.search = web_search(args.tavily_keys_file)
    if args.show:
        show(mas, examples[:args.show], options, max(args.num_recursive_rounds))
        return

    out, started = Path(args.out), time.time()
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "resume")}
    settings["ranks"] = common.RANKS
    lines = answer_all(mas, task, batches, options, args, settings)
    if common.RANK > 0:
        return
    rows = summarise(lines)
    write_json(out / "summary.json", {"settings": settings, "rows": rows})
    print_table(rows)
    print_comparison(rows, task, examples)
    plot(rows, out / "summary.png")
    print(f"{len(examples)} questions, {time.time() - started:.0f} s; results.jsonl, summary.json "
          f"and summary.png are in {out}")
    failed = [line["error"] for line in lines if not line["outputs"]]
    if len(failed) == len(lines):
        raise ValueError(f"every question failed: {failed[0]}")


if __name__ == "__main__":
    common.run(main)

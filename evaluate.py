"""Ask a system questions by several methods and numbers of rounds, and score them side by side.

    python evaluate.py                                  # the shipped tiny links, all methods
    python evaluate.py --show 2                         # what the latents say, agent by agent
    python evaluate.py --style sequential_light --dataset math500 --method latent text single
    python evaluate.py --style sequential_light --dataset my.jsonl --task choice

Methods. `latent` is the system itself. Baselines in words are `text` (the agents exchange texts),
`text_brief` (texts cut to their essence), `single` (the last agent alone) and `single_loop` (the
last agent hears its own text, for as many turns as all agents have together). Controls are
`untrained` (new outer links), `zero` (zeros are sent) and `shuffle` (another question's latents).
All share loop, decoding and scoring. All but the `single` ones share the prompts, so a difference
among them is a difference in what travels between the agents.

OUT is the folder of --out. OUT/parts gets a file for each finished batch and method. A stopped run
goes on with the missing files (--resume), and under torchrun each rank writes its own share. From
the parts come OUT/results.jsonl (a line per question and method), OUT/summary.json and summary.png.
"""
import contextlib
import random
import time
from pathlib import Path

from checkpoints import notes_of
from evaluation import report
from evaluation.answers import (METHODS, Job, Plan, answer_batch, finished, in_batches,
                                m_and_rounds, possible_methods, write_part)
from evaluation.in_words import show
from recurse import load_mas_system
from styles import get_style
from support import flags
from support.batches import progress
from support.errors import need, need_same, need_saved
from support.files import (RESULTS, claim, fingerprint, move_aside, read_json, write_json,
                           write_lines)
from support.ranks import rank, ranks, wait_for_ranks
from tasks import get_task, is_file, task_names
from tools.web import search_tool
from training.rows import need_room
from writing import Sampling, Writing

# A resumed run may change these flags, because they do not change an answer.
CHANGES_NO_ANSWER = ("out", "resume", "show", "device", "threads", "compile", "offload")


def parse():
    """(flags, style). The flags have the published names where there are any."""
    parser = flags.Parser(__doc__)
    flags.add_system_flags(parser)
    add = parser.add_argument
    # What is asked.
    add("--dataset", default="", help="a data set of tasks/, a .json/.jsonl file, or a task's .py")
    add("--task", default="", help="what a file holds: a data set, maths, choice, coding or search")
    add("--dataset_split", default="", help="of a data set on the hub, instead of the usual one")
    add("--dataset_filter", nargs="+", default=[], metavar="CONDITION",
        help="ask only rows that meet all of these, like level=5 or 'contest_date>=2024-08-01'")
    add("--num_samples", type=flags.count, default=-1, help="questions, -1 for all")
    add("--sample_seed", type=int, default=None, help="draw the questions, not the first ones")
    # By which methods.
    add("--method", nargs="+", choices=METHODS, default=[], help="default: all that are possible")
    add("--num_recursive_rounds", nargs="+", type=flags.at_least(1), default=[1, 2, 3])
    add("--latent_length", type=flags.at_least(1), default=32, help="m, latent thoughts per turn")
    add("--batch_size", type=flags.at_least(1), default=32)
    add("--measure", default="accuracy", choices=["accuracy", "loss"],
        help="loss: mean nats per token of the gold answer, with nothing decoded")
    # How answers are written.
    add("--num_rollouts", type=flags.at_least(1), default=None,
        help="answers drawn per question (default: 10 for the AIME, else 1), for pass@k")
    add("--answer_retry", default=1, **flags.SWITCH,
        help="where no answer can be read, put `Final Answer: \\boxed{` after it and go on")
    add("--max_new_tokens", type=flags.at_least(1), default=2000)
    add("--temperature", type=flags.at_least(0, float), default=0.6, help="0 is greedy")
    add("--top_p", type=flags.at_least(0, float, 1.0), default=0.95)
    add("--top_k", type=flags.at_least(0), default=0)
    add("--min_p", type=flags.at_least(0, float, 1.0), default=0.0)
    add("--repetition_penalty", type=flags.at_least(0.01, float), default=1.0)
    # Who answers, and with what.
    add("--ckpt_override", nargs="*", action="extend", default=[], metavar="KEY=PATH",
        help="a role's folder, or outer=FOLDER for the outer links")
    add("--offload", action="store_true", help="one agent on the device at a time")
    add("--tavily_keys_file", default="", help="keys for web search, one per line")
    add("--allow_unsafe_code", action="store_true", help="run programs even without a sandbox")
    # What comes out.
    add("--out", default="out/evaluate")
    add("--show", type=flags.at_least(0), default=0, metavar="N",
        help="instead of scoring, print N problems with the latents in words")
    return with_settings(parser)


def with_settings(parser):
    """(flags, style), with the settings of style, data set and trained links as defaults."""
    known = flags.first_look(parser)
    style = get_style(known.style)
    general = style.settings.get("evaluate", {})
    asked = known.task or known.dataset or general.get("dataset", "tiny")
    # A later one counts more: m and R that the style trains with, its settings for all data sets,
    # those for the one that is asked, m and R that these links were trained with.
    name = get_task(asked).name if is_file(asked) or asked in task_names() else ""
    settings = {**m_and_rounds(style.settings.get("train_outer", {})), **general,
                **style.settings.get(name, {}),
                **m_and_rounds(notes_of(overrides(known.ckpt_override).get("outer") or style.repo))}
    parser.set_defaults(dataset=known.dataset or "tiny")
    return flags.parse(parser, settings), style


def overrides(pairs):
    """{key: path} of --ckpt_override."""
    found = dict(pair.split("=", 1) for pair in pairs if all(pair.partition("=")))
    need(len(found) == len(pairs), "--ckpt_override takes KEY=PATH, each key once, not "
         + " ".join(pairs))
    return found


# ---- all batches --------------------------------------------------------------------------------

def evaluate(mas, fresh, task, examples, plan, out, settings, resume=False):
    """Answer all questions by all methods, and report: the result lines.

    fresh: the same system with new outer links, for `untrained`. settings: what summary.json says
    of the run. Methods take turns on each batch. Whatever else the machine does meets all of them
    alike, so their times can be compared."""
    jobs, batches = {}, in_batches(examples, plan.batch_size)    # {file for its lines: a Job}
    for rounds in sorted(set(plan.rounds)):
        for number, batch in enumerate(batches):
            for method in plan.methods:
                depth = 1 if method == "single" else rounds         # it has one round
                part = out / "parts" / f"{method}_{depth}_{number:05d}.json"
                asked = [task.with_rounds(one, depth) for one in batch]
                jobs.setdefault(part, Job(task, plan, method, depth, examples=asked))
    if rank() == 0 and not resume:
        move_aside(out, RESULTS)
        write_json(out / "summary.json", {"settings": settings, "rows": []})
    wait_for_ranks()
    todo = [(part, job) for part, job in jobs.items() if not finished(part, job)]
    first = Job(task, plan, "latent", rounds=1, examples=batches[0][:2])
    with contextlib.suppress(RuntimeError):     # the first call is slow (imports, choosing kernels)
        mas.respond(first.request(mas), writing=Writing(2))
    mine, answered = todo[rank()::ranks()], {}           # answered: {file: its lines}
    for part, job in progress(mine, f"evaluate, {len(batches[0])} questions per batch"):
        answered[part] = answer_batch(fresh if job.method == "untrained" else mas, job)
        write_part(part, answered[part])
    wait_for_ranks()
    # Somebody may have removed the folder meanwhile. What this run has answered is still known.
    lines = [line for part in jobs
             for line in answered.get(part) or read_json(part).get("lines", [])]
    if rank() == 0:
        if not all(part.is_file() for part in jobs):
            print(f"files in {out / 'parts'} were removed during the run", flush=True)
        write_lines(out / "results.jsonl", lines)
        report.write_report(report.summarise(lines), out, settings, mas, task, examples)
    return lines


def compare(mas, task, args, out):
    """The comparison at the end of train_outer.py: the trained links beside every baseline, on the
    test problems of the task that made the training rows. `untrained` is where training began."""
    settings = {"max_new_tokens": 1000, "batch_size": 32, **mas.style.settings.get("evaluate", {}),
                **mas.style.settings.get(task.name, {})}
    examples, size = task.load(args.eval_samples), settings["batch_size"]
    plan = Plan(methods=possible_methods(mas.style, task, in_batches(examples, size)),
                rounds=list(range(1, args.num_recursive_rounds + 1)), batch_size=size,
                latent_length=args.latent_length,
                writing=Writing(settings["max_new_tokens"], seed=args.seed, brief=task.brief))
    fresh = mas.with_fresh_outer(None, args.scale_match, args.seed)
    evaluate(mas, fresh, task, examples=examples, plan=plan, out=out, settings=vars(args),
             resume=args.resume)


# ---- the script ---------------------------------------------------------------------------------

def chosen_questions(args):
    """(task, its questions): all, the first --num_samples, or as many drawn by --sample_seed."""
    has_rows = bool(Path(args.dataset).suffix) and not is_file(args.dataset)
    need(has_rows == bool(args.task), f"--dataset {args.dataset} and --task '{args.task}': --task "
         "says what a .json or .jsonl file holds (math500, .., or maths, choice, coding, search), "
         "and goes with such a file alone")
    name, path = (args.task, args.dataset) if has_rows else (args.dataset, None)
    task = get_task(name, path, args.dataset_filter)
    count = args.num_samples if args.num_samples > 0 else None
    if args.sample_seed is None:
        return task, task.load(count, args.dataset_split or None)
    need(count, "--sample_seed draws --num_samples questions: say how many")
    examples = task.load(None, args.dataset_split or None)
    return task, random.Random(args.sample_seed).sample(examples, min(count, len(examples)))


def plan_of(args, style, task, examples):
    """The Plan of the flags: by which methods, with how many rounds and thoughts, how written."""
    batches = in_batches(examples, args.batch_size)
    sampling = Sampling(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k,
                        min_p=args.min_p, repetition_penalty=args.repetition_penalty)
    alone = args.show or args.measure == "loss"          # then one answer per question is enough
    samples = 1 if alone else args.num_rollouts or task.samples
    return Plan(methods=[] if args.show else possible_methods(style, task, batches, args.method),
                rounds=args.num_recursive_rounds, latent_length=args.latent_length,
                batch_size=args.batch_size, answer_retry=args.answer_retry, measure=args.measure,
                writing=Writing(args.max_new_tokens, sampling, args.seed, samples,
                                brief=task.brief))


def main():
    """Questions, system, answers and their table; or --show."""
    (args, style), started = parse(), time.time()
    # 1. What is asked. All complaints come now, and not after an hour of answers.
    task, examples = chosen_questions(args)
    plan = plan_of(args, style, task, examples)
    settings = {name: value for name, value in vars(args).items() if name not in CHANGES_NO_ANSWER}
    settings.update(method=plan.methods, num_rollouts=plan.writing.samples)
    if not args.show:
        claim(args.out)
        if args.measure == "accuracy":
            task.ready(args.allow_unsafe_code)

    # 2. Who answers.
    mas = load_mas_system(
        style, args.device, args.dtype, task=task.kind, threads=args.threads,
        trust_remote_code=bool(args.trust_remote_code), revision=args.revision,
        ckpt_override=overrides(args.ckpt_override), thinking=bool(args.enable_thinking),
        offload=args.offload, allow_unsafe_code=args.allow_unsafe_code, compile=args.compile,
        need_links=bool(args.show or {"latent", "shuffle"} & set(plan.methods)))
    task.check_m(mas.agents[style.roles[0].name], args.latent_length,
                 rounds=max(args.num_recursive_rounds))
    need_room(mas.agents.values(), {one.id: (one.question, one.gold) for one in examples})
    if "search" in style.tools:
        mas.search = search_tool(args.tavily_keys_file)
    if args.show:
        return show(mas, examples[:args.show], plan)
    fresh = mas.with_fresh_outer(seed=args.seed)
    links = [*mas.outer.values(), *(agent.inner for agent in mas.agents.values())]
    settings["links_prompts_data"] = fingerprint(links, style.roles, style.edges, examples)
    if args.resume:
        earlier = need_saved(Path(args.out) / "summary.json")
        need_same(earlier, read_json(earlier).get("settings", {}), settings)

    # 3. The answers and their table.
    lines = evaluate(mas, fresh, task, examples=examples, plan=plan, out=Path(args.out),
                     settings=settings, resume=args.resume)
    print(f"{len(examples)} questions, {time.time() - started:.0f} s; results.jsonl, summary.json "
          f"and summary.png are in {args.out}")
    need(any(line["outputs"] for line in lines),
         f"every question failed: {lines[0].get('error')}")


if __name__ == "__main__":
    flags.run(main)

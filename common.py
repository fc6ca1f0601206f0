"""What the scripts share: flags, one-line errors, training rows, and the optimizer's step.

Nothing here is about latents; a reader who wants to see the method can leave this file closed.
"""
import argparse
import copy
import dataclasses
import datetime
import functools
import json
import math
import os
import random
import sys
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from agents import CAPTURE
from link import DAMAGED, read_json, write_json, write_whole
from styles import ANSWER_FORMAT, KINDS
from tasks import generated_task, no_hub

# Under torchrun several ranks (processes, one a device) share the work; otherwise there is one.
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_SKIPPED = 10       # steps with a NaN or infinite loss, in a row, before training gives up


# ---- flags and errors ---------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, and whose --help shows choices and defaults."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        """Say it in one line, and end with exit code 2."""
        self.exit(2, f"error: {message} (--help lists all flags)\n")


def at_least(low, kind=int, hint="", high=sys.float_info.max):
    """An argparse type: a finite number from `low` to `high`."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError as problem:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number") from problem
        if not low <= value <= high:
            limit = f" and at most {high}" if high != sys.float_info.max else ""
            raise argparse.ArgumentTypeError(f"must be at least {low}{limit}, not {text}{hint}")
        return value
    return parse


def sample_count(text):
    """An argparse type: how many rows or questions, -1 for all."""
    return -1 if text == "-1" else at_least(1, hint=" (-1 for all)")(text)


LATENT_LENGTH = at_least(1, hint=" (for an answer without latents: evaluate.py --method single)")


def add_system_flags(parser):
    """Flags by which every script chooses its system and where to run it."""
    parser.add_argument("--style", default="tiny", help="a style of styles/, or a .py file")
    parser.add_argument("--device", default="auto",
                        help="auto, cpu, cuda or cuda:N; several (cuda:0,cuda:1) share the agents")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of the frozen models")
    parser.add_argument("--enable_thinking", type=int, default=0, choices=[0, 1],
                        help="the chat template's thinking switch")
    parser.add_argument("--revision", default=None,
                        help="of the style's repos on the hub (train_inner: of the base model)")
    parser.add_argument("--trust_remote_code", nargs="?", type=int, const=1, default=0,
                        choices=[0, 1], help="let a model repo run its own code")
    parser.add_argument("--prompts", default="",
                        help="JSON {role: {prompt or first: text or {kind: text}, system: text}}: "
                             "other words")
    parser.add_argument("--capture", default="record", choices=CAPTURE,
                        help="single steps: recorded once and replayed (CUDA graph, or trace on a "
                             "CPU); compile: fused first, a minute a model and batch size; off")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--resume", action="store_true", help="go on where this run was stopped")


def add_training_flags(parser, learning_rate_flag, link_dtype_flag):
    """Flags of both trainers; the defaults are the published ones."""
    parser.add_argument("--mas_task", default="math", choices=KINDS,
                        help="kind of the questions: which prompts and inner links are used; rows "
                             "that have a task_family know their own")
    parser.add_argument("--dataset_name", default="", help="hub id, .json/.jsonl file or tiny")
    parser.add_argument("--dataset_split", default="train")
    parser.add_argument("--dataset_json_field", default="data", help="where a .json has its rows")
    parser.add_argument("--num_samples", type=sample_count, default=-1, help="rows, -1 for all")
    parser.add_argument("--save_format", default="safetensors", choices=["safetensors", "pt"],
                        help="pt is the released layout (bf16)")
    parser.add_argument("--batch_size", type=at_least(1), default=2)
    parser.add_argument("--grad_accum_steps", type=at_least(1), default=1)
    parser.add_argument("--num_train_epochs", type=at_least(1), default=1,
                        help="used where max_steps is 0")
    parser.add_argument("--max_steps", type=at_least(0), default=20000)
    parser.add_argument(learning_rate_flag, type=at_least(0, float), default=5e-4)
    parser.add_argument("--lr_scheduler_type", default="cosine", choices=["cosine", "constant"])
    parser.add_argument("--warmup_steps", type=at_least(0), default=10)
    parser.add_argument("--weight_decay", type=at_least(0, float), default=0.0)
    parser.add_argument("--max_grad_norm", type=at_least(0, float), default=1.0)
    parser.add_argument("--latent_length", type=LATENT_LENGTH, default=32, help="m")
    parser.add_argument("--scale_match", type=int, default=1, choices=[0, 1],
                        help="start the last LayerNorm's gain at the target's embedding RMS")
    parser.add_argument("--log_every", type=at_least(1), default=10)
    parser.add_argument("--save_steps", type=at_least(0), default=100,
                        help="write state.pt every so many steps, 0 for the end only")
    parser.add_argument(link_dtype_flag, dest="link_dtype", default="auto", choices=DTYPES,
                        help="links are always trained in float32, whatever this says")
    parser.add_argument("--solver_pre_question", type=int, default=1, choices=[0, 1],
                        help="1: the question stands before what a role hears, as in all our "
                             "styles (the other order is a matter of a style's prompts)")


def early_flags():
    """--style, --mas_design and --dataset ahead of the others: defaults depend on them."""
    early = Parser("")
    early.add_argument("--style", default="")
    early.add_argument("--mas_design", default="")
    early.add_argument("--dataset", default="tiny")
    early.add_argument("--task", default="")
    known, _ = early.parse_known_args([arg for arg in sys.argv[1:] if arg not in ("-h", "--help")])
    return known


def parse_flags(parser, settings):
    """The flags, with a style's settings as defaults; those that took effect are printed."""
    for name in settings:
        if name not in vars(parser.parse_args([])):
            raise ValueError(f"the style's settings hold '{name}', which is no flag of this script")
    parser.set_defaults(**settings)
    args = parser.parse_args()
    used = [f"{name}={value}" for name, value in settings.items() if getattr(args, name) == value]
    if used:
        print("the style sets " + " ".join(used), flush=True)
    if getattr(args, "solver_pre_question", 1) == 0:
        print("note: --solver_pre_question 0 changes nothing, the order is the style's", flush=True)
    if getattr(args, "link_dtype", "auto") not in ("auto", "float32"):
        print("note: links are trained in float32, and run under autocast", flush=True)
    return args


def with_prompts(style, path):
    """The style, with other words if there is a path: a JSON file {role: {prompt | first | system:
    ..}}."""
    if not path:
        return style
    if not Path(path).is_file():
        raise FileNotFoundError(f"--prompts {path} does not exist")
    roles = {role.name: role for role in style.roles}
    for name, words in read_json(path, dict).items():
        role = style.role(name)
        for part, text in words.items() if isinstance(words, dict) else [(words, None)]:
            by_kind = text.values() if isinstance(text, dict) and part != "system" else [text]
            if (part not in ("prompt", "first", "system")
                    or not all(isinstance(one, str) for one in by_kind)):
                raise ValueError(f"{path}: role {name} has '{part}': give prompt or first as a "
                                 "text or {kind: text}, system as a text")
        if "prompt" in words and role.first and "first" not in words:
            print(f"note: {path} leaves what {role.name} is asked first as it is", flush=True)
        roles[role.name] = dataclasses.replace(role, **words)
    return dataclasses.replace(style, roles=tuple(roles.values()))


def run(main):
    """Run a script: what a user can mend is one line and exit code 2, a bug is a traceback.

    ValueError and OSError are what the modules raise for the former; TRACEBACK=1 shows where."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if RANKS > 1:
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo",
                                             timeout=datetime.timedelta(days=1))   # uneven shares
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")            # one rank speaks; errors come from all
    try:
        main()
        if RANKS > 1:
            torch.distributed.destroy_process_group()
    except (ValueError, OSError) as problem:
        if os.environ.get("TRACEBACK"):
            raise
        print("error: " + " ".join(str(problem).split()), file=sys.stderr)
        raise SystemExit(2) from None
    except torch.OutOfMemoryError as problem:
        print(f"error: {str(problem).splitlines()[0]} Lower --batch_size, or see --device and "
              "--offload", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; what a run has saved, --resume goes on from", file=sys.stderr)
        raise SystemExit(130) from None


def progress(items, name, **settings):
    """The items with a progress bar, on the rank that speaks."""
    return tqdm(items, desc=name, mininterval=1, disable=RANK > 0, **settings)


# ---- training rows ------------------------------------------------------------------------------

def load_rows(name, split="train", field="data", limit=-1, seed=42):
    """Training rows [dict]: a generated task, a local .json or .jsonl, or a hub data set.

    Raises ValueError or OSError, naming the file, where there are none."""
    if not name:
        raise ValueError("no training data: give --dataset_name")
    path = Path(name)
    if generated_task(name):
        return generated_task(name).train_rows(limit if limit > 0 else 4800, seed)
    if path.suffix in (".json", ".jsonl"):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: check --dataset_name")
        if path.suffix == ".json":
            content = read_json(path)
            rows = content.get(field) if isinstance(content, dict) else content
        else:
            rows = read_json_lines(path)
        if not isinstance(rows, list):
            raise ValueError(f"{path} has no list under '{field}': check --dataset_json_field")
    else:
        import datasets
        try:
            rows = datasets.load_dataset(name, split=split).to_list()
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as problem:
            raise OSError(f"--dataset_split {split}: {no_hub(name, problem)}") from problem
    rows = rows[:limit] if limit > 0 else rows
    if not rows:
        raise ValueError(f"{name} holds no rows")
    return rows


def read_json_lines(path):
    """The objects of a .jsonl file. Raises ValueError naming file and line."""
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except (json.JSONDecodeError, UnicodeDecodeError) as problem:
                raise ValueError(f"{path} line {number} is not JSON ({problem})") from problem
    return rows


def drop_torn_line(path):
    """Cut off a last line that a killed process left half written."""
    whole = Path(path).read_text(encoding="utf-8")
    whole = whole[:whole.rfind("\n") + 1]
    write_whole(path, lambda part: part.write_text(whole, encoding="utf-8"))


def role_texts(role, row):
    """The role's gold texts in rounds 1, 2, .. of a row; one for all rounds if its cell is a
    string, [] if the row has none of its target columns."""
    for column in role.target:
        cell = row.get(column)
        texts = cell if isinstance(cell, list) else [cell]
        if texts and all(isinstance(text, str) and text.strip() for text in texts):
            return texts
    return []


def role_text(role, row, round=1):
    """The role's gold text in a round (the last one listed repeats), or ""."""
    texts = role_texts(role, row)
    return texts[min(round, len(texts)) - 1] if texts else ""


def keep_usable(rows, roles):
    """The rows with a question and a text for each of `roles`; the others are counted and named.

    Raises ValueError if no row is left."""
    missing = {}
    usable = []
    for row in rows:
        row = row if isinstance(row, dict) else {}
        if row_kind(row, "math") not in KINDS:
            raise ValueError(f"a row has the task_family '{row['task_family']}': known are "
                             + ", ".join(KINDS))
        lacks = [] if isinstance(row.get("question"), str) else ["question"]
        lacks += [" or ".join(role.target) for role in roles if not role_text(role, row)]
        for column in lacks:
            missing[column] = missing.get(column, 0) + 1
        if not lacks:
            usable.append(row)
    if missing:
        print(f"left out {len(rows) - len(usable)} of {len(rows)} rows, which lack a column: "
              + ", ".join(f"{column} ({count})" for column, count in missing.items()), flush=True)
    if not usable:
        raise ValueError(f"no usable row: every one lacks {', '.join(missing)}")
    return usable


def row_kind(row, default):
    """The kind of a row's question: its task_family, where it has one, else the run's."""
    return str(row.get("task_family") or default).lower()


def question_of(row):
    """A row's question; for code that is tested by calling a function, with the function's name."""
    name = row.get("fn_name")
    return row["question"] + (f"\nThe function has to be called `{name}`." if name else "")


def role_examples(style, role, rows, kind):
    """What a role is asked and says, in words: [(question, kind, {role heard: its text}, gold)].

    A row whose texts are lists gives an example a round. Roles that speak before this one are
    heard in the same round, the others in the round before."""
    names, examples = [r.name for r in style.roles], []
    for row in rows:
        for round, text in enumerate(role_texts(role, row), start=1):
            heard = {}
            for name in style.heard_by(role.name):
                said_in = round if names.index(name) < names.index(role.name) else round - 1
                if said_in and role_text(style.role(name), row, said_in):
                    heard[name] = role_text(style.role(name), row, said_in)
            examples.append((question_of(row), row_kind(row, kind), heard, text))
    return examples


def read_examples(agent, style, role, examples):
    """The prompts of role_examples, slots filled with the heard texts, read: yields (places, Past)
    for each kind of question and set of roles heard, which decide the words of the prompt."""
    alike = {}
    for place, (_, kind, heard, _) in enumerate(examples):
        alike.setdefault((kind, tuple(heard)), []).append(place)
    for (kind, heard), places in alike.items():
        segments = agent.prompt(role.system, style.prompt(role, kind, heard), heard,
                                [examples[i][0] for i in places], ANSWER_FORMAT[kind])
        slots = {name: [examples[i][2][name] for i in places] for name in heard}
        yield places, agent.read(*agent.embed(segments, slots))


@torch.no_grad()
def gold_states(agent, style, role, examples, max_length):
    """States and tokens of a role's gold texts, one pair per example: [(h (n, d), tokens (n,))].

    h[i] has read the prompt and i tokens: it predicts tokens[i]. The base is frozen, so these
    never change."""
    results = [None] * len(examples)
    for places, past in read_examples(agent, style, role, examples):
        tokens = [row[:max_length] for row in agent.tokenize([examples[i][3] for i in places])]
        states = agent.follow(past, [row[:-1] for row in tokens])                  # (b, n, d)
        for i, row, h in zip(places, tokens, states):
            # A copy: a view would keep the whole padded batch in memory.
            results[i] = (h[:len(row)].clone(), torch.tensor(row, device=agent.device))
    return results


def batch_of(items, step, size, seed):
    """The batch of step 0, 1, ..: epochs of a seeded shuffle. It depends on nothing but its
    arguments, so a resumed run sees the same data."""
    places = [divmod(place, len(items)) for place in range(step * size, (step + 1) * size)]
    return [items[shuffled(len(items), seed, epoch)[index]] for epoch, index in places]


@functools.lru_cache(maxsize=2)
def shuffled(length, seed, epoch):
    """The order of one epoch."""
    order = list(range(length))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)
    return order


# ---- the optimizer's step -----------------------------------------------------------------------

class Training:
    """AdamW over links, with warm-up and cosine, clipping, fp16 scaling, NaN guard and resume.

        training = Training(link, args, learning_rate, folder, total_steps, dtype)
        for step in training.steps("inner link"):
            for batch in training.batches(items, step):        # micro-batches, this rank's share
                training.backward(loss, tokens, cosine=..)     # a mean over so many tokens
            training.step()                                    # the update, and the log's line

    A step's gradient is that of the mean over all tokens of all its micro-batches on all ranks:

        g = sum_b tokens_b g_b / sum_b tokens_b

    so accumulating, or adding ranks, is the same as a larger batch. No DDP wrapper: it cannot know
    that a link is used R times in one graph, or not at all when R = 1.
    """

    def __init__(self, links, args, learning_rate, folder, total_steps, dtype=torch.float32):
        self.links, self.args, self.folder = links, args, Path(folder)
        self.total_steps, self.done, self.skipped, self.skipped_in_a_row = total_steps, 0, 0, 0
        self.tokens, self.values, self.finite, self.unproven = 0.0, {}, True, None
        links.requires_grad_(True)
        if RANKS > 1:
            for weight in links.parameters():        # all start from the same links
                torch.distributed.broadcast(weight.data, 0)
        self.optimizer = torch.optim.AdamW(links.parameters(), lr=learning_rate, betas=(0.9, 0.95),
                                           weight_decay=args.weight_decay, fused=True)
        self.schedule = transformers.get_scheduler(
            "constant_with_warmup" if args.lr_scheduler_type == "constant" else "cosine",
            self.optimizer, min(args.warmup_steps, total_steps), total_steps)
        # Half precision underflows: in fp16 the loss is scaled up, and the gradient down again.
        device = next(links.parameters()).device
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10,
                                           enabled=dtype == torch.float16)
        self.settings = {key: value for key, value in vars(args).items()
                         if key not in ("resume", "save_dir", "log_every", "save_steps", "device",
                                      "capture", "seeds", "eval_samples")}
        self.settings["ranks"] = RANKS                 # they decide which rows make a step
        if args.resume:
            self._load_state()
        elif RANK == 0:
            (self.folder / "state.pt").unlink(missing_ok=True)       # of an earlier run
            write_json(self.folder / "train_args.json", vars(args))
            write_whole(self.folder / "log.jsonl", lambda part: part.write_text(""))

    def steps(self, name):
        """Step numbers still to do, 0-based, with a progress bar; then the links are frozen."""
        yield from progress(range(self.done, self.total_steps), name, initial=self.done,
                            total=self.total_steps)
        self.links.requires_grad_(False)

    def batches(self, items, step):
        """This rank's micro-batches of a step: together the ranks have batch_size x ranks items."""
        accumulated, size = self.args.grad_accum_steps, self.args.batch_size * RANKS
        for micro in range(accumulated):
            yield batch_of(items, step * accumulated + micro, size, self.args.seed)[RANK::RANKS]

    def backward(self, loss, tokens, **values):
        """Add the gradient of one micro-batch's loss, a mean over `tokens`; `values` are logged as
        means over all tokens. A loss that is not finite spoils the whole step."""
        weight = tokens / 1000            # near 1, so that scaled fp16 gradients keep their range
        self.finite = self.finite and bool(torch.isfinite(loss))
        if self.finite and loss.requires_grad:
            self.scaler.scale(loss * weight).backward()
        self.tokens += weight
        for name, value in {"loss": loss, **values}.items():
            value = value.item() if torch.is_tensor(value) else value
            self.values[name] = self.values.get(name, 0.0) + weight * value

    def step(self):
        """Clip, update, and log every args.log_every steps."""
        self._share()
        norm = torch.tensor(float("nan"))
        if self.finite:
            if self.unproven:                  # the weights to be saved gave a finite loss
                self._save(self.unproven)
                self.unproven = None
            self.scaler.unscale_(self.optimizer)
            limit = self.args.max_grad_norm or float("inf")
            norm = torch.nn.utils.clip_grad_norm_(self.links.parameters(), limit)
        if torch.isfinite(norm):
            self.scaler.step(self.optimizer)
            self.schedule.step()
            self.skipped_in_a_row = 0
        else:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if self.finite:
            self.scaler.update()                         # fp16: an overflow lowers the scale
        self.optimizer.zero_grad()
        values, self.values = self.values, {}
        self.finite, self.tokens, self.done = True, 0.0, self.done + 1
        self._log_and_save({**values, "grad_norm": norm.item()})

    def _share(self):
        """g = sum tokens_b g_b / sum tokens_b over the ranks: one all_reduce of everything.

        A rank whose loss was not finite takes part all the same, with zeros and a mark, so that no
        rank waits for ever and all leave the step out."""
        weights = list(self.links.parameters())
        if RANKS > 1:
            for weight in weights:
                if weight.grad is None or not self.finite:
                    weight.grad = torch.zeros_like(weight)
            device = weights[0].device
            numbers = torch.tensor([*self.values.values(), self.tokens, float(not self.finite)],
                                   device=device)
            flat = torch.cat([*(weight.grad.to(device).flatten() for weight in weights), numbers])
            torch.distributed.all_reduce(flat)
            parts = flat.split([*(weight.numel() for weight in weights), len(numbers)])
            for weight, part in zip(weights, parts):
                # A link that nobody used (R = 1) has no gradient, which AdamW tells from zero.
                weight.grad = part.view_as(weight).to(weight.device) if part.any() else None
            *shared, self.tokens, spoilt = parts[-1].tolist()
            self.values, self.finite = dict(zip(self.values, shared)), spoilt == 0
        for weight in weights:
            if weight.grad is not None and self.finite:
                weight.grad /= self.tokens
        self.values = {name: value / self.tokens for name, value in self.values.items()}

    def _log_and_save(self, values):
        last, every = self.done == self.total_steps, self.args.save_steps
        gives_up = self.skipped_in_a_row == MAX_SKIPPED
        if last or gives_up or self.done % self.args.log_every == 0:
            line = {"step": self.done, **values, "lr": self.schedule.get_last_lr()[0],
                    "skipped": self.skipped}
            line = {key: value if math.isfinite(value) else None for key, value in line.items()}
            if RANK == 0:
                with open(self.folder / "log.jsonl", "a") as log:
                    log.write(json.dumps(line) + "\n")
        if gives_up:
            raise ValueError(f"the loss was NaN or infinite {MAX_SKIPPED} steps in a row: begin "
                             "again with a lower learning rate, or a lower --max_grad_norm")
        if last:
            self._save(self._state())
        elif every and self.done % every == 0 and not self.skipped_in_a_row:
            self.unproven = copy.deepcopy(self._state())

    def _state(self):
        """Everything a resumed run needs; the data's order follows from seed and step."""
        return {"settings": self.settings, "done": self.done, "skipped": self.skipped,
                "links": self.links.state_dict(), "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(), "scaler": self.scaler.state_dict()}

    def _save(self, state):
        if RANK > 0:
            return
        write_whole(self.folder / "state.pt", lambda part: torch.save(state, part))

    def _load_state(self):
        path = self.folder / "state.pt"
        if not path.is_file():
            raise FileNotFoundError(f"nothing to resume: {path} is missing; leave --resume away")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            theirs = state["settings"]
        except DAMAGED as problem:
            raise ValueError(f"{path} is not a state of this script, or damaged") from problem
        odd = [key for key in self.settings if theirs.get(key) != self.settings[key]]
        if odd:
            raise ValueError(f"{path} is of another run ({', '.join(odd)} differ): use the same "
                             "flags, or another --save_dir")
        self.done, self.skipped = state["done"], state["skipped"]
        self.links.load_state_dict(state["links"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        if RANK > 0:
            return
        drop_torn_line(self.folder / "log.jsonl")
        kept = [line for line in read_json_lines(self.folder / "log.jsonl")
                if line["step"] <= self.done]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_whole(self.folder / "log.jsonl", lambda part: part.write_text(text))

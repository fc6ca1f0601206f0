"""What the command lines of all scripts share: flags, a style's defaults, one-line errors.

Flags have the published names where there are any. A value comes from three sources, and the later
one counts:

    add("--batch_size", default=2)                           the flag's own default
    settings={"train_outer": {"batch_size": 32}}             what the style sets for this script
    python train_outer.py --batch_size 8                     what the user gives

A style may set defaults for a script or for a data set, and trained links may know theirs. Those
that took effect are printed.
"""
import argparse
import math
import os
import sys

import transformers

from support.batches import out_of_memory
from support.devices import DTYPES
from support.errors import need, shown
from support.files import release, saved
from support.ranks import join_ranks, leave_ranks, rank


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, and whose --help shows choices and defaults."""

    def __init__(self, doc):
        super().__init__(description=doc.split("\n")[0], allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        """Say it in one line, and end with exit code 2."""
        self.exit(2, f"error: {message} (--help lists all flags)\n")


def at_least(low, kind=int, high=math.inf):
    """An argparse type: a finite number from `low` to `high`."""
    def number(text):
        value = kind(text)                   # argparse says "invalid number value" if this fails
        if not low <= value <= high or value == math.inf:
            limit = f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"must be at least {low}{limit}, not {text}")
        return value
    return number


def count(text):
    """An argparse type: how many rows or questions, -1 for all."""
    return -1 if text == "-1" else at_least(1)(text)


SWITCH = dict(type=int, choices=[0, 1])      # a flag that is 0 or 1, as the published ones are


def add_model_flags(parser):
    """Flags of how frozen models are loaded and where they run."""
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N, or several: cuda:0,cuda:1")
    add("--threads", type=at_least(0), default=0, help="of the CPU; 0: see support/devices.py")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="of the frozen models")
    add("--revision", default=None, help="on the hub, of the repos (train_inner: the base model)")
    add("--trust_remote_code", nargs="?", const=1, default=0, **SWITCH,
        help="let a model's repo run its own code")
    add("--seed", type=at_least(0, int, 2**63 - 1), default=42)


def add_system_flags(parser):
    """Flags by which every script chooses its system and where to run it."""
    add = parser.add_argument
    add("--style", default="tiny", help="a style of styles/, or a .py file that makes one")
    add_model_flags(parser)
    add("--compile", default=0, **SWITCH, help="1: compile steps on a GPU (pays in long runs)")
    add("--enable_thinking", default=0, **SWITCH, help="the chat template's own thinking switch")
    add("--resume", action="store_true", help="go on where this run was stopped")


def add_training_flags(parser, learning_rate_flag, link_dtype_flag, kinds):
    """Flags of both trainers. The defaults are the published ones. kinds: of questions."""
    add = parser.add_argument
    # The data.
    add("--mas_task", default="math", choices=kinds,
        help="kind of the questions, for rows without a task_family: decides prompts and links")
    add("--dataset_name", default="", help="hub id, .json/.jsonl file, tiny, or a task's .py")
    add("--dataset_split", default="train")
    add("--dataset_json_field", default="data", help="where a .json has its rows")
    add("--num_samples", type=count, default=-1, help="rows, -1 for all")
    add("--batch_size", type=at_least(1), default=2, help="rows at once")
    add("--grad_accum_steps", type=at_least(1), default=1, help="batches in a step")
    # The optimizer.
    add("--num_train_epochs", type=at_least(1), default=1, help="used where max_steps is 0")
    add("--max_steps", type=at_least(0), default=20000)
    add(learning_rate_flag, type=at_least(0, float), default=5e-4)
    add("--lr_scheduler_type", default="cosine", choices=["cosine", "constant"])
    add("--warmup_steps", type=at_least(0), default=10)
    add("--weight_decay", type=at_least(0, float), default=0.0)
    add("--max_grad_norm", type=at_least(0, float), default=1.0, help="0: no clipping")
    # The links.
    add("--latent_length", type=at_least(1), default=32, help="m, latent thoughts per turn")
    add("--scale_match", default=1, **SWITCH, help="start at the embeddings' length: see link.py")
    add("--save_format", default="safetensors", choices=["safetensors", "pt"],
        help="pt is the released layout (bf16)")
    # The log and the state.
    add("--log_every", type=at_least(1), default=10, help="steps")
    add("--save_steps", type=at_least(0), default=100, help="steps; 0: state.pt at the end only")
    # Published flags that change nothing here. They are taken, so that published commands work.
    add(link_dtype_flag, help="no effect: links are trained in float32 and run under autocast")
    add("--solver_pre_question", help="no effect: where the question stands is up to the style")


def first_look(parser):
    """The flags defined so far, as the user gave them. Other flags and --help are ignored.

    Some flags and many defaults depend on the style, so a script looks for the style first."""
    asked = [arg for arg in sys.argv[1:] if arg not in ("-h", "--help")]
    return parser.parse_known_args(asked)[0]


def parse(parser, settings):
    """The flags, with the settings of style and links as defaults. Those that took effect are
    printed.

    Raises ValueError for a setting that is not a flag of this script. The value of a setting is
    checked as a user's is."""
    odd = sorted(settings.keys() - {action.dest for action in parser._actions})
    need(not odd, f"the style's settings hold {odd}, which are not flags of this script")
    # argparse does not check defaults. So the settings are given as flags before the user's own.
    parser.set_defaults(**settings)                      # for --help
    given = []
    for name, value in settings.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        given += [f"--{name}", *map(str, [] if value is True else values)] * (value is not False)
    args = parser.parse_args([*given, *sys.argv[1:]])
    used = [f"{name}={value}" for name, value in settings.items() if getattr(args, name) == value]
    if used:
        print("defaults of this system: " + " ".join(used), flush=True)
    return args


def run(main):
    """Run a script. An error that a user can mend (ValueError, OSError, too little memory) is one
    line and exit code 2. A bug is a traceback. TRACEBACK=1 shows one for both."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    join_ranks()
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")            # rank 0 prints, and every rank tells errors
    try:
        main()
    except (ValueError, OSError, RuntimeError) as problem:
        says, memory = shown(" ".join(str(problem).split())), out_of_memory(problem)
        if os.environ.get("TRACEBACK") or isinstance(problem, RuntimeError) and not memory:
            raise
        if memory:
            says = (f"{says[:200]} .. Lower --batch_size. In a trainer, raise --grad_accum_steps "
                    "too. In evaluate.py, try --offload.")
        print(f"error: {says}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if rank() == 0:
            print(f"stopped; --resume goes on from {saved()}" if saved() else
                  "stopped; nothing new is saved yet", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        release()
    leave_ranks()

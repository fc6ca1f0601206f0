"""What the command lines of all scripts share: flags, a style's defaults, one-line errors, ranks.

Nothing here is about latents. A reader who wants to see the method can leave this file closed.

Flags have the published names where there are any. A value comes from three places, and the later
one counts:

    add("--batch_size", default=2)                           the flag's own default
    settings={"train_outer": {"batch_size": 32}}             what the style sets for this script
    python train_outer.py --batch_size 8                     what the user gives

A style may set defaults for a script or for a data set. Those that took effect are printed.
"""
import argparse
import datetime
import math
import os
import sys

import torch
import transformers
from tqdm import tqdm

from support.errors import need
from support.files import release, saved

# Under torchrun, several ranks (processes, one for each GPU) share the work. Else there is one.
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
DTYPES = ("auto", "float32", "bfloat16", "float16")


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


LATENT_LENGTH = at_least(1)


def add_system_flags(parser):
    """Flags by which every script chooses its system and where to run it."""
    add = parser.add_argument
    add("--style", default="tiny", help="a style of styles/, or a .py file that makes one")
    add("--device", default="auto",
        help="auto, cpu, cuda or cuda:N; several (cuda:0,cuda:1) share the agents")
    add("--threads", type=at_least(0), default=0, help="of the CPU; 0: see support/devices.py")
    add("--dtype", default="auto", choices=DTYPES, help="of the frozen models")
    add("--compile", default="auto", choices=["auto", "0", "1"],
        help="on a GPU, compile the models' layers: 1 at once, auto when it pays, 0 never")
    add("--enable_thinking", type=int, default=0, choices=[0, 1],
        help="the chat template's own thinking switch")
    add("--revision", default=None,
        help="of the style's repos on the hub (train_inner: of the base model)")
    add("--trust_remote_code", nargs="?", type=int, const=1, default=0, choices=[0, 1],
        help="let a model's repo run its own code")
    add("--seed", type=at_least(0, int, 2**63 - 1), default=42)
    add("--resume", action="store_true", help="go on where this run was stopped")


def add_training_flags(parser, learning_rate_flag, link_dtype_flag, kinds):
    """Flags of both trainers. The defaults are the published ones. kinds: of questions."""
    add = parser.add_argument
    # The data.
    add("--mas_task", default="math", choices=kinds,
        help="kind of the questions: which prompts and inner links are used; rows that have a "
             "task_family know their own")
    add("--dataset_name", default="", help="hub id, .json/.jsonl file or tiny")
    add("--dataset_split", default="train")
    add("--dataset_json_field", default="data", help="where a .json has its rows")
    add("--num_samples", type=count, default=-1, help="rows, -1 for all")
    add("--batch_size", type=at_least(1), default=2)
    add("--grad_accum_steps", type=at_least(1), default=1)
    # The optimizer.
    add("--num_train_epochs", type=at_least(1), default=1, help="used where max_steps is 0")
    add("--max_steps", type=at_least(0), default=20000)
    add(learning_rate_flag, type=at_least(0, float), default=5e-4)
    add("--lr_scheduler_type", default="cosine", choices=["cosine", "constant"])
    add("--warmup_steps", type=at_least(0), default=10)
    add("--weight_decay", type=at_least(0, float), default=0.0)
    add("--max_grad_norm", type=at_least(0, float), default=1.0, help="0: no clipping")
    # The links.
    add("--latent_length", type=LATENT_LENGTH, default=32, help="m, latent thoughts a turn")
    add("--scale_match", type=int, default=1, choices=[0, 1],
        help="start the last LayerNorm's gain at the embeddings' RMS: see link.py")
    add("--save_format", default="safetensors", choices=["safetensors", "pt"],
        help="pt is the released layout (bf16)")
    # The log and the state.
    add("--log_every", type=at_least(1), default=10)
    add("--save_steps", type=at_least(0), default=100,
        help="write state.pt every so many steps, 0 for the end only")
    # Published flags that change nothing here. They are taken, so that published commands work.
    add(link_dtype_flag, help="no effect: links are trained in float32 and run under autocast")
    add("--solver_pre_question", help="no effect: where the question stands is up to the style")


def early(parser):
    """The flags as far as they are known by now, and without --help.

    Some flags and many defaults depend on the style and the data set, so these are read first."""
    known, _ = parser.parse_known_args([arg for arg in sys.argv[1:] if arg not in ("-h", "--help")])
    return known


def parse(parser, settings):
    """The flags, with a style's settings as defaults. Settings that took effect are printed.

    Raises ValueError for a setting that is no flag of this script. Its value is checked as a
    user's is."""
    odd = sorted(settings.keys() - vars(early(parser)).keys())
    need(not odd, f"the style's settings hold {odd}, which are no flags of this script")
    # argparse does not check defaults. So the settings are given as flags before the user's own.
    parser.set_defaults(**settings)                      # for --help
    given = []
    for name, value in settings.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        given += [f"--{name}", *map(str, [] if value is True else values)] * (value is not False)
    args = parser.parse_args([*given, *sys.argv[1:]])
    used = [f"{name}={value}" for name, value in settings.items() if getattr(args, name) == value]
    if used:
        print("the style sets " + " ".join(used), flush=True)
    return args


def wait_for_ranks():
    """Wait until all ranks have come this far."""
    if RANKS > 1:
        torch.distributed.barrier()


def progress(items, name, **settings):
    """The items with a progress bar, on the rank that speaks."""
    return tqdm(items, desc=name, mininterval=1, disable=RANK > 0, **settings)


def out_of_memory(problem):
    """Whether an exception says that memory is too small, of a card or of this machine."""
    return isinstance(problem, torch.OutOfMemoryError) or any(
        sign in str(problem) for sign in ("CUDA error: out of memory", "DefaultCPUAllocator",
                                          "CUBLAS_STATUS_ALLOC_FAILED"))


def run(main):
    """Run a script. An error that a user can mend (ValueError, OSError, too little memory) is one
    line and exit code 2. A bug is a traceback. TRACEBACK=1 shows one for both."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if RANKS > 1:
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo",
                                             timeout=datetime.timedelta(days=1))   # uneven shares
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")            # one rank speaks; all of them tell errors
    try:
        main()
    except (ValueError, OSError, RuntimeError) as problem:
        says, memory = " ".join(str(problem).split()), out_of_memory(problem)
        if os.environ.get("TRACEBACK") or isinstance(problem, RuntimeError) and not memory:
            raise
        if memory:
            says = f"{says[:200]} .. Lower --batch_size, or see --device and --offload"
        print(f"error: {says}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if RANK == 0:
            print(f"stopped; --resume goes on from {saved()}" if saved() else
                  "stopped; nothing new is saved yet", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        release()
    if RANKS > 1:
        torch.distributed.destroy_process_group()

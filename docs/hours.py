"""How many hours a published style takes on one card, by arithmetic from two measured rates.

    python docs/hours.py                       with the rates of one NVIDIA H200
    python docs/hours.py --read 150 --step 6   with those of your card

It prints the table of docs/reproduce.md, section 4, and one cell of it worked out. Nothing is run.
"""
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from styles import get_style  # noqa: E402
from support import flags  # noqa: E402

# {the last part of a model's id: (GB of weights in bfloat16, layers)}
MODELS = {
    "Qwen3-1.7B": (3.44, 28), "Llama-3.2-1B-Instruct": (2.47, 16),
    "Qwen2.5-Math-1.5B-Instruct": (3.09, 28), "gemma-3-4b-it": (8.6, 34),
    "Llama-3.2-3B-Instruct": (6.43, 28), "DeepSeek-R1-Distill-Qwen-1.5B": (3.55, 28),
    "Qwen2.5-Coder-3B-Instruct": (6.17, 36), "BioMistral-7B": (14.5, 32), "Qwen3.5-2B": (3.76, 24),
    "Qwen3.5-4B": (8.4, 32), "Qwen3.5-9B": (17.9, 32)}
QUESTIONS = {"math500": 500, "gpqa": 198, "medqa": 300, "mbppplus": 378, "aime26": 30,
             "livecodebench": 1055, "bamboogle": 125, "hotpotqa": 7405}
STYLES = ("sequential_light", "sequential_scaled", "mixture", "distillation", "deliberation")
ROUNDS, STEPS = 3, 20_000
NOT_COMPILED = 7.7        # ms that compiling saves in a step of 28 layers. Qwen3.5 is not compiled
PASS = 5                  # ms of a layer in a training pass: forward, backward, and run again


def rates(model, read, step):
    """(ms to read 256 tokens, ms of a step) of a model. Both grow with its GB of weights."""
    size, layers = MODELS[model]
    extra = NOT_COMPILED * layers / 28 if "Qwen3.5" in model else 0
    return read * size / 3.44, step * size / 3.44 + extra


def models_of(style):
    """The names of a style's models, in order of speaking."""
    return [role.model.split("/")[1] for role in get_style(style).roles]


def settings_of(style, dataset):
    """(m, words of an answer, questions at once) of a style and a data set."""
    settings = get_style(style).settings
    own = settings.get(dataset, {})
    batch = 4 if dataset == "aime26" else settings["evaluate"]["batch_size"]    # 10 texts for each
    return own.get("latent_length", 32), own.get("max_new_tokens", 2000), batch


def seconds(style, dataset, read, step):
    """Seconds of a batch: all turns that think, and the last one, which writes. A word counts as
    two steps, because of the vocabulary head and the choice of the word."""
    m, words, _ = settings_of(style, dataset)
    models, total = models_of(style), 0
    for i, model in enumerate(models):
        reading, one = rates(model, read, step)
        turns = ROUNDS - (i == len(models) - 1)
        total += turns * (reading + m * one)
    return (total + reading + words * 2 * one) / 1000


def asking(style, dataset, read, step):
    """Hours of all questions, every answer at its longest."""
    batches = math.ceil(QUESTIONS[dataset] / settings_of(style, dataset)[2])
    return seconds(style, dataset, read, step) * batches / 3600


def training(style, passes):
    """Hours of 20,000 steps. A turn that thinks has `passes` passes, the last one has two."""
    layers = [MODELS[model][1] for model in models_of(style)]
    count = (ROUNDS * sum(layers) - layers[-1]) * passes + layers[-1] * 2
    return count * PASS * STEPS / 1000 / 3600


def main():
    """Print the table, and one cell worked out."""
    parser = flags.Parser(__doc__)
    parser.add_argument("--read", type=float, default=75, help="ms: Qwen3-1.7B reads 256 tokens")
    parser.add_argument("--step", type=float, default=2.92, help="ms: one step of Qwen3-1.7B")
    given = parser.parse_args()
    read, step = given.read, given.step
    names = ["hours", *QUESTIONS, "outer links", "with rollouts"]
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for style in STYLES:
        hours = [asking(style, dataset, read, step) for dataset in QUESTIONS]
        hours += [training(style, 2), training(style, 32)]
        print(f"| {style} | " + " | ".join(f"{one:.2g}" if one < 10 else f"{one:.0f}"
                                          for one in hours) + " |")
    print("\nsequential_light on math500, a batch of 32 texts, in ms:")
    m, words, _ = settings_of("sequential_light", "math500")
    for i, model in enumerate(models_of("sequential_light")):
        reading, one = rates(model, read, step)
        print(f"  {ROUNDS - (i == 2)} x ({reading:.0f} + {m} x {one:.2f})   {model} thinks")
    print(f"  {reading:.0f} + {words} x 2 x {one:.2f}        it reads and writes\n  = "
          f"{seconds('sequential_light', 'math500', read, step):.1f} s, times 16 batches = "
          f"{asking('sequential_light', 'math500', read, step):.2g} hours")


if __name__ == "__main__":
    flags.run(main)

"""Solutions of docs/exercises.md. Each is a function that measures, prints, and checks.

    python docs/solutions.py            all of them, 2 minutes
    python docs/solutions.py 1 5        only exercises 1 and 5
"""
import argparse
import dataclasses
import random
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from link import KINDS, RELEASED, InnerLink  # noqa: E402
from recurse import MAS, load_mas_system  # noqa: E402
from styles import Edge, get_style  # noqa: E402
from support.batches import others  # noqa: E402
from tasks import Example, get_task  # noqa: E402
from tasks.tiny import training_problems  # noqa: E402
from training.warm_start import warm_start  # noqa: E402

EXAMPLES = get_task("tiny").load(100)


def accuracy(mas, rounds=3, m=6, examples=None, change=None):
    """The share of problems that the latent system answers rightly: of `examples`, by default
    EXAMPLES. change: see recurse.CONTROLS."""
    examples = examples or EXAMPLES
    answers = mas.answer([one.question for one in examples], rounds, m, max_new_tokens=32,
                         change=change)
    score = get_task("tiny").score
    return sum(score(*pair).correct for pair in zip(examples, answers)) / len(examples)


def exercise_1(mas):
    """The number of thoughts: the agents' notes have six words."""
    found = {m: accuracy(mas, m=m) for m in (4, 5, 6, 7, 8)}
    print("1. accuracy by m: " + "  ".join(f"{m}: {share:.2f}" for m, share in found.items()))
    return max(found, key=found.get) == 6


def exercise_2(mas):
    """A fourth round, which no link was trained for: nothing is left to do, and nothing breaks."""
    three, four = accuracy(mas, 3), accuracy(mas, 4)
    print(f"2. three rounds {three:.2f}, four rounds {four:.2f}")
    return abs(three - four) < .05


def exercise_3(mas):
    """No scale matching: an inner link whose LayerNorm starts at 1 sends vectors that are too long.

    Six thoughts of the planner, read as words, and what it writes: how often are they the same?"""
    planner, style = mas.agents["planner"], mas.style
    words = style.words_for(style.role("planner"), "math", [])
    questions = [one.question for one in EXAMPLES]
    prompts = planner.tokenize_prompts("", words, {"question": questions})
    with torch.no_grad():
        context = planner.read_prompts(prompts, {})
        written = torch.tensor(planner.write(context, 6))                        # (B, 6)
        found = {}
        for name, gain in (("gain 1", 1.0), ("matched", planner.embedding_rms)):
            torch.manual_seed(0)
            trained, planner.inner = planner.inner, InnerLink(planner.width, gain=gain)
            read = planner.logits(planner.think(context, 6)).argmax(-1)            # (B, 6)
            found[name] = (read == written).float().mean(0)[2:].mean().item()
            planner.inner = trained
    print("3. untrained, thoughts 3 to 6 read as written: "
          + "  ".join(f"{name}: {share:.2f}" for name, share in found.items()))
    return found["matched"] > found["gain 1"]


def with_dictionaries(mas, kind=RELEASED):
    """The system with new outer links of a kind, trained as dictionaries (cell 5 of the lesson)."""
    mas = mas.with_fresh_outer({edge.key: kind for edge in mas.style.edges})
    warm_start(mas, argparse.Namespace(warm_start_steps=300, num_recursive_rounds=3, seed=0,
                                       scale_match=True))
    return mas


def exercise_4(mas):
    """Other kinds of outer links, all trained as dictionaries. There is no difference here: a
    single matrix is enough to translate 44 words."""
    found = {kind: accuracy(with_dictionaries(mas, kind)) for kind in KINDS}
    print("4. accuracy by kind: " + "  ".join(f"{kind}: {found[kind]:.2f}" for kind in KINDS))
    return min(found.values()) > .9


def exercise_5(mas):
    """A role that lies: the solver believes what it hears, so the system falls to chance. The
    critic sends the notes about another problem of the batch."""
    def lie(edge, message, asked):
        return message[others(asked)] if edge.src == "critic" else message       # (B, m, d)

    told, lied = accuracy(mas), accuracy(mas, change=lie)
    print(f"5. honest critic {told:.2f}, lying critic {lied:.2f}")
    return lied < .3 < told


def exercise_6(mas):
    """A new style of the same agents: the planner speaks to the solver, and nobody criticises."""
    tiny = get_style("tiny")
    planner, solver = tiny.role("planner"), tiny.role("solver")
    pair = dataclasses.replace(
        tiny, name="pair", repo="", edges=(Edge("pair_12", "planner", "solver"),
                                           Edge("pair_21", "solver", "planner")),
        roles=(planner, dataclasses.replace(solver, prompt=solver.prompt.replace("critic",
                                                                                 "planner"))))
    system = with_dictionaries(MAS(pair, mas.agents, None))
    found = [accuracy(system, rounds) for rounds in (1, 2, 3, 4)]
    print("6. planner and solver alone, 1 to 4 rounds: " + " ".join(f"{a:.2f}" for a in found))
    return found[0] < found[1] < found[2] < found[3]


def exercise_7(mas):
    """A task of our own: chains of a given length, made here and scored like the tiny task."""
    problems, found = training_problems(random.Random(0)), {}
    for length in (2, 4, 8, 12):
        chains = islice((one for one in problems if len(one.operations) == length),
                        len(EXAMPLES) // 2)
        examples = [Example("", one.question, str(one.values[-1]), "math") for one in chains]
        found[length] = [accuracy(mas, rounds, examples=examples) for rounds in (1, 2, 3)]
    for length, shares in found.items():
        print(f"7. chains of {length:2d} events, 1 to 3 rounds: "
              + " ".join(f"{share:.2f}" for share in shares))
    return found[4][0] > .9 and found[8][0] < .4 < found[8][1] and found[12][2] > .9


SOLUTIONS = (exercise_1, exercise_2, exercise_3, exercise_4, exercise_5, exercise_6, exercise_7)

if __name__ == "__main__":
    system = load_mas_system("tiny")
    chosen = {str(number): one for number, one in enumerate(SOLUTIONS, start=1)}
    as_expected = [chosen[number](system) for number in sys.argv[1:] or chosen]
    sys.exit(0 if all(as_expected) else 1)

"""Solutions of docs/exercises.md. Each is a function that measures, prints, and checks.

    python docs/solutions.py            all of them, under 4 minutes
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
import torch.nn.functional as F  # noqa: E402

from evaluation.in_words import readability  # noqa: E402
from link import KINDS, RELEASED, InnerLink, OuterLink  # noqa: E402
from recurse import MAS, load_mas_system  # noqa: E402
from styles import Edge, get_style  # noqa: E402
from support.batches import others  # noqa: E402
from tasks import Example, get_task  # noqa: E402
from tasks.tiny import (role_text, test_problems, train_rows,  # noqa: E402
                        training_problems)
from training.rows import read_role_texts, role_texts_of  # noqa: E402
from training.warm_start import warm_start  # noqa: E402

EXAMPLES = get_task("tiny").load(100)


def accuracy(mas, rounds=3, m=6, examples=None, change=None, method="latent"):
    """The share of problems that the system answers rightly: of `examples`, by default EXAMPLES.
    change: see recurse.CONTROLS."""
    examples = examples or EXAMPLES
    answers = mas.answer([one.question for one in examples], rounds, m, method=method,
                         max_new_tokens=32, batch_size=100, change=change)
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


def with_dictionaries(mas, kind=RELEASED, leave_out=()):
    """The system with new outer links of a kind, trained as dictionaries (cell 5 of the lesson) of
    all words but those to leave out."""
    mas = mas.with_fresh_outer({edge.key: kind for edge in mas.style.edges})
    warm_start(mas, argparse.Namespace(warm_start_steps=300, num_recursive_rounds=3, seed=0,
                                       scale_match=True), leave_out)
    return mas


def exercise_4(mas):
    """Other kinds of outer links, all trained as dictionaries. All kinds do equally well here:
    a single matrix is enough to translate 44 words."""
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


# ---- 6 and 8: where an inner link holds --------------------------------------------------------

def shares(found):
    """Numbers as text."""
    return " ".join(f"{share:.2f}" for share in found)


def planner_and_solver(mas):
    """(the style without a critic, its system with dictionaries as outer links)."""
    tiny = get_style("tiny")
    planner, solver = tiny.role("planner"), tiny.role("solver")
    pair = dataclasses.replace(
        tiny, name="pair", repo="", edges=(Edge("pair_12", "planner", "solver"),
                                           Edge("pair_21", "solver", "planner")),
        roles=(planner, dataclasses.replace(solver, prompt=solver.prompt.replace("critic",
                                                                                 "planner"))))
    return pair, with_dictionaries(MAS(pair, mas.agents, None))


def pair_rows(count, seed):
    """Rows that fit the pair: the planner does two events in a round, and the solver the third."""
    problems = islice(training_problems(random.Random(seed)), count)
    return [{"question": problem.question,
             "plan": [role_text(problem, "planner", 3 * i) for i in range(4)],
             "answer": [role_text(problem, "solver", 3 * i + 2) for i in range(4)]}
            for problem in problems]


def learn_inner(agent, texts, own=False, steps=800):
    """A new inner link for an agent, trained along RoleTexts as in cell 3 of the lesson.

    own: along what the agent itself writes for these prompts, and not along the rows' texts."""
    torch.manual_seed(0)
    with torch.no_grad():
        context = read_role_texts(agent, texts)
        tokens = agent.write(context, 6) if own else agent.tokenize([one.text for one in texts])
        along = agent.follow(context, [one[:-1] for one in tokens])               # (B, 6, d)
    states = torch.cat([h[:len(one)] for h, one in zip(along, tokens)])            # (n, d)
    words = torch.tensor([word for one in tokens for word in one])                 # (n,)
    link = InnerLink(agent.width, gain=agent.embedding_rms)
    optimizer = torch.optim.AdamW(link.parameters(), lr=4e-3)
    for _ in range(steps):
        pick = torch.randint(len(words), (256,))
        wanted = agent.embedding(words[pick])
        loss = 1 - F.cosine_similarity(link(states[pick]), wanted, dim=-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return link.requires_grad_(False)


def pair_with(mas, rows, own=False):
    """Accuracies of the pair in 1 to 4 rounds, the solver's inner link trained along these rows."""
    pair, system = planner_and_solver(mas)
    solver = mas.agents["solver"]
    shipped, texts = solver.inner, role_texts_of(pair, pair.role("solver"), rows, "math")
    solver.inner = learn_inner(solver, texts, own)
    try:
        return [accuracy(system, rounds) for rounds in (1, 2, 3, 4)]
    finally:
        solver.inner = shipped


def exercise_6(mas):
    """A new style: planner and solver alone. The solver's inner link fails in round 1, in places
    where it was not trained. Trained along fitting rows, it holds."""
    pair, system = planner_and_solver(mas)
    rounds = (1, 2, 3, 4)
    words = [accuracy(system, R, method="text") for R in rounds]
    before = [accuracy(system, R) for R in rounds]
    print(f"6. planner and solver alone, 1 to 4 rounds: in words {shares(words)}, in latents "
          f"{shares(before)}")
    # Whose fault is it? The solver's thoughts, where the planner's words stand in its prompt.
    rows = [row for row in pair_rows(200, seed=1) if " s3 " in row["question"]]
    texts = role_texts_of(pair, pair.role("solver"), rows, "math")           # 4 rounds of each row
    for i in (0, 1):
        found, _ = readability(mas.agents["solver"], texts[i::4], 6, 200)
        print(f"   round {i + 1}, the solver's thoughts that read as written: {shares(found)}")
    after = pair_with(mas, pair_rows(300, seed=0))
    print(f"   its inner link trained along fitting rows: {shares(after)}")
    return before[-1] < .7 < .95 < min(words[-1], after[-1])


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


def exercise_8(mas):
    """Whose words? The same training along rows that do not fit: first along their words, then
    along the solver's own."""
    gold, own = (pair_with(mas, train_rows(300, seed=0), own) for own in (False, True))
    print(f"8. the pair in 1 to 4 rounds, trained along words of the trio: {shares(gold)}, along "
          f"its own: {shares(own)}")
    return gold[-1] < .5 < .95 < own[-1]


# ---- 9 and 10: an outer link from nothing ------------------------------------------------------

def learn_outer(mas, latents="rollout", steps=300):
    """The link from planner to critic, trained from nothing by the critic's own loss.

    The planner hears nobody in round 1. So what it sends does not depend on the link, and is
    computed once. latents: what is sent in training, see the head of train_outer.py. Returns how
    often the critic says the right thing after 0, 100, .. steps, for 100 other problems and true
    rollouts."""
    planner, critic, count = mas.agents["planner"], mas.agents["critic"], 900
    rows = train_rows(count + 100, seed=0)
    planner_texts, critic_texts = (role_texts_of(mas.style, mas.style.role(name), rows, "math")[::4]
                                   for name in ("planner", "critic"))               # round 1
    with torch.no_grad():
        context = read_role_texts(planner, planner_texts)
        said = planner.tokenize([one.text for one in planner_texts])
        sent = {"rollout": lambda: planner.think(context, 6),
                "teacher": lambda: planner.follow(context, said)[:, 1:],
                "teacher_aligned": lambda: planner.follow(context, said)[:, :-1]}
        H, true = planner.inner(sent[latents]()), planner.inner(planner.think(context, 6))
    asked = mas.style.words_for(mas.style.role("critic"), "math", ["planner"])
    prompts = critic.tokenize_prompts("", asked, {"question": [row["question"] for row in rows]},
                                      slots=("planner",))
    gold = critic.tokenize([one.text for one in critic_texts])
    torch.manual_seed(0)
    link = OuterLink(planner.width, critic.width, gain=critic.embedding_rms)
    optimizer, found = torch.optim.AdamW(link.parameters(), lr=4e-3), []

    def read(sent, numbers):
        """The critic's Context of these problems, with what the link makes of the messages sent."""
        return critic.read(*critic.embed([prompts[i] for i in numbers],
                                         {"planner": link(sent[numbers])}))

    for step in range(steps + 1):
        if step % 100 == 0:
            with torch.no_grad():
                others = list(range(count, count + 100))
                written = critic.write(read(true, others), 6)
            found.append(sum(one == gold[i] for one, i in zip(written, others)) / len(others))
        numbers = torch.randint(count, (32,)).tolist()
        losses = critic.answer_loss(read(H, numbers), [gold[i] for i in numbers])
        optimizer.zero_grad()
        torch.cat(list(losses)).mean().backward()
        torch.nn.utils.clip_grad_norm_(link.parameters(), 0.3)
        optimizer.step()
    return found


def exercise_9(mas):
    """Without a warm start, until it learns: one link, and a loss right behind it."""
    found = learn_outer(mas)
    print(f"9. the critic is right after 0, 100, .. steps from nothing: {shares(found)}")
    return found[0] < .2 and found[-1] > .9


def exercise_10(mas):
    """Teacher states or rollouts: what is sent in training has to be what is sent later."""
    found = {latents: learn_outer(mas, latents, steps=200)[-1]
             for latents in ("rollout", "teacher_aligned", "teacher")}
    print("10. after 200 steps, asked with rollouts: "
          + "  ".join(f"{latents}: {share:.2f}" for latents, share in found.items()))
    return found["teacher"] + .2 < min(found["rollout"], found["teacher_aligned"])


# ---- 11 and 12 ---------------------------------------------------------------------------------

def exercise_11(mas):
    """A word that no link has seen: where latents fail and words do not."""
    system = with_dictionaries(mas, leave_out=("7",))
    passes = [7 in problem.values[1:-1] for problem, _ in zip(test_problems(), EXAMPLES)]
    found = {}
    for seven in (True, False):
        examples = [one for one, passed in zip(EXAMPLES, passes) if passed == seven]
        found[seven] = [accuracy(system, examples=examples, method=method)
                        for method in ("latent", "text")]
        print(f"11. {len(examples)} chains {'through' if seven else 'without'} a 7: latent, text "
              + shares(found[seven]))
    return found[True][0] < .7 < .9 < min(found[True][1], *found[False])


def exercise_12(mas):
    """A file of a task: docs/after_four.py. One round is right about the counter after four events,
    and further rounds are wrong about it, because they go on."""
    examples = get_task(Path(__file__).with_name("after_four.py")).load(len(EXAMPLES))
    found = [accuracy(mas, rounds, examples=examples) for rounds in (1, 2, 3)]
    print(f"12. the counter after four events, 1 to 3 rounds: {shares(found)}")
    return found[0] > .95 and found[2] < .6


SOLUTIONS = (exercise_1, exercise_2, exercise_3, exercise_4, exercise_5, exercise_6, exercise_7,
             exercise_8, exercise_9, exercise_10, exercise_11, exercise_12)

if __name__ == "__main__":
    system = load_mas_system("tiny")
    chosen = {str(number): one for number, one in enumerate(SOLUTIONS, start=1)}
    as_expected = [chosen[number](system) for number in sys.argv[1:] or chosen]
    sys.exit(0 if all(as_expected) else 1)

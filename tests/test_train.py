"""Training: its gradients, steps and schedules = by hand, resumed = uninterrupted, what goes wrong.

The loss is compared with a plain unrolling by reference.py, in float64. The loop of both scripts
is compared with AdamW written out below, step by step: weights and log.
"""
import argparse
import copy
import dataclasses
import itertools
import json
import math
import os
import shutil
import signal

import pytest
import torch
import torch.nn.functional as F
from helpers import PROJECT, lines_of, links_of, log_of, outer_args, outer_gradients, refuses
from safetensors.torch import load_file

import reference
import train_inner
import train_outer
from checkpoints import load_inner
from link import InnerLink, contrast, word_losses
from styles.tiny import tiny as tiny_style
from support.batches import out_of_memory
from tasks import tiny
from training import rows as data
from training import warm_start
from training.loop import micro_batches, number_of_steps

ROWS = tiny.train_rows(3, 7)
SHORT = ["--num_samples", 12, "--batch_size", 2, "--latent_length", 2, "--log_every", 1]
FLAGS = {train_inner: [*SHORT, "--held_out", 2],
         train_outer: [*SHORT, "--num_recursive_rounds", 1, "--warm_start_steps", 0,
                       "--eval_samples", 0]}
LOOPS = lines_of("training_loops.jsonl")


@pytest.fixture
def train(run, tmp_path):
    """train(script, flags): a short training, and its log. With names=.., it must end with one line
    of error that names this. Flags may be keywords too."""
    def trained(script, *flags, into=tmp_path, names=None, **more):
        flags += tuple(word for name, value in more.items() for word in (f"--{name}", value))
        code, _, errors = run(script, *FLAGS[script], *flags, "--save_dir", into)
        if names is None:
            assert code == 0, errors
            return log_of(into)
        assert code == 2 and len(errors) == 1 and str(names) in errors[0]
    return trained


def assert_same(found, wanted):
    assert (found - wanted).norm() <= 1e-9 * wanted.norm()


# ---- the outer loss -----------------------------------------------------------------------------

def plain_losses(mas, row, rounds, m, loss="answer"):
    """{(role, round): loss of each token (n,)} of the turns of a row that have heard somebody, by
    reference.py. The prompt is the tiny style's, spelled out. distill: the same prompt with a text
    of the row in it gives q, and the loss is sum_v q(v) (log q(v) - log p(v)) at each token."""
    turns, losses = [], {}

    def prompt(role, heard):
        said = list(heard.values()) or ["none"]
        parts = [f"<bos> <|user|> {row['question']} <|notes|>", *said, "<|assistant|>"]
        turns.append((role, 1 + len(turns) // 3, parts, bool(heard)))
        return parts

    reference.recurse(mas, prompt, rounds, m)
    for role, round, parts, has_heard in turns:
        if has_heard:
            agent, text = mas.agents[role.name], row[role.target[0]][round - 1]
            gold = torch.tensor(agent.tokenizer.convert_tokens_to_ids(text.split()))
            p = plain_logits(agent, parts, gold)
            losses[role.name, round] = F.cross_entropy(p, gold, reduction="none")
            if loss == "distill":
                who, when = {"planner": ("answer", round - 1), "critic": ("plan", round),
                             "solver": ("refined_plan", round)}[role.name]
                heard = row[who][min(when, len(row[who])) - 1]
                q = plain_logits(agent, [parts[0], heard, parts[2]], gold).softmax(-1).detach()
                losses[role.name, round] = (q * (q.log() - p.log_softmax(-1))).sum(-1)
    return losses


def plain_logits(agent, parts, gold):
    """The library's logits (n, V) at each token of a gold text (n,) after the parts of a prompt."""
    x = torch.cat([reference.embed(agent, parts), agent.embedding(gold[:-1])])
    return agent.model(inputs_embeds=x[None]).logits[0, -len(gold):]


def plain_outer_loss(mas, rows, rounds, args):
    """loss = (CE_final + w sum_k CE_k) / (1 + w K), and with --supervise_final_only 0 the mean of
    the earlier answers at .1. All cross-entropies are means over tokens."""
    found = [plain_losses(mas, row, rounds, args.latent_length, args.loss) for row in rows]
    means = {turn: torch.cat([losses[turn] for losses in found]).mean() for turn in found[0]}
    final = means.pop(("solver", rounds))
    early = [] if args.supervise_final_only else [
        loss for (role, _), loss in means.items() if role == "solver"]
    w = args.role_loss_weight
    loss = (final + w * sum(means.values())) / (1 + w * len(means))
    return loss + (0.1 * sum(early) / len(early) if early else 0.0)


@pytest.mark.parametrize("rerun", [0, 1])
@pytest.mark.parametrize("rounds, changes", [
    (1, {}), (2, {}), (2, {"role_loss_weight": 0.5}), (2, {"supervise_final_only": 0}),
    (3, {"role_loss_weight": 0.5, "supervise_final_only": 0}), (1, {"loss": "distill"}),
    (2, {"loss": "distill", "role_loss_weight": 0.5, "supervise_final_only": 0})])
def test_outer_loss_and_gradients_equal_the_plain_unrolling(rounds, changes, rerun, double):
    """Rows with prompts and answers of unequal length. --gradient_checkpointing changes nothing."""
    short = [text.split(" ", 3)[0] for text in ROWS[1]["answer"]]
    rows = [ROWS[0], {**ROWS[1], "answer": short}]
    args = outer_args(gradient_checkpointing=rerun, **changes)
    loss, gradients = outer_gradients(double, rows, rounds, args)
    double.outer.requires_grad_(True).zero_grad()
    plain = plain_outer_loss(double, rows, rounds, args)
    plain.backward()
    double.outer.requires_grad_(False)
    assert loss == pytest.approx(plain.item(), rel=1e-9)
    for name, p in double.outer.named_parameters():
        assert (name in gradients) == (p.grad is not None)
        if name in gradients:
            assert_same(gradients[name], p.grad)
    # The feedback link is not used in a single round.
    assert any(name.startswith("outer_31") for name in gradients) == (rounds > 1)
    with torch.no_grad():
        outcome = train_outer.outer_loss(double, rows, rounds, outer_args())
    assert outcome.loss == outcome.final and outcome.tokens == 6 + 1


@pytest.mark.parametrize("latents, wanted", [("teacher", slice(-6, -2)),
                                             ("teacher_aligned", slice(-7, -4))])
def test_teacher_latents_are_the_states_at_and_before_the_gold_tokens(latents, wanted, double):
    """Against the hidden states of one plain run over prompt and gold text, of six tokens."""
    planner, row = double.agents["planner"], ROWS[0]
    text = f"<bos> <|user|> {row['question']} <|notes|> none <|assistant|> {row['plan'][0]}"
    states = reference.hidden_states(planner, reference.embed(planner, [text]))[wanted]
    double.outer.requires_grad_(True)
    args = outer_args(latents=latents, log_gradients=1)
    message, = train_outer.outer_loss(double, [row], 1, args).sent[1, "outer_12"]
    double.outer.requires_grad_(False)
    assert_same(message, double.outer["outer_12"](planner.inner(states)))


# ---- the inner loss, and the warm start ---------------------------------------------------------

def test_the_contrast_is_its_equation(shipped):
    """Among the batch's words, each of them once. One token comes twice."""
    embedding, link = shipped.agents["critic"].embedding, InnerLink(80)
    got, tokens = link(torch.randn(5, 80)), torch.tensor([3, 8, 20, 8, 30])
    surely = contrast(got, tokens, embedding)
    words = embedding(torch.tensor([3, 8, 20, 30]))
    near = F.cosine_similarity(got[:, None], words, dim=-1) / 0.05                  # (5, 4)
    wanted = F.cross_entropy(near, torch.tensor([0, 1, 2, 1, 3]))
    assert surely.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_shared_tokens_match_strings_not_ids():
    def agent(words):
        ids = {word: i for i, word in enumerate(words.split())}
        return argparse.Namespace(tokenizer=argparse.Namespace(get_vocab=lambda: ids))

    assert warm_start.shared_tokens(agent("a b c"), agent("c x a")) == [(0, 2), (2, 0)]
    # Both our words: with a blank in front, and without.
    both = agent("Ġthe the"), agent("x the ▁the")
    assert warm_start.shared_tokens(*both) == [(0, 2), (1, 1)]


def test_the_warm_start_hears_noise_and_becomes_a_dictionary(shipped, capsys):
    """A link hears embeddings with noise of .3 of their size, learns cosine and contrast, and the
    last step's loss is printed. Then a word comes out nearest to the same word of the receiver."""
    mas, seen = shipped.with_fresh_outer(seed=0), []
    unheard = mas.outer["outer_31"].proj1.weight.clone()             # nobody hears its sender
    hook = mas.outer["outer_12"].register_forward_hook(lambda _, x, y: seen.append((x[0], y)))
    args = argparse.Namespace(num_recursive_rounds=1, seed=0, warm_start_steps=150, scale_match=1)
    warm_start.warm_start(mas, args, leave_out=("flip", "7"))
    hook.remove()
    planner, critic = mas.agents["planner"], mas.agents["critic"]
    pairs = torch.tensor(warm_start.shared_tokens(planner, critic))                 # (n, 2)
    words = warm_start.as_thoughts(planner, pairs[:, 0], 1)                         # (n, d)
    x, got = seen[149]
    heard = torch.cdist(x, words).argmin(1)                     # the word that each input is near
    noise, tokens = x - words[heard], pairs[heard, 1]
    assert noise.pow(2).mean().sqrt() == pytest.approx(0.3 * planner.embedding_rms, rel=0.1)
    left_out = {planner.tokenizer.convert_tokens_to_ids(word) for word in ("flip", "7")}
    assert set(pairs[:, 0].tolist()) - set(pairs[heard, 0].tolist()) == left_out
    loss = (word_losses(got, tokens, critic.embedding)[0]
            + contrast(got, tokens, critic.embedding)).item()
    assert f"outer_12: {len(pairs)} words in both vocabularies, loss {loss:.3f}" in (
        capsys.readouterr().out)
    with torch.no_grad():
        got = mas.outer["outer_12"](words)
        nearest = warm_start.nearest_tokens(critic, got)
        plain = F.cosine_similarity(got[:, None], critic.embedding.weight[None], dim=-1).argmax(1)
    assert torch.equal(nearest, plain) and (nearest == pairs[:, 1]).float().mean() > 0.9
    assert torch.equal(mas.outer["outer_31"].proj1.weight, unheard)


def plain_states(agent, one):
    """(states (n, d), embeddings (n, d)) along the gold text of a RoleText, by reference.py."""
    notes, = one.heard.values() or ["none"]
    prompt = f"<bos> <|user|> {one.question} <|notes|> {notes} <|assistant|>"
    gold = reference.embed(agent, [one.text])
    with torch.no_grad():
        embeds = torch.cat([reference.embed(agent, [prompt]), gold])
        return reference.hidden_states(agent, embeds)[-len(gold) - 1:-1], gold


# ---- the loop of both scripts -------------------------------------------------------------------

def rate(i, args, lr):
    """The learning rate of update i = 0, 1, ..: a warm-up, then a cosine down to 0, or constant."""
    if i < args.warmup_steps:
        return lr * i / args.warmup_steps
    done = (i - args.warmup_steps) / (args.max_steps - args.warmup_steps)
    return lr if args.lr_scheduler_type == "constant" else lr * (1 + math.cos(math.pi * done)) / 2


def train_by_hand(weights, token_losses, items, args, lr):
    """All steps, by AdamW's equations: the log. token_losses(item) -> (n,).

        m = .9 m + .1 g      v = .95 v + .05 g^2      m^ = m / (1 - .9^i)      v^ = v / (1 - .95^i)
        w = w - lr (m^ / (sqrt(v^) + 1e-8) + weight_decay w)                       i = 1, 2, .."""
    moments, log = {name: (0.0, 0.0) for name in weights}, []
    for i in range(1, args.max_steps + 1):
        rows = sum(micro_batches(items, i - 1, args), [])
        loss = torch.cat([token_losses(row) for row in rows]).mean()
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        gradients = {name: g for name, g in zip(weights, gradients) if g is not None}
        norm = torch.cat([g.view(-1) for g in gradients.values()]).norm().item()
        for name, g in gradients.items():
            limit = args.max_grad_norm or math.inf
            g, (m, v) = g * min(1.0, limit / (norm + 1e-6)), moments[name]
            moments[name] = m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            update = m / (1 - 0.9 ** i) / ((v / (1 - 0.95 ** i)).sqrt() + 1e-8)
            w = weights[name].data
            w -= rate(i - 1, args, lr) * (update + args.weight_decay * w)
        log.append({"step": i, "loss": loss.item(), "grad_norm": norm, "lr": rate(i, args, lr)})
    return log


@pytest.fixture
def uneven(tmp_path):
    """Rows whose texts have three to six words, in a file."""
    rows = tiny.train_rows(7, 3)
    for i, row in enumerate(rows):
        for role in tiny_style.roles:
            row[role.target[0]] = [" ".join(text.split()[:3 + i % 4])
                                   for text in row[role.target[0]]]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return rows


def assert_trained_alike(links, plain_links, start, log, by_hand):
    """The links have moved alike from where they started, and the log says the same."""
    plain_links, start = plain_links.state_dict(), start.state_dict()
    for name, value in links.state_dict().items():
        assert_same(value - start[name], plain_links[name] - start[name])
    for line, plain in zip(log, by_hand, strict=True):
        assert {name: line[name] for name in plain} == pytest.approx(plain, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("loop", LOOPS)
def test_outer_training_is_a_loop_by_hand(loop, uneven, double, tmp_path, train, monkeypatch):
    """The feedback link, which one round does not use, stays as it was."""
    trained, plain = (dataclasses.replace(double, outer=copy.deepcopy(double.outer))
                      for _ in range(2))
    monkeypatch.setattr(train_outer, "new_system", lambda *_: trained)
    log = train(train_outer, **loop, dataset_name=tmp_path / "rows.json", role_loss_weight=0,
                outer_lr=1e-3)
    weights = dict(plain.outer.requires_grad_(True).named_parameters())
    by_hand = train_by_hand(weights, lambda row: plain_losses(plain, row, 1, 2)["solver", 1],
                            uneven, argparse.Namespace(**loop), 1e-3)
    assert_trained_alike(trained.outer, plain.outer, double.outer, log, by_hand)
    for name, value in trained.outer["outer_31"].state_dict().items():
        assert torch.equal(value, double.outer["outer_31"].state_dict()[name])


@pytest.mark.parametrize("who, loop", [*zip(("planner", "critic"), LOOPS)])
def test_inner_training_is_a_loop_by_hand(who, loop, uneven, double, tmp_path, train, monkeypatch):
    """The states come from a plain run. A critic's prompt holds the planner's text."""
    agent, role = double.agents[who], tiny_style.role(who)
    trained, plain, start = (copy.deepcopy(agent.inner).requires_grad_(True) for _ in range(3))
    monkeypatch.setattr(train_inner, "frozen_agent", lambda *_: copy.copy(agent))
    monkeypatch.setattr(train_inner, "new_link", lambda *_: trained)
    log = train(train_inner, **loop, dataset_name=tmp_path / "rows.json", mas_role=who,
                adapter_mse_weight=30, adapter_lr=1e-3)

    def token_losses(one):
        states, gold = plain_states(agent, one)
        got = plain(states)
        return 1 - F.cosine_similarity(got, gold, dim=-1) + 30 * (got - gold).pow(2).mean(-1)

    texts = data.role_texts_of(tiny_style, role, uneven, "math")[2:]         # two are held out
    assert {one.kind for one in texts} == {"math"}
    by_hand = train_by_hand(dict(plain.named_parameters()), token_losses, texts,
                            argparse.Namespace(**loop), 1e-3)
    assert_trained_alike(trained, plain, start, log, by_hand)
    assert all(line["loss"] == pytest.approx(line["cosine"] + 30 * line["mse"]) for line in log)
    shares = json.loads((tmp_path / "readability.json").read_text())
    assert shares["before"][0] == shares["after"][0] == 1.0     # no link comes before thought 1


def test_the_contrast_is_a_part_of_the_inner_loss(double):
    """Of the micro-batch's words, each once, and with its weight. A weight of 0 leaves it out."""
    agent, words = copy.copy(double.agents["planner"]), torch.tensor([7, 9, 7, 30])
    agent.inner, h = InnerLink(96).double(), torch.randn(4, 96).double()
    args = argparse.Namespace(adapter_cos_weight=1.0, adapter_mse_weight=0.0)
    pairs, got = [(h[:1], words[:1]), (h[1:], words[1:])], agent.inner(h)
    for weight in (0.5, 0.0):
        args.adapter_contrast_weight = weight
        loss, parts = train_inner.inner_loss(agent, pairs, args)
        near = F.cosine_similarity(got[:, None], agent.embedding(torch.tensor([7, 9, 30])), dim=-1)
        wanted = F.cross_entropy(near / 0.05, torch.tensor([0, 1, 0, 2]))
        assert_same(loss, (1 - near[range(4), [0, 1, 0, 2]]).mean() + weight * wanted)
        assert ("contrast" in parts) == (weight > 0)


def test_new_links_begin_at_the_length_of_embeddings(shipped, tmp_path, train):
    """Drawn by the seed; their last gain is the embeddings' RMS (link.py says why)."""
    agent = shipped.agents["planner"]
    for match, gain in ((1, agent.embedding_rms), (0, 1.0)):
        train(train_inner, "--max_steps", 1, "--adapter_lr", 0, "--scale_match", match, "--seed", 5)
        torch.manual_seed(5)
        for name, value in InnerLink(96, gain=gain).state_dict().items():
            assert torch.equal(load_inner(tmp_path, 96).state_dict()[name], value)


def counted(monkeypatch, script, before=lambda call: None):
    """The rows of each call of a script's loss. before(1), before(2), .. run before each."""
    name = "outer_loss" if script is train_outer else "inner_loss"
    right, calls = getattr(script, name), []

    def loss(system, rows, *more):
        calls.append(rows)
        before(len(calls))
        return right(system, rows, *more)

    monkeypatch.setattr(script, name, loss)
    return calls


def scripted_losses(monkeypatch, *values):
    """train_outer's loss is a list of factors, one a micro-batch. "flat": infinite, its gradient 0.
    "steep": 0, its gradient infinite. Returns the (rounds, weights) of each call."""
    seen, values = [], list(values)

    def loss(mas, rows, rounds, args):
        link = mas.outer["outer_12"].proj1
        seen.append((rounds, link.weight.detach().clone()))
        value = values.pop(0)
        total = ((link.weight * 0).sum() + math.inf if value == "flat" else
                 (link.weight * 0).sum().sqrt() if value == "steep" else
                 ((link.weight - 1) ** 2).sum() * value)
        return train_outer.Outcome(total, total, 6, {})

    monkeypatch.setattr(train_outer, "outer_loss", loss)
    return seen


@pytest.mark.parametrize("script", FLAGS)
def test_a_step_takes_the_rows_that_the_flags_say(script, train, monkeypatch):
    """Two epochs of micro-batches of 3 rows, two for each step, and logged every second step."""
    calls = counted(monkeypatch, script)
    log = train(script, "--batch_size", 3, "--grad_accum_steps", 2, "--max_steps", 0,
                "--num_train_epochs", 2, "--log_every", 2)
    steps = math.ceil(2 * len({id(row) for rows in calls for row in rows}) / 6)
    assert [len(rows) for rows in calls] == [3] * 2 * steps
    assert [line["step"] for line in log] == [*range(2, steps, 2), steps]


def test_all_micro_batches_of_a_step_have_the_same_rounds(train, monkeypatch):
    """With --random_rounds 1 .. R are drawn, each for a whole step. The log has their number."""
    seen = scripted_losses(monkeypatch, *[1.0] * 20)
    log = train(train_outer, "--random_rounds", 1, "--num_recursive_rounds", 3,
                "--grad_accum_steps", 2, "--batch_size", 1, "--max_steps", 10)
    drawn = [rounds for rounds, _ in seen]
    assert set(drawn) == {1, 2, 3} and drawn[0::2] == drawn[1::2]
    assert [line["rounds"] for line in log] == pytest.approx(drawn[0::2])


def test_a_last_role_that_has_heard_nobody_trains_nothing(tmp_path, train):
    """In a single round, a solver that hears itself alone uses no link: the loss has no graph."""
    shutil.copy(PROJECT / "tests/data/hears_itself.txt", tmp_path / "hears_itself.py")
    log = train(train_outer, style=tmp_path / "hears_itself.py", max_steps=2, role_loss_weight=0)
    assert [(line["grad_norm"], line["skipped"]) for line in log] == [(0, 0)] * 2
    assert all(line["loss"] > 0 for line in log)


def test_batches_cover_every_row_once_an_epoch(monkeypatch):
    """Two ranks together take the rows that one process takes with the batch of both."""
    def drawn(ranks, seed=3):
        args = argparse.Namespace(batch_size=2, grad_accum_steps=2 // ranks, seed=seed,
                                  max_steps=0, num_train_epochs=3)
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        assert number_of_steps(args, 10) == 8                    # 30 rows, 4 in each step
        order = {}
        for rank, step in itertools.product(range(ranks), range(5)):
            monkeypatch.setenv("RANK", str(rank))
            batches = micro_batches(list(range(10)), step, args)
            assert [len(batch) for batch in batches] == [2] * args.grad_accum_steps
            order |= {4 * step + ranks * i + rank: row for i, row in enumerate(sum(batches, []))}
        return [order[i] for i in range(20)]

    alone = drawn(1)
    assert sorted(alone[:10]) == sorted(alone[10:]) == list(range(10)) and alone[:10] != alone[10:]
    assert drawn(2) == alone != drawn(1, seed=4)


# ---- stopped, and gone on with ------------------------------------------------------------------

@pytest.mark.parametrize("script, flags", [
    (train_outer, ["--warm_start_steps", 2, "--max_steps", 4, "--save_steps", 2]),
    (train_inner, ["--max_steps", 6, "--save_steps", 3])])
def test_a_resumed_run_equals_an_uninterrupted_one(script, flags, tmp_path, train, monkeypatch):
    rows, whole, halves = tiny.train_rows(12, 3), tmp_path / "whole", tmp_path / "halves"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = [script, *flags, "--grad_accum_steps", 2, "--dataset_name", tmp_path / "rows.json"]
    calls = counted(monkeypatch, script)
    train(*flags, into=whole)
    last = len(calls)

    def kill(call):
        if call == last:                                  # of the last step, which is not saved
            raise BaseException("killed without any cleaning up")

    with monkeypatch.context() as broken, pytest.raises(BaseException, match="killed"):
        counted(broken, script, before=kill)
        train(*flags, into=halves)
    train(*flags, "--resume", into=halves)
    assert links_of(whole) == links_of(halves)
    for name in ("log.jsonl", *["readability.json"] * (script is train_inner)):
        assert (whole / name).read_text() == (halves / name).read_text()
    assert not list(tmp_path.rglob("hidden_states*")), "the mapped file is left behind"
    (tmp_path / "rows.json").write_text(json.dumps(rows[1:] + rows[:1]))
    train(*flags, "--resume", into=whole, names="data")


def test_no_run_goes_on_from_a_state_that_is_not_its_own(tmp_path, train):
    """With other flags, in another folder, or by the other script."""
    mine, new, flags = tmp_path / "mine", tmp_path / "new", ["--max_steps", 1, "--resume"]
    train(train_outer, *flags[:2], into=mine)
    train(train_outer, *flags, "--outer_lr", 1e-5, into=mine, names="outer_lr")
    train(train_outer, *flags, into=new, names=new)
    train(train_inner, *flags, into=mine, names=mine)


def test_a_run_that_is_told_to_stop_saves_first(tmp_path, run, train, monkeypatch):
    """Ctrl-C in the middle of step 2 of 3, where nothing was saved yet; the rest gives the same."""
    flags = [train_outer, "--max_steps", 3, "--save_steps", 0]
    numbers = [signal.SIGINT, signal.SIGTERM]
    before = [signal.getsignal(one) for one in numbers]
    train(*flags, into=tmp_path / "whole")
    for number in numbers:
        halves = tmp_path / number.name
        with monkeypatch.context() as told:
            counted(told, train_outer, lambda call: call == 2 and os.kill(os.getpid(), number))
            assert run(*flags, *FLAGS[train_outer], "--save_dir", halves)[0] == 130
        assert before == [signal.getsignal(one) for one in numbers]
        assert torch.load(halves / "state.pt", weights_only=True)["done"] == 2
        train(*flags, "--resume", into=halves)
        assert links_of(tmp_path / "whole") == links_of(halves)


# ---- what goes wrong ----------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_bad_loss_skips_the_step_and_ten_in_a_row_stop(dtype, tmp_path, train, monkeypatch):
    """An infinite loss may have a gradient of 0, where logits are clipped. In float16 the scaler's
    factor becomes smaller after a bad gradient, and changes nothing that is learnt."""
    bad = [math.nan] * 9 + [1.0, "steep", math.inf, "flat", 1.0] + [math.nan] * 10
    seen = scripted_losses(monkeypatch, *bad, 1.0)
    flags = [train_outer, "--save_steps", 1, "--warmup_steps", 0]
    train(*flags, "--max_steps", 30, "--dtype", dtype, names="learning rate")
    assert len(seen) == len(bad), "ten in a row end the run, and nine do not"
    assert not list(tmp_path.glob("outer_*")), "links of a run that failed"
    weights = [one for _, one in seen]
    moved = [not torch.equal(a, b) for a, b in zip(weights, weights[1:])]
    assert [i for i, one in enumerate(moved) if one] == [9, 13]
    log = log_of(tmp_path)
    assert [line["skipped"] for line in log] == [*range(1, 10), 9, 10, 11, 12, 12, *range(13, 23)]
    assert [line["loss"] is None for line in log] == [one not in (1.0, "steep") for one in bad]
    # The schedule counts the updates, and not the steps that were skipped.
    rates = [rate(sum(moved[:i + 1]), argparse.Namespace(
        warmup_steps=0, max_steps=30, lr_scheduler_type="cosine"), 1e-3) for i in range(len(bad))]
    assert [line["lr"] for line in log] == pytest.approx(rates)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert torch.equal(state["links"]["outer_12.proj1.weight"], weights[-1])
    assert state["scaler"].get("scale") == {"float16": 2.0 ** (10 - 21)}.get(dtype)
    plain = scripted_losses(monkeypatch, 1.0, 1.0)
    train(*flags, "--max_steps", 2, "--lr_scheduler_type", "constant", into=tmp_path / "plain")
    assert torch.equal(plain[1][1], weights[10])


@pytest.mark.parametrize("script", FLAGS)
def test_a_full_card_is_one_line(script, train, monkeypatch):
    """It says which flag to lower. A bug stays a traceback."""
    kinds = [torch.OutOfMemoryError, RuntimeError, RuntimeError, RuntimeError]
    said = (PROJECT / "tests/data/full_card.txt").read_text().splitlines()
    full = [kind(line) for kind, line in zip(kinds, said, strict=True)]
    assert all(map(out_of_memory, full)) and not out_of_memory(RuntimeError("a bug"))
    problems = [RuntimeError("a bug"), *(full if script is train_outer else full[:1])]

    def fail(call):
        raise problems[-1]

    counted(monkeypatch, script, before=fail)
    while len(problems) > 1:
        train(script, names="--batch_size")
        problems.pop()
    with pytest.raises(RuntimeError, match="a bug"):
        train(script)


def test_odd_rows_are_left_out_and_counted(capsys):
    odd = [*lines_of("odd_rows.jsonl"),
           {"row": {"question": "x" * 10**6, "answer": "x"},
            "fault": "question is not a text of 1 to 200000 characters"}]
    rows, faults = [ROWS[0], *(one["row"] for one in odd)], [one["fault"] for one in odd]
    assert data.keep_usable(rows, [tiny_style.role("solver")]) == [ROWS[0]]
    said = capsys.readouterr().out
    assert said.startswith(f"left out {len(odd)} of {len(odd) + 1} rows: no column question (1), ")
    for fault in faults:
        assert f"({faults.count(fault)})" in said.split(fault)[1].split(",")[0]
    with refuses("poetry", "math, choice, code, search"):
        data.keep_usable([ROWS[0], {**ROWS[1], "task_family": "poetry"}], tiny_style.roles)


# ---- what comes out -----------------------------------------------------------------------------

def test_untrained_is_what_this_run_began_with(train, monkeypatch):
    """Same kind, scale and seed as the trained links, not some default."""
    seen = []
    monkeypatch.setattr(train_outer.evaluate, "evaluate", lambda *given, **_: seen.extend(given))
    train(train_outer, "--max_steps", 1, "--warm_start_steps", 2, "--num_recursive_rounds", 2,
          "--outer_adapter_type", "1layer_res", "--eval_samples", 2, "--seed", 5)
    after, before, *_ = seen
    fresh = after.with_fresh_outer({key: "1layer_res" for key in after.outer}, True, 5)
    for key, link in before.outer.items():
        assert link.kind == after.outer[key].kind == "1layer_res"
        assert torch.equal(link.proj1.weight, fresh.outer[key].proj1.weight)
        assert not torch.equal(link.proj1.weight, after.outer[key].proj1.weight)


def test_outer_training_goes_on_from_given_links(tmp_path, run, train):
    """From R = 1 to R = 2, as they are: the style's warm start is left out unless it is asked for.
    Another inner link is told, and links that do not fit are refused."""
    first, inner, flags = tmp_path / "first", tmp_path / "inner", [
        *SHORT, "--eval_samples", 0, "--max_steps", 1, "--num_recursive_rounds", 2, "--outer_lr", 0,
        "--load_dir", tmp_path / "first"]
    train(train_outer, "--max_steps", 2, into=first)
    train(train_inner, "--max_steps", 1, into=inner)
    for name, more, same in (("as they are", ["--agent1_inner_aligner_path", inner], True),
                             ("warmed", ["--warm_start_steps", 2], False)):
        code, said, errors = run(train_outer, *flags, *more, "--save_dir", tmp_path / name)
        assert code == 0, errors
        assert (links_of(tmp_path / name) == links_of(first)) == same
        assert (str(inner) in said) == same
    told = json.loads((first / "outerlink_config.json").read_text())
    for edge, change, named in (({}, ["--outer_31_type", "1layer_res"], "outer_31"),
                                ({"in_dim": 4}, [], "outer_31"),
                                ({"legacy_key": "outer_13"}, [], "outer_13")):
        links = [*told["adapters"][:2], {**told["adapters"][2], **edge}]
        (first / "outerlink_config.json").write_text(json.dumps({**told, "adapters": links}))
        train(train_outer, *flags, *change, into=tmp_path / "none", names=named)
        train(train_outer, *flags, *change, into=tmp_path / "none", names=first)


def test_all_inner_links_in_one_call_are_those_of_single_calls(tmp_path, run, train):
    """Of the roles that somebody hears: here planner and critic. The last line has the flags that
    train_outer.py takes. A run that was stopped after the planner goes on with the critic."""
    style = shutil.copy(PROJECT / "tests/data/styles/ahead.txt", tmp_path / "ahead.py")
    flags = [*FLAGS[train_inner], "--style", style, "--max_steps", 2]
    every = [train_inner, *flags, "--mas_role", "all", "--save_dir", tmp_path / "all"]

    def results(place):
        return [(links_of(tmp_path / place / role), log_of(tmp_path / place / role),
                 (tmp_path / place / role / "readability.json").read_text())
                for role in ("planner", "critic")]

    for role in ("planner", "critic"):
        train(*every[:-4], "--mas_role", role, into=tmp_path / "single" / role)
    code, _, errors = run(*every, "--resume")
    assert code == 2 and str(tmp_path / "all/planner") in errors[0]
    code, said, _ = run(*every)
    assert code == 0 and results("all") == results("single")
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"planner", "critic"}
    (tmp_path / "all/critic/state.pt").unlink()
    assert run(*every, "--resume")[0] == 0 and results("all") == results("single")
    command = said.splitlines()[-1].split("train_outer.py")[1].split()
    train(train_outer, *command, "--max_steps", 1, into=tmp_path / "outer")
    told = json.loads((tmp_path / "outer/train_args.json").read_text())
    assert [told[f"{role}_inner"] for role in ("planner", "critic", "solver")] == [
        str(tmp_path / "all/planner"), str(tmp_path / "all/critic"), ""]


def test_half_precision_trains_float32_links(tmp_path, train):
    """It starts at the loss of float32, and skips no step."""
    first = []
    for name in ("float32", "bfloat16", "float16"):
        log = train(train_outer, warm_start_steps=10, max_steps=2, dtype=name, into=tmp_path / name)
        assert log[-1]["skipped"] == 0 and all(math.isfinite(line["loss"]) for line in log)
        first.append(log[0]["loss"])
        for path in (tmp_path / name).glob("*.safetensors"):
            assert {weight.dtype for weight in load_file(path).values()} == {torch.float32}
    assert first == pytest.approx([first[0]] * 3, abs=0.2)

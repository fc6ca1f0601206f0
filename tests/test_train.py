"""Training: gradients = a plain unrolling, resumed = uninterrupted, and what goes wrong."""
import argparse
import json
import math
import os
import re
import signal
import sys
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_in_float64

import reference
import train_inner
import train_outer
import warm_start
from link import InnerLink, contrast, word_losses
from recurse import Turn, load_mas_system
from styles.tiny import tiny as tiny_style
from support import rows as data
from support.checkpoints import load_inner, load_outer, save_inner, save_outer
from support.training import Training, batch_of
from tasks import tiny

ROWS = tiny.train_rows(4, 7)


def outer_args(**changes):
    settings = dict(latents="rollout", latent_length=3, max_latent_tokens=4, role_loss_weight=0.0,
                    supervise_final_only=1, non_last_loss_weight=0.1, gradient_checkpointing=0,
                    mas_task="math", max_length=4096, log_gradients=0)
    return argparse.Namespace(**{**settings, **changes})


def outer_gradients(mas, rows, rounds, args):
    """(loss, {parameter: gradient}) of one outer loss."""
    mas.outer.requires_grad_(True)
    mas.outer.zero_grad()
    loss = train_outer.outer_loss(mas, rows, rounds, args).loss
    loss.backward()
    mas.outer.requires_grad_(False)
    return loss.item(), {name: p.grad.clone() for name, p in mas.outer.named_parameters()
                         if p.grad is not None}


def plain_outer_loss(mas, row, rounds, m):
    """The outer loss of one row, by reference.py. The prompt is the tiny style's, spelled out."""
    def prompt(role, heard):
        said = list(heard.values()) or ["none"]
        return [f"<bos> <|user|> {row['question']} <|notes|>", *said, "<|assistant|>"]

    agent, embeds, _ = reference.recurse(mas, prompt, rounds, m)                   # (T, d)
    words = row["answer"][rounds - 1].split()
    gold = torch.tensor(agent.tokenizer.convert_tokens_to_ids(words))
    x = torch.cat([embeds, agent.embedding(gold[:-1])])
    return F.cross_entropy(agent.model(inputs_embeds=x[None]).logits[0, -len(gold):], gold)


@pytest.fixture
def double():
    """The shipped agents in float64: two rounds of rollouts through untrained links amplify a
    rounding of 1e-7 to 4e-3 in the gradient, which would hide a real difference."""
    return tiny_in_float64()


@pytest.mark.parametrize("rounds", [1, 2])
def test_outer_loss_and_gradients_equal_the_plain_unrolling(double, rounds):
    mas = double
    loss, gradients = outer_gradients(mas, ROWS, rounds, outer_args())
    mas.outer.requires_grad_(True)
    mas.outer.zero_grad()
    # Every gold answer here has six tokens, so the mean over tokens is the mean over rows.
    plain = sum(plain_outer_loss(mas, row, rounds, 3) for row in ROWS) / len(ROWS)
    plain.backward()
    assert loss == pytest.approx(plain.item(), abs=1e-5)
    for name, p in mas.outer.named_parameters():
        if name in gradients:       # 1e-4: the cross-entropy itself is taken in float32
            assert (gradients[name] - p.grad).norm() <= 1e-4 * p.grad.norm()
        else:
            assert p.grad is None or not p.grad.any()
    if rounds == 1:      # the feedback link is not used in a single round
        assert not any(name.startswith("outer_31") for name in gradients)


@pytest.mark.parametrize("changes", [{}, {"role_loss_weight": 1.0}, {"supervise_final_only": 0},
                                     {"latents": "teacher"}, {"latents": "teacher_aligned"}])
def test_checkpointing_of_turns_changes_nothing(shipped, changes):
    mas = shipped.with_fresh_outer(seed=1)
    kept = outer_gradients(mas, ROWS, 2, outer_args(**changes))
    again = outer_gradients(mas, ROWS, 2, outer_args(gradient_checkpointing=1, **changes))
    assert kept[0] == again[0]
    assert kept[1].keys() == again[1].keys()
    for name in kept[1]:
        torch.testing.assert_close(kept[1][name], again[1][name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("latents", ["rollout", "teacher", "teacher_aligned"])
def test_a_batch_is_the_mean_of_its_rows(double, latents):
    """Rows of one answer length, but prompts of different length."""
    mas, args = double, outer_args(latents=latents)
    loss, gradients = outer_gradients(mas, ROWS, 2, args)
    single = [outer_gradients(mas, [row], 2, args) for row in ROWS]
    assert loss == pytest.approx(sum(s[0] for s in single) / len(ROWS), abs=1e-4)
    for name in gradients:
        mean = sum(s[1][name] for s in single) / len(ROWS)
        assert (gradients[name] - mean).norm() <= 1e-4 * mean.norm()


@pytest.mark.parametrize("latents", ["rollout", "teacher"])
def test_logged_gradients_do_not_depend_on_the_micro_batch(latents, double, tmp_path):
    """Gold answers of one length. Oracle: each row alone, by autograd."""
    logs = []
    for size in (len(ROWS), 1):
        run = training(tmp_path / str(size), double.outer, batch_size=len(ROWS))
        for begin in range(0, len(ROWS), size):
            train_outer.learn_from(double, ROWS[begin:begin + size], 2,
                                   outer_args(latents=latents, log_gradients=1), run)
        logs.append({name: total / run.sums["tokens"] for name, total in run.sums.items()
                     if name.startswith("gradient")})
        run.optimizer.zero_grad()
    assert len(logs[0]) == 5 and logs[0] == pytest.approx(logs[1], rel=1e-3)
    mas, alone = double, []
    for row in ROWS:
        outcome = train_outer.outer_loss(mas, [row], 2, outer_args(latents=latents,
                                                                   log_gradients=1))
        message, = train_outer.parts_of(outcome.sent[1, "outer_12"])
        alone.append(torch.autograd.grad(outcome.loss, message)[0].norm().item())
    assert logs[0]["gradient_outer_12_1"] == pytest.approx(sum(alone) / len(ROWS), rel=1e-3)


def test_the_losses_are_weighed_as_documented(shipped):
    mas = shipped.with_fresh_outer(seed=1)
    with torch.no_grad():
        outcome = train_outer.outer_loss(mas, ROWS, 1, outer_args())
    assert outcome.loss == outcome.final and outcome.tokens == 6 * len(ROWS)
    weighed = outer_gradients(mas, ROWS, 2, outer_args(supervise_final_only=0))
    final = outer_gradients(mas, ROWS, 2, outer_args())
    early = (weighed[0] - final[0]) / 0.1          # the answer of round 1, at weight 0.1
    args = outer_args()
    first_round = train_outer.outer_loss(mas, [{**row, "answer": row["answer"][:1]}
                                               for row in ROWS], 1, args).loss
    assert early == pytest.approx(first_round.item(), abs=1e-3)


def test_teacher_latents_are_the_states_at_and_before_the_gold_tokens(shipped):
    """Against the hidden states of one plain run over prompt and gold text."""
    agent, role, row = shipped.agents["planner"], shipped.style.role("planner"), ROWS[0]
    text = f"<bos> <|user|> {row['question']} <|notes|> none <|assistant|> {row['plan'][0]}"
    ids = torch.tensor([agent.tokenizer.convert_tokens_to_ids(text.split())])
    plain = agent.body(ids).last_hidden_state[0]
    rows = agent.prompt("", role.first, {"question": [row["question"]]})
    context = agent.read(*agent.embed(rows, {}))
    turn = Turn(agent, "planner", 1, None)
    at = train_outer.thoughts(turn, context, role, [row], outer_args(latents="teacher"))
    torch.testing.assert_close(at[0], plain[-6:-2], atol=1e-4, rtol=1e-4)
    aligned = outer_args(latents="teacher_aligned")
    before = train_outer.thoughts(turn, context, role, [row], aligned)
    torch.testing.assert_close(before[0], plain[-7:-4], atol=1e-4, rtol=1e-4)


def test_shared_tokens_match_strings_not_ids():
    class Vocabulary:
        def __init__(self, *words):
            ids = {word: i for i, word in enumerate(words)}
            self.tokenizer = argparse.Namespace(get_vocab=lambda: ids)

    found = warm_start.shared_tokens(Vocabulary("a", "b", "c"), Vocabulary("c", "x", "a"))
    assert found == [(0, 2), (2, 0)]
    found = warm_start.shared_tokens(Vocabulary("Ġthe", "the"), Vocabulary("x", "the", "▁the"))
    assert found == [(0, 2), (1, 1)]        # both our words: with a blank in front, and without


def test_word_losses_are_the_equations(shipped):
    """One token comes twice. The contrast is among the batch's words, each of them once."""
    agent, link = shipped.agents["critic"], InnerLink(80)
    states, tokens = torch.randn(5, 80), torch.tensor([3, 8, 20, 8, 30])
    cosine, mse = word_losses(link(states), tokens, agent.embedding)
    surely = contrast(link(states), tokens, agent.embedding)
    got, wanted = link(states), agent.embedding(tokens)
    dots = (got * wanted).sum(-1) / (got.norm(dim=-1) * wanted.norm(dim=-1))
    assert cosine.item() == pytest.approx(1 - dots.mean().item(), abs=1e-5)
    assert mse.item() == pytest.approx((got - wanted).pow(2).mean().item(), rel=1e-5)
    losses = []
    for output, right in zip(got, tokens.tolist()):
        near = {token: torch.cosine_similarity(output, agent.embedding.weight[token], 0) / 0.05
                for token in {3, 8, 20, 30}}
        losses.append(torch.stack(list(near.values())).logsumexp(0) - near[right])
    assert surely.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_hidden_states_along_a_text_equal_a_plain_run(shipped):
    agent, role = shipped.agents["critic"], shipped.style.role("critic")
    texts = data.role_texts_of(shipped.style, role, ROWS, "math")[:3]
    tokens = agent.tokenize([one.text for one in texts])
    found = train_inner.states_along(agent, shipped.style, role, texts, tokens)
    for one, row, states in zip(texts, tokens, found):
        assert one.kind == "math"
        words = (f"<bos> <|user|> {one.question} <|notes|> {one.heard['planner']} <|assistant|> "
                 f"{one.text}")
        ids = torch.tensor([agent.tokenizer.convert_tokens_to_ids(words.split())])
        plain = agent.body(ids).last_hidden_state[0]
        torch.testing.assert_close(states, plain[-len(row) - 1:-1], atol=1e-4, rtol=1e-4)
        assert row == ids[0, -len(row):].tolist()


def run_script(script, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, argv)])
    script.main()


def weights(folder, *names):
    return {name: (folder / name).read_bytes() for name in names}


def stop_after(monkeypatch, steps):
    """Make training break off, as if killed, after so many steps of this process."""
    original, taken = Training.step, []

    def step(self, **values):
        original(self, **values)
        taken.append(1)
        if len(taken) == steps:
            raise KeyboardInterrupt
    monkeypatch.setattr(Training, "step", step)


def test_a_resumed_outer_run_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    flags = ["--max_steps", 4, "--save_steps", 2, "--warm_start_steps", 2, "--num_samples", 40,
             "--batch_size", 3, "--eval_samples", 0, "--log_every", 1, "--latent_length", 2,
             "--grad_accum_steps", 2]
    run_script(train_outer, monkeypatch, *flags, "--save_dir", tmp_path / "whole")
    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        stop_after(interrupted, 3)
        run_script(train_outer, interrupted, *flags, "--save_dir", tmp_path / "halves")
    run_script(train_outer, monkeypatch, *flags, "--save_dir", tmp_path / "halves", "--resume")
    names = [f"outer_{edge}.safetensors" for edge in (12, 23, 31)]
    assert weights(tmp_path / "whole", *names) == weights(tmp_path / "halves", *names)
    assert ((tmp_path / "whole/log.jsonl").read_text()
            == (tmp_path / "halves/log.jsonl").read_text())
    with pytest.raises(ValueError, match="outer_lr"):
        run_script(train_outer, monkeypatch, *flags, "--outer_lr", 1e-5, "--resume",
                   "--save_dir", tmp_path / "halves")
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        run_script(train_outer, monkeypatch, *flags, "--save_dir", tmp_path / "new", "--resume")
    with pytest.raises(ValueError, match="another run"):      # a state of the other script
        run_script(train_inner, monkeypatch, "--save_dir", tmp_path / "whole", "--resume",
                   "--num_samples", 60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_stop_saves_first(number, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the middle of step 2 of 3, where nothing was saved yet; the rest gives the same."""
    flags = ["--max_steps", 3, "--save_steps", 0, "--warm_start_steps", 2, "--num_samples", 20,
             "--batch_size", 3, "--eval_samples", 0, "--latent_length", 2]
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    run_script(train_outer, monkeypatch, *flags, "--save_dir", tmp_path / "whole")
    assert handlers == [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    backward = Training.backward

    def told(self, *arguments, **values):
        if self.done == 1:
            os.kill(os.getpid(), number)
        return backward(self, *arguments, **values)

    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(Training, "backward", told)
        run_script(train_outer, interrupted, *flags, "--save_dir", tmp_path / "halves")
    for one, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
        signal.signal(one, handler)
    assert torch.load(tmp_path / "halves/state.pt", weights_only=True)["done"] == 2
    assert "stopping after this step" in capsys.readouterr().err
    run_script(train_outer, monkeypatch, *flags, "--save_dir", tmp_path / "halves", "--resume")
    names = [f"outer_{edge}.safetensors" for edge in (12, 23, 31)]
    assert weights(tmp_path / "whole", *names) == weights(tmp_path / "halves", *names)


@pytest.mark.parametrize("script", [train_inner, train_outer])
def test_training_does_not_go_on_with_other_rows(script, tmp_path, monkeypatch):
    rows = [{**row, "solver": "none"} for row in tiny.train_rows(20, 3)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = ["--dataset_name", tmp_path / "rows.json", "--max_steps", 2, "--batch_size", 3,
             "--latent_length", 2, "--save_dir", tmp_path / "out", "--num_samples", -1]
    if script is train_outer:
        flags += ["--warm_start_steps", 1, "--eval_samples", 0]
    run_script(script, monkeypatch, *flags)
    run_script(script, monkeypatch, *flags, "--resume")
    (tmp_path / "rows.json").write_text(json.dumps(rows[1:]))
    with pytest.raises(ValueError, match="of another run .links_prompts_data differ."):
        run_script(script, monkeypatch, *flags, "--resume")


def test_links_may_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    save_inner(InnerLink(4), tmp_path)
    os.umask(before)
    assert (tmp_path / "adapter(math).safetensors").stat().st_mode & 0o777 == 0o640


def test_a_resumed_inner_run_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    flags = ["--max_steps", 6, "--num_samples", 60, "--batch_size", 5, "--save_steps", 3,
             "--latent_length", 3, "--adapter_mse_weight", 0.5]
    run_script(train_inner, monkeypatch, *flags, "--save_dir", tmp_path / "whole")
    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        stop_after(interrupted, 4)
        run_script(train_inner, interrupted, *flags, "--save_dir", tmp_path / "halves")
    run_script(train_inner, monkeypatch, *flags, "--save_dir", tmp_path / "halves", "--resume")
    whole, found = (load_inner(tmp_path / name, 96).state_dict() for name in ("whole", "halves"))
    for name, value in whole.items():
        assert torch.equal(found[name], value)
    report = json.loads((tmp_path / "whole/readability.json").read_text())
    assert report["before"][0] == report["after"][0] == 1.0     # before any link, by construction
    assert not list(tmp_path.rglob("hidden_states*")), "the mapped file is left behind"


def test_inner_training_is_the_plain_loop(tmp_path, monkeypatch):
    """Oracle: AdamW over the equation, hidden states from a plain run of the model each time."""
    flags = ["--max_steps", 3, "--num_samples", 30, "--batch_size", 4, "--latent_length", 2,
             "--warmup_steps", 0, "--lr_scheduler_type", "constant", "--max_grad_norm", 0,
             "--held_out", 40]
    run_script(train_inner, monkeypatch, *flags, "--save_dir", tmp_path)
    agent = load_mas_system("tiny", device="cpu").agents["planner"]
    role, rows = tiny_style.role("planner"), tiny.train_rows(30, 42)
    torch.manual_seed(42)
    link = InnerLink(96, gain=agent.embedding_rms)
    optimizer = torch.optim.AdamW(link.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0)
    texts = data.role_texts_of(tiny_style, role, rows, "math")[40:]         # 40 are held out
    for step in range(3):
        losses = []
        for one in batch_of(texts, step, 4, 42):
            notes = one.heard.get("solver", "none")
            prompt = reference.embed(agent, [f"<bos> <|user|> {one.question} <|notes|> {notes} "
                                             "<|assistant|>"])
            gold = reference.embed(agent, [one.text])                              # (n, d)
            with torch.no_grad():
                states = reference.hidden_states(agent, torch.cat([prompt, gold]))
            got = link(states[len(prompt) - 1:-1])
            losses.append(1 - F.cosine_similarity(got, gold, dim=-1))
        optimizer.zero_grad()
        torch.cat(losses).mean().backward()
        optimizer.step()
    found = load_inner(tmp_path, 96).state_dict()
    for name, value in link.state_dict().items():
        torch.testing.assert_close(found[name], value, atol=2e-4, rtol=1e-3)


def test_published_layout_from_the_trainer_loads_the_same(tmp_path, monkeypatch, shipped):
    run_script(train_outer, monkeypatch, "--max_steps", 1, "--warm_start_steps", 0, "--batch_size",
               2, "--num_samples", 8, "--eval_samples", 0, "--save_format", "pt", "--save_dir",
               tmp_path, "--latent_length", 2)
    state = torch.load(tmp_path / "outer_12.pt", weights_only=True)
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    mas = load_mas_system("tiny", ckpt_override={"outer": str(tmp_path)})
    for name, value in state.items():
        assert torch.equal(mas.outer["outer_12"].state_dict()[name], value.float())


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def training(tmp_path, links, dtype=torch.float32, **changes):
    settings = dict(batch_size=1, num_train_epochs=1, max_steps=100, weight_decay=0.0,
                    lr_scheduler_type="constant", warmup_steps=0, grad_accum_steps=1,
                    max_grad_norm=1.0, log_every=1, save_steps=0, resume=False, mas_task="math")
    args = argparse.Namespace(**{**settings, **changes})
    return Training(links, args, 0.1, tmp_path, 1, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_bad_loss_skips_the_step_and_ten_in_a_row_stop(dtype, tmp_path):
    link = torch.nn.Linear(2, 1)
    run = training(tmp_path, link, dtype, save_steps=1)
    before = link.weight.detach().clone()
    for bad in (float("nan"), float("inf")):
        run.backward(link(torch.ones(2)).sum() * bad, 5)
        run.step()
    assert run.skipped == 2
    assert torch.equal(link.weight, before)
    run.backward(link(torch.ones(2)).sum(), 5)
    run.step()
    assert run.skipped_in_a_row == 0
    good = link.weight.detach().clone()
    assert not torch.equal(good, before)
    with pytest.raises(ValueError, match="10 steps in a row"):
        for _ in range(10):
            run.backward(link(torch.ones(2)).sum() * float("nan"), 5)
            run.step()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert torch.equal(saved["links"]["weight"], good)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["grad_norm"] is None for line in log] == [True, True, False] + [True] * 10


def test_an_infinite_loss_with_finite_gradients_skips_the_step(tmp_path):
    """Clipped logits may give that: the loss says inf, its gradient 0."""
    link = torch.nn.Linear(2, 1)
    run = training(tmp_path, link)
    before = link.weight.detach().clone()
    run.backward(link(torch.ones(2)).sum() * 0 + float("inf"), 5)
    run.step()
    assert run.skipped == 1 and torch.equal(link.weight, before)


def test_weights_that_blow_up_stop_the_run(tmp_path, monkeypatch):
    """A learning rate of 1e30 ruins the links in the first update."""
    with pytest.raises(ValueError, match="lower learning rate"):
        run_script(train_outer, monkeypatch, "--outer_lr", 1e30, "--max_steps", 30, "--batch_size",
                   2, "--num_samples", 8, "--warm_start_steps", 0, "--latent_length", 2,
                   "--eval_samples", 0, "--save_steps", 1, "--warmup_steps", 0, "--save_dir",
                   tmp_path)
    assert not (tmp_path / "outer_12.safetensors").exists()


def test_a_fresh_run_forgets_the_state_of_an_earlier_one(tmp_path):
    link = torch.nn.Linear(2, 1)
    training(tmp_path, link).save()
    assert (tmp_path / "state.pt").exists()
    training(tmp_path, link)
    assert not (tmp_path / "state.pt").exists() and (tmp_path / "earlier_1/state.pt").exists()


def test_untrained_is_what_this_run_began_with(tmp_path, monkeypatch):
    """Same kind, scale and seed as the trained links, not some default."""
    seen = []
    monkeypatch.setattr(train_outer.evaluate, "evaluate", lambda *given: seen.extend(given))
    run_script(train_outer, monkeypatch, "--max_steps", 1, "--warm_start_steps", 2, "--batch_size",
               2, "--num_samples", 8, "--latent_length", 2, "--outer_adapter_type", "1layer_res",
               "--eval_samples", 2, "--seed", 5, "--save_dir", tmp_path)
    after, before, *_ = seen
    fresh = after.with_fresh_outer({key: "1layer_res" for key in after.outer}, True, 5)
    for key, link in before.outer.items():
        assert link.kind == after.outer[key].kind == "1layer_res"
        assert torch.equal(link.proj1.weight, fresh.outer[key].proj1.weight)
        assert not torch.equal(link.proj1.weight, after.outer[key].proj1.weight)


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    torch.manual_seed(0)
    data, links = torch.randn(4, 3), [torch.nn.Linear(3, 1) for _ in range(2)]
    links[1].load_state_dict(links[0].state_dict())
    whole = training(tmp_path / "a", links[0])
    whole.backward(links[0](data).pow(2).mean(), 4)
    whole.step()
    halves = training(tmp_path / "b", links[1], grad_accum_steps=2)
    for part in data.split([3, 1]):                # a mean over three tokens, one over one
        halves.backward(links[1](part).pow(2).mean(), len(part))
    halves.step()
    torch.testing.assert_close(links[0].weight, links[1].weight)


def learn_from(link, rows, run, holds, alive):
    """A micro-batch on a card that holds so many rows. It fills up in the backward pass, when a
    part of the gradient is there. alive: what other micro-batches have left in memory."""
    assert not [kept for kept in alive if kept() is not None]
    output = link(torch.stack(rows))
    alive.append(weakref.ref(output))
    loss = output.pow(2).mean()
    run.backward(loss, len(rows), twice=2 * loss)
    if len(rows) > holds:
        raise torch.OutOfMemoryError("CUDA out of memory")


def three_steps(folder, link, rows, holds):
    """Three steps of 4 x 2 rows. Returns the log."""
    run, alive = training(folder, link, batch_size=4, grad_accum_steps=2, max_steps=3, seed=0), []
    for step in run.steps("link"):
        for batch in run.batches(rows, step):
            with run.halved_if_full():
                learn_from(link, batch, run, holds, alive)
        run.step()
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("holds, said", [(4, []), (3, [2]), (1, [2, 1])])
def test_a_full_card_takes_fewer_rows_at_once_and_learns_the_same(holds, said, tmp_path, capsys):
    """And the failed micro-batch is gone from memory when the next one begins."""
    torch.manual_seed(0)
    rows, large, small = list(torch.randn(16, 3)), torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
    small.load_state_dict(large.state_dict())
    logs = zip(three_steps(tmp_path / "large", large, rows, 8),
               three_steps(tmp_path / "small", small, rows, holds), strict=True)
    torch.testing.assert_close(small.weight, large.weight)
    assert all(ours == pytest.approx(wanted, rel=1e-5) for wanted, ours in logs)
    assert [int(rows) for rows in re.findall(r"takes (\d+) rows", capsys.readouterr().err)] == said


@pytest.mark.parametrize("problem, at_once, raised", [
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), 2, None),
    (RuntimeError("CUDA error: out of memory"), 2, None),
    (torch.OutOfMemoryError("CUDA out of memory"), 1, ValueError),
    (RuntimeError("a bug"), 2, RuntimeError)])
def test_what_counts_as_a_full_card(problem, at_once, raised, tmp_path):
    """A single row that is too large is an error, and a bug stays one."""
    run = training(tmp_path, torch.nn.Linear(3, 1), batch_size=at_once, seed=0)
    with pytest.raises(raised) if raised else nullcontext(), run.halved_if_full():
        raise problem
    assert run.at_once == 1 or raised


@pytest.mark.parametrize("device, sizes", [("cpu", [4, 4]), pytest.param("cuda", [8], marks=GPU)])
def test_on_a_gpu_a_step_takes_all_its_rows_at_once(device, sizes, tmp_path):
    link = torch.nn.Linear(3, 1).to(device)
    run = training(tmp_path, link, batch_size=4, grad_accum_steps=2, seed=0)
    assert [len(batch) for batch in run.batches(list(range(16)), 0)] == sizes


def test_gradients_are_clipped_to_the_limit(tmp_path):
    """One AdamW step hides the length; so look at the gradient the optimizer was given."""
    link, seen = torch.nn.Linear(2, 1, bias=False), []
    run = training(tmp_path, link, max_grad_norm=0.5)
    run.optimizer.register_step_pre_hook(
        lambda *_: seen.append(link.weight.grad.norm().item()))
    run.backward(100 * link(torch.ones(2)).sum(), 5)
    run.step()
    assert seen == [pytest.approx(0.5, rel=1e-4)]


def test_batches_cover_every_row_once_an_epoch():
    items = list(range(10))
    drawn = [row for step in range(5) for row in batch_of(items, step, 4, seed=3)]
    assert sorted(drawn[:10]) == items
    assert sorted(drawn[10:]) == items
    assert drawn[:10] != drawn[10:]
    assert batch_of(items, 3, 4, seed=3) == drawn[12:16]


def test_outer_links_of_a_run_are_found_by_the_loader(tmp_path, shipped):
    widths = {"outer_12": (96, 80), "outer_23": (80, 112), "outer_31": (112, 96)}
    save_outer(shipped.outer, tmp_path, "tiny")
    links = load_outer(tmp_path, widths)
    for key, link in links.items():
        for name, value in link.state_dict().items():
            assert torch.equal(value, shipped.outer[key].state_dict()[name])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_float32_links(dtype, tmp_path, monkeypatch):
    """Half precision starts at the float32 loss, skips no step, and leaves the links float32."""
    flags = ["--max_steps", 3, "--warm_start_steps", 20, "--batch_size", 4, "--num_samples", 40,
             "--eval_samples", 0, "--latent_length", 3, "--num_recursive_rounds", 1, "--log_every",
             1, "--random_rounds", 0]
    losses = {}
    for name in ("float32", dtype):
        run_script(train_outer, monkeypatch, *flags, "--dtype", name, "--save_dir", tmp_path / name)
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        log = [json.loads(line) for line in lines]
        losses[name] = [line["loss"] for line in log]
        assert log[-1]["skipped"] == 0
    assert losses[dtype][0] == pytest.approx(losses["float32"][0], abs=0.2)
    assert all(map(math.isfinite, losses[dtype]))
    links = load_outer(tmp_path / dtype, {"outer_12": (96, 80), "outer_23": (80, 112),
                                            "outer_31": (112, 96)})
    assert {p.dtype for link in links.values() for p in link.parameters()} == {torch.float32}


def test_odd_rows_are_left_out_and_counted(capsys):
    rows = [ROWS[0], {}, None, {"question": "x", "answer": []}, {"question": "x", "answer": [None]},
            {"question": 3, "answer": "y"}, {"question": "x", "answer": " "}]
    solver = tiny_style.role("solver")
    assert data.keep_usable(rows, [solver]) == [ROWS[0]]
    said = capsys.readouterr().out
    assert said == ("left out 6 of 7 rows: no column question (1), no column answer (1), the row "
                    "is no object {column: cell} (1), answer is no text (2), question is a number: "
                    "write it as a text (1), answer is an empty text (1)\n")

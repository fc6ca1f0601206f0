"""The recursion against reference.py: one question at a time, no cache, no padding, no batch.
Prompts are put together here by string operations. All is in float64, so both agree to CLOSE."""
import dataclasses
import functools
import itertools
from unittest import mock

import pytest
import torch
from helpers import (HELPED, QUESTIONS, THREE, byte_caller, chat, embed_words, fast, in_float64,
                     inner_equation, largest_difference, lines_of, made_style, new_mas,
                     nothing_in_float32, outer_equation, plain_parts, plain_write, randomise,
                     refuses, scripted_mas, spy_on_reading, words)

import agents
import reference
from evaluation.answers import METHODS
from link import OuterLink
from prompts import WORDS
from recurse import CONTROLS, MAS, load_mas_system, recurse
from styles import ANSWER_FORMAT, get_style
from tools.web import ServiceError
from writing import Sampling, Writing, insert, text_of, text_seed

METHODS = [method for method in METHODS if method != "untrained"]    # new links, method latent
M = 4                               # latent steps
N = 8                               # new words of an answer
CLOSE = 1e-9
ROLES = ("planner", "critic", "solver")
TRIOS = [("qwen3", "llama", "qwen2"), ("gemma3_conditional", "qwen3_5_conditional", "mistral"),
         ("mistral", "gemma3_conditional", "qwen3_5_conditional"),
         ("qwen3_5_conditional", "qwen3", "gemma3_conditional"),
         ("gemma3_conditional", "mistral", "gemma3")]


@pytest.fixture(scope="module", autouse=True)
def exact():
    with nothing_in_float32():
        yield


@functools.cache
def system(families):
    """A system of three families in float64."""
    return in_float64(new_mas(families=families))


@pytest.fixture(scope="module")
def mas():
    return system(TRIOS[0])


def respond(mas, questions, rounds, latent_length, kind="math", method="latent", trace=False,
            change=None, columns=None, **options):
    """mas.respond, with the fields of Writing and Sampling as options."""
    sampling = {name: options.pop(name) for name in [*options] if hasattr(Sampling, name)}
    writing = Writing(sampling=Sampling(**sampling), **options)
    return mas.respond(questions, rounds, latent_length, kind=kind, method=method, trace=trace,
                       writing=writing, change=change, columns=columns)


def text_from(agent, ids):
    """Token ids as a text."""
    return agent.tokenizer.decode(ids, skip_special_tokens=True).strip()


# ---- the plain recursion ------------------------------------------------------------------------

def embedded(agent, name, question, heard, style=THREE):
    """The prompt of one question to a role of a style as embeddings (1, T, d)."""
    return reference.embed(agent, plain_parts(style, question, style.role(name), heard))[None]


@torch.no_grad()
def plain_recursion(mas, question, rounds, m, count=N):
    """(thoughts, sent, ids of the answer) of one question, by reference.py."""
    thoughts, turns = {}, [(r, name) for r in range(1, rounds + 1) for name in ROLES]

    def noted(agent, embeds, m):
        H = think(agent, embeds, m)
        thoughts[turns[len(thoughts)]] = H[None]
        return H

    think = reference.think
    with mock.patch("reference.think", noted):
        agent, embeds, sent = reference.recurse(
            mas, functools.partial(plain_parts, mas.style, question), rounds, m)
    return (thoughts, {key: message[None] for key, message in sent.items()},
            reference.write(agent, embeds, count))


def plain_texts(mas, question, rounds, brief=None):
    """({(round, role): text}, tokens written in all) of agents that exchange words."""
    texts, count, heard = {}, 0, {name: {} for name in ROLES}
    for r in range(1, rounds + 1):
        for name in ROLES:
            agent, last = mas.agents[name], r == rounds and name == "solver"
            ids = plain_write(agent, embedded(agent, name, question, heard[name], mas.style),
                              N if last or not brief else min(brief, N))
            texts[r, name] = text_from(agent, ids)
            count += len(ids)
            for edge in mas.style.edges:
                if edge.src == name:
                    heard[edge.dst][name] = texts[r, name]
    return texts, count


@functools.cache
def plain_recursions(families, rounds):
    """The plain recursion of every question."""
    return [plain_recursion(system(families), question, rounds, M) for question in QUESTIONS]


def assert_as_plain(run, b, thoughts, sent):
    """Question b of a run has the plain recursion's thoughts and messages, all and only those."""
    for found, wanted in ((run.thoughts, thoughts), (run.sent, sent)):
        assert set(found) == set(wanted)
        for key, value in wanted.items():
            assert largest_difference(found[key][b:b + 1], value) < CLOSE, key


# ---- latents ------------------------------------------------------------------------------------

@pytest.mark.parametrize("families, rounds", fast(
    (TRIOS[0], 1), (TRIOS[0], 3), (TRIOS[1], 3), of=itertools.product(TRIOS, (1, 3))))
def test_latent_is_the_plain_recursion(families, rounds):
    """Thoughts, messages, final words and counts: a batch of five, and one by one."""
    mas, plain = system(families), plain_recursions(families, rounds)
    texts, run = respond(mas, QUESTIONS, rounds, M, trace=True, max_new_tokens=N)
    assert len(run.thoughts) == 3 * rounds - 1 and len(set(texts)) > 1
    assert run.latent_steps == (3 * rounds - 1) * M and set(run.texts) == {(rounds, "solver")}
    for b, (question, (thoughts, sent, ids)) in enumerate(zip(QUESTIONS, plain)):
        assert texts[b] == text_from(mas.agents["solver"], ids) and run.decoded[b] == len(ids)
        assert_as_plain(run, b, thoughts, sent)
        alone, run_alone = respond(mas, [question], rounds, M, trace=True, max_new_tokens=N)
        assert alone == [texts[b]]
        assert_as_plain(run_alone, 0, thoughts, sent)


@pytest.mark.parametrize("families", TRIOS[:2])
def test_equal_beginnings_are_read_once(families, monkeypatch):
    """As one row, for all of a batch: thoughts and messages are the plain ones, and gradients are
    those without it. Windows and recurrent states allow it where the rests are equally long."""
    mas, alike = system(families), [QUESTIONS[0], QUESTIONS[0].replace("+2", "-1")]
    for questions in (alike, QUESTIONS[:2], [QUESTIONS[0]] * 2):
        monkeypatch.setattr(agents, "SHARED", 2)
        for rounds in (1, 2):
            _, run = respond(mas, questions, rounds, M, trace=True, max_new_tokens=1)
            for b, question in enumerate(questions):
                assert_as_plain(run, b, *plain_recursion(mas, question, rounds, M)[:2])
        found, links = [], mas.outer.requires_grad_(True)
        for shared in (2, 100):
            monkeypatch.setattr(agents, "SHARED", shared)
            with monkeypatch.context() as spied:
                shapes = [spy_on_reading(mas.agents[name], spied) for name in ROLES]
                hidden = recurse(mas, questions, 2, M).last_turn.read().hidden
            once = [any(rows == 1 for rows, _ in read) for read in shapes]
            assert once == [shared == 2 and (mas.agents[name].gaps or questions != QUESTIONS[:2])
                            for name in ROLES]
            found.append(torch.cat([gradient.view(-1) for gradient in torch.autograd.grad(
                hidden[..., 0].sum(), links.parameters())]))
        links.requires_grad_(False)
        assert found[1].any() and (found[0] - found[1]).norm() <= CLOSE * found[1].norm()


@pytest.mark.parametrize("method", METHODS)
def test_a_trace_holds_latents_and_only_if_asked_for(mas, method):
    options = dict(method=method, brief=2, max_new_tokens=2)
    for trace in (False, True):
        _, run = respond(mas, QUESTIONS[:2], 2, M, trace=trace, **options)
        turns = [(r, name) for r in (1, 2) for name in ROLES][:-1]
        thinks = trace and method not in WORDS
        assert set(run.thoughts) == (set(turns) if thinks else set())
        assert set(run.sent) == ({(r, edge.key) for r, name in turns for edge in THREE.edges
                                  if edge.src == name} if thinks else set())
        assert all(isinstance(text, str) for said in run.texts.values() for text in said)


def test_the_thoughts_of_a_role_that_sends_to_nobody_are_traced(mas):
    """The critic hears the planner, and nobody hears the critic. Nor does anybody hear the solver
    in round 1. The planner, which sends to two, is traced once."""
    style = made_style("quiet")
    _, run = respond(dataclasses.replace(mas, style=style), QUESTIONS[:2], 2, M, trace=True,
                     max_new_tokens=1)
    assert list(run.thoughts) == [(r, name) for r in (1, 2) for name in ROLES][:-1]
    assert set(run.sent) == {(r, key) for r in (1, 2) for key in ("outer_12", "outer_13")}
    assert run.latent_steps == 5 * M


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.95},
                                     {"temperature": 1.0, "method": "text"}])
def test_answer_does_not_depend_on_the_batch(mas, options):
    """Greedy, sampled, and where messages are sampled too; and another seed says other words."""
    options = dict(rounds=2, latent_length=M, max_new_tokens=5, **options)
    every = mas.answer(QUESTIONS[:4], **options)
    assert mas.answer(QUESTIONS[:4], batch_size=1, **options) == every
    assert mas.answer(QUESTIONS[:4], batch_size=3, **options) == every
    assert (mas.answer(QUESTIONS[:4], seed=7, **options) != every) == ("temperature" in options)


@torch.no_grad()
def test_take_turn_takes_the_place_of_thinking(mas):
    """A trainer's hook: it is called for every turn but the last, and what it returns is sent. That
    may be a list, with thoughts of another length for each question. Oracle: each by itself."""
    seen, lengths = [], [2, 4, 1]

    def take_turn(turn):
        assert turn.agent is mas.agents[turn.role]
        seen.append((turn.round, turn.role))
        H = turn.agent.think(turn.read(), 4)
        return [h[:m] for h, m in zip(H, lengths)]

    last = recurse(mas, QUESTIONS[:3], 2, 4, take_turn=take_turn).last_turn
    assert [*seen, (last.round, last.role)] == [(r, name) for r in (1, 2) for name in ROLES]
    for b, m in enumerate(lengths):
        alone = recurse(mas, QUESTIONS[b:b + 1], 2, m).last_turn.read().hidden
        assert largest_difference(last.read().hidden[b:b + 1], alone) < CLOSE


# ---- controls -----------------------------------------------------------------------------------

def test_zero_sends_zeros(mas):
    """And the roles that come next hear them: = a plain recursion with zeros in the slots."""
    texts, run = respond(mas, QUESTIONS, 2, M, method="zero", trace=True, max_new_tokens=N)
    for edge in mas.style.edges:
        message = run.sent[1, edge.key]
        assert message.shape == (5, M, mas.agents[edge.dst].width) and not message.any()
    solver = mas.agents["solver"]
    zeros = torch.zeros(M, solver.width, dtype=torch.float64)
    for question, text in zip(QUESTIONS, texts):
        prompt = embedded(solver, "solver", question, {"planner": zeros, "critic": zeros})
        assert text == text_from(solver, plain_write(solver, prompt, N))


@pytest.mark.parametrize("asked, sent", [((0, 1), [1, 0]), (range(5), [4, 0, 1, 2, 3]),
                                         ((0, 1, 1, 2), [3, 0, 0, 2]), ((1, 1, 0), [2, 2, 1])])
def test_shuffle_sends_anothers(mas, asked, sent):
    """A question gets what is meant for the nearest one before it, in a circle, that is another."""
    _, run = respond(mas, [QUESTIONS[b] for b in asked], 2, M, method="shuffle", trace=True,
                     max_new_tokens=1)
    for (number, key), message in run.sent.items():
        edge = next(edge for edge in mas.style.edges if edge.key == key)
        H = run.thoughts[number, edge.src]
        own = outer_equation(mas.outer[key], inner_equation(mas.agents[edge.src].inner, H))
        assert largest_difference(message, own[sent]) < CLOSE
    with refuses("shuffle", "different"):
        respond(mas, QUESTIONS[:1] * 2, 2, M, method="shuffle", max_new_tokens=1)


def test_shuffle_knows_a_question_by_all_that_is_asked(mas):
    """A column that a prompt holds makes another question, and a column of the data alone does not.
    """
    planner = dataclasses.replace(THREE.roles[0], first="{question} {told}",
                                  prompt="{question} {told} {solver}")
    told = dataclasses.replace(mas, style=dataclasses.replace(
        THREE, roles=(planner, *THREE.roles[1:])))
    rows = [{"told": word, "id": i} for i, word in enumerate(("s1", "s1", "s2"))]
    run = recurse(told, QUESTIONS[:1] * 3, 1, M, columns=rows, method="shuffle", trace=True)
    sent = mas.send(THREE.edges[0], run.thoughts[1, "planner"])
    assert largest_difference(run.sent[1, "outer_12"], sent[[2, 2, 1]]) < CLOSE


def test_any_change_of_a_message_is_a_control(mas):
    """change(edge, message, asked) is called for every message, and what it returns arrives."""
    asked = []

    def without_outer_23(edge, message, _):
        asked.append(edge.key)
        return message * (edge.key != "outer_23")

    _, run = respond(mas, QUESTIONS[:2], 2, M, change=without_outer_23, trace=True,
                     max_new_tokens=1)
    assert len(asked) == len(run.sent)
    assert {key for _, key in run.sent if not run.sent[1, key].any()} == {"outer_23"}
    options = dict(rounds=2, latent_length=M, max_new_tokens=N)
    assert (mas.answer(QUESTIONS, change=CONTROLS["zero"], **options)
            == mas.answer(QUESTIONS, method="zero", **options))
    texts = mas.answer(QUESTIONS[:2], method="text", **options, change=lambda *_: ["none"] * 2)
    solver, heard = mas.agents["solver"], dict.fromkeys(ROLES[:2], "none")
    for question, text in zip(QUESTIONS, texts):
        prompt = embedded(solver, "solver", question, heard)
        assert text == text_from(solver, plain_write(solver, prompt, N))


# ---- words --------------------------------------------------------------------------------------

@pytest.mark.parametrize("method, brief", [("text", None), ("text_brief", 3), ("text_brief", 50)])
def test_text_is_a_plain_loop_of_writing(mas, method, brief):
    """Every text of every turn, and its tokens; brief: all messages but the answer are cut, and
    none becomes longer."""
    texts, run = respond(mas, QUESTIONS[:3], 2, M, method=method, max_new_tokens=N, brief=brief)
    assert run.latent_steps == 0
    for b, question in enumerate(QUESTIONS[:3]):
        wanted, count = plain_texts(mas, question, 2, brief)
        assert {key: said[b] for key, said in run.texts.items()} == wanted
        assert texts[b] == wanted[2, "solver"] and run.decoded[b] == count
    assert max(len(words(text)) for text in texts) > 3


def test_every_text_has_its_own_seed(mas, monkeypatch):
    """All differ over rounds, roles, questions and seeds; the same request draws them again."""
    seen = []
    for agent in mas.agents.values():
        def write(*args, seeds, write=agent.write, **options):
            seen.extend(seeds)
            return write(*args, seeds=seeds, **options)
        monkeypatch.setattr(agent, "write", write)
    for seed in (1, 2, 1):
        respond(mas, QUESTIONS, 2, M, method="text", max_new_tokens=1, seed=seed)
    assert len(seen) == 3 * 6 * 5 and len(set(seen)) == 2 * 6 * 5 and seen[:30] == seen[60:]


@pytest.fixture(scope="module")
def itself():
    """The same agents, but planner and solver also hear themselves."""
    return in_float64(new_mas(made_style("itself")))


@pytest.mark.parametrize("method", ["latent", "text", "text_brief", "zero", "shuffle"])
def test_roles_may_hear_themselves(method, itself):
    texts, run = respond(itself, QUESTIONS[:2], 3, M, method=method, trace=True, brief=3,
                         max_new_tokens=N)
    for b, question in enumerate(QUESTIONS[:2]):
        if method == "latent":
            assert_as_plain(run, b, *plain_recursion(itself, question, 3, M)[:2])
        elif method.startswith("text"):
            wanted, _ = plain_texts(itself, question, 3, 3 if method == "text_brief" else None)
            assert {key: said[b] for key, said in run.texts.items()} == wanted
        else:
            assert bool(run.sent[1, "outer_33"][b].any()) == (method == "shuffle") and texts[b]


@pytest.mark.parametrize("hears_itself", [False, True])
@pytest.mark.parametrize("method, rounds, turns", [
    ("single", 1, 1), ("single", 3, 1), ("single_loop", 2, 6)])
def test_the_last_agent_alone(mas, itself, hears_itself, method, rounds, turns):
    """single: the solver is asked its `first` prompt, once, whatever the number of rounds.
    single_loop: it takes the turns of all roles. After `first`, it is asked its `own` prompt. A
    solver that hears itself in the rounds too begins with `own`, with nothing in the slot."""
    mas, solver = itself if hears_itself else mas, mas.agents["solver"]
    texts, run = respond(mas, QUESTIONS[:3], rounds, M, method=method, max_new_tokens=N)
    assert run.latent_steps == 0
    assert set(run.texts) == {(turn, "solver") for turn in range(1, turns + 1)}
    for b, question in enumerate(QUESTIONS[:3]):
        user, count = f"{question}\n{ANSWER_FORMAT['math']}", 0
        for turn in range(1, turns + 1):
            own = f"{user}\nplan: {last}" if turn > 1 else user + "\nplan:" * hears_itself
            ids = plain_write(solver, embed_words(solver, words(chat(own))), N)
            last, count = text_from(solver, ids), count + len(ids)
            assert run.texts[turn, "solver"][b] == last
        assert texts[b] == last and run.decoded[b] == count


@pytest.mark.parametrize("method", METHODS)
def test_a_question_that_looks_like_a_slot_is_plain_text(mas, method):
    """Its words are unknown to the vocabulary, so the answer is that to as many unknown words."""
    odd = ["start {solver} {planner}", "{question} {answer_format} {critic}"]
    options = dict(method=method, max_new_tokens=5, brief=3)
    texts, _ = respond(mas, odd, 2, M, **options)
    assert texts == respond(mas, ["start ?! ?!", "?! ?! ?!"], 2, M, **options)[0]


def test_the_beginning_of_a_prompt_is_read_once(monkeypatch):
    """Also in words, where this tokenizer joins the blank before a slot with the text in it. So the
    last tokens of the beginning are not kept. Rounds 2 and 3 read less than the question."""
    agents = {"a": byte_caller("qwen3", 1, joined=True), "b": byte_caller("qwen3", 2, joined=True)}
    [one], [joined] = agents["b"].tokenize(["? "]), agents["b"].tokenize(["? x"])
    assert len(one) == len(joined) == 2 and one[1] != joined[1]
    outer = torch.nn.ModuleDict({key: randomise(OuterLink(32, 32), 0.1) for key in ("ab", "ba")})
    mas = MAS(made_style("equals"), agents, outer)
    shapes = spy_on_reading(agents["b"], monkeypatch)
    for method in ("latent", "text"):
        shapes.clear()
        respond(mas, ["how much is it " * 4, "and what is this " * 4], 3, 4, method=method,
                max_new_tokens=4)
        beginning, *rest = [length for _, length in shapes if length > 1]
        assert beginning > 50 and len(rest) == 3 and max(rest) < beginning / 2


# ---- requests -----------------------------------------------------------------------------------

def test_a_request_is_completed(mas):
    """By what the links were trained with, else by 3 and 32. A Request is taken as it is."""
    request = mas.request(QUESTIONS[:3], kind=["math", "code", "math"])
    assert (request.rounds, request.latent_length, request.method) == (3, 32, "latent")
    assert request.columns == [{}, {}, {}]
    picked = request.pick([1, 0, 1])
    assert picked.questions == [QUESTIONS[b] for b in (1, 0, 1)]
    assert picked.kinds == ["code", "math", "code"] and len(picked.columns) == 3
    trained = dataclasses.replace(mas, rounds=2, latent_length=5)
    request = trained.request(QUESTIONS[:2])
    assert (request.rounds, request.latent_length, request.kinds) == (2, 5, ["math", "math"])
    assert trained.request(QUESTIONS[:2], 1, 7).latent_length == 7
    assert mas.request(request) is request


@pytest.mark.parametrize("case", lines_of("refused_requests.jsonl"), ids=str)
def test_requests_that_cannot_be_served(mas, case):
    """batch_size is an argument of MAS.answer. All others go to MAS.respond, in small batches."""
    request = {"questions": QUESTIONS[:2], "rounds": 2, "latent_length": M, **case["request"]}
    with refuses(*case["named"]) as problem:
        mas.answer(**request) if "batch_size" in request else respond(mas, **request)
    assert "--" not in str(problem.value)


# ---- loading ------------------------------------------------------------------------------------

def test_a_loaded_system_is_frozen_in_any_precision(shipped):
    """Frozen models in half precision, links in float32. The first thoughts are nearly the same.
    Later ones drift apart, because a rollout amplifies rounding."""
    half = load_mas_system("tiny", device="cpu", dtype="bfloat16")
    for mas in (shipped, half):
        links = [mas.outer, *(agent.inner for agent in mas.agents.values())]
        weights = [weight for part in links for weight in part.parameters()]
        assert {weight.dtype for weight in weights} == {torch.float32}
        weights += [weight for agent in mas.agents.values() for weight in agent.model.parameters()]
        assert not any(weight.requires_grad for weight in weights)
    runs = [respond(mas, QUESTIONS, 2, M, trace=True, max_new_tokens=2)[1]
            for mas in (shipped, half)]
    latents = [*runs[1].thoughts.values(), *runs[1].sent.values()]
    assert {value.dtype for value in latents} == {torch.bfloat16}
    assert all(value.isfinite().all() for value in latents)
    wanted, first = (run.thoughts[1, "planner"][:, 0].double() for run in runs)
    assert (first - wanted).norm() < 0.05 * wanted.norm()


def test_fresh_outer_links(mas):
    """Of the right widths, their gain the target's embedding RMS, the same for the same seed."""
    fresh, again = mas.with_fresh_outer(seed=3), mas.with_fresh_outer(seed=3)
    other, plain = mas.with_fresh_outer(seed=4), mas.with_fresh_outer(scale_match=False)
    assert all(map(torch.equal, fresh.outer.parameters(), again.outer.parameters()))
    for edge in mas.style.edges:
        link, target = fresh.outer[edge.key], mas.agents[edge.dst]
        assert link.widths == (mas.agents[edge.src].width, target.width)
        gain = target.embedding_rms
        assert torch.allclose(link.ln_target.weight, torch.full((target.width,), gain))
        assert torch.equal(plain.outer[edge.key].ln_target.weight, torch.ones(target.width))
        assert not torch.equal(link.proj1.weight, other.outer[edge.key].proj1.weight)
    assert fresh.agents is mas.agents and fresh.outer is not mas.outer
    torch.manual_seed(3)
    mas.with_fresh_outer(seed=5)                    # the caller's random numbers go on undisturbed
    link = OuterLink(mas.agents["planner"].width, mas.agents["critic"].width)
    assert torch.equal(link.proj1.weight, fresh.outer["outer_12"].proj1.weight)


def test_new_inner_links_do_not_reset_the_random_numbers():
    tiny, drawn = get_style("tiny"), set()
    roles = [dataclasses.replace(role, repo="") for role in tiny.roles]
    for seed in (3, 4):
        torch.manual_seed(seed)
        load_mas_system(dataclasses.replace(tiny, roles=roles), "cpu", need_links=False)
        drawn.add(torch.rand(1).item())
    assert len(drawn) == 2


def test_an_inner_link_without_parameters(mas, monkeypatch):
    for agent in mas.agents.values():
        monkeypatch.setattr(agent, "inner", torch.nn.Identity())
    _, run = respond(mas, QUESTIONS[:1], 2, M, trace=True, max_new_tokens=1)
    assert_as_plain(run, 0, *plain_recursion(mas, QUESTIONS[0], 2, M)[:2])


# ---- several answers to a question --------------------------------------------------------------

SAMPLED = dict(temperature=1.0, top_p=0.95, max_new_tokens=N)


def drawn_alone(agent, role, round, question, k, heard):
    """Sample k of a text, drawn by itself: the question read as a batch of one, in one call of
    Agent.write with the seed of this sample: (token ids, text)."""
    prompt = embedded(agent, role, question, heard)
    context = agent.read(prompt, torch.ones(1, prompt.shape[1], dtype=torch.long))
    seed = text_seed(text_seed(42, role, round, question, k), 0)
    [ids] = agent.write(context, N, Sampling(1.0, 0.95).choose, [seed])
    return ids, text_from(agent, ids)


@pytest.mark.parametrize("method", ["latent", "single"])
def test_samples_are_single_draws(mas, method):
    """Three per question from one reading = drawn one by one after the plain recursion."""
    texts, run = respond(mas, QUESTIONS[:3], 2, M, method=method, samples=3, **SAMPLED)
    for b, question in enumerate(QUESTIONS[:3]):
        rounds, heard = 1, {}
        if method == "latent":
            _, sent, _ = plain_recursion(mas, question, 2, M, 1)
            rounds, heard = 2, {"planner": sent[2, "outer_13"][0], "critic": sent[2, "outer_23"][0]}
        alone = [drawn_alone(mas.agents["solver"], "solver", rounds, question, k, heard)
                 for k in range(3)]
        mine = texts[3 * b:3 * b + 3]
        assert mine == [text for _, text in alone] and len(set(mine)) > 1
        assert run.decoded[b] == sum(len(ids) for ids, _ in alone)
    assert len(texts) == 9 and run.latent_steps == (5 * M if method == "latent" else 0)


def test_samples_in_words_are_runs_of_their_own(mas):
    """Already the first message differs by sample, and what follows is said to that message.
    Oracle: prompts with the run's own messages, read as plain words."""
    texts, run = respond(mas, QUESTIONS[:2], 1, M, method="text", samples=3, **SAMPLED)
    plans = run.texts[1, "planner"]
    assert len(set(plans[:3])) > 1 and len(set(plans[3:])) > 1
    for i, plan in enumerate(plans):
        _, said = drawn_alone(mas.agents["critic"], "critic", 1, QUESTIONS[i // 3], i % 3,
                              {"planner": plan})
        assert run.texts[1, "critic"][i] == said
    assert texts == run.texts[1, "solver"]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "shuffle"])
def test_samples_do_not_depend_on_company(mas, method):
    """Sample k is the same in any batch and order, and for any K. All questions differ in kind."""
    kinds = dict(zip(QUESTIONS, ("math", "search", "choice")))

    def ask(questions, samples):
        texts, run = respond(mas, questions, 2, 2, method=method, samples=samples, brief=2,
                             kind=[kinds[question] for question in questions],
                             **{**SAMPLED, "max_new_tokens": 4})
        assert len(texts) == samples * len(questions) == samples * len(run.decoded)
        return {question: (texts[b * samples:(b + 1) * samples], run.decoded[b])
                for b, question in enumerate(questions)}

    many = ask(QUESTIONS[:3], 3)
    assert any(len(set(texts)) > 1 for texts, _ in many.values())
    assert ask(QUESTIONS[2::-1], 3) == many
    assert ask(QUESTIONS[:1], 3)[QUESTIONS[0]] == many[QUESTIONS[0]]
    for count in (1, 2):
        assert all(texts == many[question][0][:count] for question, (texts, _) in
                   ask(QUESTIONS[:2], count).items())


def test_greedy_samples_are_equal(mas):
    """And cost as many times the tokens."""
    for method in ("shuffle", "text"):
        once, run_once = respond(mas, QUESTIONS[:3], 2, 2, method=method, max_new_tokens=4)
        texts, run = respond(mas, QUESTIONS[:3], 2, 2, method=method, samples=3, max_new_tokens=4)
        assert texts == [text for text in once for _ in range(3)]
        assert run.decoded == [3 * count for count in run_once.decoded]


# ---- the tool loop ------------------------------------------------------------------------------

SIX_TIMES_SEVEN = "<python>print(6*7)</python>"
FORTY_TWO = "\n<result>\n42\n</result>\n"
both_families = pytest.mark.parametrize("helped", ["qwen3", "qwen3_5"], indirect=True)


@pytest.fixture(params=["qwen3", pytest.param("qwen3_5", marks=pytest.mark.slow)])
def helped(request):
    return scripted_mas(request.param)


def heard_prompt(mas, method, question, run, b):
    """What the caller reads before it writes, embedded by hand: (1, T, d)."""
    caller = mas.agents["caller"]

    def embed(text):
        return embed_words(caller, caller.tokenizer(text)["input_ids"])

    if method == "text":
        return embed(f"{question}\n[{run.texts[1, 'helper'][b]}] so>")
    return torch.cat([embed(f"{question}\n["), run.sent[1, "hc"][b:b + 1], embed("] so>")], 1)


@both_families
@pytest.mark.parametrize("method", ["latent", "text"])
def test_a_call_is_run_and_the_text_goes_on(helped, method):
    """The first text calls and goes on, the second does not. Oracle for what follows the result:
    everything read again without cache, prompt, call and result."""
    helped.script = [[f"so {SIX_TIMES_SEVEN}", "plain"], [None]]
    questions = ["6 by 7?", "what else is there?"]
    texts, run = respond(helped, questions, 1, 3, method=method, trace=True, max_new_tokens=40)
    caller = helped.agents["caller"]
    told = caller.tokenizer(f"so {SIX_TIMES_SEVEN}{FORTY_TWO}")["input_ids"]
    written = len(f"so {SIX_TIMES_SEVEN}")
    embeds = torch.cat([heard_prompt(helped, method, questions[0], run, 0),
                        embed_words(caller, told)], 1)
    wanted = plain_write(caller, embeds, 40 - written)
    assert run.drafts[0].tokens == told + wanted
    assert texts == [text_from(caller, told + wanted), "plain"]
    helpers = [0, 0]
    if method == "text":
        agent = helped.agents["helper"]
        helpers = [len(plain_write(agent, embed_words(
            agent, agent.tokenizer(f"{question}>")["input_ids"]), 40)) for question in questions]
    assert run.decoded == [written + len(wanted) + helpers[0], 6 + helpers[1]]
    assert helped.calls == [2, 1]


@both_families
def test_sampled_calls_do_not_depend_on_the_batch(helped):
    """What is drawn after a result. The texts have budgets and lengths of their own."""
    sampled = dict(temperature=1.0, max_new_tokens=50, seed=3)
    wrote = ["<python>print(10**20)</python>", SIX_TIMES_SEVEN, "x" * 20 + SIX_TIMES_SEVEN]
    questions = ["a", "what is it?", "and how?"]
    helped.script = [list(wrote), [None] * 3]
    together, run = respond(helped, questions, 1, 2, **sampled)
    assert len({len(draft.tokens) for draft in run.drafts}) > 1
    for b, question in enumerate(questions):
        helped.script = [[wrote[b]], [None]]
        alone, run_alone = respond(helped, [question], 1, 2, **sampled)
        assert alone == [together[b]] and run_alone.decoded == [run.decoded[b]]


@pytest.mark.parametrize("case", lines_of("calls.jsonl"), ids=lambda case: case["why"])
def test_what_is_a_call_and_what_goes_on(helped, case):
    """script: what the caller writes in each call, text by text. answers: what the search finds."""
    asked = []

    def find(query):
        asked.append(query)
        if query not in case["answers"]:
            raise ServiceError("host: HTTP 500")
        return case["answers"][query]

    style = dataclasses.replace(HELPED, tools=tuple(case.get("tools", HELPED.tools)))
    mas = dataclasses.replace(helped, style=style, search=find if "answers" in case else None)
    helped.script, samples = [[*texts] for texts in case["script"]], case.get("samples", 1)
    questions = list("abcd")[:len(case["texts"]) // samples]
    texts, run = respond(mas, questions, 1, 2, samples=samples,
                         max_new_tokens=case.get("max_new_tokens", 99))
    assert texts == case["texts"] and run.decoded == case["decoded"]
    assert sorted(asked) == sorted(case.get("asked", []))
    assert helped.calls == [len(texts) for texts in case["script"]]


def test_end_tokens_and_inserted_texts(helped):
    """insert() takes the place of all end tokens. A page's text must not become an end token."""
    helped.search = lambda query: "page <eos> text"
    helped.script = [["<search>x</search>"], ["words"]]
    _, run = respond(helped, ["a"], 1, 2, max_new_tokens=99)
    turn, [draft] = run.last_turn, run.drafts
    assert draft.tokens[-1] == 256 and 256 not in draft.tokens[:-1]
    assert "page <eos> text" in text_of(turn, draft)
    draft.tokens = draft.tokens + [256]
    insert(turn, draft, "more")
    assert text_of(turn, draft).endswith("wordsmore") and 256 not in draft.tokens

"""The recursion against reference.py: one question at a time, no cache, no padding, no batch.
Prompts are put together here by string operations."""
import dataclasses
import re
from unittest import mock

import pytest
import torch
from conftest import (QUESTIONS, THREE, byte_tokenizer, chat, embed_words, inner_equation,
                      largest_difference, new_agent, new_mas, new_model, outer_equation,
                      plain_write, randomise, words)

import reference
import writing as writing_module
from agents import Agent
from link import InnerLink, OuterLink
from recurse import LATENT, MAS, WORDS, chunks, load_mas_system, recurse
from styles import ANSWER_FORMAT, Edge, Role, Style
from support.checkpoints import local_folder, save_inner, save_outer
from support.sampling import Sampling
from support.web import ServiceError
from writing import Writing, insert, text_of, text_seed

METHODS = LATENT + WORDS
M = 4                               # latent steps
N = 8                               # new words of an answer
CLOSE = 1e-4
ROLES = ("planner", "critic", "solver")


def respond(mas, questions, rounds, latent_length, kind="math", method="latent", trace=False,
            temperature=0.0, top_p=1.0, **options):
    """mas.respond, with the fields of Writing and Sampling as options."""
    writing = Writing(sampling=Sampling(temperature, top_p), **options)
    return mas.respond(questions, rounds, latent_length, kind, method, trace, writing)


# ---- the plain recursion ------------------------------------------------------------------------

def user_text(name, heard):
    """What a role of THREE is asked, question and answer format still open: facts of the style."""
    if name == "planner" and not heard:
        return "plan: {question} <|notes|> none"
    lines = {"planner": ["{question} <|notes|> {solver}", "mend it {answer_format}"],
             "critic": ["{question}", "notes: {planner}", "own: {solver} .", "check: it"],
             "solver": ["{question}", "notes: {critic} and", "{answer_format}", "plan: {planner}"]}
    kept = [line for line in lines[name]
            if all("{" + role + "}" not in line or role in heard for role in ROLES)]
    return "\n".join(kept)


def prompt_parts(name, question, heard):
    """The prompt of one question as reference.py takes it. heard: {role: (m, d) or a text}."""
    text = chat(user_text(name, heard)).replace("{question}", question)
    text = text.replace("{answer_format}", ANSWER_FORMAT["math"])
    pieces = re.split("{(planner|critic|solver)}", text)               # text, slot, text, ..
    return [heard[piece] if i % 2 else piece for i, piece in enumerate(pieces)]


def embedded(agent, name, question, heard):
    """The prompt of one question as one row of embeddings (1, T, d)."""
    return reference.embed(agent, prompt_parts(name, question, heard))[None]


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
            mas, lambda role, heard: prompt_parts(role.name, question, heard), rounds, m)
    return (thoughts, {key: message[None] for key, message in sent.items()},
            reference.write(agent, embeds, count))


def plain_texts(mas, question, rounds, briefs=None):
    """({(round, role): text}, tokens written in all) of agents that exchange words."""
    texts, count, heard = {}, 0, {name: {} for name in ROLES}
    for r in range(1, rounds + 1):
        for name in ROLES:
            agent, last = mas.agents[name], r == rounds and name == "solver"
            ids = plain_write(agent, embedded(agent, name, question, heard[name]),
                              N if last or not briefs else briefs)
            texts[r, name] = agent.tokenizer.decode(ids, skip_special_tokens=True).strip()
            count += len(ids)
            for edge in mas.style.edges:
                if edge.src == name:
                    heard[edge.dst][name] = texts[r, name]
    return texts, count


@pytest.fixture(scope="module")
def plain(mas):
    """The plain recursion of every question, with one round and with three."""
    return {rounds: [plain_recursion(mas, question, rounds, M) for question in QUESTIONS]
            for rounds in (1, 3)}


def assert_as_plain(run, row, thoughts, sent):
    """One row of a Run has the plain recursion's thoughts and messages, all and only those."""
    assert set(run.thoughts) == set(thoughts) and set(run.sent) == set(sent)
    for key, wanted in thoughts.items():
        assert largest_difference(run.thoughts[key][row:row + 1], wanted) < CLOSE, key
    for key, wanted in sent.items():
        assert largest_difference(run.sent[key][row:row + 1], wanted) < CLOSE, key


# ---- latents ------------------------------------------------------------------------------------

@pytest.mark.parametrize("rounds", [1, 3])
def test_latent_is_the_plain_recursion(mas, plain, rounds):
    """Thoughts, messages and final words: a batch of five, and one by one."""
    texts, run = respond(mas, QUESTIONS, rounds, M, trace=True, max_new_tokens=N)
    assert len(run.thoughts) == 3 * rounds - 1 and len(set(texts)) > 1
    for b, (question, (thoughts, sent, ids)) in enumerate(zip(QUESTIONS, plain[rounds])):
        wanted = mas.agents["solver"].tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert texts[b] == wanted and run.decoded[b] == len(ids)
        assert_as_plain(run, b, thoughts, sent)
        alone, run_alone = respond(mas, [question], rounds, M, trace=True, max_new_tokens=N)
        assert alone == [wanted]
        assert_as_plain(run_alone, 0, thoughts, sent)


def test_what_is_heard_matters(plain):
    """Else the test above could not see a wrong message: rounds and questions differ."""
    for thoughts, sent, _ in plain[3]:
        for name in ROLES:
            assert largest_difference(thoughts[1, name], thoughts[2, name]) > 0.01
        for edge in THREE.edges:
            assert largest_difference(sent[1, edge.key], sent[2, edge.key]) > 0.01
    a, b = plain[3][0][0][1, "solver"], plain[3][1][0][1, "solver"]
    assert largest_difference(a, b) > 0.01


def test_recurse_leaves_the_last_turn_to_the_caller(mas, plain):
    """What it hands over ends on the state that the last role's words start from."""
    with torch.no_grad():
        run = recurse(mas, QUESTIONS, 3, M)
        turn = run.last_turn
        agent, context = turn.agent, turn.read()
    assert (agent, turn.role, turn.round) == (mas.agents["solver"], "solver", 3)
    assert run.thoughts == {} and run.sent == {}              # no trace was asked for
    for b, (_, _, ids) in enumerate(plain[3]):
        assert int(agent.head(context.hidden[b, -1]).argmax()) == ids[0]


def test_counts(mas):
    """latent_steps: a question's thoughts over all turns but the last; decoded: the answer's."""
    for rounds in (1, 2):
        _, run = respond(mas, QUESTIONS[:2], rounds, M, max_new_tokens=N)
        assert run.latent_steps == (3 * rounds - 1) * M
        assert all(1 <= count <= N for count in run.decoded)
        assert set(run.texts) == {(rounds, "solver")}


def test_answer_does_not_depend_on_the_batch(mas):
    """Greedy and sampled: batches of one, of two and of all; and another seed says other words."""
    for options in ({}, {"temperature": 1.0, "top_p": 0.95}):
        options.update(rounds=2, latent_length=M, max_new_tokens=N)
        every = mas.answer(QUESTIONS, batch_size=5, **options)
        for size in (1, 2):
            assert mas.answer(QUESTIONS, batch_size=size, **options) == every
    assert mas.answer(QUESTIONS, seed=7, **options) != every


def test_chunks():
    assert chunks([1, 2, 3, 4, 5], 4) == [[1, 2], [3, 4, 5]]
    assert chunks([], 4) == [] and chunks([1, 2], 5) == [[1, 2]]


def test_take_turn_takes_the_place_of_thinking(mas):
    """A trainer's hook: it is called for every turn but the last, and what it returns is sent."""
    seen = []

    def take_turn(turn):
        assert turn.agent is mas.agents[turn.role]
        seen.append((turn.round, turn.role, turn.read().hidden.shape))
        return torch.full((2, 3, turn.agent.width), float(turn.round))

    with torch.no_grad():
        run = recurse(mas, QUESTIONS[:2], 2, M, take_turn=take_turn, trace=True)
    assert [(number, name) for number, name, _ in seen] == [
        (1, "planner"), (1, "critic"), (1, "solver"), (2, "planner"), (2, "critic")]
    source = mas.agents["solver"]
    for (_, name, shape) in seen:
        assert shape == (2, 1, mas.agents[name].width)
    wanted = outer_equation(mas.outer["outer_31"],
                            inner_equation(source.inner, torch.ones(2, 3, source.width)))
    assert largest_difference(run.sent[1, "outer_31"], wanted) < CLOSE


def test_a_turn_may_be_read_again_later(mas):
    """Gradient checkpointing calls read() a second time, when all has been heard: same prompt."""
    turns = []

    def take_turn(turn):
        turns.append((turn.read, turn.read()))
        return turn.agent.think(turns[-1][1], 2)

    with torch.no_grad():
        recurse(mas, QUESTIONS[:3], 3, 2, take_turn=take_turn)
        for read, first in turns:
            second = read()
            assert torch.equal(first.mask, second.mask) and torch.equal(first.hidden, second.hidden)


def test_rows_may_think_for_different_lengths(mas):
    """H may be a list, one tensor a row: as each question by itself."""
    lengths = [2, 4, 1]

    def take_turn(turn):
        H = turn.agent.think(turn.read(), 4)
        return [row[:m] for row, m in zip(H, lengths)]

    with torch.no_grad():
        run = recurse(mas, QUESTIONS[:3], 2, 4, take_turn=take_turn)
        together = run.last_turn.read().hidden
    for b, m in enumerate(lengths):
        with torch.no_grad():
            alone = recurse(mas, QUESTIONS[b:b + 1], 2, m).last_turn.read().hidden
        assert largest_difference(together[b:b + 1], alone) < CLOSE


def test_gradients_reach_all_links_through_rounds():
    """Outer links' gradients of an answer's loss at R = 2: batch and cache = plain, one by one.

    Prompts read once and reused carry no gradient; they are constants, so nothing may be lost."""
    mas, targets = new_mas(), [words("answer 0 ."), words("answer 7")]
    mas.outer.requires_grad_(True)
    names, parameters = zip(*mas.outer.named_parameters())
    run = recurse(mas, QUESTIONS[:2], 2, 2)
    losses = run.last_turn.agent.answer_loss(run.last_turn.read(), targets)
    assert [len(of_row) for of_row in losses] == [3, 2]
    loss = torch.cat(list(losses)).sum()
    got = torch.autograd.grad(loss, parameters)
    plain = 0
    for question, target in zip(QUESTIONS, targets):
        agent, prompt, _ = reference.recurse(
            mas, lambda role, heard: prompt_parts(role.name, question, heard), 2, 2)
        row = torch.cat([prompt, embed_words(agent, target)[0]])
        logits = agent.model(inputs_embeds=row[None]).logits[0, len(prompt) - 1:-1]
        plain = plain + torch.nn.functional.cross_entropy(logits, torch.tensor(target),
                                                          reduction="sum")
    wanted = torch.autograd.grad(plain, parameters)
    assert abs(loss - plain) < CLOSE * 10
    for name, a, b in zip(names, got, wanted):
        assert b.abs().max() > 0, name
        assert largest_difference(a, b) < CLOSE * max(1.0, b.abs().max().item()), name


# ---- controls -----------------------------------------------------------------------------------

def test_zero_sends_zeros(mas):
    """And the roles behind hear them: = a plain recursion with zeros in the slots."""
    texts, run = respond(mas, QUESTIONS, 2, M, method="zero", trace=True, max_new_tokens=N)
    for (_, key), message in run.sent.items():
        edge = next(edge for edge in mas.style.edges if edge.key == key)
        assert message.shape == (5, M, mas.agents[edge.dst].width) and not message.any()
    solver = mas.agents["solver"]
    zeros = torch.zeros(M, solver.width)
    for question, text in zip(QUESTIONS, texts):
        row = embedded(solver, "solver", question, {"planner": zeros, "critic": zeros})
        assert text == solver.tokenizer.decode(plain_write(solver, row, N),
                                               skip_special_tokens=True).strip()


@pytest.mark.parametrize("count", [2, 3, 5])
def test_shuffle_sends_anothers(mas, count):
    """Row b gets what some other row of its batch would have sent, never its own."""
    _, run = respond(mas, QUESTIONS[:count], 2, M, method="shuffle", trace=True, max_new_tokens=1)
    for (number, key), message in run.sent.items():
        edge = next(edge for edge in mas.style.edges if edge.key == key)
        H = run.thoughts[number, edge.src]
        own = outer_equation(mas.outer[key], inner_equation(mas.agents[edge.src].inner, H))
        taken = []
        for b in range(count):
            near = [c for c in range(count) if (message[b] - own[c]).abs().max() < CLOSE]
            assert len(near) == 1 and near != [b]
            taken += near
        assert sorted(taken) == list(range(count))


def test_shuffle_needs_two_questions(mas):
    with pytest.raises(ValueError, match="two questions"):
        respond(mas, QUESTIONS[:1], 2, M, method="shuffle")


# ---- words --------------------------------------------------------------------------------------

@pytest.mark.parametrize("method, brief", [("text", None), ("text_brief", 3)])
def test_text_is_a_plain_loop_of_writing(mas, method, brief):
    """Every text of every turn, and how many tokens it took; brief: all messages but the answer
    are cut."""
    texts, run = respond(mas, QUESTIONS, 2, M, method=method, max_new_tokens=N, brief=brief)
    assert run.latent_steps == 0
    for b, question in enumerate(QUESTIONS):
        wanted, count = plain_texts(mas, question, 2, brief)
        assert {key: said[b] for key, said in run.texts.items()} == wanted
        assert texts[b] == wanted[2, "solver"] and run.decoded[b] == count
    if brief:
        assert max(len(words(text)) for text in run.texts[1, "planner"]) <= brief
        assert max(len(words(text)) for text in texts) > brief


def test_text_brief_never_lengthens(mas):
    """A brief length above max_new_tokens does not count."""
    _, run = respond(mas, QUESTIONS[:2], 1, M, method="text_brief", max_new_tokens=2, brief=50)
    assert max(run.decoded) <= 6


def test_text_sampled_does_not_depend_on_the_batch(mas):
    options = dict(rounds=2, latent_length=M, method="text", max_new_tokens=5, temperature=1.0)
    every = mas.answer(QUESTIONS[:3], **options)
    assert every == mas.answer(QUESTIONS[:3], batch_size=1, **options)


def test_every_text_has_its_own_seed(mas, monkeypatch):
    """All differ over rounds, roles, questions and seeds; the same request draws them again."""
    seen = []
    for agent in mas.agents.values():
        def write(context, limit, sampling, seeds, stop, real=agent.write):
            seen.extend(seeds)
            return real(context, limit, sampling, seeds, stop)
        monkeypatch.setattr(agent, "write", write)
    for seed in (1, 2, 1):
        respond(mas, QUESTIONS, 2, M, method="text", max_new_tokens=1, seed=seed)
    assert len(seen) == 3 * 6 * 5 and len(set(seen)) == 2 * 6 * 5 and seen[:30] == seen[60:]


def test_single_hears_nothing(mas):
    """The solver is asked its `first` prompt, once, whatever the number of rounds."""
    solver = mas.agents["solver"]
    for rounds in (1, 3):
        texts, run = respond(mas, QUESTIONS, rounds, M, method="single", max_new_tokens=N)
        assert run.latent_steps == 0 and set(run.texts) == {(1, "solver")}
        for b, question in enumerate(QUESTIONS):
            prompt = words(chat(f"{question}\n{ANSWER_FORMAT['math']}"))
            ids = plain_write(solver, embed_words(solver, prompt), N)
            assert texts[b] == solver.tokenizer.decode(ids, skip_special_tokens=True).strip()
            assert run.decoded[b] == len(ids)


def test_single_loop_hears_itself(mas):
    """The solver takes the turns of all roles, and is asked its `own` prompt from the second on."""
    solver = mas.agents["solver"]
    texts, run = respond(mas, QUESTIONS, 2, M, method="single_loop", max_new_tokens=N)
    assert set(run.texts) == {(turn, "solver") for turn in range(1, 2 * len(ROLES) + 1)}
    for b, question in enumerate(QUESTIONS):
        last, count = None, 0
        for turn in range(1, 7):
            user = f"{question}\n{ANSWER_FORMAT['math']}"
            if last is not None:
                user += f"\nplan: {last}"
            ids = plain_write(solver, embed_words(solver, words(chat(user))), N)
            last = solver.tokenizer.decode(ids, skip_special_tokens=True).strip()
            count += len(ids)
            assert run.texts[turn, "solver"][b] == last
        assert texts[b] == last and run.decoded[b] == count


def test_a_style_that_has_no_words_for_round_1_is_refused():
    """In round 1, b has heard a and not yet itself. Its `first` has no slot for a."""
    with pytest.raises(ValueError, match="role b has no `first` prompt for kind 'math' with a slot "
                                         r"for those heard there \({a}\)"):
        Style("pair", (Role("a", "random", "", "{question} {b}", first="{question}"),
                       Role("b", "random", "", "{question}\nnotes: {a} and {b}",
                            first="{question}", own="{question} {b}")),
              (Edge("ab", "a", "b"), Edge("ba", "b", "a"), Edge("bb", "b", "b")))


@pytest.mark.parametrize("method, missing", [("single", "first"), ("single_loop", "own")])
def test_a_baseline_needs_its_prompt(mas, method, missing):
    """Where the style has no words for it, one line says which prompt is missing."""
    *others, solver = THREE.roles
    style = dataclasses.replace(THREE, roles=(*others, dataclasses.replace(
        solver, **{missing: ""})))
    with pytest.raises(ValueError, match=f"role solver has no `{missing}` prompt") as problem:
        respond(dataclasses.replace(mas, style=style), QUESTIONS[:2], 1, M, method=method)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("method", METHODS)
def test_a_question_that_looks_like_a_slot_is_plain_text(mas, method):
    """Its words are unknown to the vocabulary, so the answer is that to as many unknown words."""
    odd = ["start {solver} {planner}", "{question} {answer_format} {critic}"]
    options = dict(method=method, max_new_tokens=5, brief=3)
    texts, _ = respond(mas, odd, 2, M, **options)
    assert texts == respond(mas, ["start ?! ?!", "?! ?! ?!"], 2, M, **options)[0]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"seed": 3}, {"stop": ("x",)},
                                     {"brief": 2, "method": "text_brief"}])
def test_respond_needs_no_options(options):
    """Each option has a default of its own, whatever else is given."""
    mas = new_mas()
    for agent in mas.agents.values():
        agent.end_tokens = set(range(agent.embedding.weight.shape[0]))      # one word and done
    _, run = respond(mas, QUESTIONS[:1], 1, M, **options)
    assert run.decoded == [3 if "brief" in options else 1]


# ---- errors -------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, named", [
    ({"latent_length": 0}, "latent length.*0"), ({"latent_length": -3}, "latent length.*-3"),
    ({"rounds": 0}, "rounds.*0"), ({"questions": []}, "no questions"),
    ({"questions": "one text"}, "list of texts.*write .question."),
    ({"questions": ["x", " "]}, "none of them empty"), ({"questions": ["x", 3]}, "list of texts"),
    ({"rounds": 1.5}, "whole numbers.*1.5"), ({"latent_length": "6"}, "whole numbers.*6"),
    ({"latent_length": 257}, "cannot think 257 latent thoughts"),
    ({"method": "telepathy"}, "telepathy.*latent.*single"), ({"method": "text_brief"}, "brief")])
def test_requests_that_cannot_be_served(mas, change, named):
    request = {"questions": QUESTIONS[:2], "rounds": 2, "latent_length": M, **change}
    with pytest.raises(ValueError, match=named) as problem:
        respond(mas, **request)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("options, named", [
    ({"temperature": float("nan")}, "temperature is at least 0"), ({"temperature": -1}, "not -1"),
    ({"temperature": float("inf")}, "not inf"), ({"top_p": 1.2}, "top_p.*1.2"),
    ({"top_p": float("nan")}, "top_p.*nan"), ({"max_new_tokens": 0}, "max_new_tokens.*0"),
    ({"batch_size": 0}, "batch_size.*0"), ({"questions": "one text"}, "write .question.")])
def test_options_of_answer_are_checked(mas, options, named):
    with pytest.raises(ValueError, match=named) as problem:
        mas.answer(**{"questions": QUESTIONS[:2], "rounds": 1, "latent_length": M, **options})
    assert "\n" not in str(problem.value) and "--" not in str(problem.value)


@pytest.mark.parametrize("options", [{"top_k": -1}, {"min_p": 2.0}, {"repetition_penalty": 0.0}])
def test_sampling_is_checked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="unknown task 'maths': choose one of math, choice"):
        load_mas_system("tiny", task="maths")


def test_a_prompt_beyond_the_models_positions_is_told_once(mas, capsys):
    agent = mas.agents["planner"]
    agent.positions = 20
    for length in (20, 21, 30):
        agent.read(torch.zeros(1, length, agent.width), torch.ones(1, length, dtype=torch.long))
        said = capsys.readouterr().out
        assert ("was made for texts of 20 tokens, and a prompt is longer" in said) == (length == 21)


def test_unknown_kind_of_question(mas):
    with pytest.raises(ValueError, match="poetry"):
        respond(mas, QUESTIONS[:2], 1, M, kind="poetry")


# ---- loading ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def saved(mas, tmp_path_factory):
    """The system in folders of the released layout: (its style, the folder)."""
    folder = tmp_path_factory.mktemp("system")
    roles = []
    for role in mas.style.roles:
        agent, repo = mas.agents[role.name], folder / role.name
        agent.model.save_pretrained(repo)
        agent.tokenizer.save_pretrained(repo)
        save_inner(agent.inner, repo)
        roles.append(dataclasses.replace(role, repo=str(repo)))
    save_outer(mas.outer, folder / "outer", "three")
    return dataclasses.replace(mas.style, roles=tuple(roles), repo=str(folder / "outer")), folder


def test_a_saved_system_answers_as_before(mas, saved):
    """load_mas_system gives the same thoughts, messages and texts to the last bit."""
    style, _ = saved
    loaded = load_mas_system(style, device="cpu")
    texts, run = respond(mas, QUESTIONS, 2, M, trace=True, max_new_tokens=N)
    again, run_again = respond(loaded, QUESTIONS, 2, M, trace=True, max_new_tokens=N)
    assert texts == again
    for key in run.thoughts:
        assert torch.equal(run.thoughts[key], run_again.thoughts[key])
    for key in run.sent:
        assert torch.equal(run.sent[key], run_again.sent[key])
    for agent in loaded.agents.values():
        assert not any(p.requires_grad for p in (*agent.model.parameters(),
                                                 *agent.inner.parameters()))
    assert not any(p.requires_grad for p in loaded.outer.parameters())
    assert loaded.style is style and set(loaded.outer) == {edge.key for edge in style.edges}


def test_a_system_in_bfloat16(mas, saved):
    """Frozen models in half precision, links in float32; the first thoughts are nearly the same.

    (Nearly: later ones drift apart, as rounding is amplified by the rollout.)"""
    loaded = load_mas_system(saved[0], device="cpu", dtype="bfloat16")
    _, run = respond(loaded, QUESTIONS, 2, M, trace=True, max_new_tokens=2)
    _, exact = respond(mas, QUESTIONS, 2, M, trace=True, max_new_tokens=2)
    assert {value.dtype for value in (*run.thoughts.values(), *run.sent.values())} == {
        torch.bfloat16}
    assert {p.dtype for agent in loaded.agents.values() for p in agent.inner.parameters()} == {
        torch.float32}
    first, wanted = run.thoughts[1, "planner"][:, 0].float(), exact.thoughts[1, "planner"][:, 0]
    assert (first - wanted).norm() < 0.05 * wanted.norm()
    assert all(value.isfinite().all() for value in (*run.thoughts.values(), *run.sent.values()))


def test_links_without_a_model_go_with_the_base_model(mas, saved, tmp_path):
    """A folder that only holds links, as train_inner writes it, and ckpt_override."""
    style, folder = saved
    link = new_agent("llama", seed=77).inner
    save_inner(link, tmp_path / "critic")
    roles = tuple(dataclasses.replace(role, model=role.repo, repo="no/such-repo")
                  if role.name == "critic" else role for role in style.roles)
    style = dataclasses.replace(style, roles=roles)
    override = {"critic": str(tmp_path / "critic")}
    loaded = load_mas_system(style, device="cpu", ckpt_override=override)
    model = mas.agents["critic"].model.state_dict()
    loaded_model = loaded.agents["critic"].model.state_dict()
    assert all(torch.equal(value, model[key]) for key, value in loaded_model.items())
    inner = loaded.agents["critic"].inner.state_dict()
    assert all(torch.equal(value, inner[key]) for key, value in link.state_dict().items())


def test_other_outer_links_by_override(mas, saved, tmp_path):
    style, _ = saved
    fresh = mas.with_fresh_outer(seed=3)
    save_outer(fresh.outer, tmp_path, "three")
    loaded = load_mas_system(style, device="cpu", ckpt_override={"outer": str(tmp_path)})
    for key, value in fresh.outer.state_dict().items():
        assert torch.equal(loaded.outer.state_dict()[key], value)


def test_fresh_outer_links(mas):
    """Of the right widths, their gain the target's embedding RMS, the same for the same seed."""
    fresh, again = mas.with_fresh_outer(seed=3), mas.with_fresh_outer(seed=3)
    other, plain = mas.with_fresh_outer(seed=4), mas.with_fresh_outer(scale_match=False)
    for edge in mas.style.edges:
        link, target = fresh.outer[edge.key], mas.agents[edge.dst]
        assert link.widths == (mas.agents[edge.src].width, target.width)
        gain = target.embedding_rms
        assert torch.allclose(link.ln_target.weight, torch.full((target.width,), gain))
        assert torch.equal(plain.outer[edge.key].ln_target.weight, torch.ones(target.width))
        assert torch.equal(link.proj1.weight, again.outer[edge.key].proj1.weight)
        assert not torch.equal(link.proj1.weight, other.outer[edge.key].proj1.weight)
    assert fresh.agents is mas.agents and fresh.outer is not mas.outer


def test_load_errors(saved, tmp_path):
    """Each is one line that names what is wrong."""
    style, folder = saved
    missing = str(tmp_path / "nowhere")
    cases = [(ValueError, "no_such_style", {}, "no_such_style"),
             (ValueError, style, {"ckpt_override": {"poet": missing}}, "poet"),
             (FileNotFoundError, style, {"ckpt_override": {"critic": missing}}, missing),
             (FileNotFoundError, style, {"ckpt_override": {"outer": missing}}, missing),
             (FileNotFoundError, dataclasses.replace(style, repo="no/repo"), {}, "no/repo"),
             (FileNotFoundError, dataclasses.replace(style, repo=str(folder / "critic")), {},
              "outerlink_config.json"),
             (ValueError, style, {"device": "toaster"}, "toaster"),
             (ValueError, style, {"dtype": "float12"}, "float12")]
    for error, style_or_name, arguments, named in cases:
        with pytest.raises(error) as problem:
            load_mas_system(style_or_name, **{"device": "cpu", **arguments})
        assert named in str(problem.value) and "\n" not in str(problem.value)


def test_links_of_other_models_are_refused(saved):
    """Two roles' folders exchanged: the style's edges no longer fit the released widths."""
    style, folder = saved
    override = {"planner": str(folder / "critic"), "critic": str(folder / "planner")}
    with pytest.raises(ValueError, match="outerlink_config.json.*outer_12"):
        load_mas_system(style, device="cpu", ckpt_override=override)


def test_local_folder():
    """As given, or within the project, or not to be had."""
    assert (local_folder("styles") / "__init__.py").is_file()
    for name in ("no/such", "not a repo id at all", "/no/such/folder"):
        with pytest.raises(FileNotFoundError) as problem:
            local_folder(name)
        assert name in str(problem.value) and "\n" not in str(problem.value)


# ---- several answers to a question --------------------------------------------------------------

SAMPLED = dict(temperature=1.0, top_p=0.95, max_new_tokens=N)


def drawn_alone(mas, method, question, k, seed=42):
    """Ids of sample k, drawn by itself: the question read as a batch of one, from the plain
    recursion's messages, in one call of Agent.write with the seed of this sample."""
    agent, rounds = mas.agents["solver"], 1 if method == "single" else 2
    heard = {}
    if method == "latent":
        _, sent, _ = plain_recursion(mas, question, 2, M, 1)
        heard = {"planner": sent[2, "outer_13"][0], "critic": sent[2, "outer_23"][0]}
    row = embedded(agent, "solver", question, heard)
    context = agent.read(row, torch.ones(1, row.shape[1], dtype=torch.long))
    first = text_seed(text_seed(seed, "solver", rounds, question, k), 0)
    return agent.write(context, N, Sampling(1.0, 0.95), [first])[0]


@pytest.mark.parametrize("method", ["latent", "single"])
def test_samples_are_single_draws(mas, method):
    """Three a question from one reading = drawn one by one after the plain recursion."""
    texts, run = respond(mas, QUESTIONS[:3], 2, M, method=method, samples=3, **SAMPLED)
    decode = mas.agents["solver"].tokenizer.decode
    for b, question in enumerate(QUESTIONS[:3]):
        alone = [drawn_alone(mas, method, question, k) for k in range(3)]
        mine = texts[3 * b:3 * b + 3]
        assert mine == [decode(ids, skip_special_tokens=True).strip() for ids in alone]
        assert run.decoded[b] == sum(map(len, alone)) and len(set(mine)) > 1
    assert len(texts) == 9 and run.latent_steps == (5 * M if method == "latent" else 0)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "shuffle"])
def test_samples_do_not_depend_on_company(mas, method):
    """Sample k of a question is the same in any batch, any order, and whatever K is."""
    def ask(questions, samples):
        texts, run = respond(mas, questions, 2, M, method=method, samples=samples, brief=3,
                                 **SAMPLED)
        assert len(texts) == samples * len(questions) == samples * len(run.decoded)
        return {question: (texts[b * samples:(b + 1) * samples], run.decoded[b])
                for b, question in enumerate(questions)}

    many = ask(QUESTIONS[:3], 4)
    assert any(len(set(texts)) > 1 for texts, _ in many.values())
    assert ask(QUESTIONS[2::-1], 4) == many
    for question in QUESTIONS[:2]:
        assert ask([question], 4)[question] == many[question]
        assert ask([question], 2)[question][0] == many[question][0][:2]
    assert all(texts == many[question][0][:1] for question, (texts, _) in
               ask(QUESTIONS[:3], 1).items())


def test_samples_in_words_are_runs_of_their_own(mas):
    """Already the first message differs by sample, and what follows is said to that message.
    Oracle: prompts with the run's own messages, read as plain words, greedy at the end."""
    questions = QUESTIONS[:2]
    texts, run = respond(mas, questions, 1, M, method="text", samples=3, **SAMPLED)
    for b in range(2):
        assert len(set(run.texts[1, "planner"][3 * b:3 * b + 3])) > 1
    critic, place = mas.agents["critic"], 0
    for question in questions:
        for k in range(3):
            row = embedded(critic, "critic", question, {"planner": run.texts[1, "planner"][place]})
            context = critic.read(row, torch.ones(1, row.shape[1], dtype=torch.long))
            seed = text_seed(text_seed(42, "critic", 1, question, k), 0)
            [said] = critic.write(context, N, Sampling(1.0, 0.95), [seed])
            said = critic.tokenizer.decode(said, skip_special_tokens=True).strip()
            assert run.texts[1, "critic"][place] == said
            place += 1
    assert texts == run.texts[1, "solver"]


@pytest.mark.parametrize("method", METHODS)
def test_greedy_samples_are_equal(mas, method):
    """And cost as many times the tokens; kinds may be mixed, a kind for each question."""
    kinds = ["math", "search", "choice"]
    options = dict(kind=kinds, method=method, brief=3, max_new_tokens=N)
    once, run_once = respond(mas, QUESTIONS[:3], 2, M, **options)
    texts, run = respond(mas, QUESTIONS[:3], 2, M, samples=3, **options)
    assert texts == [text for text in once for _ in range(3)]
    assert run.decoded == [3 * count for count in run_once.decoded]


@pytest.mark.parametrize("samples", [0, -1])
def test_no_samples_are_refused(mas, samples):
    with pytest.raises(ValueError, match="samples"):
        respond(mas, QUESTIONS[:2], 2, M, samples=samples, max_new_tokens=2)


# ---- the tool loop ------------------------------------------------------------------------------

BYTES = {**{f"byte {i}": i for i in range(256)}, "<eos>": 256, "<pad>": 257, "<bos>": 258,
         "on>.": 259}                                # a token that reaches beyond a closing tag
HELPED = Style("helped", (Role("helper", "random", "", "{question}", first="{question}"),
                          Role("caller", "random", "", "{question}\n[{helper}] so")),
               (Edge("hc", "helper", "caller"),), tools=("python", "search"))
SIX_TIMES_SEVEN = "<python>print(6*7)</python>"
FORTY_TWO = "\n<result>\n42\n</result>\n"


def byte_caller(family, seed):
    """An agent that spells: a byte is a token, and so is `on>.`"""
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}>")
    tokenizer.add_special_tokens({"eos_token": "<eos>", "pad_token": "<pad>", "bos_token": "<bos>"})
    tokenizer.add_tokens(["on>."])
    assert tokenizer.convert_tokens_to_ids(["<eos>", "on>."]) == [256, 259]
    agent = Agent(new_model(family, seed, BYTES, width=32), tokenizer)
    agent.inner = randomise(InnerLink(agent.width), agent.embedding_rms, seed)
    agent.inner.requires_grad_(False)
    return agent


@pytest.fixture(params=["qwen3", "qwen3_5"])
def helped(request, monkeypatch):
    """A system whose last agent has tools, and writes what it is told to."""
    return scripted_system(request.param, monkeypatch)


def scripted_system(family, monkeypatch):
    """A system over HELPED. Its script: what the caller writes, call by call of Agent.write and
    row by row; a text is spelled and then ended, None is left to the model."""
    agents = {"helper": byte_caller("llama", 5), "caller": byte_caller(family, 6)}
    outer = torch.nn.ModuleDict({"hc": randomise(OuterLink(32, 32), 0.1).requires_grad_(False)})
    mas = MAS(HELPED, agents, outer)
    mas.script, mas.calls, caller = [], [], agents["caller"]
    real = caller.write

    def spelled(text, limit, stop):
        """A text's bytes and an end (or the ids as given), up to after a stop string."""
        ids = caller.tokenizer(text)["input_ids"] + [256] if isinstance(text, str) else text
        for length in range(1, len(ids)):
            if any(tag in caller.tokenizer.decode(ids[:length]) for tag in stop):
                ids = ids[:length]
                break
        return ids[:limit]

    def scripted(context, limit, sampling=Sampling(), seeds=None, stop=()):
        texts = mas.script.pop(0) if mas.script else []
        texts = [*texts, *[None] * (len(context.mask) - len(texts))]
        free = [row for row, text in enumerate(texts) if text is None]
        written = {row: spelled(text, limit, stop) for row, text in enumerate(texts)
                   if text is not None}
        if free:
            ids = real(context.rows(free), limit, sampling, [seeds[row] for row in free], stop)
            written.update(zip(free, ids))
        mas.calls.append((len(texts), limit, [len(written[row]) for row in range(len(texts))]))
        return [written[row] for row in range(len(texts))]

    monkeypatch.setattr(caller, "write", scripted)
    return mas


def heard_prompt(mas, method, question, run, row):
    """What the caller reads before it writes, embedded by hand: (1, T, d)."""
    caller = mas.agents["caller"]

    def embed(text):
        return embed_words(caller, caller.tokenizer(text)["input_ids"])

    if method == "text":
        return embed(f"{question}\n[{run.texts[1, 'helper'][row]}] so>")
    return torch.cat([embed(f"{question}\n["), run.sent[1, "hc"][row:row + 1],
                      embed("] so>")], 1)


@pytest.mark.parametrize("method", ["latent", "text"])
def test_a_call_is_run_and_the_text_goes_on(helped, method):
    """Row 0 calls and goes on, row 1 does not; oracle for what follows the result: everything
    read again without cache, prompt, call and result."""
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
    assert texts[0] == caller.tokenizer.decode(told + wanted, skip_special_tokens=True).strip()
    assert texts[1] == "plain"
    helpers = [0, 0]
    if method == "text":
        agent = helped.agents["helper"]
        helpers = [len(plain_write(agent, embed_words(
            agent, agent.tokenizer(f"{question}>")["input_ids"]), 40)) for question in questions]
    assert run.decoded == [written + len(wanted) + helpers[0], 6 + helpers[1]]
    assert [rows for rows, _, _ in helped.calls] == [2, 1]


def test_at_most_five_calls_and_rows_leave(helped):
    """Row b calls b times; row 3 seven times, the last two of which are only words."""
    once = SIX_TIMES_SEVEN
    helped.script = [["done", once, once, once], ["done", once, once], ["done", once], [once],
                     [once], [once + " " + once + " end"]]
    texts, run = respond(helped, list("abcd"), 1, 2, max_new_tokens=400)
    assert [text.count("<result>") for text in texts] == [0, 1, 2, 5]
    assert texts[1] == (once + FORTY_TWO + "done").strip()
    assert texts[3] == (once + FORTY_TWO) * 5 + once + " " + once + " end"
    assert [rows for rows, _, _ in helped.calls] == [4, 3, 2, 1, 1, 1]
    assert run.decoded == [5, len(once) + 5, 2 * len(once) + 5, 7 * len(once) + 6]
    assert helped.script == []


@pytest.mark.parametrize("limit", [26, 27, 28, 30, 60])
def test_only_the_models_own_words_count(helped, limit):
    """A call of 27 tokens: cut off, with nothing left to go on, or with limit - 27 tokens left,
    whatever the results' length; each row has its own budget."""
    helped.script = [[SIX_TIMES_SEVEN, "x" * 9 + SIX_TIMES_SEVEN], ["y" * 200, "y" * 200]]
    texts, run = respond(helped, ["a", "b"], 1, 2, max_new_tokens=limit)
    for text, before in zip(texts, (0, 9)):
        wrote = "x" * before + SIX_TIMES_SEVEN
        left = max(0, limit - len(wrote))
        assert text == (wrote[:limit] if not left else wrote + FORTY_TWO + "y" * left)
    assert run.decoded == [limit, limit]
    assert all(max(lengths) <= asked for _, asked, lengths in helped.calls)


def test_a_token_beyond_the_closing_tag(helped):
    """It stays, and the result stands after it."""
    ids = helped.agents["caller"].tokenizer("<python>print(6*7)</pyth")["input_ids"] + [259]
    helped.script = [[ids], ["end"]]
    texts, run = respond(helped, ["a"], 1, 2, max_new_tokens=99)
    assert texts == [SIX_TIMES_SEVEN + "." + FORTY_TWO + "end"]
    assert run.decoded == [len(ids) + 4]


@pytest.mark.parametrize("text", ["<python>print(6*7)", "no call", "<python>a</search", ""])
def test_what_is_no_call_ends_the_text(helped, text):
    helped.script = [[text]]
    texts, run = respond(helped, ["a"], 1, 2, max_new_tokens=99)
    assert texts == [text] and run.decoded == [len(text) + 1] and len(helped.calls) == 1


@pytest.mark.parametrize("text", ["as </python> says, the answer is 5", "a</search> b",
                                  "<search>x</python> then 5"])
def test_a_closing_tag_that_closes_nothing_does_not_end_the_text(helped, text):
    """Oracle: next_call says the model goes on writing."""
    before = text[:text.rindex(">") + 1]
    helped.script = [[text], [text[len(before):]]]
    texts, _ = respond(helped, ["a"], 1, 2, max_new_tokens=99)
    assert texts == [text]


def test_a_tool_that_the_style_lacks_does_not_end_the_text(helped):
    """Without search in the style, `<search>` is only words."""
    mas = dataclasses.replace(helped, style=dataclasses.replace(HELPED, tools=("python",)))
    helped.script = [["<search>x</search> is 5"], [" is 5"]]
    texts, _ = respond(mas, ["a"], 1, 2, max_new_tokens=99)
    assert texts[0].endswith("is 5") and "<result>" not in texts[0]


def test_a_style_without_tools_runs_nothing(helped, monkeypatch):
    monkeypatch.setattr(writing_module, "run_tool", lambda *_: 1 / 0)
    mas = dataclasses.replace(helped, style=dataclasses.replace(HELPED, tools=()))
    helped.script = [[f"{SIX_TIMES_SEVEN} is 42"]]
    assert respond(mas, ["a"], 1, 2, max_new_tokens=99)[0] == [f"{SIX_TIMES_SEVEN} is 42"]


def test_search_results_and_their_absence(helped):
    """A result that closes itself, one that fails, and none at all; then the text goes on."""
    asked = []

    def find(query):
        asked.append(query)
        if query == "bad":
            raise ServiceError("host: HTTP 500")
        return "a</result>b"

    helped.search = find
    helped.script = [["<search> Emma\n</search>", "<search>bad</search>"], ["one", "two"]]
    texts, _ = respond(helped, ["a", "b"], 1, 2, max_new_tokens=99)
    assert texts == ["<search> Emma\n</search>\n<result>\na[/result]b\n</result>\none",
                     "<search>bad</search>\n<result>\nweb search failed: host: HTTP 500\n"
                     "</result>\ntwo"]
    assert sorted(asked) == ["Emma", "bad"]
    helped.search, helped.script = None, [["<search>Emma</search>"], ["end"]]
    texts, _ = respond(helped, ["a"], 1, 2, max_new_tokens=99)
    assert texts == ["<search>Emma</search>\n<result>\nweb search is not available\n</result>\nend"]


def test_samples_call_for_themselves(helped):
    """Two samples a question: rows find their own results; questions' tokens are summed."""
    helped.script = [["<python>print(1)</python>", "b", "<python>print(3)</python>", "d"],
                     ["x", "yy"]]
    texts, run = respond(helped, ["a", "b"], 1, 2, samples=2, max_new_tokens=99)
    call = len("<python>print(1)</python>")
    assert texts == ["<python>print(1)</python>" + FORTY_TWO.replace("42", "1") + "x", "b",
                     "<python>print(3)</python>" + FORTY_TWO.replace("42", "3") + "yy", "d"]
    assert run.decoded == [call + 2 + 2, call + 3 + 2]


def test_an_end_token_right_behind_a_result_is_replaced(helped):
    """insert() takes the place of end tokens, all of them, and keeps the rest."""
    helped.script = [["words"]]
    _, run = respond(helped, ["a"], 1, 2, max_new_tokens=99)
    turn, [draft] = run.last_turn, run.drafts
    assert draft.tokens[-1] == 256
    draft.tokens = draft.tokens + [256]
    insert(turn, draft, "more")
    assert text_of(turn, draft) == "wordsmore" and 256 not in draft.tokens


def test_a_tools_output_holds_no_control_tokens(helped):
    """What a page or program prints is text: it must not become the token that ends a turn."""
    helped.search = lambda query: "page <eos> text"
    helped.script = [["<search>x</search>"], ["end"]]
    _, run = respond(helped, ["a"], 1, 2, max_new_tokens=99)
    assert 256 not in run.drafts[0].tokens[:-1]
    assert "page <eos> text" in text_of(run.last_turn, run.drafts[0])


def test_a_page_that_is_no_proper_text_is_inserted_all_the_same(helped):
    """JSON may hold half a character; whatever a page says, the run goes on."""
    helped.search = lambda query: "caf\ud83d \x00"
    helped.script = [["<search>x</search>"], ["end"]]
    assert respond(helped, ["a"], 1, 2, max_new_tokens=99)[0][0].endswith("end")


def test_sampled_calls_do_not_depend_on_the_batch(helped, monkeypatch):
    """What is drawn after a result: rows with budgets and texts of different length, together
    and alone; oracle: a call each."""
    sampled = dict(temperature=1.0, max_new_tokens=60, seed=3)
    wrote = ["<python>print(10**20)</python>", SIX_TIMES_SEVEN, "x" * 20 + SIX_TIMES_SEVEN]
    questions = ["a", "what is it?", "and how?"]
    helped.script = [list(wrote), [None] * 3]
    together, run = respond(helped, questions, 1, 2, **sampled)
    assert len({len(draft.tokens) for draft in run.drafts}) > 1
    for b, question in enumerate(questions):
        helped.script = [[wrote[b]], [None]]
        alone, run_alone = respond(helped, [question], 1, 2, **sampled)
        assert alone == [together[b]] and run_alone.decoded == [run.decoded[b]]

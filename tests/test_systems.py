"""Real systems, end to end, on local folders laid out like the published hub repositories.

The models are tiny and random, of the real architectures; widths are the published ones / 64. All
command lines are the published ones, with another path to the script and smaller sizes. Where two
ways of computing are compared, both compute in float64.
"""
import dataclasses
import functools
import json
import random
import re
import shutil
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers import (FAMILIES, PROJECT, QUESTIONS, THREE, VOCABULARY, fast, holds, in_float64,
                     largest_difference, lines_of, log_of, new_mas, new_model, nothing_in_float32,
                     outer_args, outer_gradients, randomise, refuses, word_tokenizer)
from huggingface_hub import errors
from huggingface_hub.utils import hf_raise_for_status
from safetensors.torch import load_file
from tokenizers import AddedToken

import checkpoints
import evaluate
import train_inner
import train_outer
from checkpoints import load_agents, load_inner, load_outer, save_inner
from evaluation.gradients import message_gradients
from link import InnerLink, OuterLink
from recurse import load_mas_system
from styles import ANSWER_FORMAT, get_style
from writing import Writing

STYLES = ("sequential_light", "sequential_scaled", "mixture", "distillation", "deliberation")
PER_TASK = ("sequential_light", "sequential_scaled", "distillation")    # a link for math and code
METHODS = ("latent", "zero", "text", "single", "single_loop")
CLOSE = 1e-9
DATA = PROJECT / "tests/data"
TEMPLATES = {path.stem: path.read_text()
             for path in sorted((DATA / "templates").iterdir())}
SPECIAL = sorted(set(re.findall(r"</?[|\w]+>", "".join(TEMPLATES.values()))))
RELEASED = json.loads((DATA / "released.json").read_text())
BASES, SETS, COMMANDS = (RELEASED[part] for part in (
    "bases", "columns of the training sets", "command lines"))


# ---- the hub in a folder ------------------------------------------------------------------------

def rows_of(name):
    """Four rows of a training set. The mixed sets hold a question of each kind."""
    kinds = [{"Code": "code", "Science": "choice"}.get(name.split("-")[-1], "math")] * 4
    if name in ("Mixture-Summarizer", "Mixture-Outer", "Deliberation"):
        kinds = ["math", "code", "choice", "math"]
    made = []
    for i, kind in enumerate(kinds):
        values = {"question": QUESTIONS[i], "task_family": kind, "source_idx": i,
                  "type": "function" if kind == "code" else None,
                  "fn_name": "flip" if kind == "code" else None}
        made.append({column: values.get(column, f"{'s1 x7 ' * (i + 1)}{column} .")
                     for column in SETS[name].split()})
    return made


def all_words():
    """Every word that the prompts, the templates and the training sets hold."""
    texts = [*TEMPLATES.values(), *ANSWER_FORMAT.values(), "system user 26 Jul 2024",
             "The function has to be called `flip`."]
    for style in map(get_style, STYLES):
        for role in style.roles:
            for prompts in (role.prompt, role.first, role.own or {}, {"": role.system}):
                texts += prompts.values()
    texts += [str(value) for name in SETS for row in rows_of(name) for value in row.values()]
    return [*VOCABULARY, *SPECIAL,
            *(word for text in texts for word in re.sub(r"{\w+}|{[{%].*?[%}]}", " ", text).split())]


def as_released(link):
    """A link's weights as released: a bf16 state dict."""
    return {name: value.bfloat16() for name, value in link.state_dict().items()}


def write_base(folder, name, seed):
    """A base model's repo: model, tokenizer, chat template."""
    base = BASES[name]
    words = list(dict.fromkeys(all_words()))
    random.Random(seed).shuffle(words)               # no two families share their token ids
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = word_tokenizer(TEMPLATES[base["template"]], vocabulary)
    tokenizer.add_tokens([AddedToken(word, special=True) for word in SPECIAL], special_tokens=True)
    model = new_model(base["family"], seed, vocabulary, base["width"])
    if base["family"] == "mistral":
        model.config.sliding_window = 4096      # as released: the tests' own would hide the slots
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = base["tokenizer"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_agent(folder, hub, model, per_task, seed):
    """A released agent's repo: the whole base model and the inner link, or one for each task."""
    shutil.copytree(hub / model, folder)
    width = BASES[model]["width"]
    links = {"adapter.pt": InnerLink(width)}
    if per_task:
        links = {f"adapter({task}).pt": InnerLink(width) for task in ("math", "code")}
        (folder / "innerlink_config.json").write_text(json.dumps({"tasks": {
            task: {"adapter.pt": f"adapter({task}).pt"} for task in ("math", "code")}}))
    for i, (name, link) in enumerate(links.items()):
        torch.save(as_released(randomise(link, 0.12, seed + i)), folder / name)
    (folder / "adapter_config.json").write_text('{"adapter_type": "ln_res_adapter"}')


def widths_of(style):
    width = {role.name: BASES[role.model]["width"] for role in style.roles}
    return {edge.key: (width[edge.src], width[edge.dst]) for edge in style.edges}


def write_outer(folder, style, per_task):
    """A released repo of outer links, its manifest flat or a list for each task."""
    folder.mkdir(parents=True)

    def adapters(task):
        entries = []
        for i, (key, (source, target)) in enumerate(widths_of(style).items()):
            name = f"{key}({task}).pt" if task else f"{key}.pt"
            link = randomise(OuterLink(source, target), 0.12, seed=300 + i + 50 * (task == "code"))
            torch.save(as_released(link), folder / name)
            entries.append({"legacy_key": key, "filename": name, "in_dim": source,
                            "out_dim": target, "adapter_type": "outer_ln_res_adapter"})
        return entries

    config = {"format_version": 1, "paradigm": style.name,
              "legacy_config_filename": "outer_adapter_config.json"}
    if per_task:
        config["tasks"] = {task: {"adapters": adapters(task)} for task in ("math", "code")}
    else:
        config["adapters"] = adapters("")
    (folder / "outerlink_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A folder with all base models, released agents, outer links and training sets."""
    folder = tmp_path_factory.mktemp("hub")
    for seed, name in enumerate(BASES):
        write_base(folder / name, name, seed)
    for name in STYLES:
        style = get_style(name)
        for seed, role in enumerate(style.roles):
            write_agent(folder / role.repo, folder, role.model, name in PER_TASK, 20 * seed)
        write_outer(folder / style.repo, style, name in PER_TASK)
    for name in SETS:
        (folder / "RecursiveMAS" / name).mkdir()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows_of(name)),
                                    folder / "RecursiveMAS" / name / "train-0-of-1.parquet")
    return folder


def stamps(folder):
    """{path: (size, time of the last change)} of all files below a folder."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns)
            for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def at_hub(hub, monkeypatch, tmp_path_factory):
    """The hub's ids are folders here; afterwards no file has been added, changed or removed."""
    monkeypatch.chdir(hub)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    before = stamps(hub)
    yield hub
    assert stamps(hub) == before


@functools.cache
def system(name, task="math"):
    """A released system, loaded as in the published quick start. No test may change it."""
    return load_mas_system(style=name, device="cpu", task=task, trust_remote_code=True)


@pytest.fixture
def done(run):
    """done(script, flags): run it to its good end. Returns what it printed."""
    def ask(script, *options):
        code, out, errors = run(script, *options)
        assert code == 0, errors
        return out
    return ask


def released_files(mas, hub, task="math"):
    """[(a link of a released system, its file)]."""
    style, ending = mas.style, f"({task})" if mas.style.name in PER_TASK else ""
    return [(mas.agents[role.name].inner, hub / role.repo / f"adapter{ending}.pt")
            for role in style.roles] + [
        (mas.outer[edge.key], hub / style.repo / f"{edge.key}{ending}.pt") for edge in style.edges]


def same_weights(model, path):
    """Whether a model's weights are those in a folder (names differ by the text part's prefix)."""
    def plain(state):
        return {key.replace("language_model.", "").removeprefix("model."): value
                for key, value in state.items()}

    saved = plain(load_file(path / "model.safetensors"))
    own = plain(model.state_dict())
    own = {key: value for key, value in own.items() if key in saved or "lm_head" not in key}
    return own.keys() <= saved.keys() and all(torch.equal(own[k], saved[k]) for k in own)


# ---- loading ------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", ["math", "code"])
@pytest.mark.parametrize("name", STYLES)
def test_a_released_system_loads_by_its_hub_ids(name, task, at_hub):
    """Oracle: the files themselves. The task chooses the file where a repo holds two."""
    mas = system(name, task)
    assert all(holds(link, path) for link, path in released_files(mas, at_hub, task))
    for role in mas.style.roles:
        agent = mas.agents[role.name]
        assert same_weights(agent.model, at_hub / role.repo)
        assert agent.width == BASES[role.model]["width"]
        family = BASES[role.model]["family"].removesuffix("_conditional")
        assert type(agent.model).__name__.startswith(family.capitalize())
    texts = mas.answer(QUESTIONS[:2], rounds=2, latent_length=2, kind=task, max_new_tokens=2)
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)


@pytest.mark.parametrize("name, key", fast(
    ("sequential_light", "refiner"), ("deliberation", "reflector"), of=[
        ("sequential_light", "refiner"), ("sequential_scaled", "solver"), ("mixture", "code"),
        ("distillation", "distill_expert"), ("deliberation", "reflector")]))
def test_ckpt_override_changes_one_role(name, key, at_hub, tmp_path):
    """It is called by our name or by the published one: refiner is the critic. All else stays. The
    files are those of the published trainer. What is given is not asked of the hub: here there is
    no such repo."""
    style = get_style(name)
    role = style.role(key)
    write_agent(tmp_path / "it", at_hub, role.model, False, seed=9)
    (tmp_path / "it/train_args.json").write_text('{"mas_role": "x", "seed": 42}')
    write_outer(tmp_path / "outer", style, False)
    (tmp_path / "outer/outer_adapter_config.json").write_text("{}")
    before, override = stamps(tmp_path), {key: str(tmp_path / "it")}
    gone = dataclasses.replace(style, roles=tuple(
        dataclasses.replace(one, repo="no/repo", model="no/model") if one is role else one
        for one in style.roles))
    mas = load_mas_system(gone, device="cpu", ckpt_override=override)
    assert holds(mas.agents[role.name].inner, tmp_path / "it/adapter.pt")
    files = released_files(dataclasses.replace(mas, style=style), at_hub)
    assert [holds(*link) for link in files] == [
        i != style.roles.index(role) for i in range(len(files))]
    mas = load_mas_system(dataclasses.replace(gone, repo="no/outer"), device="cpu",
                          ckpt_override={**override, "outer": str(tmp_path / "outer")})
    assert all(holds(link, tmp_path / f"outer/{key}.pt") for key, link in mas.outer.items())
    assert stamps(tmp_path) == before


# ---- the published command lines ----------------------------------------------------------------

INNER_FLAGS, OUTER_FLAGS = ((DATA / name).read_text().split() for name in (
    "inner_flags.txt", "outer_flags.txt"))


def data_set(name, task):
    """The hub id of a training set, of the one for code where there are two."""
    return f"RecursiveMAS/{name.replace('-Math', f'-{task.title()}')}"


def outer_command(name, inner, save_dir, task="math"):
    """The published command line of the outer loop, with its flags for each role."""
    style, command = get_style(name), COMMANDS[name]
    argv = ["--style", name, "--mas_task", task, "--dataset_name",
            data_set(command["outer set"], task), "--save_dir", save_dir, *OUTER_FLAGS]
    for flag, role in zip(command["roles in flags"], style.roles):
        argv += [f"--{flag}_model_name_or_path", role.model,
                 f"--{flag}_inner_aligner_path", inner[role.name]]
    return argv + [f"--{style.edges[0].key}_type", "outer_ln_res_adapter"]


def train(name, done, folder, task="math"):
    """Both loops of a style by the published command lines. Returns {role or "outer": folder}.

    The inner links of mixture are trained with the tasks of their sets, and the system with math.
    The style has one link for all tasks, so math finds them."""
    style, folders = get_style(name), {}
    for key, data in COMMANDS[name]["inner sets"].items():
        role = style.role(key)
        folders[role.name] = folder / role.name
        own_task = {"Mixture-Code": "code", "Mixture-Science": "choice"}.get(data, task)
        done(train_inner, "--model_name_or_path", role.model, "--mas_design",
             COMMANDS[name]["design"], "--mas_role", key, "--mas_task", own_task,
             "--dataset_name", data_set(data, task), "--save_dir", folders[role.name],
             *INNER_FLAGS)
    done(train_outer, *outer_command(name, folders, folder / "outer", task))
    folders["outer"] = folder / "outer"
    assert all(map(finite_losses, folders.values()))
    return folders


def finite_losses(folder):
    losses = [line["loss"] for line in log_of(folder)]
    return len(losses) == 3 and all(isinstance(loss, float) for loss in losses)


@pytest.mark.parametrize("name", fast("sequential_scaled", of=STYLES))
def test_a_style_trains_and_answers_by_the_published_command_lines(name, at_hub, tmp_path, done):
    """The inner loop of each role, the outer loop, the evaluation. Oracles: losses are finite,
    links differ from what they began with, and (at_hub) base models do not change."""
    style = get_style(name)
    override = train(name, done, tmp_path)
    for role in style.roles:
        width = BASES[role.model]["width"]
        torch.manual_seed(42)
        began = InnerLink(width)
        link = load_inner(override[role.name], width)
        assert 0 < largest_difference(link.proj1.weight, began.proj1.weight) < 3e-3   # few steps
    mas = load_mas_system(name, device="cpu", ckpt_override=override)
    before = mas.with_fresh_outer(seed=42)
    for agent in mas.agents.values():           # scale matching: the gain began at the base's RMS
        assert agent.inner.post_ln.weight.mean().item() == pytest.approx(
            agent.embedding_rms, rel=0.05)
    for edge in style.edges:
        assert not torch.equal(mas.outer[edge.key].proj1.weight,
                               before.outer[edge.key].proj1.weight), edge.key
    done(evaluate, "--style", name, "--dataset", "tiny", "--device", "cpu", "--num_samples", 3,
         "--seed", 42, "--num_recursive_rounds", 2, "--batch_size", 2, "--latent_length", 3,
         "--temperature", 0.6, "--top_p", 0.95, "--top_k", 5, "--min_p", 0.01,
         "--repetition_penalty", 1.1, "--trust_remote_code", 1, "--method", "latent", "text",
         "single", "--max_new_tokens", 3, "--out", tmp_path / "out", "--ckpt_override",
         *(f"{key}={folder}" for key, folder in override.items()))
    table = json.loads((tmp_path / "out/summary.json").read_text())["rows"]
    assert [(entry["style"], entry["method"], entry["n"]) for entry in table] == [
        (name, method, 3) for method in ("text", "single", "latent")]
    assert len((tmp_path / "out/results.jsonl").read_text().splitlines()) == 9


@pytest.mark.parametrize("name", fast("distillation", of=["distillation", "sequential_light"]))
def test_a_style_trains_for_code(name, at_hub, tmp_path, done):
    """On the -Code sets, with --mas_task code. The links are found as those of this task alone."""
    override = train(name, done, tmp_path, task="code")
    mas = load_mas_system(name, device="cpu", task="code", ckpt_override=override)
    assert len(mas.answer(QUESTIONS[:1], 2, 2, kind="code", max_new_tokens=2)) == 1
    with refuses("'math'", tmp_path, kind=FileNotFoundError):
        load_mas_system(name, device="cpu", task="math", ckpt_override=override)


def test_other_flags_of_the_inner_loop(at_hub, tmp_path, done):
    """--load_dir goes on from a link (and stays there at a learning rate of 0). --text_field takes
    another column. A local .json has its rows under a field. All give what the hub's set gives."""
    shared = ["--mas_design", "sequential", "--mas_role", "planner", "--mas_task", "math",
              "--model_name_or_path", "Qwen/Qwen3-1.7B", *INNER_FLAGS]
    (tmp_path / "rows.json").write_text(json.dumps({"inside": rows_of("Sequential-Math")}))
    (tmp_path / "rows.jsonl").write_text("".join(
        json.dumps({**row, "plan": None, "mine": row["plan"]}) + "\n"
        for row in rows_of("Sequential-Math")))
    links = {}
    for name, *more in (
            ("hub", "--dataset_name", "RecursiveMAS/Sequential-Math"),
            ("json", "--dataset_name", tmp_path / "rows.json", "--dataset_json_field", "inside"),
            ("jsonl", "--dataset_name", tmp_path / "rows.jsonl", "--text_field", "mine"),
            ("again", "--dataset_name", "RecursiveMAS/Sequential-Math", "--load_dir",
             tmp_path / "hub", "--adapter_lr", 0)):
        done(train_inner, *shared, *more, "--save_dir", tmp_path / name)
        links[name] = (tmp_path / name / "adapter(math).safetensors").read_bytes()
    assert links == dict.fromkeys(links, links["hub"])


@pytest.mark.parametrize("more, kinds", [
    (["--supervise_final_only", 0, "--latents", "teacher", "--enable_thinking", 1,
      "--solver_pre_question", 0, "--lr_scheduler_type", "constant", "--outer_12_type",
      "outer_ln_adapter"], ["2layer_ln", "2layer_ln_res", "2layer_ln_res"]),
    (["--role_loss_weight", 0.5, "--warm_start_steps", 2, "--random_rounds", 1, "--latents",
      "teacher_aligned", "--outer_adapter_type", "outer_linear_res_adapter", "--dtype",
      "bfloat16"], ["1layer_res"] * 3)], ids=["published", "ours"])
def test_other_flags_of_the_outer_loop(more, kinds, at_hub, tmp_path, done):
    """The released agents of the style with three families train, and their links are saved in the
    released layout. (What each flag does to the loss: tests/test_train.py.)"""
    style = get_style("sequential_scaled")
    inner = {role.name: role.repo for role in style.roles}
    argv = outer_command("sequential_scaled", inner, tmp_path)[:-2]
    done(train_outer, *argv, "--save_format", "pt", *more)
    assert finite_losses(tmp_path)
    links = load_outer(tmp_path, widths_of(style))
    assert [links[edge.key].kind for edge in style.edges] == kinds
    assert all(holds(link, tmp_path / f"{key}.pt") for key, link in links.items())


# ---- training on kinds of questions, per sample, in every family --------------------------------

def in_kinds(text):
    """For each kind of question other words around the same slots."""
    return text and {"math": text, "code": f"check: {text}\nmend it",
                     "choice": f"own: {text} end", "search": text}


KINDS = dataclasses.replace(THREE, roles=tuple(
    dataclasses.replace(role, prompt=in_kinds(role.prompt), first=in_kinds(role.first),
                        own=in_kinds(role.own), target=(role.name,)) for role in THREE.roles))
MIXED = lines_of("mixed_rows.jsonl")


def answering(family):
    """A system in float64 whose last agent is of a family."""
    other = "llama" if family.startswith("qwen3_5") else "qwen3_5_conditional"
    return in_float64(new_mas(KINDS, families=("qwen3", other, family)))


@pytest.mark.parametrize("family, latents", fast(
    ("qwen3", "teacher_aligned"), ("gemma3", "teacher"), ("qwen3_5", "rollout"),
    of=[(family, latents) for family in FAMILIES
        for latents in ("rollout", "teacher", "teacher_aligned")]))
def test_a_mixed_batch_is_the_mean_over_its_target_tokens(family, latents):
    """Rows have three kinds and different lengths. Loss, gradients and log of their batch are those
    of each row alone, weighed by its tokens. The batch runs each turn again (checkpointing)."""
    mas, args = answering(family), dict(latents=latents, latent_length=2, log_gradients=1)
    shares = torch.tensor([len(row["solver"].split()) for row in MIXED]).double()
    shares, links, alone = shares / shares.sum(), mas.outer.requires_grad_(True), []
    with nothing_in_float32():
        batch = train_outer.outer_loss(mas, MIXED, 2, outer_args(gradient_checkpointing=1, **args))
        (batch.loss * 8.0).backward()                             # as a scaler in fp16 would do
        logged = message_gradients(batch.sent, len(MIXED), 8.0)
        for row in MIXED:
            one = train_outer.outer_loss(mas, [row], 2, outer_args(**args))
            sent = [said if torch.is_tensor(said) else said[0] for said in one.sent.values()]
            alone.append([one.loss, *torch.autograd.grad(one.loss, [*sent, *links.parameters()])])
    losses, *found = zip(*alone, strict=True)
    messages, gradients = found[:len(batch.sent)], found[len(batch.sent):]
    assert batch.loss.item() == pytest.approx((shares @ torch.stack(losses)).item(), abs=CLOSE)
    assert any(weight.grad.any() for weight in links.parameters())
    for weight, rows_alone in zip(links.parameters(), gradients, strict=True):
        wanted = sum(map(torch.mul, shares, rows_alone))
        assert (weight.grad / 8 - wanted).norm() <= CLOSE * wanted.norm()
    assert logged == pytest.approx({
        f"gradient_{key}_{round}": (shares @ torch.stack([g.norm() for g in rows_alone])).item()
        for (round, key), rows_alone in zip(batch.sent, messages, strict=True)}, rel=1e-9)


def test_kinds_change_the_loss():
    """Otherwise the test above could not see a row that is asked in the words of another kind."""
    mas, args = answering("llama"), outer_args(latent_length=2)
    losses = {kind: outer_gradients(mas, [{**MIXED[0], "task_family": kind}], 1, args)[0]
              for kind in ("math", "code", "choice", None)}
    assert len({round(loss, 4) for loss in losses.values()}) == 3
    assert losses[None] == losses["math"]          # the kind of the run, --mas_task


@pytest.mark.parametrize("family, method", fast(
    ("mistral", "latent"), ("qwen3_5", "latent"), *(("llama", method) for method in METHODS),
    of=[(family, method) for family in ("llama", "mistral", "qwen3_5") for method in METHODS]))
def test_kinds_with_slots_in_another_order_share_a_batch(family, method):
    """Each question is answered as it is by itself, although the prompts of its batch begin with
    different words and hold their slots in different orders. A batch of answer() has its kinds."""
    roles = [*KINDS.roles]
    roles[1] = dataclasses.replace(roles[1], prompt={
        **roles[1].prompt, "choice": "own: {solver} and\n{question}\ncheck: {planner}"})
    roles[2] = dataclasses.replace(roles[2], prompt={
        **roles[2].prompt, "code": "{question}\nplan: {planner}\nnotes: {critic}"})
    mas = dataclasses.replace(answering(family),
                              style=dataclasses.replace(KINDS, roles=tuple(roles)))
    kinds, options = [row["task_family"] for row in MIXED], dict(
        method=method, trace=True, writing=Writing(max_new_tokens=3))
    with nothing_in_float32():
        texts, batch = mas.respond(QUESTIONS[:4], 2, 2, kind=kinds, **options)
        for b, (question, kind) in enumerate(zip(QUESTIONS, kinds)):
            [text], alone = mas.respond([question], 2, 2, kind=kind, **options)
            assert texts[b] == text
            assert {turn: said[b] for turn, said in batch.texts.items()} == {
                turn: said[0] for turn, said in alone.texts.items()}
            assert batch.thoughts.keys() == alone.thoughts.keys()
            for key, H in batch.thoughts.items():
                assert largest_difference(H[b], alone.thoughts[key][0]) < CLOSE
        assert texts == mas.answer(QUESTIONS[:4], 2, 2, kind=kinds, method=method, batch_size=2,
                                   max_new_tokens=3)
    for odd in ([], ["math"], ["math"] * 3):       # else it is one for all questions
        with refuses("kind"):
            mas.answer(QUESTIONS[:2], kind=odd, method=method)


# ---- bad input: one line that names the file or role, and the cure ------------------------------

httpx = sys.modules[errors.HfHubHTTPError.__mro__[1].__module__.split(".")[0]]


def hub_says(status, code):
    """The error that the hub library makes of an answer of the hub."""
    request = httpx.Request("GET", "https://huggingface.co/api/models/some/repo/revision/main")
    answer = httpx.Response(status, headers={"X-Error-Code": code} if code else {},
                            request=request)
    with pytest.raises(errors.HfHubHTTPError) as problem:
        hf_raise_for_status(answer)
    return problem.value


@pytest.mark.parametrize("case", lines_of("hub_problems.jsonl"), ids=lambda case: case["why"])
def test_what_the_hub_refuses(case, monkeypatch):
    """One line names the repo, its revision, who needs it, and passes on the hub's own message. It
    does so for a role's repo, for the outer links and for a base model."""
    if "status" in case:
        problem = hub_says(case["status"], case["code"])
    else:                                       # some of httpx are let through by the library
        module = errors if hasattr(errors, case["kind"]) else httpx
        problem = getattr(module, case["kind"])(case["message"])
    named = [*case["named"], type(problem).__name__]

    def refuse(name, **_):
        raise problem

    monkeypatch.setattr(checkpoints, "snapshot_download", refuse)
    tiny = get_style("tiny")
    role = dataclasses.replace(tiny.roles[0], repo="some/repo")
    for changes, who in (({"roles": (role, *tiny.roles[1:])}, "role planner"),
                         ({"repo": "some/repo"}, "outer links")):
        with refuses("style tiny", who, "some/repo", "v9", *named, kind=FileNotFoundError):
            load_mas_system(dataclasses.replace(tiny, **changes), device="cpu", revision="v9")
    with refuses("role critic", "some/base", *named, kind=FileNotFoundError):
        load_agents(tiny, "cpu", models={"critic": "some/base"})


LIGHT = get_style("sequential_light")
CRITIC = LIGHT.role("critic").repo


@pytest.mark.parametrize("file, renamed, task, named", [
    ("chat_template.jinja", "x", "math", ["chat_template.jinja"]),
    # The library makes an empty tokenizer of some families, for which no text has tokens.
    ("tokenizer.json", "x", "math", ["tokenizer"]),
    # The manifest names a file that is missing. No other file may be taken in its place.
    ("adapter(code).pt", "x", "code", ["'code'", "adapter(code).pt", "train_inner.py"]),
    ("adapter(code).pt", "adapter.pt", "code", ["'code'", "adapter(code).pt"])])
def test_a_role_without_a_file_is_named(file, renamed, task, named, at_hub, tmp_path):
    folder = shutil.copytree(at_hub / CRITIC, tmp_path / "it")
    (folder / file).rename(folder / renamed)
    with refuses(folder, *named, kind=(ValueError, FileNotFoundError)):
        load_mas_system(LIGHT, device="cpu", task=task, ckpt_override={"critic": str(folder)})


def test_a_tokenizer_with_more_tokens_than_the_model(at_hub, tmp_path):
    """A question with such a token gets one line that names the folder. Others are answered."""
    path = shutil.copytree(at_hub / CRITIC, tmp_path / "it") / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 5000,
                                      "content": "<extra>"})
    path.write_text(json.dumps(tokenizer))
    mas = load_mas_system(LIGHT, device="cpu", ckpt_override={"critic": str(path.parent)})
    assert len(mas.answer(QUESTIONS[:1], 1, 2, max_new_tokens=1)) == 1
    with refuses(path.parent, "tokenizer"):
        mas.answer(["start <extra> 3"], 1, 2, max_new_tokens=1)


def test_links_trained_on_another_base_model_are_used_with_that_one(at_hub, tmp_path, done):
    """train_args.json names it. Another one of the same width would load too, and give nonsense."""
    done(train_inner, "--mas_design", "sequential", "--mas_role", "planner",
         "--model_name_or_path", "meta-llama/Llama-3.2-1B-Instruct", "--dataset_name",
         "RecursiveMAS/Sequential-Math", *INNER_FLAGS, "--save_dir", tmp_path)
    agents = load_agents(LIGHT, "cpu", override={"planner": str(tmp_path)})
    assert same_weights(agents["planner"].model, at_hub / "meta-llama/Llama-3.2-1B-Instruct")


def test_a_design_does_not_overrule_a_style(monkeypatch):
    """sequential is the published name of both sequential styles."""
    flags = "--mas_design sequential --style sequential_scaled"
    monkeypatch.setattr(sys, "argv", ["train_inner.py", *flags.split()])
    assert train_inner.parse()[1].name == "sequential_scaled"


# ---- devices and memory -------------------------------------------------------------------------

def answers(mas, **options):
    """(texts, thoughts) of two rounds."""
    texts, ran = mas.respond(QUESTIONS[:2], 2, 2, trace=True, writing=Writing(max_new_tokens=3),
                             **options)
    return texts, list(ran.thoughts.values())


def same_answers(one, other):
    return one[0] == other[0] and all(map(torch.equal, one[1], other[1]))


@pytest.mark.parametrize("name", fast("mixture", "deliberation", of=STYLES))
def test_two_devices_share_the_agents(name, at_hub, monkeypatch):
    """Each agent is loaded once, to one of the two, and the loads differ by one agent at most. The
    answers stay those of one device. (The device meta stands for a card.)"""
    assert same_answers(answers(system(name)), answers(load_mas_system(name, device="cpu,cpu")))
    monkeypatch.setattr(checkpoints, "pick_device", lambda device, dtype: (
        torch.device(device), torch.float32))
    monkeypatch.setattr(checkpoints, "need_proved", lambda agent: None)     # meta has no numbers
    sizes = {"cpu": [], "meta": []}
    for agent in load_agents(get_style(name), "cpu,meta").values():
        assert {weight.device for weight in agent.model.parameters()} == {agent.device}
        sizes[agent.device.type].append(agent.model.get_memory_footprint())
    assert all(sizes.values())
    one, other = map(sum, sizes.values())
    assert abs(one - other) <= max(sizes["cpu"] + sizes["meta"])


@pytest.mark.parametrize("halves", ["planner", "critic"])
def test_agents_of_different_precision(halves):
    """--device cuda,cpu makes them: bfloat16 on the card, float32 beside it."""
    mas = new_mas()
    agent = mas.agents[halves]
    agent.model.bfloat16()
    agent.dtype = torch.bfloat16
    assert len(mas.answer(QUESTIONS[:2], 2, 2, max_new_tokens=2)) == 2


def test_offload_moves_whole_models(at_hub):
    """All parameters and buffers move, and the agent's own names for them go along. New outer links
    take their gain from embeddings that are in main memory. (The device meta stands for a card.)"""
    mas = load_mas_system("sequential_scaled", device="cpu", offload=True)
    for name, agent in mas.agents.items():
        agent.device = torch.device("meta")
        assert agent.embedding_rms == system("sequential_scaled").agents[name].embedding_rms
    fresh = mas.with_fresh_outer()
    assert {link.proj1.weight.device.type for link in fresh.outer.values()} == {"meta"}
    assert mas.agent("planner") is mas.agents["planner"]
    for name, agent in mas.agents.items():
        weights = (*agent.model.parameters(), *agent.model.buffers(), agent.embedding.weight,
                   agent.model.lm_head.weight, *agent.body.parameters())
        assert {weight.device.type for weight in weights} == {
            "meta" if name == "planner" else "cpu"}


def watch_the_card(mas):
    """(ids of the models on the card, ids of those that were taken away, in order): they change. A
    model that runs must be on the card, and alone there. (The CPU as cpu:0 stands for a card.)"""
    on_card, away = set(), []
    for agent in mas.agents.values():
        agent.device = torch.device("cpu:0")

        def to(device, model=agent.model):
            if device == torch.device("cpu:0"):
                on_card.add(id(model))
            elif id(model) in on_card:
                on_card.remove(id(model))
                away.append(id(model))
            return model

        def before_it_runs(*_, model=agent.model):
            assert on_card == {id(model)}

        agent.model.to = to
        agent.body.register_forward_pre_hook(before_it_runs)
    return on_card, away


@pytest.mark.parametrize("name", fast("sequential_light", of=[
    "sequential_light", "mixture", "deliberation"]))
def test_offload_keeps_one_agent_on_the_device_and_answers_the_same(name, at_hub):
    """Only the model whose turn it is runs. Oracle for the answers: a system without offload."""
    mas = load_mas_system(name, device="cpu", offload=True)
    on_card, away = watch_the_card(mas)
    for method in METHODS:
        assert same_answers(answers(system(name), method=method), answers(mas, method=method))
        assert on_card == {id(mas.agents[mas.style.roles[-1].name].model)}
    assert len(set(away)) == len(mas.agents)


def test_roles_of_one_base_share_its_model(at_hub, tmp_path):
    """Both roles of deliberation have one base model. Each keeps its own inner link. With offload
    the model that both share is never moved away between their turns."""
    override = {"outer": get_style("deliberation").repo}
    for role in ("reflector", "toolcaller"):
        save_inner(randomise(InnerLink(40), 1.0, len(role)), tmp_path / role)
        override[role] = str(tmp_path / role)
    whole, two, offloaded = (
        load_mas_system("deliberation", ckpt_override=override, **options) for options in (
            {"device": "cpu"}, {"device": "cpu,cpu"}, {"device": "cpu", "offload": True}))
    for mas in (whole, two, offloaded):
        reflector, toolcaller = mas.agents.values()
        assert reflector.model is toolcaller.model
        assert largest_difference(reflector.inner.proj1.weight, toolcaller.inner.proj1.weight) > 0
    on_card, away = watch_the_card(offloaded)
    assert same_answers(answers(whole), answers(offloaded))
    assert on_card == {id(offloaded.agents["reflector"].model)} and not away
    by_repo = system("deliberation")
    assert by_repo.agents["reflector"].model is not by_repo.agents["toolcaller"].model

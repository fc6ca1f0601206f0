"""Real systems, end to end, on local folders laid out like the published hub repositories.

The models are tiny and random, of the real architectures; widths are the published ones / 64. All
command lines are the published ones, with the script's path changed and the sizes cut down.
"""
import dataclasses
import hashlib
import json
import random
import re
import shutil
import sys
import types

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from conftest import (PROJECT, QUESTIONS, THREE, TOLERANCE, VOCABULARY, largest_difference,
                      new_mas, new_model, randomise, word_tokenizer)
from huggingface_hub import errors
from huggingface_hub.utils import hf_raise_for_status
from safetensors.torch import load_file
from test_recurse import plain_recursion
from test_train import outer_args, outer_gradients
from tokenizers import AddedToken

import common
import evaluate
import recurse
import train_inner
import train_outer
from agents import Agent
from link import InnerLink, OuterLink, load_inner, load_outer, save_inner, save_outer
from recurse import load_mas_system
from styles import ANSWER_FORMAT, get_style

STYLES = ("sequential_light", "sequential_scaled", "mixture", "distillation", "deliberation")
PER_TASK = ("sequential_light", "sequential_scaled", "distillation")    # a link for math and code

# ---- chat templates in the manner of each family ------------------------------------------------

CHATML = ("{% for m in messages %}<|im_start|> {{ m.role }}\n{{ m.content }} <|im_end|>\n"
          "{% endfor %}<|im_start|> assistant\n")
TEMPLATES = {
    "qwen3": CHATML + "{% if enable_thinking is defined and not enable_thinking %}"
                      "<think>\n\n</think>\n\n{% endif %}",
    "qwen2": "{% if messages[0].role != 'system' %}<|im_start|> system\nYou are a helpful "
             "assistant. <|im_end|>\n{% endif %}" + CHATML,
    "llama": "{{ bos_token }}{% for m in messages %}<|header|> {{ m.role }} <|end_header|>\n\n"
             "{% if m.role == 'system' %}Today Date: {{ date_string }}\n\n{% endif %}"
             "{{ m.content | trim }} <|eot|>{% endfor %}<|header|> assistant <|end_header|>\n\n",
    # No system role, and turns have to alternate.
    "gemma": "{{ bos_token }}{% for m in messages %}"
             "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
             "{{ raise_exception('Conversation roles must alternate user/assistant/..') }}"
             "{% endif %}<|turn|> {{ m.role }}\n{{ m.content | trim }} <|end_turn|>\n"
             "{% endfor %}<|turn|> model\n",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
               "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
               "<|inst|> {{ m.content }} <|end_inst|>{% endfor %}",
    # Thinks whatever it is told.
    "deepseek": "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
                "{{ m.content }}{% else %}<|User|> {{ m.content }}{% endif %}{% endfor %}"
                "<|Assistant|><think>\n",
}
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|header|>", "<|end_header|>", "<|eot|>", "<|turn|>",
           "<|end_turn|>", "<|inst|>", "<|end_inst|>", "<|User|>", "<|Assistant|>", "<think>",
           "</think>")

BASES = {       # base model: family, width, template, tokenizer class as released
    "Qwen/Qwen3-1.7B": ("qwen3", 32, "qwen3", "Qwen2Tokenizer"),
    "meta-llama/Llama-3.2-1B-Instruct": ("llama", 32, "llama", "PreTrainedTokenizerFast"),
    "Qwen/Qwen2.5-Math-1.5B-Instruct": ("qwen2", 24, "qwen2", "Qwen2Tokenizer"),
    "google/gemma-3-4b-it": ("gemma3_conditional", 40, "gemma", "GemmaTokenizer"),
    "meta-llama/Llama-3.2-3B-Instruct": ("llama", 48, "llama", "PreTrainedTokenizerFast"),
    "Qwen/Qwen3.5-4B": ("qwen3_5_conditional", 40, "qwen3", "TokenizersBackend"),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": ("qwen2", 24, "deepseek", "LlamaTokenizerFast"),
    "Qwen/Qwen2.5-Coder-3B-Instruct": ("qwen2", 32, "qwen2", "Qwen2Tokenizer"),
    "BioMistral/BioMistral-7B": ("mistral", 64, "mistral", "LlamaTokenizer"),
    "Qwen/Qwen3.5-2B": ("qwen3_5_conditional", 32, "qwen3", "Qwen2Tokenizer"),
    "Qwen/Qwen3.5-9B": ("qwen3_5_conditional", 64, "qwen3", "Qwen2Tokenizer"),
}

# ---- training sets: the published columns -------------------------------------------------------

SEQUENTIAL = "question plan refined_plan answer answer_field"
DISTILLATION = ("question refined_plan answer distill_expert distill_learner task_family domain "
                "type source")
SUMMARIZER = ("question answer hie_summarizer hie_math_expert hie_code_expert hie_science_expert "
              "type task_family domain fn_name")
SETS = {
    "Sequential-Math": SEQUENTIAL, "Sequential-Code": SEQUENTIAL + " type",
    "Distillation-Math": DISTILLATION, "Distillation-Code": DISTILLATION,
    "Mixture-Math": "question answer hie_math_expert type task_family domain",
    "Mixture-Code": "question answer hie_code_expert type task_family domain",
    "Mixture-Science": "question answer hie_science_expert type task_family domain",
    "Mixture-Summarizer": SUMMARIZER, "Mixture-Outer": SUMMARIZER,
    "Deliberation": ("question answer deliberation_reflector deliberation_toolcaller task_family "
                     "domain tool_type type source source_idx"),
}


def rows_of(name):
    """Four rows of a training set; the mixed sets hold a question of each kind."""
    kinds = {"Code": "code", "Science": "choice"}.get(name.split("-")[-1], "math")
    kinds = [kinds] * 4
    if name in ("Mixture-Summarizer", "Mixture-Outer", "Deliberation"):
        kinds = ["math", "code", "choice", "math"]
    rows = []
    for i, kind in enumerate(kinds):
        row = {column: f"{'s1 x7 ' * (i + 1)}{column} ." for column in SETS[name].split()}
        row.update(question=QUESTIONS[i], type="function" if kind == "code" else None)
        for column, value in (("task_family", kind), ("source_idx", i),
                              ("fn_name", "flip" if kind == "code" else None)):
            if column in row:
                row[column] = value
        rows.append(row)
    return rows


def all_words():
    """Every word that the prompts, the templates and the training sets hold."""
    texts = [*TEMPLATES.values(), *ANSWER_FORMAT.values(), "system user 26 Jul 2024",
             "The function has to be called `flip`."]
    for style in map(get_style, STYLES):
        for role in style.roles:
            for prompts in (role.prompt, role.first or {}, {"": role.system}):
                texts += prompts.values()
    texts += [str(value) for name in SETS for row in rows_of(name) for value in row.values()]
    return [*VOCABULARY, *SPECIAL,
            *(word for text in texts for word in re.sub(r"{\w+}|{[{%].*?[%}]}", " ", text).split())]


# ---- the hub in a folder ------------------------------------------------------------------------

def released(link):
    """A link's weights as released: a bf16 state dict."""
    return {name: value.bfloat16() for name, value in link.state_dict().items()}


def write_base(folder, name, seed):
    """A base model's repo: model, tokenizer, chat template."""
    family, width, template, tokenizer_class = BASES[name]
    words = list(dict.fromkeys(all_words()))
    random.Random(seed).shuffle(words)               # no two families share their token ids
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = word_tokenizer(TEMPLATES[template], vocabulary)
    tokenizer.add_tokens([AddedToken(word, special=True) for word in SPECIAL], special_tokens=True)
    model = new_model(family, seed, vocabulary, width)
    if family == "mistral":
        model.config.sliding_window = 4096      # as released: the tests' own would hide the slots
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = tokenizer_class
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_agent(folder, base, width, per_task, seed):
    """A released agent's repo: the whole base model and the inner link, or one for each task."""
    shutil.copytree(base, folder)
    links = {"adapter.pt": InnerLink(width)}
    if per_task:
        links = {f"adapter({task}).pt": InnerLink(width) for task in ("math", "code")}
        (folder / "innerlink_config.json").write_text(json.dumps({"tasks": {
            task: {"adapter.pt": f"adapter({task}).pt"} for task in ("math", "code")}}))
    for i, (name, link) in enumerate(links.items()):
        torch.save(released(randomise(link, 0.12, seed + i)), folder / name)
    (folder / "adapter_config.json").write_text('{"adapter_type": "ln_res_adapter"}')


def write_outer(folder, style, widths, per_task):
    """A released repo of outer links, its manifest flat or a list for each task."""
    folder.mkdir(parents=True)

    def adapters(task):
        entries = []
        for i, (key, (source, target)) in enumerate(widths.items()):
            name = f"{key}({task}).pt" if task else f"{key}.pt"
            link = randomise(OuterLink(source, target), 0.12, seed=300 + i + 50 * (task == "code"))
            torch.save(released(link), folder / name)
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


def widths_of(style):
    width = {role.name: BASES[role.model][1] for role in style.roles}
    return {edge.key: (width[edge.src], width[edge.dst]) for edge in style.edges}


@pytest.fixture(autouse=True)
def quiet():
    """Loading draws no progress bars, as in the scripts."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A folder with all base models, released agents, outer links and training sets."""
    folder = tmp_path_factory.mktemp("hub")
    for seed, name in enumerate(BASES):
        write_base(folder / name, name, seed)
    for name in STYLES:
        style = get_style(name)
        for seed, role in enumerate(style.roles):
            write_agent(folder / role.repo, folder / role.model, BASES[role.model][1],
                        name in PER_TASK, 20 * seed)
        write_outer(folder / style.repo, style, widths_of(style), name in PER_TASK)
    for name in SETS:
        (folder / "RecursiveMAS" / name).mkdir()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows_of(name)),
                                    folder / "RecursiveMAS" / name / "train-0-of-1.parquet")
    return folder


def contents(folder):
    """{path: hash of its bytes} of all files below a folder."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def at_hub(hub, monkeypatch, tmp_path_factory):
    """The hub's ids are folders here; afterwards no file has been added, changed or removed."""
    monkeypatch.chdir(hub)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    before = contents(hub)
    yield hub
    assert contents(hub) == before


def holds(link, path):
    """Whether a link's weights are exactly those in a released file."""
    state, own = torch.load(path, weights_only=True), link.state_dict()
    return set(own) == set(state) and all(torch.equal(own[k], state[k].float()) for k in own)


def same_weights(model, path):
    """Whether a model's weights are those in a folder (names differ by the text part's prefix)."""
    def plain(state):
        return {key.replace("language_model.", "").removeprefix("model."): value
                for key, value in state.items()}

    saved = plain(load_file(path / "model.safetensors"))
    own = plain(model.state_dict())
    own = {key: value for key, value in own.items() if key in saved or "lm_head" not in key}
    return own.keys() <= saved.keys() and all(torch.equal(own[k], saved[k]) for k in own)


def run(script, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, argv)])
    script.main()


# ---- loading ------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", ["math", "code"])
@pytest.mark.parametrize("name", STYLES)
def test_a_released_system_loads_by_its_hub_ids(name, task, at_hub):
    """Oracle: the files themselves. The task chooses the file where a repo holds two."""
    mas = load_mas_system(name, device="cpu", task=task)
    ending = f"({task})" if name in PER_TASK else ""
    for role in mas.style.roles:
        agent = mas.agents[role.name]
        assert holds(agent.inner, at_hub / role.repo / f"adapter{ending}.pt")
        assert same_weights(agent.model, at_hub / role.repo)
        assert agent.width == BASES[role.model][1]
    for edge in mas.style.edges:
        assert holds(mas.outer[edge.key], at_hub / mas.style.repo / f"{edge.key}{ending}.pt")
    texts = mas.answer(QUESTIONS[:2], rounds=2, latent_length=2, kind=task, max_new_tokens=3)
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)


@pytest.mark.parametrize("name", STYLES)
def test_prompts_are_made_of_known_words(name, at_hub):
    """The rendered chat of each role and kind: the question once, whole, and no slot left over;
    the templates that know no system role still say the system text."""
    mas = load_mas_system(name, device="cpu")
    for role in mas.style.roles:
        agent = mas.agents[role.name]
        heard = mas.style.heard_by(role.name)
        for kind in ("math", "choice", "code", "search"):
            segments = agent.prompt(role.system, mas.style.prompt(role, kind, heard), heard,
                                    QUESTIONS[:1], ANSWER_FORMAT[kind])
            assert [part for part in segments if isinstance(part, str)] == heard
            ids = [token for part in segments if not isinstance(part, str) for token in part[0]]
            words = agent.tokenizer.convert_ids_to_tokens(ids)
            text = " ".join(words)
            assert "<unk>" not in words and "{question}" not in text
            assert text.count(QUESTIONS[0]) == 1
            assert " ".join(role.system.split()) in text
            assert (ANSWER_FORMAT[kind] in text) == (role is mas.style.roles[-1])


def test_the_published_quick_start(at_hub):
    """Only the import is ours."""
    mas = load_mas_system(style="sequential_light", device="cpu", trust_remote_code=True)
    planner, critic, solver = (mas.agents[role].model for role in ("planner", "critic", "solver"))
    assert [type(model).__name__ for model in (planner, critic, solver)] == [
        "Qwen3ForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM"]
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="use --device cpu"):
            load_mas_system(style="sequential_light", device="cuda", trust_remote_code=True)


@pytest.mark.parametrize("name", STYLES)
def test_ckpt_override_by_local_folder(name, at_hub, tmp_path):
    """Each role's folder and the outer links', one at a time; the others stay as they were."""
    style, released_mas = get_style(name), load_mas_system(name, device="cpu")
    role = style.roles[0]
    link = randomise(InnerLink(BASES[role.model][1]), 1.0, seed=9)
    write_agent(tmp_path / "agent", at_hub / role.model, BASES[role.model][1], False, seed=0)
    torch.save(released(link), tmp_path / "agent/adapter.pt")
    mas = load_mas_system(name, device="cpu", ckpt_override={role.name: str(tmp_path / "agent")})
    for other in style.roles:
        same = largest_difference(mas.agents[other.name].inner.proj1.weight,
                                  released_mas.agents[other.name].inner.proj1.weight) == 0
        assert same == (other is not role)
    assert holds(mas.agents[role.name].inner, tmp_path / "agent/adapter.pt")
    fresh = mas.with_fresh_outer()
    save_outer(fresh.outer, tmp_path / "outer", name, "pt")
    mas = load_mas_system(name, device="cpu", ckpt_override={"outer": str(tmp_path / "outer")})
    for edge in style.edges:
        assert holds(mas.outer[edge.key], tmp_path / f"outer/{edge.key}.pt")


@pytest.mark.parametrize("name", STYLES)
def test_links_as_the_published_trainer_writes_them(name, at_hub, tmp_path):
    """adapter.pt beside the whole model; outer_XX.pt beside two manifests. The role's own repo
    and model are not looked at."""
    style, override = get_style(name), {"outer": str(tmp_path / "outer")}
    style = dataclasses.replace(style, repo="no/outer", roles=tuple(
        dataclasses.replace(role, repo="no/repo") for role in style.roles))
    for role in style.roles:
        override[role.name] = str(tmp_path / role.name)
        write_agent(tmp_path / role.name, at_hub / role.model, BASES[role.model][1], False, 3)
        (tmp_path / role.name / "train_args.json").write_text('{"mas_role": "x", "seed": 42}')
    style = dataclasses.replace(style, roles=tuple(
        dataclasses.replace(role, model="no/model") for role in style.roles))
    write_outer(tmp_path / "outer", style, widths_of(get_style(name)), False)
    (tmp_path / "outer/outer_adapter_config.json").write_text("{}")
    before = contents(tmp_path)
    mas = load_mas_system(style, device="cpu", ckpt_override=override)
    for role in style.roles:
        assert holds(mas.agents[role.name].inner, tmp_path / role.name / "adapter.pt")
    for edge in style.edges:
        assert holds(mas.outer[edge.key], tmp_path / f"outer/{edge.key}.pt")
    assert len(mas.answer(QUESTIONS[:1], 1, 2, max_new_tokens=2)) == 1
    assert contents(tmp_path) == before


# ---- the published command lines ----------------------------------------------------------------

INNER = {       # style: (design, role, task, training set), as published
    "sequential_light": [("sequential", "planner", "math", "Sequential-Math"),
                         ("sequential", "refiner", "math", "Sequential-Math"),
                         ("sequential", "solver", "math", "Sequential-Math")],
    "sequential_scaled": [("sequential", "planner", "math", "Sequential-Math"),
                          ("sequential", "refiner", "math", "Sequential-Math"),
                          ("sequential", "solver", "math", "Sequential-Math")],
    # Published with the tasks code and choice for the second and third: see the test below.
    "mixture": [("hie", "hie_math_expert", "math", "Mixture-Math"),
                ("hie", "hie_code_expert", "math", "Mixture-Code"),
                ("hie", "hie_science_expert", "choice", "Mixture-Science"),
                ("hie", "hie_summarizer", "math", "Mixture-Summarizer")],
    "distillation": [("distill", "distill_expert", "math", "Distillation-Math"),
                     ("distill", "distill_learner", "math", "Distillation-Math")],
    "deliberation": [("deliberation", "deliberation_reflector", "math", "Deliberation"),
                     ("deliberation", "deliberation_toolcaller", "math", "Deliberation")],
}
OUTER = {       # style: (task, training set, the roles' names in flags)
    "sequential_light": ("math", "Sequential-Math", ["agent1", "agent2", "agent3"]),
    "sequential_scaled": ("math", "Sequential-Math", ["agent1", "agent2", "agent3"]),
    "mixture": ("math", "Mixture-Outer", ["agent1", "agent2", "agent3", "agent4"]),
    "distillation": ("math", "Distillation-Math", ["expert", "learner"]),
    "deliberation": ("math", "Deliberation", ["reflector", "toolcaller"]),
}
OPTIMIZER = ("--lr_scheduler_type cosine --weight_decay 0 --warmup_steps 1 --max_grad_norm 1.0 "
             "--log_every 1 --save_steps 0 --seed 42 --enable_thinking 0 --solver_pre_question 1 "
             "--num_train_epochs 1 --dataset_split train --dataset_json_field data "
             "--trust_remote_code --dtype float32 --batch_size 2 --max_steps 3").split()
INNER_FLAGS = [*OPTIMIZER, *(
    "--max_length 2048 --adapter_lr 5e-4 --grad_accum_steps 1 --adapter_dtype auto --adapter_type "
    "ln_res_adapter --adapter_cos_weight 1.0 --adapter_mse_weight 0.0 --latent_length 3").split()]
OUTER_FLAGS = [*OPTIMIZER, *(
    "--num_samples -1 --shuffle --max_length 4096 --max_latent_tokens 80 --outer_lr 5e-4 "
    "--num_recursive_rounds 2 --supervise_final_only 1 --non_last_loss_weight 0.1 "
    "--outer_adapter_type outer_ln_res_adapter --inner_adapter_type_fallback ln_res_adapter "
    "--gradient_checkpointing 1 --outer_dtype auto --device cpu --latent_length 3").split()]


def train_inner_links(name, monkeypatch, folder):
    """{role: folder} of the inner links of a style, trained by the published command lines."""
    style, folders = get_style(name), {}
    for design, role, task, data in INNER[name]:
        role_name = style.role(role).name
        folders[role_name] = folder / role_name
        run(train_inner, monkeypatch, "--model_name_or_path", style.role(role).model,
            "--mas_design", design, "--mas_role", role, "--mas_task", task, "--dataset_name",
            f"RecursiveMAS/{data}", "--save_dir", folder / role_name, *INNER_FLAGS)
    return folders


def outer_command(name, inner, save_dir):
    """The published command line of the outer loop, with its flags for each role."""
    style, (task, data, names) = get_style(name), OUTER[name]
    argv = ["--style", name, "--mas_task", task, "--dataset_name", f"RecursiveMAS/{data}",
            "--save_dir", save_dir, *OUTER_FLAGS]
    for flag, role in zip(names, style.roles):
        argv += [f"--{flag}_model_name_or_path", role.model,
                 f"--{flag}_inner_aligner_path", inner[role.name]]
    return argv + [f"--{style.edges[0].key}_type", "outer_ln_res_adapter"]


def finite_losses(folder):
    losses = [line["loss"] for line in common.read_json_lines(folder / "log.jsonl")]
    return len(losses) == 3 and all(isinstance(loss, float) for loss in losses)


@pytest.mark.parametrize("name", STYLES)
def test_a_style_trains_and_answers_by_the_published_command_lines(name, at_hub, tmp_path,
                                                                   monkeypatch):
    """Inner loop of each role, outer loop, evaluation. Oracles: finite losses, links that differ
    from what they began with, and (at_hub) base models that do not change."""
    style = get_style(name)
    inner = train_inner_links(name, monkeypatch, tmp_path)
    for role in style.roles:
        width = BASES[role.model][1]
        torch.manual_seed(42)
        began = InnerLink(width)
        link = load_inner(inner[role.name], width, OUTER[name][0])
        assert finite_losses(inner[role.name])
        assert not torch.equal(link.proj1.weight, began.proj1.weight)
        assert largest_difference(link.proj1.weight, began.proj1.weight) < 3e-3     # few steps
    run(train_outer, monkeypatch, *outer_command(name, inner, tmp_path / "outer"))
    assert finite_losses(tmp_path / "outer")
    override = {**inner, "outer": tmp_path / "outer"}
    mas = load_mas_system(name, device="cpu", task=OUTER[name][0], ckpt_override=override)
    before = mas.with_fresh_outer(seed=42)
    for agent in mas.agents.values():           # scale matching: the gain began at the base's RMS
        assert agent.inner.post_ln.weight.mean().item() == pytest.approx(
            agent.embedding_rms, rel=0.05)
    for edge in style.edges:
        assert not torch.equal(mas.outer[edge.key].proj1.weight,
                               before.outer[edge.key].proj1.weight), edge.key
    run(evaluate, monkeypatch, "--style", name, "--dataset", "tiny", "--device", "cpu",
        "--num_samples", 4, "--seed", 42, "--num_recursive_rounds", 2, "--batch_size", 3,
        "--latent_length", 3, "--temperature", 0.6, "--top_p", 0.95, "--top_k", 5, "--min_p", 0.01,
        "--repetition_penalty", 1.1, "--trust_remote_code", 1, "--method", "latent", "text",
        "single", "--max_new_tokens", 4, "--out", tmp_path / "out", "--ckpt_override",
        *(f"{key}={folder}" for key, folder in override.items()))
    rows = json.loads((tmp_path / "out/summary.json").read_text())["rows"]
    assert [(row["style"], row["method"], row["n"]) for row in rows] == [
        (name, method, 4) for method in ("text", "single", "latent")]
    assert len(common.read_json_lines(tmp_path / "out/results.jsonl")) == 12


@pytest.mark.parametrize("name", ["sequential_light", "distillation"])
def test_a_style_trains_for_code(name, at_hub, tmp_path, monkeypatch):
    """With the -Code sets and --mas_task code; found again as the task's links, and only so."""
    monkeypatch.setitem(INNER, name, [(design, role, "code", data.replace("Math", "Code"))
                                      for design, role, _, data in INNER[name]])
    monkeypatch.setitem(OUTER, name, ("code", OUTER[name][1].replace("Math", "Code"),
                                      OUTER[name][2]))
    inner = train_inner_links(name, monkeypatch, tmp_path)
    run(train_outer, monkeypatch, *outer_command(name, inner, tmp_path / "outer"))
    assert finite_losses(tmp_path / "outer")
    override = {**inner, "outer": tmp_path / "outer"}
    mas = load_mas_system(name, device="cpu", task="code", ckpt_override=override)
    assert len(mas.answer(QUESTIONS[:1], 2, 2, kind="code", max_new_tokens=2)) == 1
    with pytest.raises(FileNotFoundError, match="no inner link for task 'math'"):
        load_mas_system(name, device="cpu", task="math", ckpt_override=override)


def test_mixture_with_the_code_expert_trained_for_code(at_hub, tmp_path, monkeypatch):
    """As published: its inner link is trained with --mas_task code, the outer ones with math."""
    monkeypatch.setitem(INNER, "mixture", [INNER["mixture"][0], (
        "hie", "hie_code_expert", "code", "Mixture-Code"), *INNER["mixture"][2:]])
    inner = train_inner_links("mixture", monkeypatch, tmp_path)
    run(train_outer, monkeypatch, *outer_command("mixture", inner, tmp_path / "outer"))


def test_other_flags_of_the_inner_loop(at_hub, tmp_path, monkeypatch):
    """--load_dir goes on from a link (at a learning rate of 0: stays there), --text_field takes
    another column, a local .json has its rows under a field; both give what the hub's set gives."""
    common_flags = ["--mas_design", "sequential", "--mas_role", "planner", "--mas_task", "math",
                    "--model_name_or_path", "Qwen/Qwen3-1.7B"]
    (tmp_path / "rows.json").write_text(json.dumps({"inside": rows_of("Sequential-Math")}))
    (tmp_path / "rows.jsonl").write_text("".join(
        json.dumps({**row, "plan": None, "mine": row["plan"]}) + "\n"
        for row in rows_of("Sequential-Math")))
    for name, *flags in (
            ("hub", "--dataset_name", "RecursiveMAS/Sequential-Math"),
            ("json", "--dataset_name", tmp_path / "rows.json", "--dataset_json_field", "inside"),
            ("jsonl", "--dataset_name", tmp_path / "rows.jsonl", "--text_field", "mine"),
            ("again", "--dataset_name", "RecursiveMAS/Sequential-Math", "--load_dir",
             tmp_path / "hub", "--adapter_lr", 0)):
        run(train_inner, monkeypatch, *common_flags, *INNER_FLAGS, *flags, "--save_dir",
            tmp_path / name)
        assert contents(tmp_path / name)["adapter(math).safetensors"] == contents(
            tmp_path / "hub")["adapter(math).safetensors"], name


@pytest.mark.parametrize("flags", [
    ["--supervise_final_only", 0], ["--latents", "teacher"], ["--latents", "teacher_aligned"],
    ["--role_loss_weight", 0.5, "--warm_start_steps", 2, "--random_rounds", 1],
    ["--enable_thinking", 1, "--solver_pre_question", 0, "--lr_scheduler_type", "constant"],
    ["--outer_12_type", "outer_ln_adapter"], ["--outer_adapter_type", "outer_linear_res_adapter"],
    ["--dtype", "bfloat16"]], ids=lambda flags: flags[0])
def test_other_flags_of_the_outer_loop(flags, at_hub, tmp_path, monkeypatch):
    """On the released agents of the style with three families; saved in the released layout."""
    style = get_style("sequential_scaled")
    inner = {role.name: role.repo for role in style.roles}
    argv = outer_command("sequential_scaled", inner, tmp_path)[:-2]
    run(train_outer, monkeypatch, *argv, "--save_format", "pt", *flags)
    assert finite_losses(tmp_path)
    widths = widths_of(style)
    links = load_outer(tmp_path, widths)
    for key in widths:
        assert holds(links[key], tmp_path / f"{key}.pt")


# ---- numbers: three families, round after round -------------------------------------------------

TRIOS = [("gemma3_conditional", "qwen3_5_conditional", "mistral"),
         ("mistral", "gemma3_conditional", "qwen3_5_conditional"),
         ("qwen3_5_conditional", "qwen3", "gemma3_conditional"),
         ("gemma3_conditional", "mistral", "gemma3")]


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("families", TRIOS, ids="-".join)
def test_a_system_of_three_families_is_the_plain_recursion(families, rounds):
    """Five questions: thoughts, messages and greedy words, in a batch with cache and padding,
    against the equations run one by one without either (test_recurse has it for Qwen3, Llama and
    Qwen2)."""
    mas, m, count = new_mas(families=families), 3, 6
    close = max(TOLERANCE.get(family, 1e-4) for family in families)
    texts, batch = mas.respond(QUESTIONS, rounds, m, trace=True, max_new_tokens=count)
    for b, question in enumerate(QUESTIONS):
        thoughts, sent, ids = plain_recursion(mas, question, rounds, m, count)
        wanted = mas.agents["solver"].tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert texts[b] == wanted
        for found, expected in ((batch.thoughts, thoughts), (batch.sent, sent)):
            assert found.keys() == expected.keys()
            for key in expected:
                assert largest_difference(found[key][b:b + 1], expected[key]) < close, key


# ---- training on kinds of questions, per sample, in every family --------------------------------

def worded(style):
    """THREE with targets, and for each kind of question other words around the same slots."""
    def kinds(text):
        return {"math": text, "code": f"check: {text}\nmend it", "choice": f"own: {text} end",
                "search": text}

    return dataclasses.replace(style, roles=tuple(
        dataclasses.replace(role, prompt=kinds(role.prompt), target=(role.name,),
                            first=kinds(role.first) if role.first else "")
        for role in style.roles))


KINDS = worded(THREE)
MIXED = [{"question": question, "task_family": kind, "planner": "s1 x7 1", "critic": "s2 flip 8 .",
          "solver": answer} for question, kind, answer in zip(
    QUESTIONS, ("math", "code", "choice", "code"), ("s3 +2 0 .", "4 .", "s4 flip 7 s5", "9"))]
ANSWERERS = ("qwen3", "llama", "qwen2", "mistral", "gemma3", "gemma3_conditional", "qwen3_5",
             "qwen3_5_conditional")


def answering(family, double=True):
    """A system whose last agent is of a family, in float64: rounding is amplified by rollouts."""
    other = "llama" if family.startswith("qwen3_5") else "qwen3_5_conditional"
    mas = new_mas(KINDS, families=("qwen3", other, family))
    if double:
        for agent in mas.agents.values():
            agent.model.double()
            agent.inner.double()
            agent.dtype = torch.float64
        mas.outer.double()
    return mas


def close_gradients(found, wanted, close):
    assert found.keys() == wanted.keys() and any(value.any() for value in wanted.values())
    for name in wanted:
        assert (found[name] - wanted[name]).norm() <= close * wanted[name].norm(), name


@pytest.mark.parametrize("latents", ["rollout", "teacher"])
@pytest.mark.parametrize("family", ANSWERERS)
def test_a_mixed_batch_is_the_mean_over_its_target_tokens(family, latents):
    """Rows of three kinds and of different length, batched = each by itself, weighed by its
    tokens: loss and gradients."""
    mas, args = answering(family), outer_args(latents=latents, latent_length=2)
    loss, gradients = outer_gradients(mas, MIXED, 2, args)
    counts = [len(row["solver"].split()) for row in MIXED]
    singles = [outer_gradients(mas, [row], 2, args) for row in MIXED]
    assert loss == pytest.approx(sum(
        one * n for (one, _), n in zip(singles, counts)) / sum(counts), abs=1e-4)
    wanted = {name: sum(one[name] * n for (_, one), n in zip(singles, counts)) / sum(counts)
              for name in gradients}
    close_gradients(gradients, wanted, 2e-3)


def test_kinds_change_the_loss():
    """Else the test above could not see a row asked under another row's kind."""
    mas, args = answering("llama"), outer_args(latent_length=2)
    losses = {kind: outer_gradients(mas, [{**MIXED[0], "task_family": kind}], 2, args)[0]
              for kind in ("math", "code", "choice", None)}
    assert len({round(loss, 4) for loss in losses.values()}) == 3
    assert losses[None] == losses["math"]          # the run's own, --mas_task


@pytest.mark.parametrize("family", ANSWERERS)
def test_checkpointing_of_turns_changes_no_gradient(family):
    """Also where a recurrent state is kept (Qwen3.5); in float32, as it is trained."""
    mas = answering(family, double=False)
    kept, again = (outer_gradients(mas, MIXED, 2, outer_args(
        latent_length=2, role_loss_weight=0.5, gradient_checkpointing=flag)) for flag in (0, 1))
    assert kept[0] == pytest.approx(again[0], abs=1e-5)
    close_gradients(again[1], kept[1], 1e-3)


def test_an_unknown_task_family_is_named():
    with pytest.raises(ValueError, match="poetry.*math, choice, code, search") as problem:
        common.keep_usable([MIXED[0], {**MIXED[1], "task_family": "poetry"}], KINDS.roles)
    assert "\n" not in str(problem.value)


def test_kinds_that_hear_in_another_order_cannot_share_a_batch():
    """One line that names style and role; each kind alone works."""
    roles = [*KINDS.roles]
    roles[2] = dataclasses.replace(roles[2], prompt={
        **roles[2].prompt, "code": "{question}\nplan: {planner}\nnotes: {critic}"})
    mas = dataclasses.replace(answering("llama", double=False),
                              style=dataclasses.replace(KINDS, roles=tuple(roles)))
    with pytest.raises(ValueError, match="style three.*role solver.*different order") as problem:
        mas.respond(QUESTIONS[:2], 1, 2, kind=["math", "code"], max_new_tokens=1)
    assert "\n" not in str(problem.value)
    for kind in ("math", "code"):
        mas.respond(QUESTIONS[:2], 1, 2, kind=[kind] * 2, max_new_tokens=1)


def test_answer_takes_a_kind_for_each_question():
    """As one batch does, whatever the batch size."""
    mas = answering("llama", double=False)
    options = dict(rounds=1, latent_length=2, max_new_tokens=4)
    kinds = [row["task_family"] for row in MIXED]
    whole = mas.answer(QUESTIONS[:4], kind=kinds, **options)
    assert mas.answer(QUESTIONS[:4], kind=kinds, batch_size=2, **options) == whole


# ---- export and import --------------------------------------------------------------------------

RELEASED_KEYS = {"legacy_key", "filename", "adapter_type", "in_dim", "out_dim"}


@pytest.mark.parametrize("name", STYLES)
def test_released_links_saved_again_are_the_same_bits(name, at_hub, tmp_path):
    """bf16 -> float32 here -> bf16: names, types and bits; and the manifests' released keys. As
    safetensors, float32 to the last bit."""
    mas = load_mas_system(name, device="cpu")
    ending = "(math)" if name in PER_TASK else ""
    for format in ("pt", "safetensors"):
        save_outer(mas.outer, tmp_path / format, name, format)
        for role in mas.style.roles:
            save_inner(mas.agents[role.name].inner, tmp_path / format / role.name, "math", format)
    pairs = [(at_hub / mas.style.repo / f"{edge.key}{ending}.pt", tmp_path / f"pt/{edge.key}.pt")
             for edge in mas.style.edges]
    pairs += [(at_hub / role.repo / f"adapter{ending}.pt",
               tmp_path / f"pt/{role.name}/adapter(math).pt") for role in mas.style.roles]
    for theirs, ours in pairs:
        one, other = (torch.load(path, weights_only=True) for path in (theirs, ours))
        assert one.keys() == other.keys()
        assert all(other[key].dtype == torch.bfloat16 and torch.equal(one[key], other[key])
                   for key in one)
        exact = load_file(str(ours).replace("/pt/", "/safetensors/").replace(".pt", ".safetensors"))
        assert all(torch.equal(exact[key], one[key].float()) for key in one)
    theirs = json.loads((at_hub / mas.style.repo / "outerlink_config.json").read_text())
    ours = json.loads((tmp_path / "pt/outerlink_config.json").read_text())
    assert set(ours) == {"format_version", "paradigm", "legacy_config_filename", "adapters"}
    assert set(ours) - {"adapters"} == set(theirs) - {"adapters", "tasks"}
    assert all(set(entry) == RELEASED_KEYS for entry in ours["adapters"])
    folder = tmp_path / "pt" / mas.style.roles[0].name
    assert json.loads((folder / "adapter_config.json").read_text()) == {
        "adapter_type": "ln_res_adapter"}
    assert json.loads((folder / "innerlink_config.json").read_text()) == {
        "tasks": {"math": {"adapter.pt": "adapter(math).pt"}}}


# ---- bad input: one line that names the file or role, and the cure ------------------------------

def says(problem, *parts):
    """Whether an error is one line with all parts."""
    text = str(problem.value)
    return "\n" not in text and all(part in text for part in parts)


httpx = sys.modules[errors.HfHubHTTPError.__mro__[1].__module__.split(".")[0]]


def hub_says(status, code):
    """The error that the hub library makes of an answer of the hub."""
    request = httpx.Request("GET", "https://huggingface.co/api/models/some/repo/revision/main")
    answer = httpx.Response(status, headers={"X-Error-Code": code} if code else {},
                            request=request)
    try:
        hf_raise_for_status(answer)
    except errors.HfHubHTTPError as problem:
        return problem


HUB_PROBLEMS = {
    "gated": (hub_says(403, "GatedRepo"), ["gated", "accept its terms", "hf auth login"]),
    "missing": (hub_says(404, "RepoNotFound"), ["no repo of the hub", "check the name"]),
    "private": (hub_says(401, None), ["private", "hf auth login"]),
    "revision": (hub_says(404, "RevisionNotFound"), ["no such revision", "v9", "leave it away"]),
    "server": (hub_says(500, None), ["check name and network"]),
    "offline": (errors.OfflineModeIsEnabled("offline mode is enabled"), ["check name and network"]),
    "no network": (errors.LocalEntryNotFoundError("Got: ConnectError: [Errno -3]\nAn error"),
                   ["check name and network"]),
}


@pytest.mark.parametrize("case", HUB_PROBLEMS)
def test_what_the_hub_refuses(case, monkeypatch):
    """For a role's repo, the outer links, and a base model: who, which repo, why, what to do."""
    problem, named = HUB_PROBLEMS[case]

    def refuse(name, **_):
        raise problem

    monkeypatch.setattr(recurse, "snapshot_download", refuse)
    tiny_style = get_style("tiny")
    roles = (dataclasses.replace(tiny_style.roles[0], repo="some/repo"), *tiny_style.roles[1:])
    for style, who in ((dataclasses.replace(tiny_style, roles=roles), "role planner"),
                       (dataclasses.replace(tiny_style, repo="some/repo"), "outer links")):
        with pytest.raises(FileNotFoundError) as raised:
            load_mas_system(style, device="cpu", revision="v9")
        assert says(raised, "style tiny", who, "some/repo", "v9", *named)
    with pytest.raises(FileNotFoundError) as raised:
        recurse.load_agents("tiny", "cpu", models={"critic": "some/base"})
    assert says(raised, "role critic", "some/base", *(part for part in named if part != "v9"))


@pytest.mark.parametrize("problem", [httpx.ProxyError("403 Forbidden"),
                                     httpx.RemoteProtocolError("peer closed connection"),
                                     httpx.ReadError("broken pipe")],
                         ids=lambda problem: type(problem).__name__)
def test_a_proxy_or_a_connection_that_breaks_off(problem, monkeypatch):
    """snapshot_download lets these through as they are."""
    def refuse(name, **_):
        raise problem

    monkeypatch.setattr(recurse, "snapshot_download", refuse)
    with pytest.raises((OSError, ValueError)) as raised:
        recurse.local_folder("some/repo", who="role planner")
    assert says(raised, "role planner", "some/repo", "network")


def agent_folder(at_hub, tmp_path):
    folder = tmp_path / "agent"
    shutil.copytree(at_hub / get_style("sequential_light").role("critic").repo, folder)
    return folder


def load_critic(folder, **options):
    return load_mas_system("sequential_light", device="cpu",
                           ckpt_override={"critic": str(folder)}, **options)


def test_a_tokenizer_without_chat_template(at_hub, tmp_path):
    folder = agent_folder(at_hub, tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError) as problem:
        load_critic(folder)
    assert says(problem, str(folder), "no chat template", "instruct model")


def test_a_folder_without_tokenizer_files(at_hub, tmp_path):
    """The library makes an empty tokenizer of some families: every text has no tokens."""
    folder = shutil.copytree(at_hub / "Qwen/Qwen2.5-Math-1.5B-Instruct", tmp_path / "base")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError) as problem:
        recurse.load_agents("sequential_light", "cpu", models={"solver": str(folder)})
    assert says(problem, str(folder), "tokenizer")


def test_a_template_that_drops_the_users_text():
    """One that wants a list of parts gets a string, and writes none of it."""
    template = ("{% for m in messages %}<|user|> {% for part in m['content'] %}{{ part['text'] }}"
                "{% endfor %}{% endfor %} <|assistant|>")
    agent = Agent(new_model("llama"), word_tokenizer(template))
    with pytest.raises(ValueError, match="template"):
        agent.prompt("", "{question} <|notes|> {critic}", ["critic"], QUESTIONS[:1])


def test_inner_links_of_another_width(at_hub, tmp_path):
    folder = agent_folder(at_hub, tmp_path)
    torch.save(released(InnerLink(8)), folder / "adapter(math).pt")
    with pytest.raises(ValueError) as problem:
        load_critic(folder)
    assert says(problem, str(folder / "adapter(math).pt"), "(8", "(32", "belongs to other models")


def test_outer_links_of_another_style(at_hub):
    outer = get_style("distillation").repo
    with pytest.raises(ValueError) as problem:
        load_mas_system("sequential_light", device="cpu", ckpt_override={"outer": outer})
    assert says(problem, f"{outer}/outerlink_config.json", "outer_el", "outer_12", "another style")


def test_outer_links_of_the_same_edges_but_other_models(at_hub):
    outer = get_style("sequential_scaled").repo
    with pytest.raises(ValueError) as problem:
        load_mas_system("sequential_light", device="cpu", ckpt_override={"outer": outer})
    assert says(problem, f"{outer}/outerlink_config.json", "outer_12", "40 -> 48", "32 -> 32",
                "other models")


def test_links_of_another_task(at_hub, tmp_path):
    """An agent without the code link, and outer links without the task code."""
    folder = agent_folder(at_hub, tmp_path)
    (folder / "adapter(code).pt").unlink()
    with pytest.raises(FileNotFoundError) as problem:
        load_critic(folder, task="code")
    assert says(problem, str(folder), "task 'code'", "adapter(code).pt", "train_inner.py")


def test_outer_links_of_another_task(at_hub, tmp_path):
    shutil.copytree(at_hub / get_style("sequential_light").repo, tmp_path / "outer")
    path = tmp_path / "outer/outerlink_config.json"
    config = json.loads(path.read_text())
    del config["tasks"]["code"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError) as problem:
        load_mas_system("sequential_light", device="cpu", task="code",
                        ckpt_override={"outer": str(tmp_path / "outer")})
    assert says(problem, str(path), "task", "math") and "KeyError" not in str(problem.value)


def test_links_trained_on_another_base_model_are_not_used_with_the_roles(at_hub, tmp_path,
                                                                         monkeypatch):
    """train_args.json says what they were trained on: that model is taken, or it is an error."""
    run(train_inner, monkeypatch, "--mas_design", "sequential", "--mas_role", "planner",
        "--model_name_or_path", "meta-llama/Llama-3.2-1B-Instruct", "--dataset_name",
        "RecursiveMAS/Sequential-Math", *INNER_FLAGS, "--save_dir", tmp_path)
    try:
        mas = load_mas_system("sequential_light", device="cpu",
                              ckpt_override={"planner": str(tmp_path)})
    except ValueError as problem:
        assert "meta-llama/Llama-3.2-1B-Instruct" in str(problem)
    else:
        assert "Llama" in type(mas.agents["planner"].model).__name__


def test_a_manifest_that_names_a_missing_file(at_hub, tmp_path):
    folder = agent_folder(at_hub, tmp_path)
    (folder / "adapter(code).pt").rename(folder / "adapter.pt")
    with pytest.raises(FileNotFoundError) as problem:
        load_critic(folder, task="code")
    assert says(problem, "innerlink_config.json", "adapter(code).pt")


@pytest.mark.parametrize("kinds", [[], ["math"], ["math"] * 3], ids=len)
def test_a_kind_for_each_question_or_one_for_all(kinds):
    with pytest.raises(ValueError, match="kind"):
        new_mas().respond(QUESTIONS[:2], 1, 2, kind=kinds, max_new_tokens=1)


def test_a_tokenizer_with_more_tokens_than_the_model(at_hub, tmp_path):
    """Said when it is loaded, not at the first question that holds such a token."""
    folder = agent_folder(at_hub, tmp_path)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 5000,
                                      "content": "<extra>"})
    path.write_text(json.dumps(tokenizer))
    try:
        load_critic(folder).answer(["start <extra> 3"], 1, 2, max_new_tokens=1)
    except ValueError as problem:
        assert str(folder) in str(problem)


def test_an_override_of_an_unknown_role():
    with pytest.raises(ValueError) as problem:
        load_mas_system("sequential_light", device="cpu", ckpt_override={"poet": "some/folder"})
    assert says(problem, "sequential_light", "'poet'", "planner, critic, solver")


def test_an_override_by_the_published_name_of_a_role(at_hub):
    """refiner is the critic."""
    other = get_style("sequential_light").role("planner").repo
    mas = load_mas_system("sequential_light", device="cpu", ckpt_override={"refiner": other})
    assert same_weights(mas.agents["critic"].model, at_hub / other)


def test_ckpt_override_may_be_given_twice(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--ckpt_override", "planner=a",
                                      "--ckpt_override", "outer=b"])
    args, _ = evaluate.flags()
    assert evaluate.parse_override(args.ckpt_override) == {"planner": "a", "outer": "b"}


def test_a_jsonl_that_is_no_text_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError) as problem:
        common.load_rows(str(tmp_path / "rows.jsonl"))
    assert says(problem, str(tmp_path / "rows.jsonl"))


def test_a_design_does_not_overrule_a_style(monkeypatch):
    """sequential is the published name of both sequential styles."""
    monkeypatch.setattr(sys, "argv", ["train_inner.py", "--mas_design", "sequential", "--style",
                                      "sequential_scaled"])
    assert train_inner.flags()[1].name == "sequential_scaled"


def test_missing_data_is_said_before_any_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(train_outer, "load_agents", lambda *_, **__: pytest.fail("models first"))
    with pytest.raises(ValueError, match="no training data"):
        run(train_outer, monkeypatch, "--style", "mixture", "--save_dir", tmp_path / "out")


# ---- a style in one file ------------------------------------------------------------------------

DEBATE = '''"""Two equal agents: each hears the other; the second one answers."""
from styles import Edge, Role, Style


def debater(name, other, target):
    return Role(name, "tiny/solver", "tiny/solver", target=(target,),
                prompt="{question} <|notes|> {%s}" % other, first="{question} <|notes|> none")


debate = Style(
    name="debate",
    roles=(debater("left", "right", "plan"), debater("right", "left", "answer")),
    edges=(Edge("outer_lr", "left", "right"), Edge("outer_rl", "right", "left")),
)
'''
DEBATE_FLAGS = ("--dataset_name tiny --num_samples 20 --max_steps 3 --batch_size 2 --latent_length "
                "2 --num_recursive_rounds 2 --eval_samples 2 --log_every 1").split()


@pytest.fixture
def debate(tmp_path):
    path = tmp_path / "debate.py"
    path.write_text(DEBATE)
    return path


def test_a_style_file_trains_and_answers(debate, tmp_path, monkeypatch):
    """train_inner, train_outer and evaluate of a style given by its path; links of its own."""
    run(train_inner, monkeypatch, "--style", debate, "--mas_role", "left", "--dataset_name",
        "tiny", "--num_samples", 10, "--max_steps", 2, "--latent_length", 2, "--save_dir",
        tmp_path / "left")
    run(train_outer, monkeypatch, "--style", debate, *DEBATE_FLAGS, "--save_dir",
        tmp_path / "outer", "--left_inner_aligner_path", tmp_path / "left")
    assert finite_losses(tmp_path / "outer")
    run(evaluate, monkeypatch, "--style", debate, "--num_samples", 4, "--latent_length", 2,
        "--max_new_tokens", 4, "--num_recursive_rounds", 2, "--out", tmp_path / "out",
        "--ckpt_override", f"left={tmp_path / 'left'}", f"outer={tmp_path / 'outer'}")
    rows = json.loads((tmp_path / "out/summary.json").read_text())["rows"]
    assert {row["style"] for row in rows} == {"debate"} and len(rows) == 8


def test_the_trainers_last_line_can_be_run(debate, tmp_path, monkeypatch, capsys):
    """The command it prints asks the system that was trained: this style file, these links."""
    shutil.copytree(PROJECT / "tiny/solver", tmp_path / "mine")
    run(train_outer, monkeypatch, "--style", debate, *DEBATE_FLAGS, "--save_dir",
        tmp_path / "outer", "--agent1_inner_aligner_path", tmp_path / "mine")
    command = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert command[:2] == ["python", "evaluate.py"]
    assert str(debate) in command and f"left={tmp_path / 'mine'}" in command
    run(evaluate, monkeypatch, *command[2:])


BROKEN_FILES = {
    "none": ("x = 1\n", "makes 0 styles"),
    "two": (DEBATE + "import dataclasses\nmore = dataclasses.replace(debate, name='b')\n",
            "makes 2 styles"),
    "two roles of one name": (DEBATE.replace('"right", "left", "answer"', '"left", "left", "x"'),
                              "two roles are called left"),
    "an edge to nowhere": (DEBATE.replace('"outer_rl", "right"', '"outer_rl", "judge"'),
                           "names role judge, which does not exist"),
    "a missing slot": (DEBATE.replace("<|notes|> {%s}\" % other", "<|notes|>\""), "no slot"),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_broken_style_file_is_one_line(case, tmp_path, monkeypatch, capsys):
    text, complaint = BROKEN_FILES[case]
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--style", str(tmp_path / "mine.py")])
    with pytest.raises(SystemExit) as stopped:
        common.run(evaluate.main)
    said = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(said) == 1 and complaint in said[0]


def test_a_style_file_that_is_missing():
    with pytest.raises(ValueError) as problem:
        get_style("no/such/file.py")
    assert says(problem, "no/such/file.py", "does not exist")


def test_a_style_file_may_start_from_a_shipped_style(tmp_path):
    """The shortest way to a new one: other words, another model, the rest as it is."""
    path = tmp_path / "mine.py"
    path.write_text("import dataclasses\nfrom styles.tiny import tiny\n"
                    "mine = dataclasses.replace(tiny, name='mine')\n")
    assert get_style(str(path)).name == "mine"


ODD_FILES = {
    "not Python": "def (:\n",
    "a name that is missing": "debate = Style()\n",
    "one role without its comma": DEBATE.replace(
        'roles=(debater("left", "right", "plan"), debater("right", "left", "answer"))',
        'roles=(debater("left", "right", "plan"))'),
}


@pytest.mark.parametrize("case", ODD_FILES)
def test_a_style_file_that_python_refuses_is_one_line(case, tmp_path):
    (tmp_path / "mine.py").write_text(ODD_FILES[case])
    with pytest.raises(ValueError) as problem:
        get_style(str(tmp_path / "mine.py"))
    assert says(problem, "mine.py")


@pytest.mark.parametrize("change", [
    {"left": "agent2", "right": "agent1"}, {"left": "agent1", "right": "agent2"},
    {"outer_lr": "outer_adapter"}, {"outer_lr": "forward"}, {"outer_lr": "keys"}], ids=str)
def test_names_that_meet_other_names(change, debate, tmp_path, monkeypatch):
    """Roles called agent1, agent2 as in the published flags; edges called like a flag's head or
    like a method: either they work or the style is refused by one line."""
    text = DEBATE
    for old, new in change.items():
        text = text.replace(f'"{old}"', f'"{new}"')
    debate.write_text(text)
    try:
        run(train_outer, monkeypatch, "--style", debate, *DEBATE_FLAGS, "--save_dir",
            tmp_path / "outer")
    except ValueError as problem:
        assert "style debate" in str(problem)


# ---- places and memory --------------------------------------------------------------------------

def answers(mas, **options):
    """(texts, thoughts) of two rounds."""
    texts, ran = mas.respond(QUESTIONS[:3], 2, 2, trace=True, max_new_tokens=4, **options)
    return texts, list(ran.thoughts.values())


def same_answers(one, other):
    return one[0] == other[0] and all(map(torch.equal, one[1], other[1]))


@pytest.mark.parametrize("name", STYLES)
def test_two_devices_share_the_agents(name, at_hub, monkeypatch):
    """--device a,b: each agent is loaded once, to one of the two, neither gets more than the
    largest agent more than the other; and the answers stay those of one device."""
    loaded = {"a": [], "b": []}
    load_agent = recurse.load_agent

    def load(folder, device, dtype, *options):
        agent = load_agent(folder, torch.device("cpu"), dtype, *options)
        loaded[device].append((agent, agent.model.get_memory_footprint()))
        return agent

    whole = load_mas_system(name, device="cpu")
    assert same_answers(answers(whole), answers(load_mas_system(name, device="cpu,cpu")))
    monkeypatch.setattr(recurse, "load_agent", load)
    monkeypatch.setattr(recurse, "pick_device", lambda place, dtype: (place, torch.float32))
    mas = load_mas_system(name, device="a,b")
    assert same_answers(answers(whole), answers(mas))
    sizes = {place: sum(size for _, size in agents) for place, agents in loaded.items()}
    assert len(loaded["a"]) + len(loaded["b"]) == len(mas.agents) and min(sizes.values()) > 0
    largest = max(size for agents in loaded.values() for _, size in agents)
    assert abs(sizes["a"] - sizes["b"]) <= largest


@pytest.mark.parametrize("halves", ["planner", "critic"])
def test_agents_of_different_precision(halves):
    """As --device cuda,cpu makes them: bfloat16 on the card, float32 beside it."""
    mas = new_mas()
    agent = mas.agents[halves]
    agent.model.bfloat16()
    agent.dtype = torch.bfloat16
    assert len(mas.answer(QUESTIONS[:2], 2, 2, max_new_tokens=2)) == 2


def test_roles_of_one_base_share_its_model(at_hub, tmp_path):
    """Deliberation on one base model with links of their own; each keeps its inner link."""
    override = {"outer": get_style("deliberation").repo}
    for role in ("reflector", "toolcaller"):
        save_inner(randomise(InnerLink(40), 1.0, len(role)), tmp_path / role)
        override[role] = str(tmp_path / role)
    for device in ("cpu", "cpu,cpu"):
        mas = load_mas_system("deliberation", device=device, ckpt_override=override)
        reflector, toolcaller = mas.agents.values()
        assert reflector.model is toolcaller.model
        assert largest_difference(reflector.inner.proj1.weight, toolcaller.inner.proj1.weight) > 0
    by_repo = load_mas_system("deliberation", device="cpu")
    assert by_repo.agents["reflector"].model is not by_repo.agents["toolcaller"].model


def test_weights_move_in_and_out(at_hub):
    """All parameters and buffers are among those that move; wake() puts a copy in place, on the
    device, rest() brings back the very tensor. (No device but the CPU is needed for this.)"""
    role = get_style("sequential_scaled").roles[0]
    mas = load_mas_system("sequential_scaled", device="cpu", offload=True)
    agent, model = mas.agents[role.name], mas.agents[role.name].model
    moving = {id(weight) for weight, _ in agent.at_rest}
    assert moving == {id(weight) for weight in (*model.parameters(), *model.buffers())}
    assert all(weight.data_ptr() == resting.data_ptr() for weight, resting in agent.at_rest)
    resting, agent.device = torch.ones(3), torch.device("meta")
    weight = types.SimpleNamespace(device=resting.device, data=resting)
    agent.at_rest = [(weight, resting)]
    agent.wake()
    assert weight.data.device.type == "meta"
    agent.rest()
    assert weight.data is resting


@pytest.mark.parametrize("method", ["latent", "zero", "text", "single", "single_loop"])
@pytest.mark.parametrize("name", ["sequential_light", "mixture", "deliberation"])
def test_offload_keeps_one_agent_awake_and_answers_the_same(name, method, at_hub, monkeypatch):
    """Every forward pass is of the one model that is awake. Oracle for the answers: without."""
    wanted = answers(load_mas_system(name, device="cpu"), method=method)
    mas, awake, passes = load_mas_system(name, device="cpu", offload=True), set(), []
    assert all(agent.at_rest for agent in mas.agents.values())
    wake, rest, forward = Agent.wake, Agent.rest, Agent._forward

    def now_awake(agent):
        wake(agent)
        awake.add(id(agent.model))
        assert len(awake) == 1

    def now_resting(agent):
        rest(agent)
        awake.discard(id(agent.model))

    def counted(agent, *args):
        assert awake == {id(agent.model)}
        passes.append(agent)
        return forward(agent, *args)

    monkeypatch.setattr(Agent, "wake", now_awake)
    monkeypatch.setattr(Agent, "rest", now_resting)
    monkeypatch.setattr(Agent, "_forward", counted)
    assert same_answers(wanted, answers(mas, method=method)) and passes


def test_offload_by_flag_gives_the_same_results(at_hub, tmp_path, monkeypatch):
    """evaluate.py --offload, --device cpu,cpu and neither: the same lines but for the times."""
    lines = {}
    ways = {"plain": [], "offload": ["--offload"], "two": ["--device", "cpu,cpu"]}
    for name, flags in ways.items():
        run(evaluate, monkeypatch, "--style", "mixture", "--num_samples", 4, "--latent_length", 2,
            "--num_recursive_rounds", 2, "--method", "latent", "single", "zero", "untrained",
            "--max_new_tokens", 3, "--out", tmp_path / name, *flags)
        lines[name] = [{key: value for key, value in line.items()
                        if key not in ("seconds", "peak_memory_mb")}
                       for line in common.read_json_lines(tmp_path / name / "results.jsonl")]
    assert len(lines["plain"]) == 16 and lines["plain"] == lines["offload"] == lines["two"]

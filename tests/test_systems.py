"""Real systems, end to end, on local folders laid out like the published hub repositories.

The models are tiny and random, of the real architectures; widths are the published ones / 64. All
command lines are the published ones, with another path to the script and smaller sizes.
"""
import dataclasses
import hashlib
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
import transformers
from conftest import (PROJECT, QUESTIONS, THREE, TOLERANCE, VOCABULARY, in_float64,
                      largest_difference, new_mas, new_model, randomise, word_tokenizer)
from huggingface_hub import errors
from huggingface_hub.utils import hf_raise_for_status
from safetensors.torch import load_file
from test_recurse import plain_recursion
from test_train import outer_args, outer_gradients
from tokenizers import AddedToken

import evaluate
import train_inner
import train_outer
from agents import Agent
from link import InnerLink, OuterLink
from recurse import load_mas_system
from styles import ANSWER_FORMAT, get_style
from support import checkpoints, flags, rows
from support.checkpoints import (load_agents, load_inner, load_outer, local_folder, save_inner,
                                 save_outer)
from writing import Writing

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
    """Four rows of a training set. The mixed sets hold a question of each kind."""
    kinds = {"Code": "code", "Science": "choice"}.get(name.split("-")[-1], "math")
    kinds = [kinds] * 4
    if name in ("Mixture-Summarizer", "Mixture-Outer", "Deliberation"):
        kinds = ["math", "code", "choice", "math"]
    made = []
    for i, kind in enumerate(kinds):
        row = {column: f"{'s1 x7 ' * (i + 1)}{column} ." for column in SETS[name].split()}
        row.update(question=QUESTIONS[i], type="function" if kind == "code" else None)
        for column, value in (("task_family", kind), ("source_idx", i),
                              ("fn_name", "flip" if kind == "code" else None)):
            if column in row:
                row[column] = value
        made.append(row)
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
    """The rendered chat of each role and kind holds the question once and whole, and no slot is
    left over. The templates that know no system role still say the system text."""
    mas = load_mas_system(name, device="cpu")
    for role in mas.style.roles:
        agent = mas.agents[role.name]
        heard = mas.style.heard_by(role.name)
        for kind in ("math", "choice", "code", "search"):
            values = {"question": QUESTIONS[:1], "answer_format": [ANSWER_FORMAT[kind]]}
            [row] = agent.prompt(role.system, mas.style.prompt(role, kind, heard), values, heard)
            assert [part for part in row if isinstance(part, str)] == heard
            ids = [token for part in row if not isinstance(part, str) for token in part]
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
        with pytest.raises(ValueError, match="there is no cuda.*torch sees 0 GPUs"):
            load_mas_system(style="sequential_light", device="cuda", trust_remote_code=True)


@pytest.mark.parametrize("name", STYLES)
def test_ckpt_override_by_local_folder(name, at_hub, tmp_path):
    """A role's folder is overridden, then the folder of the outer links. All else stays as it was.
    """
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
    """adapter.pt stands beside the whole model, and outer_XX.pt beside two manifests. The role's
    own repo and model are not looked at."""
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


def read_lines(path):
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def finite_losses(folder):
    losses = [line["loss"] for line in read_lines(folder / "log.jsonl")]
    return len(losses) == 3 and all(isinstance(loss, float) for loss in losses)


@pytest.mark.parametrize("name", STYLES)
def test_a_style_trains_and_answers_by_the_published_command_lines(name, at_hub, tmp_path,
                                                                   monkeypatch):
    """The inner loop of each role, the outer loop, the evaluation. Oracles: losses are finite,
    links differ from what they began with, and (at_hub) base models do not change."""
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
    table = json.loads((tmp_path / "out/summary.json").read_text())["rows"]
    assert [(row["style"], row["method"], row["n"]) for row in table] == [
        (name, method, 4) for method in ("text", "single", "latent")]
    assert len(read_lines(tmp_path / "out/results.jsonl")) == 12


@pytest.mark.parametrize("name", ["sequential_light", "distillation"])
def test_a_style_trains_for_code(name, at_hub, tmp_path, monkeypatch):
    """It trains on the -Code sets with --mas_task code. The links are found again as those of this
    task, and of no other."""
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
    """--load_dir goes on from a link (and stays there at a learning rate of 0). --text_field takes
    another column. A local .json has its rows under a field. All give what the hub's set gives."""
    shared = ["--mas_design", "sequential", "--mas_role", "planner", "--mas_task", "math",
              "--model_name_or_path", "Qwen/Qwen3-1.7B"]
    (tmp_path / "rows.json").write_text(json.dumps({"inside": rows_of("Sequential-Math")}))
    (tmp_path / "rows.jsonl").write_text("".join(
        json.dumps({**row, "plan": None, "mine": row["plan"]}) + "\n"
        for row in rows_of("Sequential-Math")))
    for name, *more in (
            ("hub", "--dataset_name", "RecursiveMAS/Sequential-Math"),
            ("json", "--dataset_name", tmp_path / "rows.json", "--dataset_json_field", "inside"),
            ("jsonl", "--dataset_name", tmp_path / "rows.jsonl", "--text_field", "mine"),
            ("again", "--dataset_name", "RecursiveMAS/Sequential-Math", "--load_dir",
             tmp_path / "hub", "--adapter_lr", 0)):
        run(train_inner, monkeypatch, *shared, *INNER_FLAGS, *more, "--save_dir",
            tmp_path / name)
        assert contents(tmp_path / name)["adapter(math).safetensors"] == contents(
            tmp_path / "hub")["adapter(math).safetensors"], name


@pytest.mark.parametrize("more", [
    ["--supervise_final_only", 0], ["--latents", "teacher"], ["--latents", "teacher_aligned"],
    ["--role_loss_weight", 0.5, "--warm_start_steps", 2, "--random_rounds", 1],
    ["--enable_thinking", 1, "--solver_pre_question", 0, "--lr_scheduler_type", "constant"],
    ["--outer_12_type", "outer_ln_adapter"], ["--outer_adapter_type", "outer_linear_res_adapter"],
    ["--dtype", "bfloat16"]], ids=lambda more: more[0])
def test_other_flags_of_the_outer_loop(more, at_hub, tmp_path, monkeypatch):
    """The released agents of the style with three families train, and their links are saved in the
    released layout."""
    style = get_style("sequential_scaled")
    inner = {role.name: role.repo for role in style.roles}
    argv = outer_command("sequential_scaled", inner, tmp_path)[:-2]
    run(train_outer, monkeypatch, *argv, "--save_format", "pt", *more)
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
    """Thoughts, messages and greedy words of five questions, in a batch with cache and padding, are
    those of the equations run one by one without either. (test_recurse has it for Qwen3, Llama and
    Qwen2.)"""
    mas, m, count = new_mas(families=families), 3, 6
    close = max(TOLERANCE.get(family, 1e-4) for family in families)
    texts, batch = mas.respond(QUESTIONS, rounds, m, trace=True,
                               writing=Writing(max_new_tokens=count))
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
        return text and {"math": text, "code": f"check: {text}\nmend it",
                         "choice": f"own: {text} end", "search": text}

    return dataclasses.replace(style, roles=tuple(
        dataclasses.replace(role, prompt=kinds(role.prompt), first=kinds(role.first),
                            own=kinds(role.own), target=(role.name,)) for role in style.roles))


KINDS = worded(THREE)
MIXED = [{"question": question, "task_family": kind, "planner": "s1 x7 1", "critic": "s2 flip 8 .",
          "solver": answer} for question, kind, answer in zip(
    QUESTIONS, ("math", "code", "choice", "code"), ("s3 +2 0 .", "4 .", "s4 flip 7 s5", "9"))]
ANSWERERS = ("qwen3", "llama", "qwen2", "mistral", "gemma3", "gemma3_conditional", "qwen3_5",
             "qwen3_5_conditional")


def answering(family, double=True):
    """A system whose last agent is of a family."""
    other = "llama" if family.startswith("qwen3_5") else "qwen3_5_conditional"
    mas = new_mas(KINDS, families=("qwen3", other, family))
    return in_float64(mas) if double else mas


def close_gradients(found, wanted, close):
    assert found.keys() == wanted.keys() and any(value.any() for value in wanted.values())
    for name in wanted:
        assert (found[name] - wanted[name]).norm() <= close * wanted[name].norm(), name


@pytest.mark.parametrize("latents", ["rollout", "teacher"])
@pytest.mark.parametrize("family", ANSWERERS)
def test_a_mixed_batch_is_the_mean_over_its_target_tokens(family, latents):
    """Rows have three kinds and different lengths. Loss and gradients of their batch are those of
    each row by itself, weighed by its tokens."""
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
    """Otherwise the test above could not see a row that is asked in the words of another kind."""
    mas, args = answering("llama"), outer_args(latent_length=2)
    losses = {kind: outer_gradients(mas, [{**MIXED[0], "task_family": kind}], 2, args)[0]
              for kind in ("math", "code", "choice", None)}
    assert len({round(loss, 4) for loss in losses.values()}) == 3
    assert losses[None] == losses["math"]          # the kind of the run, --mas_task


@pytest.mark.parametrize("family", ANSWERERS)
def test_checkpointing_of_turns_changes_no_gradient(family):
    """It changes none where a recurrent state is kept either (Qwen3.5). In float32, as in training.
    """
    mas = answering(family, double=False)
    kept, again = (outer_gradients(mas, MIXED, 2, outer_args(
        latent_length=2, role_loss_weight=0.5, gradient_checkpointing=flag)) for flag in (0, 1))
    assert kept[0] == pytest.approx(again[0], abs=1e-5)
    close_gradients(again[1], kept[1], 1e-3)


def test_an_unknown_task_family_is_named():
    with pytest.raises(ValueError, match="poetry.*math, choice, code, search") as problem:
        rows.keep_usable([MIXED[0], {**MIXED[1], "task_family": "poetry"}], KINDS.roles)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("method", ["latent", "zero", "text", "single", "single_loop"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3_5"])
def test_kinds_with_slots_in_another_order_share_a_batch(family, method):
    """Each question is answered as it is by itself, although the prompts of its batch hold their
    slots in different orders and begin with different words."""
    roles = [*KINDS.roles]
    roles[1] = dataclasses.replace(roles[1], prompt={
        **roles[1].prompt, "choice": "own: {solver} and\n{question}\ncheck: {planner}"})
    roles[2] = dataclasses.replace(roles[2], prompt={
        **roles[2].prompt, "code": "{question}\nplan: {planner}\nnotes: {critic}"})
    mas = dataclasses.replace(answering(family, double=False),
                              style=dataclasses.replace(KINDS, roles=tuple(roles)))
    kinds, options = [row["task_family"] for row in MIXED], dict(method=method, trace=True)
    writing = Writing(max_new_tokens=4)
    texts, batch = mas.respond(QUESTIONS[:4], 2, 2, kind=kinds, writing=writing, **options)
    for b, (question, kind) in enumerate(zip(QUESTIONS, kinds)):
        [text], alone = mas.respond([question], 2, 2, kind=kind, writing=writing, **options)
        assert texts[b] == text
        assert {turn: said[b] for turn, said in batch.texts.items()} == {
            turn: said[0] for turn, said in alone.texts.items()}
        for key, H in batch.thoughts.items():
            assert largest_difference(H[b], alone.thoughts[key][0]) < TOLERANCE.get(family, 1e-4)


@pytest.mark.parametrize("method", ["latent", "text", "single"])
def test_answer_takes_a_kind_for_each_question(method):
    """The answers are those of one batch, whatever the batch size."""
    mas = answering("llama", double=False)
    options = dict(rounds=1, latent_length=2, max_new_tokens=4, method=method)
    kinds = [row["task_family"] for row in MIXED]
    whole = mas.answer(QUESTIONS[:4], kind=kinds, **options)
    assert mas.answer(QUESTIONS[:4], kind=kinds, batch_size=2, **options) == whole
    assert whole == [mas.answer([question], kind=kind, **options)[0]
                     for question, kind in zip(QUESTIONS, kinds)]


# ---- export and import --------------------------------------------------------------------------

RELEASED_KEYS = {"legacy_key", "filename", "adapter_type", "in_dim", "out_dim"}


@pytest.mark.parametrize("name", STYLES)
def test_released_links_saved_again_are_the_same_bits(name, at_hub, tmp_path):
    """bf16 becomes float32 here and bf16 again: names, types and bits stay, and the manifests have
    the released keys. As safetensors the links are float32 to the last bit."""
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


HUB_PROBLEMS = {     # what is raised, and words of the hub that have to be passed on
    "gated": (hub_says(403, "GatedRepo"), ["GatedRepoError", "Cannot access gated repo"]),
    "missing": (hub_says(404, "RepoNotFound"), ["RepositoryNotFoundError", "404",
                                                "make sure you are authenticated"]),
    "private": (hub_says(401, None), ["RepositoryNotFoundError", "401",
                                      "make sure you are authenticated"]),
    "revision": (hub_says(404, "RevisionNotFound"), ["RevisionNotFoundError",
                                                     "Revision Not Found"]),
    "server": (hub_says(500, None), ["HfHubHTTPError", "500 Internal Server Error"]),
    "offline": (errors.OfflineModeIsEnabled("offline mode is enabled"),
                ["OfflineModeIsEnabled", "offline mode is enabled"]),
    "no network": (errors.LocalEntryNotFoundError("Got: ConnectError: [Errno -3]\nAn error"),
                   ["LocalEntryNotFoundError", "Got: ConnectError: [Errno -3] An error"]),
    # The library lets these through as they are.
    "proxy": (httpx.ProxyError("403 Forbidden"), ["ProxyError", "403 Forbidden"]),
    "broken off": (httpx.RemoteProtocolError("peer closed connection"),
                   ["RemoteProtocolError", "peer closed connection"]),
    "read error": (httpx.ReadError("broken pipe"), ["ReadError", "broken pipe"]),
}


@pytest.fixture(params=HUB_PROBLEMS)
def refused(request, monkeypatch):
    """The hub refuses everything. Returns the words that have to be passed on."""
    problem, named = HUB_PROBLEMS[request.param]

    def refuse(name, **_):
        raise problem

    monkeypatch.setattr(checkpoints, "snapshot_download", refuse)
    return named


def test_what_the_hub_refuses(refused):
    """One line names the repo, its revision, who needs it, and passes on the hub's own message. It
    does so for a role's repo, for the outer links and for a base model."""
    tiny_style = get_style("tiny")
    roles = (dataclasses.replace(tiny_style.roles[0], repo="some/repo"), *tiny_style.roles[1:])
    for style, who in ((dataclasses.replace(tiny_style, roles=roles), "role planner"),
                       (dataclasses.replace(tiny_style, repo="some/repo"), "outer links")):
        with pytest.raises(FileNotFoundError) as raised:
            load_mas_system(style, device="cpu", revision="v9")
        assert says(raised, "style tiny", who, "some/repo (revision v9)", *refused)
    with pytest.raises(FileNotFoundError) as raised:
        load_agents(tiny_style, "cpu", models={"critic": "some/base"})
    assert says(raised, "role critic", "some/base", *refused) and "v9" not in str(raised.value)


def test_what_the_hub_refuses_of_a_folder(refused):
    """local_folder names who asked for it."""
    with pytest.raises(FileNotFoundError) as raised:
        local_folder("some/repo", who="role planner")
    assert says(raised, "role planner: some/repo is no folder here", *refused)


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
    """The library makes an empty tokenizer of some families, for which no text has tokens."""
    folder = shutil.copytree(at_hub / "Qwen/Qwen2.5-Math-1.5B-Instruct", tmp_path / "base")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError) as problem:
        load_agents(get_style("sequential_light"), "cpu", models={"solver": str(folder)})
    assert says(problem, str(folder), "tokenizer")


def test_a_template_that_drops_the_users_text():
    """A template that wants a list of parts gets a string, and writes none of it."""
    template = ("{% for m in messages %}<|user|> {% for part in m['content'] %}{{ part['text'] }}"
                "{% endfor %}{% endfor %} <|assistant|>")
    agent = Agent(new_model("llama"), word_tokenizer(template))
    with pytest.raises(ValueError, match="template"):
        agent.prompt("", "{question} <|notes|> {critic}", {"question": QUESTIONS[:1]}, ["critic"])


def test_inner_links_of_another_width(at_hub, tmp_path):
    folder = agent_folder(at_hub, tmp_path)
    torch.save(released(InnerLink(8)), folder / "adapter(math).pt")
    with pytest.raises(ValueError) as problem:
        load_critic(folder)
    assert says(problem, str(folder / "adapter(math).pt"), "proj1.weight", "[8, 8]",
                "[32, 32]", "for these models")


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
    """An agent has no link for code."""
    folder = agent_folder(at_hub, tmp_path)
    (folder / "adapter(code).pt").unlink()
    with pytest.raises(FileNotFoundError) as problem:
        load_critic(folder, task="code")
    assert says(problem, str(folder), "task 'code'", "adapter(code).pt", "train_inner.py")


def test_outer_links_of_another_task(at_hub, tmp_path):
    """The manifest lists links for math alone."""
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
    """train_args.json says what they were trained on. That model is taken, or it is an error."""
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
    """No other file is taken in its place."""
    folder = agent_folder(at_hub, tmp_path)
    (folder / "adapter(code).pt").rename(folder / "adapter.pt")
    with pytest.raises(FileNotFoundError) as problem:
        load_critic(folder, task="code")
    assert says(problem, str(folder), "task 'code'", "looked for adapter(code).pt)")


@pytest.mark.parametrize("kinds", [[], ["math"], ["math"] * 3], ids=len)
def test_a_kind_for_each_question_or_one_for_all(kinds):
    with pytest.raises(ValueError, match="kind"):
        new_mas().respond(QUESTIONS[:2], 1, 2, kind=kinds, writing=Writing(max_new_tokens=1))


def test_a_tokenizer_with_more_tokens_than_the_model(at_hub, tmp_path):
    """A question with such a token gets one line that names the folder. Others are answered."""
    folder = agent_folder(at_hub, tmp_path)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 5000,
                                      "content": "<extra>"})
    path.write_text(json.dumps(tokenizer))
    mas = load_critic(folder)
    assert len(mas.answer(QUESTIONS[:1], 1, 2, max_new_tokens=1)) == 1
    with pytest.raises(ValueError) as problem:
        mas.answer(["start <extra> 3"], 1, 2, max_new_tokens=1)
    assert says(problem, str(folder), "tokenizer knows more tokens than its model")


def test_an_override_of_an_unknown_role():
    with pytest.raises(ValueError) as problem:
        load_mas_system("sequential_light", device="cpu", ckpt_override={"poet": "some/folder"})
    assert says(problem, "sequential_light", "'poet'", "planner, critic, solver")


def test_an_override_by_the_published_name_of_a_role(at_hub):
    """refiner is the critic."""
    other = get_style("sequential_light").role("planner").repo
    mas = load_mas_system("sequential_light", device="cpu", ckpt_override={"refiner": other})
    assert same_weights(mas.agents["critic"].model, at_hub / other)


@pytest.mark.parametrize("pairs, complaint", [
    (["planner=no/planner", "outer=tiny/outer"], "role planner: no/planner"),
    (["planner=tiny/planner", "outer=no/outer"], "outer links: no/outer")], ids=["first", "second"])
def test_ckpt_override_may_be_given_twice(pairs, complaint, monkeypatch):
    """Both count: the one that names no folder is complained of, whichever it is."""
    with pytest.raises(FileNotFoundError, match=complaint):
        run(evaluate, monkeypatch, "--ckpt_override", pairs[0], "--ckpt_override", pairs[1])


def test_a_jsonl_that_is_no_text_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError) as problem:
        rows.load_rows(str(tmp_path / "rows.jsonl"))
    assert says(problem, str(tmp_path / "rows.jsonl"))


def test_a_design_does_not_overrule_a_style(monkeypatch):
    """sequential is the published name of both sequential styles."""
    monkeypatch.setattr(sys, "argv", ["train_inner.py", "--mas_design", "sequential", "--style",
                                      "sequential_scaled"])
    assert train_inner.parse()[1].name == "sequential_scaled"


def test_missing_data_is_said_before_any_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(train_outer, "load_agents", lambda *_, **__: pytest.fail("models first"))
    with pytest.raises(ValueError, match="no training data"):
        run(train_outer, monkeypatch, "--style", "mixture", "--save_dir", tmp_path / "out")


# ---- a style in one file ------------------------------------------------------------------------

DEBATE = '''"""Two equal agents hear each other. The second one answers."""
from styles import Edge, Role, Style


def debater(name, other, target):
    return Role(name, "tiny/solver", "tiny/solver", target=(target,),
                prompt="{question} <|notes|> {%s}" % other, first="{question} <|notes|> none",
                own="{question} <|notes|> {%s}" % name)


debate = Style(
    name="debate",
    roles=(debater("left", "right", "plan"), debater("right", "left", "answer")),
    edges=(Edge("outer_lr", "left", "right"), Edge("outer_rl", "right", "left")),
)
'''


def write_debate_links(folder):
    """The folder of new outer links for DEBATE."""
    links = {key: OuterLink(112, 112) for key in ("outer_lr", "outer_rl")}
    save_outer(links, folder / "links", "debate")
    return folder / "links"


DEBATE_FLAGS = ("--dataset_name tiny --num_samples 20 --max_steps 3 --batch_size 2 --latent_length "
                "2 --num_recursive_rounds 2 --eval_samples 2 --log_every 1").split()


@pytest.fixture
def debate(tmp_path):
    path = tmp_path / "debate.py"
    path.write_text(DEBATE)
    return path


def test_a_style_file_trains_and_answers(debate, tmp_path, monkeypatch):
    """All three scripts take a style by its path, and it gets links of its own."""
    run(train_inner, monkeypatch, "--style", debate, "--mas_role", "left", "--dataset_name",
        "tiny", "--num_samples", 10, "--max_steps", 2, "--latent_length", 2, "--save_dir",
        tmp_path / "left")
    run(train_outer, monkeypatch, "--style", debate, *DEBATE_FLAGS, "--save_dir",
        tmp_path / "outer", "--left_inner_aligner_path", tmp_path / "left")
    assert finite_losses(tmp_path / "outer")
    run(evaluate, monkeypatch, "--style", debate, "--num_samples", 4, "--latent_length", 2,
        "--max_new_tokens", 4, "--num_recursive_rounds", 2, "--out", tmp_path / "out",
        "--ckpt_override", f"left={tmp_path / 'left'}", f"outer={tmp_path / 'outer'}")
    table = json.loads((tmp_path / "out/summary.json").read_text())["rows"]
    assert {row["style"] for row in table} == {"debate"} and len(table) == 8


def test_the_trainers_last_line_can_be_run(debate, tmp_path, monkeypatch, capsys):
    """The command it prints asks the system that was trained: this style file, these links."""
    shutil.copytree(PROJECT / "tiny/solver", tmp_path / "mine")
    run(train_outer, monkeypatch, "--style", debate, *DEBATE_FLAGS, "--save_dir",
        tmp_path / "outer", "--agent1_inner_aligner_path", tmp_path / "mine")
    command = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert command[:2] == ["python", "evaluate.py"]
    assert str(debate) in command and f"outer={tmp_path / 'outer'}" in command
    run(evaluate, monkeypatch, *command[2:])


BROKEN_FILES = {
    "none": ("x = 1\n", "makes no style of its own"),
    "a shipped one alone": ("from styles.tiny import tiny\n", "makes no style of its own"),
    "two roles of one name": (DEBATE.replace('"right", "left", "answer"', '"left", "left", "x"'),
                              "two roles are called left"),
    "an edge to nowhere": (DEBATE.replace('"outer_rl", "right"', '"outer_rl", "judge"'),
                           "names role judge, which does not exist"),
    "a missing slot": (DEBATE.replace("<|notes|> {%s}\" % other", "<|notes|>\""),
                       "role left has no `prompt` prompt for kind 'math'"),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_broken_style_file_is_one_line(case, tmp_path, monkeypatch, capsys):
    text, complaint = BROKEN_FILES[case]
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--style", str(tmp_path / "mine.py")])
    with pytest.raises(SystemExit) as stopped:
        flags.run(evaluate.main)
    said = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(said) == 1 and complaint in said[0]


def test_a_style_file_that_is_missing():
    with pytest.raises(ValueError) as problem:
        get_style("no/such/file.py")
    assert says(problem, "no/such/file.py", "No such file")


OTHER_WORDS = """\
from dataclasses import replace

from styles.tiny import tiny

solver = tiny.role("solver")
mine = replace(tiny, name="mine", roles=(*tiny.roles[:2], replace(solver, NEW)))
"""


def test_a_style_file_may_start_from_a_shipped_style(tmp_path, monkeypatch):
    """It changes the words of one role. The rest stays as it is, settings and links included."""
    path, tiny = tmp_path / "mine.py", get_style("tiny")
    path.write_text(OTHER_WORDS.replace("NEW", 'prompt="{question} {critic}"'))
    mine = get_style(str(path))
    assert mine.name == "mine" and mine.roles[:2] == tiny.roles[:2]
    assert mine.roles[2] == dataclasses.replace(tiny.roles[2], prompt="{question} {critic}")
    assert dataclasses.replace(mine, name="tiny", roles=tiny.roles) == tiny
    outputs = {}
    for name, style in (("theirs", "tiny"), ("mine", path)):
        run(evaluate, monkeypatch, "--style", style, "--method", "latent", "single",
            "--num_recursive_rounds", 2, "--num_samples", 9, "--out", tmp_path / name)
        lines = read_lines(tmp_path / name / "results.jsonl")
        for method in ("latent", "single"):
            outputs[name, method] = [line["outputs"] for line in lines if line["method"] == method]
    assert outputs["mine", "single"] == outputs["theirs", "single"]      # its prompt is `first`
    assert outputs["mine", "latent"] != outputs["theirs", "latent"]


@pytest.mark.parametrize("new, complaint", [
    ('name="judge"', "edge outer_23 names role solver, which does not exist"),
    ('colour="red"', "unexpected keyword argument 'colour'"),
    ('prompt="{question}"', "({critic})")], ids=["role", "field", "slot"])
def test_a_changed_style_that_cannot_work_is_one_line(new, complaint, tmp_path, monkeypatch,
                                                      capsys):
    """It is refused before anything is written."""
    (tmp_path / "mine.py").write_text(OTHER_WORDS.replace("NEW", new))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--style", str(tmp_path / "mine.py"),
                                      "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        flags.run(evaluate.main)
    said = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(said) == 1
    assert "mine.py" in said[0] and complaint in said[0]
    assert not (tmp_path / "out").exists()


def test_the_last_style_of_a_file_counts(tmp_path):
    """A file may make helpers and several styles. A style that it only imports does not count."""
    path = tmp_path / "mine.py"
    path.write_text(DEBATE + "import dataclasses\nmore = dataclasses.replace(debate, name='b')\n")
    assert get_style(str(path)).name == "b"
    path.write_text(DEBATE + "from styles.tiny import tiny\n")
    assert get_style(str(path)).name == "debate"


def test_a_style_without_own_says_what_single_loop_lacks(debate, tmp_path):
    """All other methods work."""
    own = ',\n                own="{question} <|notes|> {%s}" % name'
    assert own in DEBATE
    debate.write_text(DEBATE.replace(own, ""))
    mas = load_mas_system(str(debate), device="cpu",
                          ckpt_override={"outer": str(write_debate_links(tmp_path))})
    for method in ("latent", "text", "single"):
        assert len(mas.answer(QUESTIONS[:2], 2, 2, method=method, max_new_tokens=2)) == 2
    with pytest.raises(ValueError) as problem:
        mas.answer(QUESTIONS[:2], 2, 2, method="single_loop", max_new_tokens=2)
    assert says(problem, "style debate", "role right", "`own`", "add it")


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
    {"outer_lr": "lr"}], ids=str)
def test_names_that_meet_other_names(change, debate, tmp_path, monkeypatch):
    """Roles are called agent1 and agent2, as in the published flags. Edges are called like the
    beginning of a flag. Either they work or one line refuses the style."""
    text = DEBATE
    for old, new in change.items():
        text = text.replace(f'"{old}"', f'"{new}"')
    debate.write_text(text)
    try:
        run(train_outer, monkeypatch, "--style", debate, *DEBATE_FLAGS, "--save_dir",
            tmp_path / "outer")
    except ValueError as problem:
        assert "style debate" in str(problem) and "\n" not in str(problem)


# ---- places and memory --------------------------------------------------------------------------

def answers(mas, **options):
    """(texts, thoughts) of two rounds."""
    texts, ran = mas.respond(QUESTIONS[:3], 2, 2, trace=True, writing=Writing(max_new_tokens=4),
                             **options)
    return texts, list(ran.thoughts.values())


def same_answers(one, other):
    return one[0] == other[0] and all(map(torch.equal, one[1], other[1]))


@pytest.mark.parametrize("name", STYLES)
def test_two_devices_share_the_agents(name, at_hub, monkeypatch):
    """With --device a,b each agent is loaded once, to one of the two. Neither gets more than the
    largest agent more than the other. The answers stay those of one device."""
    loaded = {"a": [], "b": []}
    load_agent = checkpoints.load_agent

    def load(folder, device, dtype, *options):
        agent = load_agent(folder, torch.device("cpu"), dtype, *options)
        loaded[device].append((agent, agent.model.get_memory_footprint()))
        return agent

    whole = load_mas_system(name, device="cpu")
    assert same_answers(answers(whole), answers(load_mas_system(name, device="cpu,cpu")))
    monkeypatch.setattr(checkpoints, "load_agent", load)
    monkeypatch.setattr(checkpoints, "pick_device", lambda place, dtype: (place, torch.float32))
    mas = load_mas_system(name, device="a,b")
    assert same_answers(answers(whole), answers(mas))
    sizes = {place: sum(size for _, size in agents) for place, agents in loaded.items()}
    assert len(loaded["a"]) + len(loaded["b"]) == len(mas.agents) and min(sizes.values()) > 0
    largest = max(size for agents in loaded.values() for _, size in agents)
    assert abs(sizes["a"] - sizes["b"]) <= largest


@pytest.mark.parametrize("halves", ["planner", "critic"])
def test_agents_of_different_precision(halves):
    """--device cuda,cpu makes them: bfloat16 on the card, float32 beside it."""
    mas = new_mas()
    agent = mas.agents[halves]
    agent.model.bfloat16()
    agent.dtype = torch.bfloat16
    assert len(mas.answer(QUESTIONS[:2], 2, 2, max_new_tokens=2)) == 2


def test_roles_of_one_base_share_its_model(at_hub, tmp_path):
    """Both roles of deliberation have one base model. Each keeps its own inner link."""
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


def test_offload_moves_whole_models(at_hub):
    """All parameters and buffers move, and the agent's own names for them go along. (The device
    meta stands for a card.)"""
    mas = load_mas_system("sequential_scaled", device="cpu", offload=True)
    for name, agent in mas.agents.items():
        agent.device = torch.device("meta")
        assert {weight.device.type for weight in agent.model.parameters()} == {"cpu"}
    agent = mas.agent("planner")
    assert agent is mas.agents["planner"]
    for weight in (*agent.model.parameters(), *agent.model.buffers(), agent.embedding.weight,
                   agent.head.weight, *agent.body.parameters()):
        assert weight.device.type == "meta"
    for name in ("critic", "solver"):
        model = mas.agents[name].model
        assert {weight.device.type for weight in model.parameters()} == {"cpu"}


def test_fresh_outer_links_of_an_offloaded_system(at_hub):
    """Their gain is taken from embeddings that are in main memory, while the agent's device is the
    card. (The device meta stands for it.)"""
    whole = load_mas_system("sequential_light", device="cpu")
    mas = load_mas_system("sequential_light", device="cpu", offload=True)
    for agent in mas.agents.values():
        agent.device = torch.device("meta")
    assert mas.agents["planner"].embedding_rms == whole.agents["planner"].embedding_rms
    fresh = mas.with_fresh_outer()
    assert {link.proj1.weight.device.type for link in fresh.outer.values()} == {"meta"}


def watch_places(mas, monkeypatch):
    """(ids of the models on the card, agents that ran). The card is the CPU as the device cpu:0.

    A forward pass fails unless its model, and no other one, is on the card."""
    on_card, passes, forward = set(), [], Agent.forward

    def moving(model):
        def to(device):
            moved = on_card.add if device == torch.device("cpu:0") else on_card.discard
            moved(id(model))
            return model
        return to

    for agent in mas.agents.values():
        agent.device = torch.device("cpu:0")
        monkeypatch.setattr(agent.model, "to", moving(agent.model))

    def counted(agent, *args):
        assert on_card == {id(agent.model)}
        passes.append(agent)
        return forward(agent, *args)

    monkeypatch.setattr(Agent, "forward", counted)
    return on_card, passes


@pytest.mark.parametrize("method", ["latent", "zero", "text", "single", "single_loop"])
@pytest.mark.parametrize("name", ["sequential_light", "mixture", "deliberation"])
def test_offload_keeps_one_agent_on_the_device_and_answers_the_same(name, method, at_hub,
                                                                    monkeypatch):
    """Every forward pass is one of the model whose turn it is. Oracle for the answers: a system
    without offload."""
    wanted = answers(load_mas_system(name, device="cpu"), method=method)
    mas = load_mas_system(name, device="cpu", offload=True)
    on_card, passes = watch_places(mas, monkeypatch)
    assert same_answers(wanted, answers(mas, method=method)) and passes
    assert on_card == {id(mas.agents[mas.style.roles[-1].name].model)}


def test_offload_lets_roles_of_one_base_share_the_device(at_hub, tmp_path, monkeypatch):
    """The model that both roles share is never moved away between their turns."""
    override = {"outer": get_style("deliberation").repo}
    for role in ("reflector", "toolcaller"):
        save_inner(randomise(InnerLink(40), 1.0, len(role)), tmp_path / role)
        override[role] = str(tmp_path / role)
    wanted = answers(load_mas_system("deliberation", device="cpu", ckpt_override=override))
    mas = load_mas_system("deliberation", device="cpu", ckpt_override=override, offload=True)
    on_card, passes = watch_places(mas, monkeypatch)
    assert same_answers(wanted, answers(mas)) and len(set(map(id, passes))) == 2
    assert on_card == {id(mas.agents["reflector"].model)}


def test_offload_by_flag_gives_the_same_results(at_hub, tmp_path, monkeypatch):
    """evaluate.py writes the same lines but for the times with --offload, with --device cpu,cpu and
    with neither."""
    lines = {}
    ways = {"plain": [], "offload": ["--offload"], "two": ["--device", "cpu,cpu"]}
    for name, more in ways.items():
        run(evaluate, monkeypatch, "--style", "mixture", "--num_samples", 4, "--latent_length", 2,
            "--num_recursive_rounds", 2, "--method", "latent", "single", "zero", "untrained",
            "--max_new_tokens", 3, "--out", tmp_path / name, *more)
        lines[name] = [{key: value for key, value in line.items()
                        if key not in ("seconds", "peak_memory_mb")}
                       for line in read_lines(tmp_path / name / "results.jsonl")]
    assert len(lines["plain"]) == 16 and lines["plain"] == lines["offload"] == lines["two"]

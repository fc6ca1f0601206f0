"""Make the shipped tiny system from nothing: three agents, their inner links, the outer links.

    python docs/build_tiny.py   # about 40 minutes on a CPU, writes out/tiny

A run that was stopped keeps the agents that were done.

Each agent is a small causal LM of another family (Qwen3, Llama, Qwen2) that learns to say its
role's text (tasks/tiny.py), given the question and the notes it hears. Then the project's own
scripts, run as a user would run them, train the inner links and the outer links. Seeds are fixed,
so that nothing shipped is unexplained.
"""
import argparse
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
from tasks import tiny as task  # noqa: E402

WORD_ID = {word: i for i, word in enumerate(task.WORDS)}
CHAT_TEMPLATE = ("{{ bos_token }}{% for message in messages %} <|{{ message['role'] }}|> "
                 "{{ message['content'] }}{% endfor %}"
                 "{% if add_generation_prompt %} <|assistant|>{% endif %}")
MODELS = {      # {role: (family, its sizes)}
    "planner": ("qwen3", dict(hidden_size=96, intermediate_size=192, head_dim=24,
                              num_key_value_heads=2)),
    "critic": ("llama", dict(hidden_size=80, intermediate_size=160, head_dim=20,
                             num_key_value_heads=4)),
    "solver": ("qwen2", dict(hidden_size=112, intermediate_size=224, num_key_value_heads=2))}


def new_model(role):
    """A fresh model. At these widths an initializer_range of .02 makes everything tiny: it is .08.
    """
    torch.manual_seed(0)
    family, sizes = MODELS[role]
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](
        vocab_size=len(task.WORDS), tie_word_embeddings=True, initializer_range=0.08,
        max_position_embeddings=512, num_hidden_layers=3, num_attention_heads=4,
        bos_token_id=WORD_ID["<bos>"], eos_token_id=WORD_ID["<eos>"],
        pad_token_id=WORD_ID["<pad>"], **sizes))


def new_tokenizer():
    """One word, one token."""
    tokenizer = Tokenizer(models.WordLevel(WORD_ID, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        unk_token="<unk>", additional_special_tokens=["<|user|>", "<|notes|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False)


def spoil(notes, rng):
    """The planner's notes with an error in the last event. Without these the critic learns to copy.
    """
    words, wrong = notes.split(), str(rng.randint(0, 9))
    words[4], words[5] = rng.choice(list(task.OPERATIONS)), wrong
    if "." in words:                     # a full text ends: because 1 to 4 and 4 to WRONG .
        words[words.index(".") - 1] = wrong
    return " ".join(words)


def heard_notes(problem, role, rng):
    """(notes, events done according to them), from anywhere in the chain."""
    length, full = len(problem.operations), rng.random() < 0.5
    if rng.random() < 0.15:
        return "none", 0
    if role == "critic":
        start = rng.randint(0, length)
        notes, done = task.role_text(problem, "planner", start, full), start + 2
        if done <= length and rng.random() < 0.3:
            notes = spoil(notes, rng)
    elif role == "solver" and rng.random() < 0.75:
        start = rng.randint(1, length)
        notes, done = task.role_text(problem, "critic", start, full), start + 1
    else:      # the planner hears the solver; a solver that loops alone hears itself
        start = rng.randint(0, length)
        notes, done = task.role_text(problem, "solver", start, full), start + 1
    return notes, min(done, length)


def training_batch(problems, role, rng, batch_size):
    """(tokens, labels), both (B, T), padded on the right. Labels are -100 outside the role's text.
    """
    tokens, labels = [], []
    for problem, _ in zip(problems, range(batch_size)):
        notes, done = heard_notes(problem, role, rng)
        prompt = f"<bos> <|user|> {problem.question} <|notes|> {notes} <|assistant|>".split()
        text = f"{task.role_text(problem, role, done, full=True)} <eos>".split()
        tokens.append(torch.tensor([WORD_ID[word] for word in prompt + text]))
        labels.append(tokens[-1].clone())
        labels[-1][:len(prompt)] = -100
    return pad_sequence(tokens, True, WORD_ID["<pad>"]), pad_sequence(labels, True, -100)


def train_agent(role, folder, steps, batch_size=64, learning_rate=3e-3):
    """Teach one agent its role by next-token prediction, short chains first, and save it."""
    model, rng = new_model(role), random.Random(f"tiny agent {role}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98),
                                  weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps,
                                                   pct_start=0.05)
    for step in tqdm(range(steps), desc=f"train {role}", mininterval=5):
        longest = min(task.LONGEST, int(4 + 9 * step / (0.35 * steps)))
        problems = task.training_problems(rng, longest)
        tokens, labels = training_batch(problems, role, rng, batch_size)           # (B, T)
        hidden = model.base_model(tokens, attention_mask=(tokens != WORD_ID["<pad>"]).long())
        targets = labels[:, 1:]                        # state t predicts token t + 1
        logits = model.lm_head(hidden.last_hidden_state[:, :-1][targets != -100])  # (N, V)
        loss = F.cross_entropy(logits, targets[targets != -100])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    print(f"{role}: loss {loss.item():.4f}")
    model.half().save_pretrained(folder)       # fp16 rounding does no harm, and halves the files
    new_tokenizer().save_pretrained(folder)


def run(*command):
    """Run one of the project's scripts, as a user would; stop if it fails."""
    print("\n$ python " + " ".join(map(str, command)), flush=True)
    subprocess.run([sys.executable, *map(str, command)], cwd=PROJECT, check=True)


def copy_links(source, folder):
    """The links and their manifests, without the logs and states of their training."""
    links = shutil.ignore_patterns("*.jsonl", "*.pt", "*.png", "parts", "train_args.json",
                                   "readability.json", "summary.json")
    shutil.copytree(source, folder, ignore=links, dirs_exist_ok=True)


def main():
    """Agents, then inner links, then outer links and their comparison: all of it in --out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="out/tiny", help="where the system goes")
    parser.add_argument("--agent_steps", type=int, default=4000, help="training steps per agent")
    args = parser.parse_args()
    out, work, started = Path(args.out).resolve(), Path("out/build").resolve(), time.time()
    for role in MODELS:
        if (out / role / "model.safetensors").is_file():
            print(f"{out / role} is there already and is kept: delete it to train it anew")
        else:
            train_agent(role, out / role, args.agent_steps)
    for role in MODELS:
        run("train_inner.py", "--mas_role", role, "--model_name_or_path", out / role,
            "--save_dir", work / role)
        copy_links(work / role, out / role)
    folders = [(f"--{role}_inner_aligner_path", out / role) for role in MODELS]
    run("train_outer.py", "--save_dir", work / "outer", *sum(folders, ()))
    copy_links(work / "outer", out / "outer")
    print(f"built {out} in {(time.time() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()

"""What the tests share: tiny random agents of real architectures, tokenizers, oracles, scripts.

The oracle of the method is reference.py: one question at a time, without cache, padding or batch.
The links' own oracle is the equations below, with plain tensor operations.
"""
import argparse
import base64
import contextlib
import json
import multiprocessing
import os
import pickle
import re
import runpy
import signal
import socket
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")      # for matrices this small, threads only wait
PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import (AutoConfig, AutoModelForCausalLM,  # noqa: E402
                          AutoModelForImageTextToText, PreTrainedTokenizerFast)

import reference  # noqa: E402
import train_outer  # noqa: E402
from agents import Agent  # noqa: E402
from link import InnerLink, OuterLink  # noqa: E402
from recurse import MAS, load_mas_system  # noqa: E402
from styles import ANSWER_FORMAT, Edge, Role, Style  # noqa: E402
from docs.build_tiny import CHAT_TEMPLATE, WORD_ID  # noqa: E402

torch.set_num_threads(1)        # nothing here is large; a second thread only waits for the first
FAMILIES = ("qwen3", "llama", "qwen2", "mistral", "gemma3", "gemma3_conditional", "qwen3_5",
            "qwen3_5_conditional")
MODELS = json.loads((PROJECT / "tests/data/small_models.json").read_text())
WINDOW = MODELS["own"]["mistral"]["sliding_window"]     # shorter than the prompts: so it matters
EXTRA_WORDS = tuple(dict.fromkeys(
    (ANSWER_FORMAT["math"] + " <|system|> plan: check: notes: own: mend it team of three").split()))
VOCABULARY = {word: i for i, word in enumerate((*WORD_ID, *EXTRA_WORDS))}
QUESTIONS = ["start 3 s1 x7 s2 flip s3 +2", "start 0 s1 +1",
             "start 9 s1 -2 s2 x3 s3 -1 s4 flip s5 +3 s6 x7", "start 5 s1 flip s2 +2",
             "start 7 s1 x3 s2 x3 s3 x3 s4 -2"]


# ---- tokenizers ---------------------------------------------------------------------------------

def word_tokenizer(template=CHAT_TEMPLATE, vocabulary=VOCABULARY):
    """One word, one token, as in docs/build_tiny.py, with a few more words."""
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        unk_token="<unk>", chat_template=template, clean_up_tokenization_spaces=False)


def byte_tokenizer(template):
    """One byte, one token: loses nothing, so that decoded tokens show the whole text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template,
                                   clean_up_tokenization_spaces=False)


def words(text):
    """The token ids of a text, by looking its words up."""
    return [VOCABULARY.get(word, VOCABULARY["<unk>"]) for word in text.split()]


def chat(user):
    """CHAT_TEMPLATE written out for one user turn."""
    return f"<bos> <|user|> {user} <|assistant|>"


# ---- models, links, agents ----------------------------------------------------------------------

def new_model(family, seed=0, vocabulary=VOCABULARY, width=None):
    """A random float32 causal LM of a real architecture, large enough weights to be lively."""
    torch.manual_seed(seed)
    kind = family.removesuffix("_conditional")
    width = width or MODELS["widths"][kind]
    settings = {**MODELS["all"], **MODELS["own"].get(kind, {}), "vocab_size": len(vocabulary),
                "hidden_size": width, "intermediate_size": 2 * width}
    settings |= {f"{one}_token_id": vocabulary[f"<{one}>"] for one in ("bos", "eos", "pad")}
    vision = MODELS["vision"].get(kind)
    if kind == "gemma3":
        settings = dict(text_config=settings, vision_config=vision, mm_tokens_per_image=4)
    elif kind == "qwen3_5":
        settings["tie_word_embeddings"] = family == kind            # else said at the top alone
        settings = dict(text_config=settings, tie_word_embeddings=True,
                        vision_config={**vision, "out_hidden_size": width})
    config = AutoConfig.for_model(kind, **settings)
    if family == kind:
        return AutoModelForCausalLM.from_config(config.get_text_config()).eval()
    return AutoModelForImageTextToText.from_config(config).eval()


def randomise(link, gain, seed=0):
    """The link with every parameter drawn at random; the last LayerNorm's gain is about `gain`."""
    generator = torch.Generator().manual_seed(seed)
    last = getattr(link, "post_ln", None) or getattr(link, "ln_target", None)
    with torch.no_grad():
        for module in link.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, module.in_features ** -0.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
            elif isinstance(module, nn.LayerNorm):
                factor = gain if module is last else 1.0
                module.weight.normal_(1, 0.3, generator=generator).mul_(factor)
                module.bias.normal_(0, 0.2, generator=generator).mul_(factor)
    return link


def new_agent(family, seed=0, template=CHAT_TEMPLATE):
    """An agent with random weights and a random inner link."""
    agent = Agent(new_model(family, seed), word_tokenizer(template))
    agent.inner = randomise(InnerLink(agent.width), agent.embedding_rms, seed + 1)
    agent.inner.requires_grad_(False)
    return agent


def made_style(name):
    """A style of tests/data/styles/made.json."""
    parts = json.loads((PROJECT / "tests/data/styles/made.json").read_text())[name]
    roles = tuple(Role(model="random", repo="", **role) for role in parts["roles"])
    return Style(name, roles, tuple(Edge(*edge) for edge in parts["edges"]),
                 tools=tuple(parts.get("tools", ())))


THREE, HELPED = made_style("three"), made_style("helped")


def new_mas(style=THREE, families=("qwen3", "llama", "qwen2")):
    """A random system over a style; each role's model is of another family."""
    agents = {role.name: new_agent(family, seed=10 + i)
              for i, (role, family) in enumerate(zip(style.roles, families))}
    outer = nn.ModuleDict()
    for i, edge in enumerate(style.edges):
        source, target = agents[edge.src], agents[edge.dst]
        outer[edge.key] = randomise(OuterLink(source.width, target.width), target.embedding_rms,
                                    seed=100 + i).requires_grad_(False)
    return MAS(style, agents, outer)


# ---- the oracles --------------------------------------------------------------------------------

def inner_equation(link, h):
    """R_in(h) = LN_post(h + W2 GELU(W1 LN_pre(h))), parameter by parameter."""
    w = dict(link.named_parameters())
    y = F.layer_norm(h, h.shape[-1:], w["pre_ln.weight"], w["pre_ln.bias"])
    y = F.gelu(y @ w["proj1.weight"].T + w["proj1.bias"])
    y = h + y @ w["proj2.weight"].T + w["proj2.bias"]
    return F.layer_norm(y, h.shape[-1:], w["post_ln.weight"], w["post_ln.bias"])


def outer_equation(link, x):
    """R_out(x) = LN_t(W3 x + W2 GELU(W1 LN_s(x))), parameter by parameter."""
    w = dict(link.named_parameters())
    y = F.layer_norm(x, x.shape[-1:], w["ln_source.weight"], w["ln_source.bias"])
    y = F.gelu(y @ w["proj1.weight"].T + w["proj1.bias"])
    y = y @ w["proj2.weight"].T + w["proj2.bias"]
    y = x @ w["residual_proj.weight"].T + w["residual_proj.bias"] + y
    return F.layer_norm(y, y.shape[-1:], w["ln_target.weight"], w["ln_target.bias"])


def plain_parts(style, question, role, heard):
    """The parts of a role's prompt for reference.py. heard: {role heard: (m, d), or a text}."""
    everyone = {edge.src for edge in style.edges if edge.dst == role.name}
    text = chat(role.prompt if heard.keys() == everyone else role.first)
    text = text.replace("{question}", question).replace("{answer_format}", ANSWER_FORMAT["math"])
    pieces = re.split(f"{{({'|'.join(heard) or 'nobody'})}}", text)          # text, slot, text, ..
    return [heard[piece] if i % 2 else piece for i, piece in enumerate(pieces)]


def plain_think(agent, embeds, m):
    """m thoughts after one unpadded row of embeddings (1, T, d), by reference.py: (1, m, d)."""
    return reference.think(agent, embeds[0], m)[None]


@torch.no_grad()
def plain_write(agent, embeds, count):
    """Greedy token ids after one unpadded row of embeddings (1, T, d), by reference.py."""
    return reference.write(agent, embeds[0], count)


def embed_words(agent, ids):
    """Embeddings (1, T, d) of token ids."""
    return agent.model.get_input_embeddings()(torch.tensor([ids], dtype=torch.long))


def left_pad(rows):
    """(embeds (B, T, d), mask (B, T)) of rows (1, T_b, d), padded on the left by hand."""
    longest = max(row.shape[1] for row in rows)
    embeds = rows[0].new_zeros(len(rows), longest, rows[0].shape[2])
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for b, row in enumerate(rows):
        embeds[b, longest - row.shape[1]:] = row[0]
        mask[b, longest - row.shape[1]:] = 1
    return embeds, mask


def read_plain(agent, prompts):
    """A Context of prompts of given token ids, padded on the left by hand."""
    return agent.read(*left_pad([embed_words(agent, ids) for ids in prompts]))


def largest_difference(a, b):
    """max |a - b|; also fails where the shapes differ."""
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def tiny_in_float64():
    """The shipped agents with new outer links, all in float64."""
    return in_float64(load_mas_system("tiny", device="cpu").with_fresh_outer(seed=1))


def in_float64(mas):
    """A system, turned into float64: rollouts amplify rounding."""
    for agent in mas.agents.values():
        widen(agent)
    mas.outer.double()
    return mas


def widen(agent):
    """An agent, turned into float64."""
    agent.model.double()
    agent.inner.double()
    agent.dtype = torch.float64
    return agent


@contextlib.contextmanager
def nothing_in_float32():
    """The library computes norms and recurrent states in float32, those of a float64 model too. In
    this block it takes float64. So two ways of computing agree to 1e-9 on any processor."""
    class Wide:
        float32 = float = torch.float64

        def __getattr__(self, name):
            return getattr(torch, name)

    for family in FAMILIES:
        new_model(family)                # the library imports a family when it is first asked for
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("transformers.models.") and ".modeling_" in name:
                patch.setattr(module, "torch", Wide(), raising=False)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def spy_on_reading(agent, monkeypatch):
    """A list of the shapes (B, T) of all that the agent reads from now on, single steps too."""
    shapes, read = [], agent.read

    def spy(embeds, mask, context=None):
        shapes.append(tuple(mask.shape))
        return read(embeds, mask, context)

    monkeypatch.setattr(agent, "read", spy)
    return shapes


def outer_args(**changes):
    """The flags that train_outer.outer_loss asks for."""
    settings = dict(latents="rollout", latent_length=3, max_latent_tokens=4, role_loss_weight=0.0,
                    supervise_final_only=1, non_last_loss_weight=0.1, gradient_checkpointing=0,
                    mas_task="math", max_length=4096, log_gradients=0, loss="answer")
    return argparse.Namespace(**{**settings, **changes})


def outer_gradients(mas, rows, rounds, args):
    """(loss, {parameter: gradient}) of one outer loss."""
    mas.outer.requires_grad_(True).zero_grad()
    loss = train_outer.outer_loss(mas, rows, rounds, args).loss
    loss.backward()
    mas.outer.requires_grad_(False)
    return loss.item(), {name: weight.grad.clone() for name, weight in mas.outer.named_parameters()
                         if weight.grad is not None}


@contextlib.contextmanager
def refuses(*named, kind=ValueError):
    """This block must raise an error of this kind: one line that names all of these."""
    with pytest.raises(kind) as problem:
        yield problem
    text = str(problem.value)
    assert "\n" not in text and all(str(one) in text for one in named), text


def lines_of(name):
    """The lines of a .jsonl file of tests/data."""
    return [json.loads(line) for line in (PROJECT / "tests/data" / name).open()]


def holds(link, weights):
    """Whether a link's parameters are exactly those of a state dict, or of a file with one."""
    if isinstance(weights, Path):
        weights = (load_file(weights) if weights.suffix == ".safetensors"
                   else torch.load(weights, weights_only=True))
    own = link.state_dict()
    return set(own) == set(weights) and all(torch.equal(own[k], weights[k].float()) for k in own)


def fast(*chosen, of):
    """The cases `of` a test, all of them marked slow but the chosen ones."""
    return [case if case in chosen else pytest.param(*(case if isinstance(case, tuple) else [case]),
                                                     marks=pytest.mark.slow) for case in of]


def log_of(folder):
    """The lines of a training's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def untimed(path):
    """The lines of a .jsonl file, without what differs from run to run."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items()
             if name not in ("seconds", "peak_memory_mb")} for line in lines]


def links_of(folder):
    """{file: its bytes} of the links in a folder."""
    found = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert found
    return found


# ---- a system that writes what it is told to ----------------------------------------------------

BYTES = {**{f"byte {i}": i for i in range(256)}, "<eos>": 256, "<pad>": 257, "<bos>": 258,
         "on>.": 259}                                # a token that reaches beyond a closing tag


def byte_caller(family, seed, joined=False):
    """An agent that spells: a byte is a token, and so is `on>.` If joined, a blank and the byte
    after it are one token too."""
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}>")
    tokenizer.add_special_tokens({"eos_token": "<eos>", "pad_token": "<pad>", "bos_token": "<bos>"})
    tokenizer.add_tokens(["on>."])
    assert tokenizer.convert_tokens_to_ids(["<eos>", "on>."]) == [256, 259]
    vocabulary = BYTES
    if joined:
        core = tokenizer.backend_tokenizer
        pairs = [("\u0120", byte) for byte in sorted(core.get_vocab(False))]     # U+0120: a blank
        more = {a + b: len(BYTES) + i for i, (a, b) in enumerate(pairs)}
        core.model = models.BPE({**core.get_vocab(False), **more}, pairs)
        vocabulary = {**BYTES, **more}
    agent = Agent(new_model(family, seed, vocabulary, width=32), tokenizer)
    agent.inner = randomise(InnerLink(agent.width), agent.embedding_rms, seed)
    agent.inner.requires_grad_(False)
    return agent


def scripted_mas(family="qwen3"):
    """A system in float64 over HELPED. Its last agent has tools, and writes what it is told to.

    script: what it writes, call by call of Agent.write and question by question. A text is spelled
    and then ended, None is left to the model. calls: how many texts each call was asked for."""
    agents = {"helper": byte_caller("llama", 5), "caller": byte_caller(family, 6)}
    outer = nn.ModuleDict({"hc": randomise(OuterLink(32, 32), 0.1).requires_grad_(False)})
    mas = in_float64(MAS(HELPED, agents, outer))
    mas.script, mas.calls, caller = [], [], agents["caller"]
    real = caller.write

    def spelled(text, limit, stop):
        """A text's bytes and an end, up to after a stop string."""
        ids = caller.tokenizer(text)["input_ids"] + [256]
        ends = (length for length in range(1, len(ids))
                if any(tag in caller.tokenizer.decode(ids[:length]) for tag in stop))
        return ids[:min(limit, next(ends, limit))]

    def scripted(context, limit, choose, seeds, stop=()):
        texts = mas.script.pop(0) if mas.script else []
        texts = [*texts, *[None] * (len(context.mask) - len(texts))]
        mas.calls.append(len(texts))
        free = [b for b, text in enumerate(texts) if text is None]
        drawn = iter(real(context.pick(free), limit, choose, [seeds[b] for b in free], stop)
                     if free else [])
        return [next(drawn) if text is None else spelled(text, limit, stop) for text in texts]

    caller.write = scripted
    return mas


# ---- scripts as processes -----------------------------------------------------------------------

# A process that imports torch takes seconds to start. So one server imports it once, and forks each
# script from there. A fork is a process of its own: for locks, for signals, for ranks.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["datasets", "math_verify", "matplotlib.figure", "evaluate",
                               "train_inner", "train_outer"])


def run_forked(script, options, settings, folder):
    """In the new process: become `python SCRIPT OPTIONS`, with its output in files of `folder`."""
    threading.Thread(target=die_with_the_tests, daemon=True).start()
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background is deaf to it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(settings)
    os.chdir(PROJECT)
    # The descriptors of the tests themselves must not stay open here: a reader would wait for us.
    for number, file in ((0, os.devnull), (1, f"{folder}/stdout"), (2, f"{folder}/stderr")):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    sys.argv = [str(script), *options]
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    runpy.run_path(str(PROJECT / script), run_name="__main__")


def die_with_the_tests():
    """End this process when the tests end, however they do."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGKILL)


class Script:
    """`python SCRIPT OPTIONS` in a process of its own, with more environment variables.

        script = Script("evaluate.py", "--num_samples", 2, RANK="0")
        code = script.wait()
        print(script.stdout(), script.stderr())

    A fixture of conftest.py ends those that still run after a test."""
    started = []

    def __init__(self, script, *options, **settings):
        self.folder = tempfile.TemporaryDirectory()
        self.process = SERVER.Process(target=run_forked, args=(
            script, list(map(str, options)), settings, self.folder.name))
        with contextlib.chdir(PROJECT):               # where the server looks for our modules
            self.process.start()
        self.started.append(self)

    def runs(self):
        return self.process.is_alive()

    def wait(self, timeout=240):
        """Its exit code."""
        self.process.join(timeout)
        assert not self.runs(), f"still running after {timeout} s: {self.stderr()}"
        return self.process.exitcode

    def wait_for(self, condition, timeout=240):
        """Wait until condition() is true. It must become true before the script ends."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.runs() and time.monotonic() < end, self.stderr()
            time.sleep(0.02)

    def send(self, number):
        os.kill(self.process.pid, number)

    def stdout(self):
        return self._said("stdout")

    def stderr(self):
        return self._said("stderr")

    def _said(self, name):
        file = Path(self.folder.name) / name
        return file.read_text() if file.exists() else ""

    def end(self):
        self.process.kill()
        self.process.join()
        self.folder.cleanup()


def start_ranks(count, script, *options, **settings):
    """A script in `count` ranks, as torchrun starts them: its Scripts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [Script(script, *options, RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE=str(count),
                   MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **settings) for i in range(count)]


def run_ranks(count, script, *options, **settings):
    """A script in `count` ranks, to its end: (exit codes, what all of them said)."""
    ranks = start_ranks(count, script, *options, **settings)
    codes = [one.wait() for one in ranks]
    return codes, "".join(one.stdout() + one.stderr() for one in ranks)


# ---- rows in the published columns --------------------------------------------------------------

def write_rows(path, rows):
    """Write the rows as .jsonl, or as .json with a data field: the file's name."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps({"data": rows}))
    return str(path)


ROWS = json.loads((PROJECT / "tests/data/rows.json").read_text())
GPQA, MEDQA, MBPP, HUMAN = (ROWS[name] for name in ("gpqa", "medqa", "mbppplus", "humaneval"))


def live_row(hidden, **change):
    """A row of LiveCodeBench with these hidden tests."""
    return {**ROWS["livecodebench"], "private_test_cases": hidden, **change}


def stdin_test(given, expected):
    """A test of LiveCodeBench: what a program reads, and what it should print."""
    return {"input": given, "output": expected, "testtype": "stdin"}


def packed(value):
    """As LiveCodeBench packs its hidden tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()

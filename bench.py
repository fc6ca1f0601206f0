"""What the system costs, beside a plain reference of the published algorithm.

    python bench.py                                  # all sections, under 10 minutes on a CPU
    python bench.py --sections rollout step --dims qwen3-1.7b --layers 4
    python bench.py --dims light                     # the three models of sequential_light

The physics first. A latent step at batch 1 multiplies one vector by every weight of the decoder
body, so it can be no faster than reading those weights once:

    floor [ms] = bytes of the weights / memory bandwidth, which torch.mv on one large matrix shows

Then a table per section, then all figures as one JSON line. Models have real dimensions and random
weights: nothing is downloaded. The reference below is written from the paper's equations: the
rollout runs the whole prefix again at every latent step, and the vocabulary head at its last
position; each stage loads its model; training takes samples one by one. Reference and ours take
turns in one process; what they compute must agree before a time is printed. Times are medians
(fastest .. slowest).

Memory: a model and its cache are made on torch's meta device, where tensors have a shape and no
numbers, so that the bytes are those of the real code and nothing is downloaded.
"""
import argparse
import copy
import ctypes
import json
import os
import platform
import statistics
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

import common
import evaluate
import train_inner
import train_outer
from agents import (CAPTURE, DTYPES, WORTH_RECORDING, Agent, apply_link, cache_name,
                    new_cache, pick_device)
from link import InnerLink, OuterLink
from recurse import MAS, load_mas_system, recurse
from styles import Edge, Role, Style, all_styles, get_style
from tasks import get_task

PATIENCE = 15       # seconds after which a comparison that was repeated once is not again

# T tokens of a prompt, m latent steps, B questions, R rounds, n tokens of a text.
# rollout: (T, m, B, layers (0: all), speed-up wanted); step: T, steps; head: answer positions, all;
# round: T, m, B; text: what the published token counts are divided by; inner: T, n, steps;
# outer: T, m, B, R, n; decode, pass10: T, n; growth: T, m, B, R; matrix: shows the bandwidth.
CPU = dict(rollout=[(64, 16, 1, 0, 0), (64, 8, 4, 0, 0), (256, 48, 1, 8, 15), (512, 32, 1, 4, 16)],
           step=(256, 32), step_at_most=1.4, head=(64, 512), round=(32, 8, 2), text=32,
           inner=(64, 64, 2), outer=(16, 4, 2, 2, 16), outer_wanted=0, decode=(64, 16),
           pass10=(128, 8), growth=(8, 8, 1, 2), layers=8, matrix=(8192, 16384))
GPU = dict(CPU, rollout=[(256, 48, 1, 0, 0), (512, 32, 1, 0, 0), (256, 48, 32, 0, 0)],
           step_at_most=2.5, round=(256, 48, 32), text=1, inner=(256, 256, 8),
           outer=(128, 16, 16, 3, 64), outer_wanted=4, decode=(256, 128), pass10=(1024, 64),
           growth=(256, 32, 2, 8), layers=0)
TINY = dict(rollout=[(12, 4, 1, 0, 0), (12, 4, 3, 1, 0)], step=(12, 4), step_at_most=0, head=(2, 8),
            round=(8, 3, 2), text=256, inner=(6, 5, 2), outer=(6, 3, 2, 2, 4), outer_wanted=0,
            decode=(8, 4), pass10=(8, 3), growth=(8, 4, 2, 2), layers=0, matrix=(256, 1024))
TEXT_TOKENS, LATENT_TOKENS, LATENT_STEPS = 4100, 893, 48      # published, a question at R = 3
TINY_QUESTIONS = 500                                          # of the shipped tiny system

# The base models, as their config.json describes them.
SIGLIP = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
              num_attention_heads=16, image_size=896, patch_size=14)


def dims(model_type, width, inner_width, layers, heads, kv_heads, words, tied=True, **others):
    """A text model's config."""
    return CONFIG_MAPPING[model_type](
        hidden_size=width, intermediate_size=inner_width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=words,
        tie_word_embeddings=tied, **others)


def real_dims():
    """{base model: its config}. Those of Qwen3.5-2B and -4B are recalled, not read from the hub;
    the number of parameters that follows agrees with the models' names."""
    small = dict(linear_num_key_heads=16, linear_num_value_heads=16)
    large = dict(linear_num_key_heads=16, linear_num_value_heads=32)
    gemma = dims("gemma3_text", 2560, 10240, 34, 8, 4, 262208, head_dim=256)
    return {
        "Qwen/Qwen3-1.7B": dims("qwen3", 2048, 6144, 28, 16, 8, 151936, head_dim=128),
        "meta-llama/Llama-3.2-1B-Instruct": dims("llama", 2048, 8192, 16, 32, 8, 128256),
        "Qwen/Qwen2.5-Math-1.5B-Instruct": dims("qwen2", 1536, 8960, 28, 12, 2, 151936),
        "google/gemma-3-4b-it": CONFIG_MAPPING["gemma3"](text_config=gemma.to_dict(),
                                                         vision_config=SIGLIP),
        "meta-llama/Llama-3.2-3B-Instruct": dims("llama", 3072, 8192, 28, 24, 8, 128256),
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B":
            dims("qwen2", 1536, 8960, 28, 12, 2, 151936, tied=False),
        "Qwen/Qwen2.5-Coder-3B-Instruct": dims("qwen2", 2048, 11008, 36, 16, 2, 151936),
        "BioMistral/BioMistral-7B": dims("mistral", 4096, 14336, 32, 32, 8, 32000, tied=False),
        "Qwen/Qwen3.5-2B": dims("qwen3_5_text", 2048, 6144, 24, 8, 2, 248320, **small),
        "Qwen/Qwen3.5-4B": dims("qwen3_5_text", 2560, 9216, 32, 16, 4, 248320, **large),
        "Qwen/Qwen3.5-9B": dims("qwen3_5_text", 4096, 12288, 32, 16, 4, 248320, False, **large)}


def chosen_configs(name, layers):
    """[config] of --dims, one for each of the three agents, cut to `layers` (0: all of them)."""
    real = real_dims()
    if name == "light":
        configs = [real[role.model] for role in get_style("sequential_light").roles]
    else:
        configs = [{"qwen3-1.7b": real["Qwen/Qwen3-1.7B"],
                    "qwen3-0.6b": dims("qwen3", 1024, 3072, 28, 16, 8, 151936, head_dim=128),
                    "tiny": dims("qwen3", 64, 128, 2, 4, 2, 256, head_dim=16)}[name]] * 3
    cut = {"num_hidden_layers": layers, "layer_types": None} if layers else {}
    made = {id(config): type(config)(**{**config.to_dict(), **cut}) for config in configs}
    return [made[id(config)] for config in configs]


# ---- random models of real dimensions -----------------------------------------------------------

def words_tokenizer(count):
    """Token i is the word "wi", so that a text of n words has n tokens, whoever wrote it."""
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="w0", clean_up_tokenization_spaces=False,
        chat_template="w1 {% for turn in messages %}{{ turn['content'] }} {% endfor %}w2")


def new_agent(config, device, dtype):
    """An agent with random weights, which never ends a text: all texts have the length asked."""
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None
    agent = Agent(model, words_tokenizer(config.vocab_size))
    agent.end_tokens = set()
    agent.inner = InnerLink(agent.width, gain=agent.embedding_rms).to(device).requires_grad_(False)
    return agent


def new_system(name, layers, device, dtype):
    """Planner -> critic -> solver -> planner with random weights. Agents of the same dimensions
    share one frozen model, as roles with the same base do."""
    hears = {"planner": "solver", "critic": "planner", "solver": "critic"}
    roles = [Role(who, who, "", f"{{question}}\n{{{heard}}}", target=("text",))
             for who, heard in hears.items()]
    edges = [Edge(f"to_{who}", heard, who) for who, heard in hears.items()]
    torch.manual_seed(0)
    bases, agents = {}, {}
    for role, config in zip(roles, chosen_configs(name, layers)):
        if id(config) not in bases:
            bases[id(config)] = new_agent(config, device, dtype)
        agents[role.name] = bases[id(config)]
    mas = MAS(Style("random", tuple(roles), tuple(edges)), agents, torch.nn.ModuleDict())
    return mas.with_fresh_outer()


def some_words(count, seed=0):
    """A text of so many tokens."""
    numbers = torch.randint(3, 250, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{number}" for number in numbers.tolist())


def some_embeds(agent, tokens, batch_size):
    """(embeds (B, T, d), mask (B, T)) of random prompts."""
    texts = [some_words(tokens, seed) for seed in range(batch_size)]
    return agent.embed([agent.tokenize(texts)], {})


@contextmanager
def depth(agent, layers):
    """The agent with its first so many layers alone (0: all)."""
    whole = agent.body.layers
    agent.body.layers = whole[:layers or len(whole)]
    agent.kept["steps"] = None               # a recorded step still has the layers it had
    yield agent
    agent.body.layers = whole
    agent.kept["steps"] = None


# ---- the published algorithm, from its equations ------------------------------------------------

def published_states(agent, embeds):
    """Hidden states after the final norm, (B, T, d), of whole sequences: no cache, no padding."""
    return agent.body(inputs_embeds=embeds, use_cache=False).last_hidden_state


def published_rollout(agent, embeds, m):
    """(B, m, d): h_i = body(e_1 .. e_T, R_in(h_1) .. R_in(h_(i-1))), all run again for each i."""
    thoughts = []
    for _ in range(m):
        h = published_states(agent, embeds)[:, -1:]                        # (B, 1, d)
        agent.head(h)                  # a causal LM is asked, so its head runs; nobody reads it
        thoughts.append(h)
        embeds = torch.cat([embeds, apply_link(agent.inner, h, agent.dtype)], 1)
    return torch.cat(thoughts, 1)


def published_rounds(mas, questions, rounds, think, agent_of):
    """(last agent, its last prompt (B, T, d), {(round, edge key): what was sent}).

    think(agent, embeds) -> H; agent_of(role name): how an agent is come by at each stage."""
    heard, sent = {role.name: {} for role in mas.style.roles}, {}
    for round in range(1, rounds + 1):
        for role in mas.style.roles:
            agent, said = agent_of(role.name), heard[role.name]
            words = mas.style.prompt(role, "math", said)
            embeds, _ = agent.embed(agent.prompt(role.system, words, said, questions), said)
            if round == rounds and role is mas.style.roles[-1]:
                return agent, embeds, sent
            H = think(agent, embeds)                                       # (B, m, d)
            for edge in mas.style.edges:
                if edge.src == role.name:
                    # R_out(R_in(H))                                         (B, m, d_dst)
                    inward = apply_link(agent.inner, H, agent.dtype)
                    message = apply_link(mas.outer[edge.key], inward,
                                         mas.agents[edge.dst].dtype)
                    heard[edge.dst][role.name] = sent[round, edge.key] = message


def embed_text(agent, text):
    """(embeddings (1, n, d), ids (n,)) of a text."""
    ids = torch.tensor(agent.tokenize([text])[0], device=agent.device)
    return agent.embedding(ids)[None], ids


def published_outer_loss(mas, rows, rounds, m, latents):
    """Mean cross-entropy of the last answers, backward, one row at a time: the loss.

    The thoughts are an uncached rollout, or (latents="teacher", as published) the hidden states at
    the gold text. Only at the answer's positions does the head run."""
    def think(agent, embeds):
        if latents == "rollout":
            return published_rollout(agent, embeds, m)
        told, ids = embed_text(agent, row["text"])
        return published_states(agent, torch.cat([embeds, told], 1))[:, -len(ids):]

    losses = []
    for row in rows:
        agent, embeds, _ = published_rounds(mas, [row["question"]], rounds, think, mas.agents.get)
        told, ids = embed_text(agent, row["text"])
        states = published_states(agent, torch.cat([embeds, told], 1))[0, -len(ids) - 1:-1]
        loss = F.cross_entropy(agent.head(states).float(), ids)
        (loss / len(rows)).backward()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def published_inner_steps(agent, style, link, examples, batch_size=2):
    """Train `link` along the examples, the base run again for each sample: losses 1 - cos."""
    optimizer = torch.optim.AdamW(link.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=0)
    losses = []
    for start in range(0, len(examples), batch_size):
        optimizer.zero_grad()
        total = 0
        for question, kind, _, gold in examples[start:start + batch_size]:
            words = style.prompt(style.roles[0], kind, ())
            embeds, _ = agent.embed(agent.prompt("", words, (), [question]), {})
            told, ids = embed_text(agent, gold)
            with torch.no_grad():
                states = published_states(agent, torch.cat([embeds, told], 1))
            # 1 - cos(R_in(h_t), Emb(token_(t+1)))
            got = link(states[0, -len(ids) - 1:-1].float())
            loss = 1 - F.cosine_similarity(got, told[0].float(), dim=-1).mean()
            (loss / batch_size).backward()
            total += loss.item() / batch_size
        torch.nn.utils.clip_grad_norm_(link.parameters(), 1.0)
        optimizer.step()
        losses.append(total)
    return losses


# ---- measuring ----------------------------------------------------------------------------------

def apart(ours, reference):
    """How far results are from each other: the largest absolute difference, in half precision
    |a - b| / |b| (rounding differs there, and a rollout amplifies it)."""
    if not torch.is_tensor(ours):
        return max([apart(a, b) for a, b in zip(ours, reference, strict=True)])
    if ours.shape != reference.shape:
        return float("inf")
    a, b = ours.detach().float(), reference.detach().float()
    half = ours.dtype in (torch.bfloat16, torch.float16)
    return ((a - b).norm() / b.norm() if half else (a - b).abs().max()).item()


class Bench:
    """The options, the system, and what has been measured so far."""

    def __init__(self, options):
        self.options = options
        self.device, self.dtype = pick_device(options.device, options.dtype)
        on_cpu = self.device.type == "cpu"
        torch.set_num_threads(options.threads or (1 if on_cpu else torch.get_num_threads()))
        self.size = TINY if options.dims == "tiny" else CPU if on_cpu else GPU
        self.layers = options.layers or self.size["layers"]
        self.mas = new_system(options.dims, self.layers, self.device, self.dtype)
        self.agent = self.mas.agents["planner"]
        for agent in self.mas.agents.values():
            agent.capture = options.capture
        self.tolerance = 1e-3 if self.dtype == torch.float32 else 0.1
        self.rows = []

    def timed(self, run):
        """(seconds, what run() returned), with the device's work done."""
        self.wait()
        started = time.perf_counter()
        result = run()
        self.wait()
        return time.perf_counter() - started, result

    def recorded(self, run):
        """The run, after two first ones: in the second its steps are recorded."""
        run()
        self.agent.kept["recordings"] = 0
        self.agent.kept["steps"].taken = WORTH_RECORDING[self.device.type]
        run()
        return run

    def wait(self):
        """Until the device has done what it was asked."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def compare(self, case, reference, ours, distance=apart, at_least=0, at_most=0, units=(1, 1)):
        """Time both in turns, print and keep a row. distance(our result, the reference's) must be
        within the tolerance, None: they need not agree. Each time is divided by its unit. ratio:
        reference / ours, or with at_most (of a cost, not a gain) ours / reference."""
        times, results, started = ([], []), [None, None], time.perf_counter()
        while len(times[0]) < self.options.repeats:
            for which in (0, 1) if len(times[0]) % 2 == 0 else (1, 0):
                seconds, results[which] = self.timed((reference, ours)[which])
                times[which].append(seconds / units[which])
            error = distance(results[1], results[0]) if distance else None
            if error is not None and not error <= self.tolerance:
                raise RuntimeError(f"{case}: ours and the reference are {error:.2g} apart, more "
                                   f"than {self.tolerance}: no time is worth anything")
            if len(times[0]) > 1 and time.perf_counter() - started > PATIENCE:
                break
        theirs, mine = (statistics.median(side) for side in times)
        ratio = mine / theirs if at_most else theirs / mine
        row = {"case": case, "reference_s": spread(times[0]), "ours_s": spread(times[1]),
               "repeats": len(times[0]), "ratio": ratio, "apart": error}
        if at_least or 0 < at_most < float("inf"):
            row["wanted"] = f"at most {at_most}" if at_most else f"at least {at_least}"
            row["reached"] = ratio <= at_most if at_most else ratio >= at_least
        self.rows.append(row)
        print_row(row, slower=not at_most and ratio < 1)
        return row

    def note(self, text, **figures):
        """A line under the table, and its figures."""
        print(f"  {text}", flush=True)
        self.rows.append({"case": text, **figures})


def spread(times):
    """[median, fastest, slowest]."""
    return [statistics.median(times), min(times), max(times)]


def print_row(row, slower):
    """One row of the table."""
    sides = [f"{1000 * median:9.1f} ({1000 * low:.1f} .. {1000 * high:.1f})"
             for median, low, high in (row["reference_s"], row["ours_s"])]
    wanted = f"{row['wanted']}: {'yes' if row['reached'] else 'NO'}" if "wanted" in row else ""
    error = "" if row["apart"] is None else f"apart {row['apart']:.0e}"
    print(f"  {row['case']:42s} {sides[0]:>28s} {sides[1]:>28s} {row['ratio']:7.2f}x  "
          f"{wanted}{'SLOWER than the reference' if slower else ''} {error}", flush=True)


# ---- sections -----------------------------------------------------------------------------------

def matrix_reader(bench):
    """(a function that reads one large float32 matrix through, its bytes)."""
    matrix = torch.randn(bench.size["matrix"], device=bench.device)
    vector = torch.randn(matrix.shape[1], device=bench.device)
    return lambda: torch.mv(matrix, vector), matrix.nbytes


def step_bytes(agent):
    """Bytes of all weights that a latent step reads: the layers, the last norm, the inner link."""
    modules = (agent.body.layers, agent.body.norm, agent.inner)
    return size_of([weight for module in modules for weight in module.parameters()])


def physics(bench):
    """Print the floor of a latent step at B = 1: {"weights", "bandwidth", "floor_ms"}."""
    read, size = matrix_reader(bench)
    seconds = min(bench.timed(read)[0] for _ in range(5))
    weights, bandwidth = step_bytes(bench.agent), size / seconds
    bench.bandwidth = bandwidth
    floor = 1000 * weights / bandwidth
    print(f"a latent step of {bench.options.dims}, {len(bench.agent.body.layers)} layers, reads "
          f"{weights / 1e9:.3f} GB of weights; torch.mv on {size / 1e9:.2f} GB reads "
          f"{bandwidth / 1e9:.1f} GB/s:\nno step at B = 1 can take less than {floor:.2f} ms")
    return {"weights": weights, "bandwidth": bandwidth, "floor_ms": floor}


@torch.no_grad()
def rollout(bench):
    """m thoughts after a prompt of T tokens, for B questions."""
    for T, m, B, layers, wanted in bench.size["rollout"]:
        with depth(bench.agent, layers) as agent:
            embeds, mask = some_embeds(agent, T, B)
            as_stated = bench.options.dims == "qwen3-0.6b" and len(agent.body.layers) == layers
            ours = bench.recorded(lambda: agent.think(agent.read(embeds, mask), m))
            row = bench.compare(f"T={T} m={m} B={B}, {len(agent.body.layers)} layers",
                                lambda: published_rollout(agent, embeds, m), ours,
                                at_least=wanted if as_stated else 0)
            if row.get("reached") is False:
                read_s = bench.timed(lambda: agent.read(embeds, mask))[0]
                limit = row["reference_s"][0] / (read_s + (m - 1) * step_bytes(agent)
                                                 / bench.bandwidth)
                bench.note(f"reading the prompt ({1000 * read_s:.0f} ms) and {m - 1} floors would "
                           f"be {limit:.1f}x: the most that this machine allows", limit=limit)


@torch.no_grad()
def step(bench):
    """One cached latent step at B = 1 against its floor, in turns; and against its own matrices."""
    (T, steps), agent = bench.size["step"], bench.agent
    past = agent.read(*some_embeds(agent, T, 1))
    read, size = matrix_reader(bench)
    matrices = [weight for module in (agent.body.layers, agent.inner)
                for weight in module.parameters() if weight.dim() == 2]
    vectors = [weight.new_ones(weight.shape[1]) for weight in matrices]

    think = bench.recorded(lambda: agent.think(past, 1 + steps))
    bench.compare(f"floor, and a step after T={T}", lambda: [read() for _ in range(steps)], think,
                  None, units=(steps * size / step_bytes(agent), steps),
                  at_most=bench.size["step_at_most"] or float("inf"))

    def unrecorded():
        """The same thoughts, each step by Python and the library's own code."""
        kept, capture = agent.kept["steps"], agent.capture
        replay, kept.recorded, agent.capture = kept.recorded, None, "off"
        think()
        kept.recorded, agent.capture = replay, capture

    bench.compare("the same step kernel by kernel, and recorded", unrecorded, think, None,
                  units=(steps, steps))
    # Short rows are read more slowly than long ones: how much of the gap is that?
    bench.compare("torch.mv on its matrices, and the same step",
                  lambda: [torch.mv(*pair) for pair in steps * list(zip(matrices, vectors))],
                  think, None, units=(steps, steps), at_most=float("inf"))


@torch.no_grad()
def head(bench):
    """The vocabulary head and the loss at the answer's positions against all positions."""
    told, tokens = bench.size["head"]
    states = torch.randn(1, tokens, bench.agent.width, device=bench.device, dtype=bench.dtype)
    ids = torch.arange(told, device=bench.device)
    labels = torch.cat([ids.new_full((tokens - told,), -100), ids])        # -100: no target
    bench.compare(f"{told} answer positions of {tokens}",
                  lambda: F.cross_entropy(bench.agent.head(states)[0].float(), labels),
                  lambda: F.cross_entropy(bench.agent.head(states[0, -told:]).float(), ids),
                  at_least=7 if bench.options.dims != "tiny" else 0)


@torch.no_grad()
def round_of_style(bench):
    """Two rounds of three agents up to the last one's answer: five turns, models reloaded in the
    reference (from files that the system has at hand in memory)."""
    T, m, B = bench.size["round"]
    questions, mas = [some_words(T, seed) for seed in range(B)], bench.mas
    with tempfile.TemporaryDirectory() as folder:
        for agent in mas.agents.values():
            if not (Path(folder) / str(id(agent))).exists():
                agent.model.save_pretrained(Path(folder) / str(id(agent)))

        def reloaded(name):
            agent = mas.agents[name]
            model = AutoModelForCausalLM.from_pretrained(Path(folder) / str(id(agent)),
                                                         dtype=bench.dtype).to(bench.device)
            return Agent(model, agent.tokenizer, agent.inner)

        def reference():
            return list(published_rounds(mas, questions, 2, lambda agent, embeds:
                        published_rollout(agent, embeds, m), reloaded)[2].values())

        bench.compare(f"R=2 T={T} m={m} B={B}, three agents", reference,
                      lambda: list(recurse(mas, questions, 2, m, trace=True).sent.values()))


def text(bench):
    """Recursive text against recursive latents at R = 3, with evaluate's way of answering."""
    tiny, task, spent = load_mas_system("tiny", device="cpu"), get_task("tiny"), {}
    options = dict(tiny.style.settings["tiny"], samples=1, answer_retry=0)
    examples = task.load(TINY_QUESTIONS)
    batches = evaluate.in_batches(examples, options.pop("batch_size"))

    def answer(method):
        answers = [one for batch in batches
                   for one in evaluate.answers_to(tiny, task, batch, method, 3, options)]
        spent[method] = (sum(one["decoded_tokens"] for one in answers) / len(answers),
                         sum(one["correct"][0] for one in answers) / len(answers))

    bench.compare("the shipped tiny system, a question", lambda: answer("text"),
                  lambda: answer("latent"), None, units=[len(examples)] * 2, at_least=1.8)
    fewer = 1 - spent["latent"][0] / spent["text"][0]
    bench.note(f"text, latents: {spent['text'][0]:.1f}, {spent['latent'][0]:.1f} tokens decoded "
               f"({100 * fewer:.1f} % fewer, wanted 75.6), accuracy {spent['text'][1]:.3f}, "
               f"{spent['latent'][1]:.3f}", fewer_tokens=fewer, reached=fewer >= 0.756)

    part, question = bench.size["text"], some_words(256 // bench.size["text"])
    turn, last = max(1, TEXT_TOKENS // 9 // part), LATENT_TOKENS // part
    m = max(1, LATENT_STEPS // part)
    bench.compare(f"published token counts / {part}: text 9 x {turn}, latents 8 x {m} + {last}",
                  lambda: bench.mas.respond([question], 3, m, method="text", max_new_tokens=turn),
                  lambda: bench.mas.respond([question], 3, m, max_new_tokens=last),
                  lambda ours, theirs: float(ours[1].decoded_tokens != [last]
                                             or theirs[1].decoded_tokens != [9 * turn]),
                  at_least=2.4 if bench.options.dims != "tiny" else 0)


def training_settings(bench, **others):
    """The flags that the trainers' functions look at, with the published values."""
    return argparse.Namespace(**{**dict(
        mas_task="math", lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
        max_grad_norm=1.0, grad_accum_steps=1, log_every=10**9, save_steps=0, resume=False,
        adapter_cos_weight=1.0, adapter_mse_weight=0.0, max_length=4096, max_latent_tokens=80,
        role_loss_weight=0.0, supervise_final_only=1, gradient_checkpointing=0), **others})


def inner(bench):
    """Training an inner link at batch 2: hidden states once, against again in each step."""
    (T, n, steps), agent, style = bench.size["inner"], bench.agent, bench.mas.style
    args, features = training_settings(bench), []
    examples = [(some_words(T, i), "math", {}, some_words(n, 100 + i)) for i in range(2 * steps)]

    def read():
        """All states, once."""
        features[:] = common.gold_states(agent, style, style.roles[0], examples, n)

    def ours():
        """Losses of an epoch over states that are read already, by train_inner."""
        link, losses = copy.deepcopy(agent.inner).requires_grad_(True), []
        with tempfile.TemporaryDirectory() as folder:
            training = common.Training(link, args, 5e-4, folder, 10**9)
            for start in range(0, len(features), 2):
                states = torch.cat([h for h, _ in features[start:start + 2]])      # (2 n, d)
                tokens = torch.cat([ids for _, ids in features[start:start + 2]])  # (2 n,)
                loss, *_ = train_inner.inner_loss(link, agent.embedding, states, tokens, args)
                training.backward(loss, len(states))
                training.step()
                losses.append(loss.item())
        return torch.tensor(losses)

    def reference():
        link = copy.deepcopy(agent.inner).requires_grad_(True)
        return torch.tensor(published_inner_steps(agent, style, link, examples))

    read()
    row = bench.compare(f"a sample, T={T} n={n}, states at hand", reference, ours,
                        units=[len(examples)] * 2)
    once = statistics.median(bench.timed(read)[0] for _ in range(bench.options.repeats))
    once, per_step = once / len(examples), row["ours_s"][0]
    ratio = 40000 * row["reference_s"][0] / (1904 * once + 40000 * per_step)
    bench.note(f"20,000 steps of 2 on 1,904 rows: 40,000 x {1000 * row['reference_s'][0]:.0f} ms "
               f"against 1,904 x {1000 * once:.0f} ms (states, once) + 40,000 x "
               f"{1000 * per_step:.0f} ms = {ratio:.1f}x (wanted 10)", ratio=ratio,
               states_s=once, reached=ratio >= 10)


def outer(bench):
    """Training outer links, forward and backward: a batch at once against row by row."""
    T, m, B, R, n = bench.size["outer"]
    rows = [{"question": some_words(T, i), "text": some_words(n, 100 + i)} for i in range(B)]
    links = [*bench.mas.outer.requires_grad_(True).parameters()]

    def gradient(loss):
        """[loss, gradients relative to the largest one], and nothing left behind."""
        flat = torch.cat([torch.zeros_like(link).flatten() if link.grad is None else
                          link.grad.flatten() for link in links])
        for link in links:
            link.grad = None
        return [torch.tensor(loss), flat / flat.abs().max()]

    def ours(batches, known=None, **others):
        """Loss and gradients of these batches, by train_outer."""
        args, total = training_settings(bench, latent_length=m, **others), 0
        for batch in batches:
            loss, *_ = train_outer.outer_loss(bench.mas, batch, R, args, known)
            (loss / len(batches)).backward()
            total += loss.item() / len(batches)
        return gradient(total)

    for latents in ("rollout", "teacher"):
        bench.compare(f"{latents} R={R} T={T} m={m} n={n}, a row of {B}",
                      lambda: gradient(published_outer_loss(bench.mas, rows, R, m, latents)),
                      lambda: ours([rows], latents=latents), units=(B, B),
                      at_least=bench.size["outer_wanted"])
    for case, reference, tried in (
            ("our rollouts, row by row against all at once", [[row] for row in rows], {}),
            ("the same, turns kept against checkpointed", [rows],
             {"gradient_checkpointing": 1})):
        bench.compare(case, lambda: ours(reference, latents="rollout"),
                      lambda: ours([rows], latents="rollout", **tried), units=(B, B))
    known = {}
    ours([rows], known, latents="rollout")
    bench.compare("the same, first thoughts anew against kept from an epoch before",
                  lambda: ours([rows], latents="rollout"),
                  lambda: ours([rows], known, latents="rollout"), units=(B, B))
    # At a CPU's short prompts the logits are the peak; turns only count where they are longer.
    length, peaks = T if bench.device.type == "cuda" else 8 * T, []
    rows = [{**row, "question": some_words(length, i)} for i, row in enumerate(rows)]
    for checkpointing in (0, 1):
        peak_memory_mb(bench.device, reset=True)
        before = peak_memory_mb(bench.device)
        ours([rows], latents="rollout", gradient_checkpointing=checkpointing)
        peaks.append(peak_memory_mb(bench.device) - before)
    bench.note(f"memory of a step at T={length} beside the models: turns kept {peaks[0]:.0f} MB, "
               f"checkpointed {peaks[1]:.0f} MB", kept_mb=peaks[0], checkpointed_mb=peaks[1])
    bench.mas.outer.requires_grad_(False)


@torch.no_grad()
def decode(bench):
    """Greedy decoding: our loop against the library's generate. Times are per token."""
    T, n = bench.size["decode"]
    agent, ids = bench.agent, torch.tensor(bench.agent.tokenize([some_words(T)]))

    def library():
        ids_here = ids.to(bench.device)
        return agent.model.generate(ids_here, attention_mask=torch.ones_like(ids_here),
                                    max_new_tokens=n, do_sample=False, pad_token_id=0)[0, T:]

    ours = bench.recorded(lambda: torch.tensor(agent.write(
        agent.read(*agent.embed([ids.tolist()], {})), n).ids[0]))
    bench.compare(f"a token, T={T} n={n}", library, ours, same_tokens(bench), units=(n, n))


def same_tokens(bench):
    """A distance of token ids: the share that differs; near-ties fall either way in bfloat16."""
    half = bench.dtype != torch.float32
    return lambda ours, theirs: 0.0 if half else (ours != theirs.cpu()).float().mean().item()


@torch.no_grad()
def pass10(bench):
    """Ten samples of one question: one prefill, against one for each sample."""
    T, n = bench.size["pass10"]
    agent, seeds = bench.agent, list(range(10))
    embeds, mask = some_embeds(agent, T, 1)

    def samples(past):
        # top_k: among all words of a random model the smallest rounding would change the draw.
        return torch.tensor(agent.write(past, n, temperature=0.6, top_k=20, seeds=seeds).ids)

    bench.compare(f"T={T}, 10 x {n} tokens",
                  lambda: samples(agent.read(embeds.repeat(10, 1, 1), mask.repeat(10, 1))),
                  lambda: samples(agent.read(embeds, mask).rows([0] * 10)), same_tokens(bench))


@torch.no_grad()
def growth(bench):
    """Our time when m, R, B or T doubles: before and after."""
    T, m, B, R = bench.size["growth"]

    def run(m=m, R=R, B=B, T=T):
        questions = [some_words(T, seed) for seed in range(B)]
        return bench.mas.respond(questions, R, m, max_new_tokens=m)

    for name, value in dict(m=m, R=R, B=B, T=T).items():
        most = 2.1 if name in "mR" and bench.options.dims != "tiny" else float("inf")
        bench.compare(f"{name} from {value} to {2 * value} (T={T} m={m} B={B} R={R})", run,
                      lambda: run(**{name: 2 * value}), None, at_most=most)


# ---- memory -------------------------------------------------------------------------------------

def size_of(tensors):
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def model_memory(config, dtype, batch_size, tokens):
    """(bytes of the weights, bytes of a cache of batch_size rows of `tokens` positions, width)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        body = model.get_decoder()
        width, cache = body.config.hidden_size, new_cache(body.config)
        embeds = torch.empty(batch_size, tokens, width, dtype=dtype)
        body(inputs_embeds=embeds, use_cache=True, **{cache_name(body): cache})
    held = []
    for layer in cache.layers:
        for value in vars(layer).values():
            values = value.values() if isinstance(value, dict) else [value]
            held += [one for one in values if torch.is_tensor(one)]
    return size_of([*model.parameters(), *model.buffers()]), size_of(held), width


def style_memory(style, configs, dtype, batch_size, tokens):
    """Bytes that a style takes: {"weights", "largest" (of one agent: what --offload keeps on the
    card), "links", "cache"}.

    configs: {base model: config}; a base model that two roles share counts once. Links are
    float32. cache: of all agents together, batch_size rows of `tokens` positions in each."""
    models = {role.model: model_memory(configs[role.model], dtype, batch_size, tokens)
              for role in style.roles}
    by_role = {role.name: models[role.model] for role in style.roles}
    with torch.device("meta"):
        links = [InnerLink(width) for _, _, width in by_role.values()]
        links += [OuterLink(by_role[edge.src][2], by_role[edge.dst][2]) for edge in style.edges]
    return {"weights": sum(weights for weights, _, _ in models.values()),
            "largest": max(weights for weights, _, _ in models.values()),
            "links": size_of([weight for link in links for weight in link.parameters()]),
            "cache": sum(cache for _, cache, _ in by_role.values())}


def memory_table(tokens=1000):
    """Print what each real style takes, by dtype."""
    configs = real_dims()
    print(f"GB of weights and links, and of a cache of {tokens} positions of one question in all "
          "agents")
    print(f"{'style':18s} {'dtype':9s} {'weights':>8s} {'offload':>8s} {'links':>6s} "
          f"{'cache':>6s}")
    for style in all_styles().values():
        if not all(role.model in configs for role in style.roles):
            continue
        for dtype in ("bfloat16", "float32"):
            size = style_memory(style, configs, DTYPES[dtype], 1, tokens)
            print(f"{style.name:18s} {dtype:9s} {size['weights'] / 1e9:8.2f} "
                  f"{size['largest'] / 1e9:8.2f} {size['links'] / 1e9:6.2f} "
                  f"{size['cache'] / 1e9:6.3f}")


@torch.no_grad()
def memory(bench):
    """What weights, links and caches of the real styles take, worked out from their dimensions; and
    what a turn costs whose agent is brought to the device first (--offload)."""
    memory_table()
    (T, m, B), agent = bench.size["round"], bench.agent
    embeds, mask = some_embeds(agent, T, B)
    weights = [*agent.model.parameters(), *agent.model.buffers()]
    at_rest = [(weight, weight.data.cpu()) for weight in weights]     # on a CPU the same memory

    def turn(weights_at_rest):
        """A turn of an agent whose weights rest elsewhere."""
        agent.at_rest = weights_at_rest
        agent.rest()
        agent.wake()
        return agent.think(agent.read(embeds, mask), m)

    size = sum(resting.nbytes for _, resting in at_rest) / 1e9
    bench.compare(f"T={T} m={m} B={B}, offload moves {size:.1f} GB" if bench.device.type == "cuda"
                  else "offload, which on a CPU moves nothing", lambda: turn([]),
                  lambda: turn(at_rest), at_most=float("inf"))
    agent.at_rest = []


SECTIONS = {"rollout": rollout, "step": step, "head": head, "round": round_of_style, "text": text,
            "inner": inner, "outer": outer, "decode": decode, "pass10": pass10, "growth": growth,
            "memory": memory}


def flags():
    """The flags."""
    parser = common.Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    add("--dims", default="qwen3-0.6b", choices=["qwen3-0.6b", "qwen3-1.7b", "light", "tiny"],
        help="dimensions of the models; light: the three of sequential_light")
    add("--layers", type=common.at_least(0), default=0, help="0: 8 on a CPU, all on a GPU")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", default="auto", choices=common.DTYPES)
    add("--capture", default="record", choices=CAPTURE, help="how single steps run: see agents.py")
    add("--threads", type=common.at_least(0), default=0, help="0: one on a CPU")
    add("--repeats", type=common.at_least(1), default=3, help="of each comparison")
    return parser.parse_args()


def peak_memory_mb(device, reset=False):
    """Peak memory since the last reset: the card's, or what this process held in main memory."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return peak
    try:                                                  # Linux; elsewhere the peak so far
        if reset:
            ctypes.CDLL(None).malloc_trim(0)              # what is free goes back to the system
            Path("/proc/self/clear_refs").write_text("5")
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10
    except (OSError, IndexError, AttributeError):
        return evaluate.peak_memory_mb(())


def hardware(device):
    """The card's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().split("\n") if line.startswith("model name")
             ] if info.is_file() else []
    return names[0].split(": ")[1] if names else platform.processor() or platform.machine()


def main():
    """The physics, a table for each section, the JSON line."""
    options, started = flags(), time.time()
    bench = Bench(options)
    figures = {"hardware": hardware(bench.device), "cores": os.cpu_count(),
               "threads": torch.get_num_threads(), "torch": torch.__version__,
               "device": str(bench.device), "dtype": str(bench.dtype), "dims": options.dims,
               "layers": len(bench.agent.body.layers)}
    print(", ".join(f"{name} {value}" for name, value in figures.items()))
    figures.update(physics(bench), sections={})
    print(f"  {'ms: median (fastest .. slowest)':42s} {'reference':>28s} {'ours':>28s}    ratio")
    for name in dict.fromkeys(options.sections):
        print(f"{name}: {SECTIONS[name].__doc__.splitlines()[0]}", flush=True)
        peak_memory_mb(bench.device, reset=True)
        bench.rows = []
        SECTIONS[name](bench)
        figures["sections"][name] = {"rows": bench.rows,
                                     "peak_memory_mb": peak_memory_mb(bench.device)}
        print(f"  peak memory {figures['sections'][name]['peak_memory_mb']:.0f} MB")
    figures.update(seconds=time.time() - started, load=os.getloadavg())
    print(json.dumps(figures))


if __name__ == "__main__":
    common.run(main)

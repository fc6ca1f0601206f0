"""One frozen language model as an agent. It reads, then thinks in latents or writes in words.

    past = agent.read(embeds, mask)       a prompt goes in: KV cache, mask, last hidden state
    H    = agent.think(past, m)           (B, m, d) latent thoughts: h_1 = past.last,
                                          h_(i+1) = body(R_in(h_i) | cache); no word is chosen
    said = agent.write(past, 100)         the same loop with words: token_i = argmax head(h_i)

h is the last layer's hidden state after the final norm. Between steps only the
cache grows: m thoughts cost one reading of the prompt and m-1 single positions, and the
vocabulary head, which at 150k words doubles a step's cost, is never run while thinking. Where
no gradient is asked for, the cache grows within buffers that stay where they are, so that a step
can be recorded once and replayed (Steps).

Shapes: B questions, T tokens, m latent steps, d hidden width, V words. Prompts are padded on the
left. Three things go into every call of the library, single steps included: the whole 2-D mask
(without it padded rows come out wrong and nothing says so), position ids counted from that mask
(so that padding changes nothing), and the cache.
"""
import copy
import inspect
import json
import os
import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache,
                          PreTrainedTokenizerFast)
from transformers.cache_utils import LinearAttentionLayer, StaticLayer

RECURRENT = "linear_attention"         # Qwen3.5: layers with a state in place of keys and values
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken")
CAPTURE = ("record", "compile", "off")  # how single steps run: see Steps
ROOM = 16                              # buffers are a multiple of this long
# So many steps in the same buffers, and the next one is recorded. A trace costs what it saves in
# about a hundred steps; of a CUDA graph we expect ten (not measured).
WORTH_RECORDING = {"cpu": 256, "cuda": 10}
WARM_UP = 4                            # steps that recording takes
# So often for each agent: torch never frees a trace (5 MB for 2 layers, 50 MB for 28).
RECORDINGS = {"cpu": 8, "cuda": float("inf")}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device="auto", dtype="auto"):
    """(torch.device, torch.dtype) for the frozen models, decided here and nowhere else.

    auto: the first GPU if there is one; bfloat16 there, float16 where the card has no bfloat16;
    float32 on a CPU (half precision is four times slower there). Prints what it chose and why."""
    why = "asked for"
    if os.environ.get("LOCAL_RANK") and device in ("auto", "cuda") and torch.cuda.is_available():
        device, why = f"cuda:{os.environ['LOCAL_RANK']}", "this rank's GPU"
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        why = "a GPU is there" if device == "cuda" else "no GPU found"
    try:
        device = torch.device(device)
    except RuntimeError as problem:
        raise ValueError(f"unknown device '{device}': use auto, cpu, cuda or cuda:N") from problem
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device '{device}' is not supported: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but this torch sees no GPU: use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no {device}: this machine has {torch.cuda.device_count()} GPUs")
    if dtype == "auto":
        dtype = "float32"
        if device.type == "cuda":          # asked of this card; older ones only emulate bfloat16
            modern = torch.cuda.get_device_capability(device) >= (8, 0)
            dtype = "bfloat16" if modern else "float16"
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype '{dtype}': choose auto, {', '.join(DTYPES)}")
    print(f"device {device} ({why}), frozen models in {dtype}, links in float32", flush=True)
    return device, DTYPES[dtype]


def apply_link(link, states, dtype):
    """link(states) in `dtype`, the reading model's. Links stay float32 and run under autocast."""
    half = dtype in (torch.bfloat16, torch.float16)
    if not half:
        return link(states.to(next(link.parameters()).dtype)).to(dtype)
    with torch.autocast(states.device.type, dtype):
        return link(states).to(dtype)


class RecurrentLayer(LinearAttentionLayer):
    """The library's state of a linear-attention layer (Qwen3.5), replaced at each step.

    The library overwrites it in place, which breaks the backward pass and every other Past that
    shares it. record_past is its own switch for keeping old convolution states: with it, all
    steps take the path on which that state is a new tensor."""

    def __init__(self):
        super().__init__()
        self.record_past = True

    def update_conv_state(self, conv_states, state_idx=0, conv_kernel_size=None, **kwargs):
        """The states that the convolution runs over; the last ones of them are kept."""
        full = super().update_conv_state(conv_states, state_idx, conv_kernel_size, **kwargs)
        self.conv_states[state_idx] = full[..., -conv_kernel_size:]
        return full

    def update_recurrent_state(self, recurrent_states, state_idx=0, **kwargs):
        """The new state takes the old one's place, not its memory."""
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states


def layer_kinds(config):
    """The kinds of layers of a decoder, by its config: {full_attention, ..}."""
    return set(getattr(config, "layer_types", None) or ["full_attention"])


def new_cache(config):
    """An empty cache for a decoder of this config. Sliding layers keep all positions too (their
    mask does the sliding): only so can what was read be cut and moved."""
    if RECURRENT not in layer_kinds(config):
        return DynamicCache()
    cache = DynamicCache(config=config)
    cache.layers = [RecurrentLayer() if isinstance(layer, LinearAttentionLayer) else layer
                    for layer in cache.layers]
    return cache


@dataclass
class Past:
    """What an agent has read. It is never changed in place: whoever goes on from it copies it."""
    cache: DynamicCache
    mask: torch.Tensor       # (B, T) 1 = token, 0 = padding
    last: torch.Tensor       # (B, 1, d) hidden state at the last position

    def copy_cache(self):
        """A cache that can grow without this one noticing; no tensor is copied, since dynamic
        layers, and RecurrentLayer, put a new tensor in place when they grow."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in cache.layers:
            states = {name: dict(value) for name, value in vars(layer).items()
                      if isinstance(value, dict)}              # RecurrentLayer keeps its own so
            vars(layer).update(states)
        return cache

    def rows(self, places):
        """The Past of these rows alone; a row may come several times."""
        if places == list(range(len(self.mask))):
            return self
        places, cache = torch.tensor(places, device=self.mask.device), self.copy_cache()
        cache.reorder_cache(places)
        return Past(cache, self.mask[places], self.last[places])

    def right_aligned(self, mask):
        """The first mask[b].sum() positions of each row b, moved to the row's right edge.

        mask: (B, T') left-padded. Keys are rotated by position id, not by place in memory, so
        moving them changes nothing. Used to put the part of a prompt that is read already
        directly before the part that is new."""
        cache = self.copy_cache()
        kept, had = mask.sum(1), self.mask.sum(1)                                    # (B,)
        shift = (kept - mask.shape[1]) - (had - self.mask.shape[1])
        columns = torch.arange(mask.shape[1], device=mask.device)
        source = (columns + shift[:, None]).clamp(0, self.mask.shape[1] - 1)         # (B, T')
        if mask.shape != self.mask.shape or bool(shift.any()):
            for layer in cache.layers:
                heads, width = layer.keys.shape[1], layer.keys.shape[3]
                index = source[:, None, :, None].expand(-1, heads, -1, width)
                layer.keys = layer.keys.gather(2, index)
                layer.values = layer.values.gather(2, index)
        return Past(cache, mask, self.last)


class FixedLayer(StaticLayer):
    """Keys and values of a layer in buffers (B, heads, C, width) that stay where they are: a new
    position is written at `place`, and the mask hides all that lies behind it."""

    def __init__(self, keys, values, place):
        super().__init__(keys.shape[2])
        self.keys, self.values, self.place, self.is_initialized = keys, values, place, True

    def update(self, keys, values, *args, **kwargs):
        """Write one position, (B, heads, 1, width) each: the whole buffers."""
        self.keys.index_copy_(2, self.place, keys)
        self.values.index_copy_(2, self.place, values)
        return self.keys, self.values

    def get_seq_length(self):
        """Where the library's causal mask places the new position."""
        return self.place[0]

    def get_mask_sizes(self, *args):
        """(columns of the mask, the first one's number)."""
        return self.keys.shape[2], 0


class Steps(torch.nn.Module):
    """Single positions behind what was read, without gradient: h = steps.step(x), (B, 1, d).

    All that a step needs and changes lies in buffers of a fixed size: keys and values, the mask,
    the positions. A step copies nothing that was there before, and one that comes often can be
    recorded and replayed without Python, as a CUDA graph on a GPU, as a TorchScript trace on a CPU
    (from 1.5 to 1.35 times its floor there). The agent's `capture` says how: record; compile,
    torch.compile first, which fuses small kernels and takes a minute for each model and batch
    size; or off."""

    def __init__(self, agent, layers, rows, capacity):
        super().__init__()
        self.agent, self.rows, self.capacity = agent, rows, capacity
        self.left, self.taken, self.recorded = 0, 0, None
        like = torch.empty(0, dtype=torch.long, device=agent.device)
        self.seen = self._buffer(like, rows, capacity)           # the mask
        self.position = self._buffer(like, rows, 1)              # of the next token in its text
        self.place = self._buffer(like, 1)                       # its column in the buffers
        self.small = [self.seen, self.position, self.place]      # all that is no key or value
        self.cache = DynamicCache()
        self.cache.layers = [self._fixed(layer) for layer in layers]

    def _buffer(self, like, *shape):
        """Zeros that the module knows: for a trace all other tensors are constants."""
        with torch.inference_mode(False):        # whoever asks first: others will write here too
            zeros = like.new_zeros(shape)
        self.register_buffer(f"buffer{len(self._buffers)}", zeros)
        return zeros

    def _fixed(self, layer):
        """A layer as this one of a cache, over buffers."""
        if not isinstance(layer, LinearAttentionLayer):
            _, heads, _, width = layer.keys.shape
            shape = self.rows, heads, self.capacity, width
            return FixedLayer(*(self._buffer(one, *shape) for one in (layer.keys, layer.values)),
                              self.place)
        fixed = LinearAttentionLayer()               # the library's own, which works in place
        vars(fixed).update(vars(layer), record_past=False)
        conv, state = layer.conv_states[0], layer.recurrent_states[0]
        fixed.conv_states = {0: self._buffer(conv, self.rows, conv.shape[1],
                                               layer.conv_kernel_size[0])}
        fixed.recurrent_states = {0: self._buffer(state, self.rows, *state.shape[1:])}
        self.small += [fixed.conv_states[0], fixed.recurrent_states[0]]
        return fixed

    @property
    def mask(self):
        """(B, T), as that of a Past: what is read by now."""
        return self.seen[:, :self.capacity - self.left]

    def begin(self, past, rows=slice(None)):
        """Go on from these rows of a Past, or of other Steps; nothing older is left."""
        length = past.mask.shape[1]
        for fixed, layer in zip(self.cache.layers, past.cache.layers):
            if isinstance(fixed, FixedLayer):
                for buffer, read in ((fixed.keys, layer.keys), (fixed.values, layer.values)):
                    buffer[:, :, :length].copy_(read[:, :, :length][rows])
                    buffer[:, :, length:].zero_()    # a weight of 0 does not hide a NaN
                continue
            for buffer, read in ((fixed.conv_states[0], layer.conv_states[0]),
                                 (fixed.recurrent_states[0], layer.recurrent_states[0])):
                # A prompt shorter than the convolution has fewer states: zeros stand before it.
                buffer.zero_()[..., -read.shape[-1]:].copy_(read[rows])
        mask = past.mask[rows]
        self.seen.zero_()[:, :length].copy_(mask)
        self.position.copy_(mask.sum(1, keepdim=True))
        self.place.fill_(length)
        self.left = self.capacity - length

    def forward(self, x):
        """One position. All that changes does so in place, on the device: it can be recorded."""
        self.seen.index_fill_(1, self.place, 1)
        # h = body(x | cache)                                                      (B, 1, d)
        h = self.agent._forward(x, self.cache, self.seen, self.position)
        self.position.add_(1)
        self.place.add_(1)
        return h

    @torch.no_grad()
    def step(self, x):
        """The same, recorded if that is worth it by now."""
        worth = self.taken >= WORTH_RECORDING[self.agent.device.type] and self.left > WARM_UP
        if worth and not self.recorded and self.agent.recordings_left():
            # The first calls write into columns that later steps overwrite; the rest is put back.
            before = [buffer.clone() for buffer in self.small]
            self.recorded = record(self, x)
            for buffer, value in zip(self.small, before):
                buffer.copy_(value)
        self.left -= 1
        self.taken += 1
        return (self.recorded or self.forward)(x)


def record(steps, x):
    """The step over these buffers, recorded; None where that fails, and it says why. It runs
    WARM_UP times on the way, with x."""
    agent, step = steps.agent, steps.forward
    agent.kept["recordings"] += 1
    x = steps._buffer(x, *x.shape).copy_(x)              # where a graph will look for its input
    try:
        if agent.at_rest:
            raise RuntimeError("with offload the weights do not stay in one place")
        if agent.capture == "compile":
            torch._dynamo.config.recompile_limit = 64      # every number of rows is one of its own
            step = torch.compile(step, dynamic=False, fullgraph=True)
        elif agent.device.type == "cpu":
            with warnings.catch_warnings():          # shapes and flags become constants: so it is
                warnings.simplefilter("ignore")      # meant, for they never change
                step = torch.jit.trace(steps, x, check_trace=False)
        return cuda_graph(step, x) if agent.device.type == "cuda" else warmed_up(step, x)
    except RuntimeError as problem:
        print(f"{agent.tokenizer.name_or_path}: single steps are not recorded: "
              f"{str(problem).splitlines()[0]}", flush=True)
        agent.kept["recordings"] = float("inf")          # nor for a role with the same base model


def warmed_up(step, x):
    """The step, run until all that is made or compiled at its first calls is there."""
    for _ in range(WARM_UP - 1):                         # a trace has run it once
        step(x)
    return step


def cuda_graph(step, x):
    """The step's kernels as one CUDA graph: replay(x) -> h. It reads and writes the very tensors
    that the step does now, so these have to stay where they are."""
    with torch.cuda.device(x.device):
        aside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):               # a stream of this card, and left at an error
            warmed_up(step, x)
            with torch.cuda.graph(graph, stream=aside):
                h = step(x)
        torch.cuda.current_stream().wait_stream(aside)

    def replay(new):
        """h (B, 1, d) of the next position, new (B, 1, d)."""
        x.copy_(new)
        graph.replay()
        return h.clone()                             # the next replay overwrites h

    return replay


@dataclass
class Said:
    """What an agent wrote: B texts, and the token ids of each (its end token included)."""
    texts: list
    ids: list


class Agent:
    """A frozen causal language model with its tokenizer and its inner link.

    One call at a time: thoughts and words of all calls go through the same buffers (kept)."""

    def __init__(self, model, tokenizer, inner=None, thinking=False, capture="record"):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.inner = tokenizer, inner
        self.body, self.head = model.get_decoder(), model.get_output_embeddings()
        self.cache_name = cache_name(self.body)
        self.embedding = model.get_input_embeddings()    # called, not indexed: Gemma scales inside
        self.device, self.dtype = self.embedding.weight.device, self.embedding.weight.dtype
        self.at_rest = []                                # with offload: (weight, its place of rest)
        self.capture = capture                           # how single steps run: see Steps
        # The Steps in use, and how many recordings there were: roles of one base model share them.
        self.kept = {"steps": None, "recordings": 0}
        self.width = self.embedding.weight.shape[1]
        self.thinking = thinking                         # the chat template's own switch
        if tokenizer.chat_template is None:
            raise ValueError(f"{tokenizer.name_or_path or 'this model'} has no chat template: take "
                             "the instruct model, or set tokenizer.chat_template")
        odd = layer_kinds(self.body.config) - {"full_attention", "sliding_attention", RECURRENT}
        if odd:
            raise ValueError(f"{tokenizer.name_or_path or 'this model'} has layers of a kind that "
                             f"is not supported ({', '.join(sorted(odd))}): choose another model")
        self.recurrent = RECURRENT in layer_kinds(self.body.config)
        ends = [tokenizer.eos_token_id, model.generation_config.eos_token_id]
        self.end_tokens = {token for end in ends if end is not None
                           for token in (end if isinstance(end, list) else [end])}

    @property
    def embedding_rms(self):
        """Root mean square of the token embeddings, over some 4096 evenly spaced tokens."""
        table = self.embedding.weight
        tokens = torch.arange(0, len(table), max(1, len(table) // 4096), device=table.device)
        return self.embedding(tokens).float().pow(2).mean().sqrt().item()

    def recordings_left(self):
        """Whether steps may be recorded (once more)."""
        return self.capture != "off" and self.kept["recordings"] < RECORDINGS[self.device.type]

    def wake(self):
        """Bring the weights to the device, where they rest elsewhere (offload)."""
        for weight, resting in self.at_rest:
            if weight.device.type != self.device.type:
                weight.data = resting.to(self.device, non_blocking=True)

    def rest(self):
        """Let go of the device. Frozen weights never change, so nothing is copied back."""
        self.kept["steps"] = None
        for weight, resting in self.at_rest:
            weight.data = resting

    # ---- prompts ----------------------------------------------------------------------------

    def tokenize(self, texts, plain=False):
        """Token ids of each text on its own, without special tokens: [[int]]. plain: a text of
        strangers, in which <|im_end|> is to be eight letters and not the end of a turn."""
        unique = list(dict.fromkeys(texts))          # what follows a slot is the same in all rows
        if not unique:
            return []
        # Half a surrogate pair, which JSON can carry, is no text that a tokenizer takes.
        proper = [text.encode("utf-8", "replace").decode() for text in unique]
        ids = self.tokenizer(proper, add_special_tokens=False, split_special_tokens=plain)
        ids = ids["input_ids"]
        known = dict(zip(unique, ids))
        return [known[text] for text in texts]

    def render(self, system, user, marked):
        """The chat around `user` as pieces: strings, and between them the names out of `marked`.

        Rendered once with placeholders from Unicode's private range in place of `{name}`, then
        cut there. Questions go in only afterwards, so nothing in one can be taken for a slot."""
        system = system.strip()                            # many templates strip it themselves
        pattern = "|".join(re.escape(name) for name in sorted(marked, key=len, reverse=True))
        user = re.sub("{(" + pattern + ")}", "\ue000\\1\ue001", user)

        def chat(messages):
            """The messages as one text, up to where the model is to go on."""
            # Llama's template writes the date of the day unless told one: results would vary.
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True,
                enable_thinking=self.thinking, date_string="26 Jul 2024")

        text = ""
        if system:
            try:
                text = chat([{"role": "system", "content": system},
                             {"role": "user", "content": user}])
            except jinja2.TemplateError:
                pass                                       # this template knows no system role
        if system not in text or not text:
            text = chat([{"role": "user", "content": f"{system}\n\n{user}".strip()}])
        pieces = re.split("\ue000([^\ue001]*)\ue001", text)   # text, name, text, name, .., text
        if pieces[1::2] != re.findall("\ue000([^\ue001]*)\ue001", user):
            raise ValueError(f"the chat template of {self.tokenizer.name_or_path} leaves out what "
                             "the user says: take one that writes message['content']")
        return pieces

    def prompt(self, system, user, slots, questions, answer_format=""):
        """B prompts as segments: a list of B token lists, or the name of a slot, in order.

        Each run of text between two slots is tokenised on its own, question included."""
        pieces = self.render(system, user, [*slots, "question", "answer_format"])
        segments, texts = [], [""] * len(questions)
        for i, piece in enumerate(pieces + [None]):
            if piece is None or (i % 2 and piece in slots):
                if any(texts):
                    segments.append(self.tokenize(texts))
                segments += [piece] if piece else []
                texts = [""] * len(questions)
            elif i % 2:
                values = questions if piece == "question" else [answer_format] * len(questions)
                texts = [text + value for text, value in zip(texts, values)]
            else:
                texts = [text + piece for text in texts]
        return segments

    def embed(self, segments, heard):
        """Prompts with their slots filled: embeds (B, T, d) and mask (B, T), padded on the left.

        heard: {slot: latents (B, m, d), or B of them with their own m, or B texts}."""
        parts = []
        for segment in segments:
            said = heard[segment] if isinstance(segment, str) else segment
            if isinstance(said[0], str):
                said = self.tokenize(said)
            if not torch.is_tensor(said[0]):
                lengths = [len(tokens) for tokens in said]
                flat = [token for tokens in said for token in tokens]
                if max(flat, default=0) >= self.embedding.num_embeddings:
                    raise ValueError(f"{self.tokenizer.name_or_path}: its tokenizer knows more "
                                     "tokens than its model: they do not belong together")
                flat = torch.tensor(flat, dtype=torch.long, device=self.device)
                said = self.embedding(flat).split(lengths)                  # B x (length, d)
            parts.append(said)
        rows = [torch.cat(row) for row in zip(*parts)]
        ones = [torch.ones(len(row), dtype=torch.long, device=self.device) for row in rows]
        return (pad_sequence(rows, batch_first=True, padding_side="left"),
                pad_sequence(ones, batch_first=True, padding_side="left"))

    # ---- read, think, follow, write ---------------------------------------------------------

    def _forward(self, embeds, cache, mask, positions=None):
        """Hidden states (B, T_new, d) of new positions; grows the cache. mask: (B, T_past+T_new)"""
        if positions is None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -embeds.shape[1]:]
        return self.body(inputs_embeds=embeds, attention_mask=mask, position_ids=positions,
                         use_cache=True, **{self.cache_name: cache}).last_hidden_state

    def _growing(self, past):
        """step(x) -> h behind `past`, differentiable: every step makes the cache anew."""
        cache, mask = past.copy_cache(), past.mask

        def step(x):
            """h (B, 1, d) of the next position, x (B, 1, d)."""
            nonlocal mask
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            return self._forward(x, cache, mask)

        return step

    @torch.no_grad()
    def _steps(self, past, more, rows=slice(None)):
        """Steps behind these rows of `past` (other Steps, or a Past), with room for so many more.

        The buffers of the last call, and what was recorded over them, serve again if they fit."""
        count, length = len(past.mask[rows]), past.mask.shape[1] + more
        steps = self.kept["steps"]
        if not steps or steps is past or steps.rows != count or not (
                length <= steps.capacity <= 2 * length + ROOM):
            self.kept["steps"] = steps = None       # freed (unless past) before new ones are made
            # An eighth more than asked for: prompts of the next batch may be a little longer.
            capacity = -(-(length + length // 8) // ROOM) * ROOM
            self.kept["steps"] = steps = Steps(self, past.cache.layers, count, capacity)
        steps.begin(past, rows)
        return steps

    def read(self, embeds, mask, past=None):
        """Read embeds (B, T, d) with mask (B, T), after `past` if given: a new Past."""
        cache = new_cache(self.body.config) if past is None else past.copy_cache()
        mask = mask if past is None else torch.cat([past.mask, mask], 1)
        states = self._forward(embeds, cache, mask)
        return Past(cache, mask, states[:, -1:])

    @torch.no_grad()
    def read_prefix(self, segments):
        """Everything before the first slot, read once, to be shared by all rounds: (tokens, Past)
        of B prompts, or None if they begin with a slot."""
        if isinstance(segments[0], str):
            return None
        return segments[0], self.read(*self.embed(segments[:1], {}))

    def read_prompt(self, segments, heard, prefix=None):
        """A Past of the filled prompts; what they share with `prefix` is not read again.

        Rows differ in how much is new (texts have different lengths), yet a hole in the middle
        of the cache is best avoided: the last `new` positions of *every* row are read, `new`
        being the longest new part, after a cache of all that comes before them. A recurrent
        state cannot be cut back like that: then all is read again."""
        tokens, past = prefix or (None, None)
        if tokens == segments[0] and len(segments) > 1:      # the usual case: just that is shared,
            embeds, mask = self.embed(segments[1:], heard)
            if mask.all():                                   # and all rows have as much to read
                return self.read(embeds, mask, past)
        embeds, mask = self.embed(segments, heard)
        if prefix is None or self.recurrent:
            return self.read(embeds, mask)
        shared = torch.tensor([common_length(*pair) for pair in zip(segments[0], tokens)])
        new = int((mask.sum(1).cpu() - shared).clamp(min=1).max())
        if new >= mask.shape[1]:
            return self.read(embeds, mask)
        return self.read(embeds[:, -new:], mask[:, -new:], past.right_aligned(mask[:, :-new]))

    def think(self, past, m):
        """m latent thoughts H = [h_1 .. h_m], (B, m, d): the hidden state that reading ended on,
        then m-1 cached steps through the inner link. Differentiable. (The paper's rollout.)"""
        learning = torch.is_grad_enabled() and any(
            one.requires_grad for one in (past.last, *self.inner.parameters()))
        # m = 1 takes no step: no buffers for it.
        step = self._growing(past) if learning or m == 1 else self._steps(past, m - 1).step
        thoughts = [past.last]
        for _ in range(m - 1):
            x = apply_link(self.inner, thoughts[-1], self.dtype)     # x = R_in(h)         (B, 1, d)
            thoughts.append(step(x))                                 # h = body(x | cache) (B, 1, d)
        return torch.cat(thoughts, 1)

    def follow(self, past, tokens):
        """Teacher forcing: hidden states along given tokens, (B, 1 + n, d), n the longest row.

        State i has seen the prompt and i tokens: it predicts token i+1. tokens: B lists;
        states behind a shorter row's end are meaningless."""
        rows = [torch.tensor(row, dtype=torch.long, device=self.device) for row in tokens]
        padded = pad_sequence(rows, batch_first=True)                              # (B, n)
        if padded.shape[1] == 0:
            return past.last
        told = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        states = self._forward(self.embedding(padded), past.copy_cache(),
                               torch.cat([past.mask, told], 1))
        return torch.cat([past.last, states], 1)

    def answer_loss(self, past, targets):
        """(sum of cross-entropies, number of target tokens) of B target token lists after `past`.

        The vocabulary head runs at the positions that predict a target, nowhere else."""
        states = self.follow(past, [row[:-1] for row in targets])                  # (B, n, d)
        lengths = torch.tensor([len(row) for row in targets], device=self.device)
        told = torch.arange(states.shape[1], device=self.device) < lengths[:, None]
        labels = torch.tensor([token for row in targets for token in row], dtype=torch.long,
                              device=self.device)
        logits = self.head(states[told]).float()                                   # (N, V)
        return F.cross_entropy(logits, labels, reduction="sum"), len(labels)

    @torch.no_grad()
    def write(self, past, max_new_tokens, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0,
              repetition_penalty=1.0, seeds=None, stop=()):
        """Decode up to max_new_tokens words a row: Said. Rows that are finished leave the batch.

        temperature 0 is greedy. Otherwise row b draws from its own generator, seeded seeds[b], so
        that a sample does not depend on who shares its batch. A row also ends behind the first
        string of `stop` it has written.

        Our own loop, because the library's generate cannot start from a full cache, refuses
        embeddings for some families and would read the prompt once per sample."""
        steps, logits = None, self.head(past.last[:, -1])                          # (B, V)
        rows = list(range(len(logits)))                      # the rows still in the batch
        written, ends = [[] for _ in rows], {}               # ends[row]: how long its text is
        pick = self._sampler(temperature, top_p, top_k, min_p, repetition_penalty,
                             seeds or [0] * len(rows), max_new_tokens)
        for step in range(max_new_tokens):
            token = pick(logits.float(), rows, written, step)                      # (b,)
            for row, word in zip(rows, token.tolist()):
                written[row].append(word)
                if word in self.end_tokens or self._stopped(written[row], stop):
                    ends.setdefault(row, step + 1)
            going = [place for place, row in enumerate(rows) if row not in ends]
            if not going or step == max_new_tokens - 1:
                break
            # A recorded step has a fixed number of rows: to be worth a new one half must be gone.
            most = len(rows) // 2 if steps and steps.recorded else len(rows) - 1
            fewer = len(going) <= most
            if fewer or not steps or not steps.left:
                kept = torch.tensor(going, device=self.device) if fewer else slice(None)
                more = min(max_new_tokens - 1 - step, max(256, step))              # buffers double
                steps = self._steps(steps or past, more, kept)
                token, rows = token[kept], [rows[place] for place in going] if fewer else rows
            h = steps.step(self.embedding(token)[:, None])                         # (b, 1, d)
            logits = self.head(h[:, -1])                                           # (b, V)
        written = [tokens[:ends.get(row)] for row, tokens in enumerate(written)]
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        return Said([text.strip() for text in texts], written)

    def _stopped(self, tokens, stop):
        """Whether one of the stop strings has just been written (the last tokens are enough)."""
        if not stop:
            return False
        tail = self.tokenizer.decode(tokens[-max(len(text) for text in stop) - 1:])
        return any(text in tail for text in stop)

    def _sampler(self, temperature, top_p, top_k, min_p, repetition_penalty, seeds, steps):
        """pick(logits (b, V), rows, written, step) -> tokens (b,)."""
        warpers = transformers.LogitsProcessorList()
        if repetition_penalty != 1.0:
            warpers.append(transformers.RepetitionPenaltyLogitsProcessor(repetition_penalty))
        if temperature > 0:
            if temperature != 1.0:
                warpers.append(transformers.TemperatureLogitsWarper(temperature))
            if top_k > 0:
                warpers.append(transformers.TopKLogitsWarper(top_k))
            if top_p < 1.0:
                warpers.append(transformers.TopPLogitsWarper(top_p))
            if min_p > 0:
                warpers.append(transformers.MinPLogitsWarper(min_p))
            draws = torch.stack([torch.rand(steps, generator=torch.Generator().manual_seed(seed))
                                 for seed in seeds]).to(self.device)               # (B, steps)

        def pick(logits, rows, written, step):
            """The next word of each row that is still in the batch."""
            if warpers:
                so_far = None                        # only the repetition penalty looks back
                if repetition_penalty != 1.0:
                    so_far = torch.tensor([written[row] for row in rows], dtype=torch.long)
                    so_far = so_far.to(self.device)
                logits = warpers(so_far, logits)
            if temperature == 0:
                return logits.argmax(-1)
            # Inverse transform: the first word whose cumulated probability exceeds u ~ U(0, 1).
            cumulated = logits.softmax(-1).cumsum(-1)
            u = draws[rows, step][:, None] * cumulated[:, -1:]
            token = torch.searchsorted(cumulated, u, right=True)[:, 0]
            return token.clamp(max=logits.shape[-1] - 1)

        return pick


def cache_name(body):
    """What a decoder calls the cache it is given: transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(body.forward).parameters else "past_key_values"


def common_length(a, b):
    """How many leading elements two lists share."""
    length = 0
    for x, y in zip(a, b):
        if x != y:
            break
        length += 1
    return length


def load_agent(folder, device, dtype, trust_remote_code=False, thinking=False, offload=False,
               capture="record"):
    """The Agent (without an inner link) of a local folder that holds a whole causal LM; with
    offload its weights rest in main memory until wake().

    A released folder has an adapter_config.json beside the model, which makes transformers take
    it for a PEFT adapter: so the folder is loaded through a view of links without that file.
    Raises OSError or ValueError if files or weights are missing."""
    with tempfile.TemporaryDirectory() as view:
        for file in Path(folder).resolve().iterdir():
            if file.name != "adapter_config.json":
                (Path(view) / file.name).symlink_to(file)
        settings = {"trust_remote_code": trust_remote_code}
        loudness = transformers.utils.logging.get_verbosity()
        transformers.utils.logging.set_verbosity_error()      # we say ourselves what is missing
        try:
            config = AutoConfig.from_pretrained(view, **settings)
            if not any(list(Path(view).glob(name)) for name in TOKENIZER_FILES):
                raise ValueError("there is no tokenizer file")    # the library makes an empty one
            # AutoTokenizer goes by the model's family and may put that family's way of splitting
            # words in place of the folder's own: tokenizer.json, where there is one, is the truth.
            whole = (Path(view) / "tokenizer.json").is_file()
            kind = PreTrainedTokenizerFast if whole else AutoTokenizer
            tokenizer = kind.from_pretrained(view, **({} if whole else settings))
            model, report = AutoModelForCausalLM.from_pretrained(
                view, config=config, dtype=dtype, output_loading_info=True, **settings)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError,
                json.JSONDecodeError) as problem:
            says = str(problem).replace(view, str(folder)).split("\n")[0]
            raise ValueError(f"{folder} does not load as a causal language model with tokenizer: "
                             + says) from problem
        finally:
            transformers.utils.logging.set_verbosity(loudness)
    if config.tie_word_embeddings and set(report["missing_keys"]) == {"lm_head.weight"}:
        # Text and images: "tied" may stand at the top of config.json, not in its text part.
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
        report["missing_keys"] = set()
    for what, says in (("missing_keys", "lacks the weights"),
                       ("unexpected_keys", "holds weights its model has no place for:")):
        if report[what]:
            names = ", ".join(sorted(report[what])[:3])
            raise ValueError(f"{folder} {says} {names} ..: config.json (model_type "
                             f"{config.model_type}) is not that of this checkpoint")
    tokenizer.name_or_path = str(folder)
    agent = Agent(model if offload else model.to(device), tokenizer, None, thinking, capture)
    if offload:
        agent.device = device
        weights = (*model.parameters(), *model.buffers())
        agent.at_rest = [(weight, weight.data) for weight in weights]
    return agent

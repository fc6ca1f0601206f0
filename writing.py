"""A turn in words: drafts that grow piece by piece, and how each next word is chosen.

An answer is rarely written in one go. Ten samples stand after one reading of the prompt. A tool's
result is put in where its call ends. An answer that cannot be read gets `Final Answer: \\boxed{`
put after it. All three are the same thing: something is put after a draft, and the model goes on
from there. So there is one way to write:

    drafts = new_drafts(turn, questions, writing)     empty drafts, writing.samples per question
    go_on(turn, drafts, writing, limits, stop)        each draft grows by at most limits[i] words
    insert(turn, draft, text)                         a text is put after a draft

write_turn() does a whole turn with these three, tool calls included.
"""
import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from numbers import Integral

import torch
import transformers

from support.errors import need
from tools.calls import TAGS, next_call, run_tool

MAX_CALLS = 5                                              # tool calls per answer, as published


# ---- the next word ------------------------------------------------------------------------------

@dataclass
class Sampling:
    """How the next word is chosen from a model's logits: the likeliest word, or a draw.

        p = softmax(logits / temperature)        then top_p, top_k or min_p set unlikely words to 0

    temperature 0 takes the likeliest word. repetition_penalty makes words less likely that were
    written before. Each text brings its own random number u, so its words do not depend on the
    texts beside it. (The library's own sampling draws for the whole batch at once.)"""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        # A NaN fails every comparison, so it is refused too.
        need(0 <= self.temperature < math.inf and self.top_k >= 0 and self.repetition_penalty > 0
             and 0 <= self.top_p <= 1 and 0 <= self.min_p <= 1, f"{self}: temperature and top_k are"
             " at least 0, repetition_penalty is above 0, top_p and min_p are between 0 and 1")

    def choose(self, logits, so_far, u):
        """The next tokens (B,) from logits (B, V). so_far: B equally long lists of the tokens
        written before. u (B,), drawn from U(0, 1), decides where a word is drawn."""
        if self.repetition_penalty != 1.0:               # only this one looks back
            so_far = torch.tensor(so_far, dtype=torch.long, device=logits.device)
        logits = self.warpers()(so_far, logits)
        if self.temperature == 0:
            return logits.argmax(-1)
        # Inverse transform sampling: the first word whose cumulated probability exceeds u.
        cumulated = logits.softmax(-1).cumsum(-1)                                   # (B, V)
        u = u[:, None] * cumulated[:, -1:]               # the last sum is 1 only up to rounding
        return torch.searchsorted(cumulated, u, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)

    def warpers(self):
        """The library's functions (tokens so far, logits) -> logits, in the library's order."""
        drawn = self.temperature > 0                     # else the likeliest word is taken
        penalty = self.repetition_penalty
        return transformers.LogitsProcessorList(warper(value) for wanted, warper, value in (
            (penalty != 1, transformers.RepetitionPenaltyLogitsProcessor, penalty),
            (drawn, transformers.TemperatureLogitsWarper, self.temperature),
            (drawn and self.top_k > 0, transformers.TopKLogitsWarper, self.top_k),
            (drawn and self.top_p < 1, transformers.TopPLogitsWarper, self.top_p),
            (drawn and self.min_p > 0, transformers.MinPLogitsWarper, self.min_p)) if wanted)


# ---- drafts -------------------------------------------------------------------------------------

@dataclass
class Writing:
    """How texts are written.

    samples: drafts per question. repeats: each question stands `repeats` times in the batch,
    because agents that exchange words need a conversation of its own for each sample. brief: how
    many tokens hold all that a message says (method text_brief)."""
    max_new_tokens: int = 1000
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 42
    samples: int = 1
    repeats: int = 1
    brief: int | None = None

    def __post_init__(self):
        for name in ("max_new_tokens", "samples"):
            value = getattr(self, name)
            need(isinstance(value, Integral) and value >= 1, f"{name} is a whole number of at least"
                 f" 1, not {value}")


@dataclass
class Draft:
    """A text in the making: which prompt it follows, and its tokens so far."""
    b: int                                         # the number of its prompt in the batch
    seed: int
    tokens: list = field(default_factory=list)     # the text so far
    newest: list = field(default_factory=list)     # what the model wrote last
    decoded: int = 0                               # how many of the tokens the model chose itself


def text_seed(*parts):
    """A seed made from what a text is about. It is the same in any batch, order or resumed run."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def new_drafts(turn, questions, writing):
    """Empty drafts, writing.samples per question, side by side. Each has a seed of its own."""
    numbers = [b for b in range(len(questions)) for _ in range(writing.samples)]
    own = writing.samples * writing.repeats          # drafts of one question; they stand in a row
    return [Draft(b, text_seed(writing.seed, turn.role, turn.round, questions[b], i % own))
            for i, b in enumerate(numbers)]


def go_on(turn, drafts, writing, limits, stop=()):
    """Let each draft grow by at most limits[i] words, or until it has one of the strings `stop`."""
    numbers = [draft.b for draft in drafts]
    if any(draft.tokens for draft in drafts):      # a text after the prompt is read with it
        context = turn.read(numbers, [draft.tokens for draft in drafts])
    else:                                          # all samples start from one reading
        context = turn.read().pick(numbers)
    seeds = [text_seed(draft.seed, len(draft.tokens)) for draft in drafts]
    pieces = turn.agent.write(context, max(limits), writing.sampling.choose, seeds=seeds, stop=stop)
    for draft, tokens, limit in zip(drafts, pieces, limits):
        draft.newest = tokens[:limit]
        draft.tokens = draft.tokens + draft.newest
        draft.decoded += len(draft.newest)


def insert(turn, draft, text, plain=False):
    """Put a text after a draft. Its end token goes. plain: see Agent.tokenize."""
    while draft.tokens and draft.tokens[-1] in turn.agent.end_tokens:
        draft.tokens = draft.tokens[:-1]
    draft.tokens = draft.tokens + turn.agent.tokenize([text], plain, goes_on=True)[0]


def text_of(turn, draft):
    """A draft as a text."""
    return turn.agent.tokenizer.decode(draft.tokens, skip_special_tokens=True).strip()


def write_turn(mas, recursion, turn, questions, writing):
    """Write one turn of a recursion: its texts, B * writing.samples of them.

    The last role may call its style's tools. The Recursion keeps texts and drafts, and counts the
    words."""
    tools = mas.style.tools if turn.role == mas.style.roles[-1].name else ()
    recursion.drafts = going = new_drafts(turn, questions, writing)
    for calls_left in range(MAX_CALLS if tools else 0, -1, -1):
        limits = [writing.max_new_tokens - draft.decoded for draft in going]
        go_on(turn, going, writing, limits=limits, stop=TAGS if calls_left else ())
        going = use_tools(turn, going, writing, tools, mas.search) if calls_left else []
        if not going:
            break
    for draft in recursion.drafts:
        recursion.decoded[draft.b // writing.repeats] += draft.decoded
    texts = [text_of(turn, draft) for draft in recursion.drafts]
    recursion.texts[turn.round, turn.role] = texts
    return texts


def write_message(mas, recursion, turn, request, writing):
    """What an agent says in words to the others: B texts.

    text_brief cuts a text after writing.brief tokens, which hold all that it has to say. It is the
    fair baseline for latents, because its texts are short too. But its user has to know the length.
    """
    writing = replace(writing, samples=1)
    if request.method == "text_brief":
        need(writing.brief, "method text_brief needs a task that has a brief message length")
        writing = replace(writing, max_new_tokens=min(writing.brief, writing.max_new_tokens))
    return write_turn(mas, recursion, turn, questions=request.questions, writing=writing)


# ---- tools --------------------------------------------------------------------------------------

def use_tools(turn, drafts, writing, tools, search):
    """Run the calls that drafts end in, side by side, and insert their results.

    Returns the drafts that go on. A draft goes on if it stopped at a tag, which may also be a stray
    one, and has words left."""
    going, calls = [], []
    for draft in drafts:
        text = turn.agent.tokenizer.decode(draft.newest)
        ends = [text.find(tag) + len(tag) for tag in TAGS if tag in text]
        if not ends or draft.decoded >= writing.max_new_tokens:
            continue
        going.append(draft)
        call = next_call(text[:min(ends)])         # the last token may reach beyond the tag
        if call and call[0] in tools:
            calls.append((draft, *call))
    with ThreadPoolExecutor(MAX_CALLS) as pool:
        results = pool.map(lambda call: run_tool(*call[1:], search), calls)
        for (draft, *_), result in zip(calls, results):
            insert(turn, draft, result, plain=True)
    return going

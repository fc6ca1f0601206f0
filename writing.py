"""A turn in words: drafts that grow piece by piece.

An answer is rarely written in one go. Ten samples stand after one reading of the prompt. A tool's
result is put in where its call ends. An answer that cannot be read gets `Final Answer: \\boxed{`
put after it. All three are the same thing: something is put after a draft, and the model goes on
from there. So there is one way to write:

    drafts = new_drafts(turn, questions, writing)     empty drafts, writing.samples a question
    go_on(turn, drafts, writing, limits, stop)        each draft grows by so many words at most
    insert(turn, draft, text)                         a text is put after a draft

write() below does all of a turn with these three, calls of tools included.
"""
import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from numbers import Integral

from support.errors import need
from support.sampling import Sampling
from support.sandbox import run_python

TOOL_TAGS, MAX_CALLS = ("</python>", "</search>"), 5       # calls of tools an answer, as published
RESULT_CAP = 6000                                          # characters of a tool's result


@dataclass
class Writing:
    """How texts are written.

    samples: drafts a question. repeats: so many rows of the batch are the same question, because
    agents that exchange words need a conversation of its own for each sample. stop: strings that
    end a text. brief: how many tokens hold all that a message has to say (method text_brief)."""
    max_new_tokens: int = 1000
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 42
    samples: int = 1
    repeats: int = 1
    stop: tuple = ()
    brief: int | None = None

    def __post_init__(self):
        need(all(isinstance(one, Integral) and one >= 1
                 for one in (self.max_new_tokens, self.samples)), "max_new_tokens and samples are "
             f"whole numbers of at least 1, not {self.max_new_tokens} and {self.samples}")


@dataclass
class Draft:
    """A text in the making: which prompt it follows, and its tokens so far."""
    row: int                                       # the prompt, as a row of the batch
    seed: int
    tokens: list = field(default_factory=list)     # the text so far
    newest: list = field(default_factory=list)     # what the model wrote last
    decoded: int = 0                               # how many of the tokens the model chose itself


def text_seed(*parts):
    """A seed made from what a text is about. It is the same in any batch, order or resumed run."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def new_drafts(turn, questions, writing):
    """Empty drafts, writing.samples a question, side by side. Each sample has a seed of its own."""
    drafts = []
    for row, question in enumerate(questions):
        for _ in range(writing.samples):
            sample = len(drafts) % (writing.samples * writing.repeats)
            seed = text_seed(writing.seed, turn.role, turn.round, question, sample)
            drafts.append(Draft(row, seed))
    return drafts


def go_on(turn, drafts, writing, limits, stop=()):
    """Let each draft grow by at most limits[i] words, or until it has one of the strings `stop`."""
    rows = [draft.row for draft in drafts]
    if any(draft.tokens for draft in drafts):      # what stands after the prompt is read with it
        context = turn.read(rows, [draft.tokens for draft in drafts])
    else:                                          # all samples start from one reading
        context = turn.read().rows(rows)
    seeds = [text_seed(draft.seed, len(draft.tokens)) for draft in drafts]
    stop = (*writing.stop, *stop)
    written = turn.agent.write(context, max(limits), writing.sampling, seeds, stop)
    for draft, tokens, limit in zip(drafts, written, limits):
        draft.newest = tokens[:limit]
        draft.tokens = draft.tokens + draft.newest
        draft.decoded += len(draft.newest)


def insert(turn, draft, text, plain=False):
    """Put a text after a draft, in place of its end token. plain: see Agent.tokenize."""
    while draft.tokens and draft.tokens[-1] in turn.agent.end_tokens:
        draft.tokens = draft.tokens[:-1]
    draft.tokens = draft.tokens + turn.agent.tokenize([text], plain)[0]


def text_of(turn, draft):
    """A draft as a text."""
    return turn.agent.tokenizer.decode(draft.tokens, skip_special_tokens=True).strip()


def write(turn, questions, writing, tools=(), search=None):
    """Write a whole turn: its drafts, writing.samples a question.

    tools: names of the tools that the writer may call. search: query -> text, or None."""
    drafts = going = new_drafts(turn, questions, writing)
    for calls_left in range(MAX_CALLS if tools else 0, -1, -1):
        limits = [writing.max_new_tokens - draft.decoded for draft in going]
        go_on(turn, going, writing, limits, TOOL_TAGS if calls_left else ())
        if calls_left:
            going = use_tools(turn, going, writing, tools, search)
        if not calls_left or not going:
            return drafts


# ---- tools --------------------------------------------------------------------------------------

def use_tools(turn, drafts, writing, tools, search):
    """Run the calls that drafts end in, side by side, and insert their results.

    Returns the drafts that go on. A draft goes on if it stopped at a tag, which may also be a stray
    one, and has words left."""
    going, calls = [], []
    for draft in drafts:
        text = turn.agent.tokenizer.decode(draft.newest)
        ends = [text.find(tag) + len(tag) for tag in TOOL_TAGS if tag in text]
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


def next_call(text):
    """(tool, body) if `text` ends in <python> .. </python> or <search> .. </search>, else None."""
    found = re.fullmatch(r".*<(python|search)>(.*)</\1>\s*", text, re.DOTALL)
    return found.groups() if found else None


def run_tool(tool, body, search=None):
    """Run one call. Returns the text to insert, <result> .. </result>, which also tells errors."""
    if tool == "python":
        run = run_python(re.sub(r"^\s*```\w*\n|\n```\s*$", "", body).strip("\n"), timeout_s=10)
        result = run.stdout.rstrip()
        if run.status != "ok":
            result += f"\n[{run.status} after {run.seconds:.1f} s]\n{run.stderr.strip()[-2000:]}"
        result = result.strip("\n") or "(nothing was printed)"
    else:                                          # next_call knows no third tool
        try:
            result = search(body.strip()) if search else "web search is not available"
        except (RuntimeError, ValueError) as problem:
            result = f"web search failed: {problem}"
    # The model must not be able to close the result, or what follows would pass for its own words.
    result = re.sub(r"<\s*/\s*result\s*>", "[/result]", result, flags=re.IGNORECASE)
    if len(result) > RESULT_CAP:
        result = result[:RESULT_CAP - 6] + "\n[cut]"
    return f"\n<result>\n{result}\n</result>\n"

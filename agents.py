"""One frozen language model as an agent: it reads a prompt, then thinks in latents or writes words.

    context = agent.read(embeds, mask)      the prompt goes in; a KV cache and h_1 come out
    H       = agent.think(context, m)       m latent thoughts:   h_(i+1) = body(R_in(h_i) | cache)
    tokens  = agent.write(context, 100)     the same, in words:  token_i = argmax logits(h_i)

Thinking and writing are the same loop. Writing chooses a word from the hidden state and feeds the
word's embedding back. Thinking feeds the hidden state itself back, through the inner link, and
chooses no word. So m thoughts cost one reading of the prompt and m - 1 single steps. The vocabulary
head never runs while an agent thinks. (Qwen3-0.6B's head is a third as large as its body.)

h is the last layer's hidden state after the final norm. Prompts of a batch are padded on the left,
so that all of them end in the same column. Every call of the library gets three things, single
steps included: the whole 2-D mask (without it, padded prompts come out wrong, and nothing says so),
position ids counted from that mask (so that padding changes nothing), and the cache.

Shapes: B questions, T tokens, m latent steps, d hidden width, V words of the vocabulary.
"""
import inspect
import math
import os
import re

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from cache import Context, Growing, new_cache
from chats import MARK, render, turn_ends, whole_text
from gpu.recorded import Recorder
from head import Head
from support.errors import need, say_once
from support.words import tell_unknown

PADDING, LATENT = -1, -2     # stand in the place of a token's id where no token is
SHARED = 12         # equal tokens at the beginning of all prompts of a batch that are worth a pass
LAYER_KINDS = {"full_attention", "sliding_attention", "linear_attention"}       # those we support


def apply_link(link, states, dtype):
    """link(states) in `dtype`, the dtype of the model that reads the result.

    Links stay float32 in memory. In half precision they run under autocast, which casts the factors
    of a product and keeps its sums in float32."""
    if dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(states.device.type, dtype):
            return link(states).to(dtype)
    return link(states.to(next(link.parameters(), states).dtype)).to(dtype)


def equal_beginnings(prompts):
    """B times the tokens with which all B prompts begin. None if they are fewer than SHARED.

    The last token of a prompt is left out, because its hidden state is needed for each row."""
    begun = [parts[0] for parts in prompts if not isinstance(parts[0], str)]      # a str is a slot
    shared = os.path.commonprefix(begun)[:min(map(len, begun), default=1) - 1]
    worth = len(shared) >= SHARED and 1 < len(begun) == len(prompts)
    return [shared] * len(begun) if worth else None


def greedy(logits, written, u):
    """The likeliest tokens (B,) of logits (B, V). Sampling in writing.py chooses in other ways."""
    return logits.argmax(-1)


class Agent:
    """A frozen causal language model with its tokenizer and its inner link.

    Not thread-safe on a GPU: all calls share one set of recorded buffers."""

    def __init__(self, model, tokenizer, inner=None, thinking=False):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.inner = tokenizer, inner
        self.thinking = thinking                         # the chat template's own switch
        self.chat = bool(tokenizer.chat_template)        # chats.as_role sets it for a role
        self.body, self.logits = model.get_decoder(), Head(model)
        self.embedding = model.get_input_embeddings()    # Gemma's also scales, so it is called
        self.width = self.embedding.weight.shape[1]
        self.device, self.dtype = self.embedding.weight.device, self.embedding.weight.dtype
        self.recorder = Recorder(self.forward)           # of single steps on a GPU
        self.name = tokenizer.name_or_path or "this model"
        config = model.config.get_text_config(decoder=True)
        self.positions = getattr(config, "max_position_embeddings", None) or math.inf
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        need(kinds <= LAYER_KINDS, f"{self.name}: a model of the family {model.config.model_type} "
             "has layers of a kind that is not supported here ("
             f"{', '.join(sorted(kinds - LAYER_KINDS))}): choose a model of another family")
        # gaps: padding may stand in the middle of a cache, because the mask hides it. But a sliding
        # window counts it, and a recurrent state runs over it.
        self.gaps = kinds == {"full_attention"} and not getattr(config, "sliding_window", None)
        takes = inspect.signature(self.body.forward).parameters
        self.cache_name = "cache" if "cache" in takes else "past_key_values"    # renamed in 5.24
        ends = model.generation_config.eos_token_id                             # one, a list, None
        self.end_tokens = {tokenizer.eos_token_id, *turn_ends(tokenizer),
                           *(ends if isinstance(ends, list) else [ends])} - {None}

    @property
    def embedding_rms(self):
        """Root mean square of the token embeddings, over some 4096 evenly spaced tokens."""
        weight = self.embedding.weight                       # with --offload it is on the CPU now
        tokens = torch.arange(0, len(weight), max(1, len(weight) // 4096), device=weight.device)
        return self.embedding(tokens).float().pow(2).mean().sqrt().item()

    # ---- prompts ----------------------------------------------------------------------------

    def tokenize(self, texts, plain=False, goes_on=False):
        """Token ids of each text, without special tokens: [[int]].

        plain: treat `<|im_end|>` in the text as ordinary characters. Used for tool output. goes_on:
        other tokens stand before these. Some tokenizers (Llama 2's) put a blank before every text,
        which would not stand there. So a sign is put before the text, and taken off its tokens."""
        # JSON may hold half a surrogate pair. Tokenizers fail on it, so it is replaced by `?`.
        proper = [text.encode("utf-8", "replace").decode() for text in texts]
        # Tokens write a blank as one of these two signs. Here none was asked for.
        blank = "".join(self.tokenizer.tokenize("a")).startswith(("\u2581", "\u0120"))
        sign = MARK[0] if goes_on and blank else ""
        ids = self.tokenizer([sign, *(sign + text for text in proper)], add_special_tokens=False,
                             split_special_tokens=plain).input_ids
        ids = [tokens[len(ids[0]):] for tokens in ids[1:]]
        unknown = self.tokenizer.unk_token_id                                     # maybe None
        tell_unknown(self.tokenizer, [text for text, one in zip(proper, ids) if unknown in one])
        return ids

    def render(self, system, user):
        """The chat around a user's text, or that text alone, up to where the model has to go on."""
        return (render(self.tokenizer, system, user, self.thinking) if self.chat
                else whole_text(self.tokenizer, user))

    def tokenize_prompts(self, system, user, values, slots=()):
        """B prompts as lists of parts: lists of token ids, and the names of slots between them.

        In `user`, {name} is replaced by values[name][b] (the question, the answer format, a text
        that another agent wrote: B texts for each name). For a name in `slots` it is a slot, where
        latents will go. All other braces stay as they are.

        The chat is rendered once with a mark for each {name}, and cut at the slots. Values go in
        afterwards and in one pass, so that nothing in a question is taken for a mark. The text
        between two slots is tokenised as one text, so that words are split as the model knows them.
        With slots ("planner",):

            "{question} <|notes|> {planner}"  ->  [[1, 4, 8, 25, .., 6], "planner", [7]]"""
        user = re.sub("{(" + "|".join(map(re.escape, [*values, *slots])) + ")}",
                      lambda found: MARK.format(found[1]), user)
        chat = self.render(system, user)
        pieces = re.split(MARK.format("(" + "|".join(map(re.escape, slots)) + ")"), chat)
        mark, count = MARK.format("(.*?)"), len(next(iter(values.values())))
        columns = []                                   # one part of all B prompts after the other
        for i, piece in enumerate(pieces):
            if i % 2:                                            # pieces: text, slot, text, slot ..
                columns.append([piece] * count)
            elif piece:
                columns.append(self.tokenize([
                    re.sub(mark, lambda found: values[found[1]][b], piece) for b in range(count)],
                    goes_on=i > 0))
        return [list(parts) for parts in zip(*columns)]

    def embed(self, prompts, heard):
        """Prompts with latents in their slots: embeds (B, T, d), mask (B, T), padded on the left.

        prompts: see tokenize_prompts. heard: {slot: B latents (m, d)}, where m may differ."""
        # 1. Token ids, with a sign for each latent; and the latents in the same order.
        tokens, latents = [[] for _ in prompts], []
        for b, parts in enumerate(prompts):
            for part in parts:
                if isinstance(part, str):
                    latents.append(heard[part][b])                                  # (m, d)
                    part = [LATENT] * len(latents[-1])
                tokens[b] = tokens[b] + part
        # 2. All of it as words.
        ids = [torch.tensor(one, dtype=torch.long) for one in tokens]
        ids = pad_sequence(ids, True, PADDING, "left").to(self.device)              # (B, T)
        need(ids.numel() == 0 or ids.max() < self.embedding.num_embeddings, f"{self.name}: its "
             "tokenizer knows more tokens than its model: they do not belong together")
        embeds = self.embedding(ids.clamp(min=0))                                   # (B, T, d)
        # 3. Latents take the positions that were kept for them. Gradients flow into them.
        if latents:
            latents = torch.cat(latents).to(embeds.dtype)                           # (N, d)
            embeds = embeds.masked_scatter((ids == LATENT)[..., None], latents)
        return embeds, (ids != PADDING).long()

    # ---- read, think, follow, write ---------------------------------------------------------

    def forward(self, embeds, cache, mask):
        """Hidden states (B, n, d) of n new positions, which the cache takes in. mask: (B, T + n).
        """
        # The number of each new position within its own text. (In recorded steps the mask is longer
        # than the text, and 0 there. So its last column still counts the whole text.)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -embeds.shape[1]:]         # (B, n)
        return self.body(inputs_embeds=embeds, attention_mask=mask, position_ids=positions,
                         use_cache=True, **{self.cache_name: cache}).last_hidden_state

    def read(self, embeds, mask, context=None):
        """The Context of embeds (B, T, d) with mask (B, T), read after `context` if one is given.
        """
        cache = new_cache(self.body.config) if context is None else context.fork()
        mask = mask if context is None else torch.cat([context.mask, mask], 1)
        if mask.shape[1] > self.positions and mask.sum(1).max() > self.positions:
            say_once(f"{self.name} was made for texts of {self.positions} tokens, and a text is "
                     "longer: what it says there may be nonsense")
        states = self.forward(embeds, cache, mask)                                  # (B, T, d)
        return Context(cache, mask, states[:, -1:])

    def read_prompts(self, prompts, heard, prefix=None):
        """The Context of prompts with latents in their slots.

        prefix: (B token lists, their Context) of a beginning that was read before. The question
        stands before the slots and is the same in every round, so only the rest is new. Without
        one, the tokens with which all prompts begin are read once, as one row (see SHARED).
        The rest alone is read if all rests have the same length. Other lengths need padding in the
        middle of the cache, which is allowed if self.gaps. In all other cases the whole prompt is
        read. (On the tiny system a training step takes 1.6 times as long without a prefix.)"""
        begun, context = prefix or (equal_beginnings(prompts), None)
        if begun and all(parts[0][:len(one)] == one for parts, one in zip(prompts, begun)):
            rest = [[parts[0][len(one):], *parts[1:]] for parts, one in zip(prompts, begun)]
            embeds, mask = self.embed(rest, heard)
            if context is not None and mask.shape[1] == 0:
                return context                                  # nothing stands after the prefix
            if mask.sum(1).min() > 0 and (self.gaps or mask.all()):
                if context is None:
                    context = self.read(*self.embed([begun[:1]], {})).pick([0] * len(prompts))
                return self.read(embeds, mask, context)
        return self.read(*self.embed(prompts, heard))

    def steps(self, context, count):
        """Single steps after a Context, `count` of them: recorded ones on a GPU without gradients,
        if the card has room for their buffers."""
        if self.device.type == "cpu" or torch.is_grad_enabled():
            return Growing(self.read, context)
        return self.recorder.steps(context, count) or Growing(self.read, context)

    def think(self, context, m):
        """m latent thoughts H = [h_1 .. h_m], (B, m, d): the paper's rollout. Differentiable.

        Raises ValueError for more thoughts than the model has positions."""
        need(m <= self.positions, f"{self.name} was made for texts of {self.positions} tokens: it "
             f"cannot think {m} latent thoughts")
        steps, thoughts = self.steps(context, m - 1), [context.hidden]              # h_1
        for _ in range(m - 1):
            x = apply_link(self.inner, thoughts[-1], self.dtype)      # x = R_in(h_i)    (B, 1, d)
            thoughts.append(steps.step(x))                            # h_(i+1) = body(x | cache)
        return torch.cat(thoughts, 1)

    def follow(self, context, tokens):
        """Hidden states along given tokens (teacher forcing): (B, 1 + n, d), n the longest list.

        State i, from 0, has read the prompt and i tokens, so it predicts tokens[i]. States after
        the end of a shorter list mean nothing. tokens: B lists of ids."""
        lists = [torch.tensor(one, dtype=torch.long, device=self.device) for one in tokens]
        ids = pad_sequence(lists, True, PADDING)                                    # (B, n)
        if ids.shape[1] == 0:
            return context.hidden
        mask = torch.cat([context.mask, (ids != PADDING).long()], 1)                # (B, T + n)
        embeds = self.embedding(ids.clamp(min=0))                                   # (B, n, d)
        states = self.forward(embeds, context.fork(), mask)                         # (B, n, d)
        return torch.cat([context.hidden, states], 1)

    def answer_logits(self, context, targets):
        """The scores (N, V) of the words at each token of B target token lists after a Context.

        The vocabulary head runs at the positions that predict a target, and nowhere else."""
        states = self.follow(context, [one[:-1] for one in targets])                # (B, n, d)
        used = torch.cat([states[b, :len(one)] for b, one in enumerate(targets)])   # (N, d)
        return self.logits(used).float()

    def answer_loss(self, context, targets):
        """Cross-entropy of each token of B target token lists after a Context: B tensors (n_b,), in
        nats."""
        labels = torch.tensor([token for one in targets for token in one], dtype=torch.long,
                              device=self.device)                                   # (N,)
        logits = self.answer_logits(context, targets)                               # (N, V)
        losses = F.cross_entropy(logits, labels, reduction="none")                  # (N,)
        return losses.split([len(one) for one in targets])

    @torch.no_grad()
    def write(self, context, max_new_tokens, choose=greedy, seeds=None, stop=()):
        """Decode up to max_new_tokens words for each question: B lists of token ids, end tokens
        included.

        choose(logits (B, V), B lists of the tokens written so far, u (B,)) -> B tokens. u is drawn
        from U(0, 1). Question b draws from a generator of its own, seeded seeds[b], so that its
        text does not depend on the rest of the batch. A text also ends after the first of the
        strings `stop`. Without a chat no token ends a turn, so a text ends with its line.

        This loop is our own, because the library's generate cannot start from a full cache, refuses
        embeddings for some families, and would read the prompt once for each sample."""
        stop = stop if self.chat else (*stop, "\n")
        going = list(range(len(context.mask)))               # the questions still in the batch
        draws = torch.stack([
            torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed))
            for seed in seeds or [0] * len(going)]).to(self.device)                 # (B, steps)
        written, ends = [[] for _ in going], {}              # ends[b]: how long text b is
        enough = max(map(len, stop), default=0) + 1          # tokens that hold any of `stop`
        hidden, steps, room = context.hidden, None, 0
        for step in range(max_new_tokens):
            # 1. The next word of each text.
            logits = self.logits(hidden[:, -1]).float()                               # (b, V)
            tokens = choose(logits, [written[b] for b in going], draws[going, step])     # (b,)
            # 2. Which texts have ended?
            for b, token in zip(going, tokens.tolist()):
                written[b].append(token)
                tail = self.tokenizer.decode(written[b][-enough:]) if stop else ""
                if token in self.end_tokens or any(text in tail for text in stop):
                    ends.setdefault(b, step + 1)
            open_ones = [i for i, b in enumerate(going) if b not in ends]
            if not open_ones or step == max_new_tokens - 1:
                break
            # 3. Ended texts leave when half of the batch has ended: a step reads their cache too.
            few = len(open_ones) <= len(going) // 2
            if few or room == 0:
                context = steps.context() if steps else context
                if few:
                    going, tokens = [going[i] for i in open_ones], tokens[open_ones]
                    context = context.pick(open_ones)
                room = min(max_new_tokens - step, max(256, step))     # buffers grow with the text
                steps = self.steps(context, room)
                room = max(room, steps.room)
            # 4. The word goes in, the next hidden state comes out.
            hidden, room = steps.step(self.embedding(tokens)[:, None]), room - 1    # (b, 1, d)
        return [tokens[:ends.get(b)] for b, tokens in enumerate(written)]

"""What an inner link is trained along: texts, and the frozen agent's hidden states along them.

    tokens = tokens_of(agent, texts, args)                 of the rows' texts or of the agent's own
    pairs  = hidden_states(agent, texts, tokens, args)     [(states (n, d), tokens (n,))]

A state h_t and the token that it predicts are one example for the link: R_in(h_t) should look like
the embedding of that token (see train_inner.py).

The base model never changes, so its hidden states never change either. They are computed once and
kept for all epochs, in a file that is mapped into memory and may be larger than memory.
"""
import json
import shutil
from pathlib import Path

import torch

from support.batches import by_length, progress
from support.errors import need
from support.files import read_lines, write_lines
from support.ranks import rank
from training.rows import read_role_texts
from writing import Sampling, text_seed


def tokens_of(agent, texts, args):
    """The tokens to train along, a list for each of these RoleTexts: of its gold text, or of what
    the frozen agent itself writes for its prompt.

    Own texts are written in batches into a file of --save_dir. A run that is started again goes on
    with it."""
    if args.text == "gold":
        return [tokens[:args.max_length] for tokens in agent.tokenize([one.text for one in texts])]
    print("texts: the agent's own, along which latents stay readable (--text gold: the rows')")
    file = Path(args.save_dir) / f"own_texts.rank{rank()}.jsonl"
    lines = read_lines(file)
    write_lines(file, lines)      # not through a link, and without a line that a crash has cut off
    keys = [text_seed(agent.name, one.role, one.question, one.kind, one.heard, one.row,
                      args.own_length, args.own_temperature, args.seed, agent.thinking, agent.dtype)
            for one in texts]
    written = {line["key"]: line["tokens"] for line in lines}
    # Equal prompts have equal keys, and are asked once.
    todo = list({key: i for i, key in enumerate(keys) if key not in written}.values())
    batches = by_length([len(texts[i].question) for i in todo], args.batch_size)
    for batch in progress(batches, "own texts"):
        numbers = [todo[i] for i in batch]
        context = read_role_texts(agent, [texts[i] for i in numbers])
        tokens = agent.write(context, args.own_length, Sampling(args.own_temperature).choose,
                             seeds=[keys[i] for i in numbers])
        with open(file, "a") as out:
            for i, text in zip(numbers, tokens):
                written[keys[i]] = text
                out.write(json.dumps({"key": keys[i], "tokens": text}) + "\n")
    return [[token for token in written[key] if token not in agent.end_tokens] for key in keys]


@torch.no_grad()
def hidden_states(agent, texts, tokens, args):
    """Hidden states along all texts, computed once: [(states (n, d), tokens (n,))].

    State i, from 0, has read the prompt and i tokens, so it predicts tokens[i]. They lie in a file
    of --save_dir that is mapped into memory. The file is unlinked before this returns, so the
    system frees it when the process ends, even by a crash."""
    lengths, file = list(map(len, tokens)), Path(args.save_dir) / f"hidden_states.rank{rank()}.bin"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)         # a link would lead the states into another file
    size = sum(lengths) * agent.width * agent.embedding.weight.element_size()
    need(shutil.disk_usage(file.parent).free > 1.1 * size, f"there is no room for {file} "
         f"({size / 1e9:.1f} GB): lower --num_samples, or use another --save_dir")
    states = torch.from_file(str(file), shared=True, size=sum(lengths) * agent.width,
                             dtype=agent.dtype).view(-1, agent.width)              # (all n, d)
    print(f"{len(texts)} texts, {len(states)} tokens: {size / 1e9:.2f} GB of hidden states in "
          f"{file}", flush=True)
    of_text = states.split(lengths)                                                # [(n, d)]
    for batch in progress(by_length(lengths, args.batch_size), "hidden states"):
        context = read_role_texts(agent, [texts[i] for i in batch])
        along = agent.follow(context, [tokens[i][:-1] for i in batch])             # (B, n, d)
        for i, h in zip(batch, along):
            of_text[i].copy_(h[:lengths[i]])
    file.unlink()
    return list(zip(of_text, (torch.tensor(text, device=agent.device) for text in tokens)))

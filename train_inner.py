"""Train one agent's inner link: the agent's next input from its own last thought.

    python train_inner.py                                        # tiny's planner, 20 seconds
    python train_inner.py --style tiny --mas_role critic --save_dir out/critic

The base model is frozen. Along a text, its hidden state h_t predicts the next token. Sent through
the link, h_t should look like that token's embedding (the paper's inner loop):

    loss = cos_weight (1 - cos(R_in(h_t), Emb(token_(t+1)))) + mse_weight MSE(R_in(h_t), Emb(..))

If it does, then the model that reads R_in(h_t) goes on as if it had read the word. That is the
point of the inner link: the model thinks on without choosing a word.

Which text? `--text gold`, as published, takes the role's text in the training rows. `--text own`
takes what the frozen agent itself writes for the same prompt. On a real model this decides: along
words that the model would not say, h_t does not predict the next word, and the link learns an
average. docs/real.md has the figures. Own texts are written once and kept in --save_dir.

The base model never changes, so its hidden states never change either. They are computed once and
kept for all epochs, in a file that is mapped into memory and may be larger than memory.
"""
import dataclasses
import json
import shutil
import time
from pathlib import Path

import torch

from link import KINDS as LINK_KINDS
from link import InnerLink, kind_name, word_losses
from recurse import chunks
from styles import KINDS, PUBLISHED_DESIGNS, get_style
from support import flags
from support import rows as data
from support.checkpoints import load_agent, load_inner, local_folder, save_inner
from support.compiled import set_compile
from support.devices import pick_device, settle
from support.errors import need
from support.files import claim, fingerprint, write_json
from support.flags import RANK
from support.sampling import Sampling
from support.training import Training
from writing import text_seed


def parse():
    """(flags, style, role). The flags have the published names where there are any."""
    parser = flags.Parser(__doc__)
    flags.add_system_flags(parser)
    flags.add_training_flags(parser, "--adapter_lr", "--adapter_dtype", KINDS)
    add = parser.add_argument
    add("--mas_role", default="planner", help="the role whose link is trained")
    add("--mas_design", default="", choices=["", *PUBLISHED_DESIGNS],
        help="the published name of a style, in place of --style")
    add("--model_name_or_path", default="", help="base model, in place of the role's")
    add("--save_dir", default="out/train_inner")
    add("--load_dir", default="", help="start from the inner link in this folder")
    add("--text", default="own", choices=["own", "gold"],
        help="the agent's own words for the rows' prompts; or the role's gold text, as published")
    add("--text_field", default="", help="column with the gold text, in place of the role's")
    add("--own_length", type=flags.at_least(1), default=64, help="tokens of an own text")
    add("--own_temperature", type=flags.at_least(0, float), default=0.0, help="0 is greedy")
    add("--held_out", type=flags.at_least(1), default=40,
        help="texts on which readability is measured, and which are not trained on")
    add("--max_length", type=flags.at_least(1), default=2048, help="tokens of a gold text")
    add("--adapter_type", default="ln_res_adapter",
        help=f"kind of link: {', '.join(LINK_KINDS)} or a published name")
    add("--adapter_cos_weight", type=flags.at_least(0, float), default=1.0)
    add("--adapter_mse_weight", type=flags.at_least(0, float), default=0.0)
    known = flags.early(parser)
    design = PUBLISHED_DESIGNS.get(known.mas_design, "")
    style = get_style(design if design and known.style == "tiny" else known.style)
    need(style.name.startswith(design.split("_")[0]), f"--mas_design {known.mas_design} is not the "
         f"design of --style {known.style}: leave one of them out")
    role = style.role(known.mas_role)
    parser.set_defaults(style=style.name if design else known.style, model_name_or_path=role.model)
    args = flags.parse(parser, style.settings.get("train_inner", {}))
    if args.text_field:
        role = dataclasses.replace(role, target=(args.text_field,))
    return args, style, role


def own_tokens(agent, style, role, texts, args):
    """What the frozen agent itself writes for the prompts of these RoleTexts: a token list each.

    Written in batches into a file of --save_dir. A run that is started again goes on with it."""
    file = Path(args.save_dir) / f"own_texts.rank{RANK}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    keys = [text_seed(agent.name, role, one.question, one.kind, one.heard, one.row,
                      args.own_length, args.own_temperature, args.seed, agent.thinking, agent.dtype)
            for one in texts]
    lines = file.read_text().split("\n") if file.is_file() else []
    whole = [json.loads(line) for line in lines if line.endswith("}")]     # one may be torn
    written = {line["key"]: line["tokens"] for line in whole}
    todo = {key: i for i, key in enumerate(keys) if key not in written}    # equal prompts once
    todo = sorted(todo.values(), key=lambda i: len(texts[i].question))     # so little is padding
    for chunk in flags.progress(chunks(todo, args.batch_size), "own texts"):
        context = data.read_role_texts(agent, style, role, [texts[i] for i in chunk])
        tokens = agent.write(context, args.own_length, Sampling(args.own_temperature),
                             [keys[i] for i in chunk])
        with open(file, "a") as out:
            for i, row in zip(chunk, tokens):
                written[keys[i]] = row
                out.write("\n" + json.dumps({"key": keys[i], "tokens": row}))
    return [[token for token in written[key] if token not in agent.end_tokens] for key in keys]


@torch.no_grad()
def states_along(agent, style, role, texts, tokens):
    """Hidden states along given tokens after the prompts of RoleTexts: [(n, d)].

    State i, from 0, has read the prompt and i tokens, so it predicts tokens[i]."""
    context = data.read_role_texts(agent, style, role, texts)
    states = agent.follow(context, [row[:-1] for row in tokens])                   # (B, n, d)
    return [h[:len(row)] for h, row in zip(states, tokens)]


def hidden_states(agent, style, role, texts, tokens, args):
    """Hidden states along all texts, computed once: [(states (n, d), tokens (n,))].

    They lie in a file of --save_dir that is mapped into memory. The file has no name any more when
    this returns, so it goes away with the process, however that ends."""
    lengths, file = list(map(len, tokens)), Path(args.save_dir) / f"hidden_states.rank{RANK}.bin"
    file.parent.mkdir(parents=True, exist_ok=True)
    size = sum(lengths) * agent.width * agent.embedding.weight.element_size()
    need(shutil.disk_usage(file.parent).free > 1.1 * size, f"there is no room for {file} "
         f"({size / 1e9:.1f} GB): lower --num_samples, or use another --save_dir")
    states = torch.from_file(str(file), shared=True, size=sum(lengths) * agent.width,
                             dtype=agent.dtype).view(-1, agent.width)              # (all n, d)
    print(f"{len(texts)} texts, {len(states)} tokens: {size / 1e9:.2f} GB of hidden states in "
          f"{file}", flush=True)
    places = states.split(lengths)
    by_length = sorted(range(len(texts)), key=lengths.__getitem__)         # so little is padding
    for chunk in flags.progress(chunks(by_length, args.batch_size), "hidden states"):
        found = states_along(agent, style, role, [texts[i] for i in chunk],
                             [tokens[i] for i in chunk])
        for i, h in zip(chunk, found):
            places[i].copy_(h)
    file.unlink()
    return list(zip(places, (torch.tensor(row, device=agent.device) for row in tokens)))


@torch.no_grad()
def readability(agent, style, role, texts, args):
    """Do the latents, read through the vocabulary head, say what the text would say?

    Returns, for each latent step, the share of prompts whose thought reads as the token that greedy
    decoding writes at that place; and the first prompt's thoughts in words. The first thought comes
    before any link, so it always agrees."""
    agreed, counted, words = torch.zeros(args.latent_length), torch.zeros(args.latent_length), ""
    for batch in flags.progress(chunks(texts, args.batch_size), "readability"):
        context = data.read_role_texts(agent, style, role, batch)
        thoughts = agent.think(context, args.latent_length)                 # (b, m, d)
        read_out = agent.head(thoughts).argmax(-1).cpu()                    # (b, m)
        words = words or agent.tokenizer.decode(read_out[0])
        for row, ids in zip(read_out, agent.write(context, args.latent_length)):
            agreed[:len(ids)] += row[:len(ids)] == torch.tensor(ids)
            counted[:len(ids)] += 1
    return (agreed / counted.clamp(min=1)).tolist(), words


def frozen_agent(args, style, role):
    """The role's base model as an Agent, without an inner link."""
    device, dtype = pick_device(settle(style, args.device, args.threads), args.dtype)
    base = local_folder(args.model_name_or_path, args.revision, f"role {role.name}")
    agent = load_agent(base, device, dtype, bool(args.trust_remote_code),
                       bool(args.enable_thinking))
    set_compile([agent], args.compile)
    return agent


def new_link(agent, args):
    """The link to train: a new one, or the one in --load_dir."""
    if args.load_dir:
        folder = local_folder(args.load_dir, who="--load_dir")
        return load_inner(folder, agent.width, args.mas_task,
                          kind_name(args.adapter_type)).to(agent.device)
    torch.manual_seed(args.seed)
    gain = agent.embedding_rms if args.scale_match else 1.0               # see link.py
    return InnerLink(agent.width, args.adapter_type, gain).to(agent.device)


def tell(count, before, after, folder):
    """Print and save what readability() returned before and after training."""
    (shares_before, words_before), (shares_after, words_after) = before, after
    write_json(Path(folder) / "readability.json", {"before": shares_before, "after": shares_after})
    print(f"share of {count} prompts whose latents read as the greedy text, by step:")
    for name, shares in (("before", shares_before), ("after", shares_after)):
        print(f"  {name:7s}" + " ".join(f"{share:.2f}" for share in shares))
    print(f"the first one's latents in words:\n  before {words_before!r}\n  after  {words_after!r}")
    print(f"the link is in {folder}")


def learn_from(agent, pairs, args, training):
    """Add the gradient of one micro-batch of (states, tokens)."""
    states = torch.cat([h for h, _ in pairs]).to(agent.device)              # (n, d)
    targets = torch.cat([ids for _, ids in pairs])                          # (n,)
    got = agent.inner(states.float())                                       # R_in(h_t)   (n, d)
    cosine, mse = word_losses(got, targets, agent.embedding)
    # loss = w_cos (1 - cos(R_in(h_t), Emb(token))) + w_mse MSE(R_in(h_t), Emb(token)), where the
    # state h_t predicts the token. As published, w_cos = 1 and w_mse = 0.
    loss = args.adapter_cos_weight * cosine + args.adapter_mse_weight * mse
    training.backward(loss, len(states), cosine=cosine, mse=mse)


def main():
    """Texts, agent, hidden states, the loop, and what the trained link is worth."""
    (args, style, role), started = parse(), time.time()
    # 1. The prompts. Some are held out for readability, if there are enough.
    rows = data.load_rows(args.dataset_name, args.dataset_split, args.dataset_json_field,
                          args.num_samples, args.seed)
    rows = data.keep_usable(rows, [role] if args.text == "gold" else [])
    texts = held_out = data.role_texts_of(style, role, rows, args.mas_task)
    if len(texts) >= 2 * args.held_out:
        held_out, texts = texts[:args.held_out], texts[args.held_out:]
    else:
        print("too few texts to hold any out: readability is measured on the training texts")
    if RANK == 0:
        claim(args.save_dir)

    # 2. The frozen agent, its link, and its hidden states along the texts.
    agent = frozen_agent(args, style, role)
    agent.inner = new_link(agent, args)
    if args.text == "own":
        print("texts: the agent's own, along which latents stay readable (--text gold: the rows')")
        tokens = own_tokens(agent, style, role, texts, args)
    else:
        tokens = [row[:args.max_length] for row in agent.tokenize([one.text for one in texts])]
    pairs = [pair for pair in zip(texts, tokens) if pair[1]]             # (text, its tokens)
    need(pairs, "--text own: the agent writes nothing for these prompts, try --text gold")
    before = readability(agent, style, role, held_out, args)
    pairs = hidden_states(agent, style, role, *zip(*pairs), args)

    # 3. The loop.
    training = Training(agent.inner, args, args.adapter_lr, args.save_dir, len(pairs),
                        contents=fingerprint([], role, texts, tokens))
    for step in training.steps("inner link"):
        for batch in training.batches(pairs, step):
            with training.halved_if_full():
                learn_from(agent, batch, args, training)
        training.step()

    # 4. The link, and what it is worth.
    if RANK == 0:
        save_inner(agent.inner, args.save_dir, args.mas_task if style.links_by_task else None,
                   args.save_format)
        training.save()
        print(f"\n{style.name} {role.name}: 1-cos {training.logged['cosine']:.4f}, mse "
              f"{training.logged['mse']:.5f}, {training.summary()}, {time.time() - started:.0f} s")
        tell(len(held_out), before, readability(agent, style, role, held_out, args), args.save_dir)


if __name__ == "__main__":
    flags.run(main)

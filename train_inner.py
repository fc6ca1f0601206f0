"""Train one agent's inner link: the agent's next input from its own last thought.

    python train_inner.py                                        # tiny's planner, 20 seconds
    python train_inner.py --style tiny --mas_role critic --save_dir out/critic
    python train_inner.py --style tiny --mas_role all --save_dir out/inner    # out/inner/critic, ..

The base model is frozen. Along a text, its hidden state h_t predicts the next token. Sent through
the link, h_t should look like that token's embedding (the paper's inner loop):

    loss = cos_weight (1 - cos(R_in(h_t), Emb(token_(t+1)))) + mse_weight MSE(R_in(h_t), Emb(..))

If it does, then the model that reads R_in(h_t) goes on as if it had read the word. That is the
point of the inner link: the model thinks on without choosing a word.

--adapter_contrast_weight adds a third term, which is ours: R_in(h_t) should be nearer to its own
word than to the other words of the micro-batch (`contrast` in link.py). The embeddings of a real
model lie close together, so the cosine alone mostly teaches where all words lie, and not which word
this is. docs/real.md has the figures: the contrast helps a single thought, and harms a chain of
thoughts.

Which text? `--text gold`, as published, takes the role's text in the training rows. `--text own`
takes what the frozen agent itself writes for the same prompt. On a real model this decides: along
words that the model would not say, h_t does not predict the next word, and the link learns an
average. docs/real.md has the figures. Own texts are written once and kept in --save_dir, and so
are the hidden states along the texts: see training/along.py.
"""
import argparse
import dataclasses
import gc
import math
import time
from pathlib import Path

import torch

from chats import as_role
from checkpoints import load_agent, load_inner, local_folder, save_inner
from evaluation.in_words import readability, tell
from gpu.compiled import set_compile
from link import InnerLink, contrast, word_losses
from proof import need_proved
from styles import KINDS, PUBLISHED_DESIGNS, get_style
from support import flags
from support.devices import pick_device, settle
from support.errors import need
from support.files import claim, fingerprint
from support.ranks import rank
from training import rows as data
from training.along import hidden_states, tokens_of
from training.loop import (State, mean_over_tokens, micro_batches, new_schedule, number_of_steps)


def parse():
    """([(flags, role)], style): the links to train, one after the other.

    The flags have the published names where there are any. --mas_role all stands for all roles
    that somebody hears: the links of the others are never used."""
    parser = flags.Parser(__doc__)
    flags.add_system_flags(parser)
    flags.add_training_flags(parser, "--adapter_lr", "--adapter_dtype", KINDS)
    add = parser.add_argument
    add("--mas_role", default="planner", help="the role whose link is trained, or all")
    add("--mas_design", default="", choices=["", *PUBLISHED_DESIGNS],
        help="the published name of a style, instead of --style")
    add("--model_name_or_path", default="", help="base model, instead of the role's")
    add("--save_dir", default="out/train_inner")
    add("--load_dir", default="", help="start from the inner link in this folder")
    add("--text", default="own", choices=["own", "gold"], help="see the head of this file")
    add("--text_field", default="", help="column with the gold text, instead of the role's")
    add("--own_length", type=flags.at_least(1), default=64, help="tokens of an own text")
    add("--own_temperature", type=flags.at_least(0, float), default=0.0, help="0 is greedy")
    add("--held_out", type=flags.at_least(1), default=40, help="texts for readability alone")
    add("--max_length", type=flags.at_least(1), default=2048, help="tokens of a gold text")
    add("--adapter_type", default="ln_res_adapter", help="kind of link, ours or as published")
    add("--adapter_cos_weight", type=flags.at_least(0, float), default=1.0)
    add("--adapter_mse_weight", type=flags.at_least(0, float), default=0.0)
    add("--adapter_contrast_weight", type=flags.at_least(0, float), default=0.0,
        help="see the head of this file")
    known = flags.first_look(parser)
    design = PUBLISHED_DESIGNS.get(known.mas_design, "")
    style = get_style(design if design and known.style == "tiny" else known.style)
    need(style.name.startswith(design.split("_")[0]), f"--mas_design {known.mas_design} is not the "
         f"design of --style {known.style}: leave one of them out")
    every, speakers = known.mas_role == "all", {edge.src for edge in style.edges}
    roles = ([role for role in style.roles if role.name in speakers] if every
             else [style.role(known.mas_role)])
    parser.set_defaults(style=style.name if design else known.style)
    args = flags.parse(parser, style.settings.get("train_inner", {}))
    need(roles, f"--mas_role all: nobody hears anybody in style {style.name}")
    runs = []
    for role in roles:
        own = {"model_name_or_path": args.model_name_or_path or role.model, "mas_role": role.name}
        if every:                # a run that was stopped has not begun with the last roles
            folder = Path(args.save_dir) / role.name
            begun = not runs or (folder / "state.pt").is_file()
            own |= {"save_dir": str(folder), "resume": args.resume and begun}
        if args.text_field:
            role = dataclasses.replace(role, target=(args.text_field,))
        runs.append((argparse.Namespace(**{**vars(args), **own}), role))
    return runs, style


# ---- one run ------------------------------------------------------------------------------------

def texts_of(args, style, role):
    """(RoleTexts to train on, RoleTexts held out for readability, if there are enough)."""
    rows = data.keep_usable(data.load_rows(args), [role] if args.text == "gold" else [])
    texts = data.role_texts_of(style, role, rows, args.mas_task)
    if len(texts) >= 2 * args.held_out:
        return texts[args.held_out:], texts[:args.held_out]
    print("too few texts to hold any out: readability is measured on the training texts")
    return texts, texts


def frozen_agent(args, style, role):
    """The role's base model as an Agent, without an inner link."""
    device, dtype = pick_device(settle(style, args.device, args.threads), args.dtype)
    base = local_folder(args.model_name_or_path, args.revision, f"role {role.name}")
    agent = as_role(load_agent(base, device, dtype, thinking=bool(args.enable_thinking),
                               trust_remote_code=bool(args.trust_remote_code)), role)
    need_proved(agent)
    set_compile([agent], args.compile)
    return agent


def new_link(agent, args):
    """The link to train: a new one, or the one in --load_dir."""
    if args.load_dir:
        folder = local_folder(args.load_dir, who="--load_dir")
        return load_inner(folder, agent.width, args.mas_task, args.adapter_type).to(agent.device)
    torch.manual_seed(args.seed)
    gain = agent.embedding_rms if args.scale_match else 1.0               # see link.py
    return InnerLink(agent.width, args.adapter_type, gain).to(agent.device)


def inner_loss(agent, pairs, args):
    """(loss, its parts) of a micro-batch of (states (n, d), tokens (n,)).

        loss = w_cos (1 - cos(R_in(h_t), Emb(token))) + w_mse MSE(R_in(h_t), Emb(token))
               + w_contrast contrast

    where the state h_t predicts the token. As published, w_cos = 1 and the others are 0."""
    states = torch.cat([h for h, _ in pairs]).to(agent.device)              # (n, d)
    targets = torch.cat([ids for _, ids in pairs])                          # (n,)
    got = agent.inner(states.float())                                       # R_in(h_t)   (n, d)
    cosine, mse = word_losses(got, targets, agent.embedding)
    loss = args.adapter_cos_weight * cosine + args.adapter_mse_weight * mse
    parts = {"cosine": cosine, "mse": mse}
    if args.adapter_contrast_weight:         # else its n x words cosines would be computed in vain
        parts["contrast"] = contrast(got, targets, agent.embedding)
        loss = loss + args.adapter_contrast_weight * parts["contrast"]
    return loss, parts


def main():
    """Train each link. The rows of all roles are looked at first: a fault in them is told now, and
    not when the links of other roles are done."""
    runs, style = parse()
    texts = [texts_of(args, style, role) for args, role in runs]
    for (args, role), (to_train_on, held_out) in zip(runs, texts):
        train(args, style, role, to_train_on, held_out)
        gc.collect()                      # an agent points at itself: free its model's memory now
    if len(runs) > 1:
        print(f"all links: python train_outer.py --style {args.style} " + " ".join(
            f"--{role.name}_inner_aligner_path {args.save_dir}" for args, role in runs))


def train(args, style, role, texts, held_out):
    """One link: agent, hidden states, the loop, and what the trained link is worth."""
    started = time.time()
    # 1. The frozen agent with its link, and its hidden states along the texts.
    claim(args.save_dir)
    agent = frozen_agent(args, style, role)
    link = agent.inner = new_link(agent, args)
    tokens = tokens_of(agent, texts, args)
    written = [pair for pair in zip(texts, tokens) if pair[1]]           # (text, its tokens)
    need(written, "--text own: the agent writes nothing for these prompts, try --text gold")
    before = readability(agent, held_out, args.latent_length, args.batch_size)
    pairs = hidden_states(agent, *zip(*written), args)                   # (states, tokens)

    # 2. The optimizer, and the state of the run: a new one, or with --resume the saved one.
    optimizer = torch.optim.AdamW(link.parameters(), lr=args.adapter_lr, betas=(0.9, 0.95),
                                  weight_decay=args.weight_decay, fused=True)
    steps = number_of_steps(args, len(pairs))
    schedule = new_schedule(optimizer, args, steps)
    state = State(args, steps, contents=fingerprint([], role, texts, tokens), links=link,
                  optimizer=optimizer, schedule=schedule)

    # 3. The loop.
    for step in state.steps("inner link"):
        for batch in micro_batches(pairs, step, args):
            loss, parts = inner_loss(agent, batch, args)
            # A mean over tokens, times its tokens, is a sum. Sums of micro-batches can be added up.
            weight = sum(len(ids) for _, ids in batch) / 1000
            (loss * weight).backward()
            state.add(weight, loss=loss, **parts)
        mean_over_tokens(link, state)                        # of all micro-batches and all ranks
        norm = torch.nn.utils.clip_grad_norm_(link.parameters(), args.max_grad_norm or math.inf)
        finite = math.isfinite(norm) and math.isfinite(state.means["loss"])
        if finite:                                           # else the step is skipped
            optimizer.step()
            schedule.step()
        optimizer.zero_grad()
        state.end_step(norm.item(), finite)                  # the log, state.pt, Ctrl-C

    # 4. The link, and what it is worth.
    link.requires_grad_(False)
    if rank() == 0:
        save_inner(link, args.save_dir, args.mas_task if style.links_by_task else None,
                   args.save_format)
        state.save()
        print(f"\n{style.name} {role.name}: 1-cos {state.logged['cosine']:.4f}, mse "
              f"{state.logged['mse']:.5f}, {state.done} steps, {state.skipped} skipped, "
              f"{time.time() - started:.0f} s")
        after = readability(agent, held_out, args.latent_length, args.batch_size)
        tell(len(held_out), before, after, folder=args.save_dir)


if __name__ == "__main__":
    flags.run(main)

"""Train the outer links: what agents send each other, through the whole unrolled recursion.

    python train_outer.py                               # the tiny system, under 2 minutes on a CPU
    python train_outer.py --seeds 0 1 2 3 4             # five runs and the table over them

Agents and inner links are frozen. All R rounds are unrolled, and the last agent's cross-entropy
on the gold answer in the last round (the paper's outer loop) flows back through frozen
models and inner links into the outer links. Three things that are not in the paper steady it, and
real styles leave them off (tiny's table in the README shows what each is worth):

    --warm_start_steps   R_out first learns to turn h_t into the other agent's embedding of the
                         next token: loss 1 - cos(R_out(R_in(h_t)), Emb_dst(token_(t+1)))
    --role_loss_weight   every later role's own gold text, given the latents it hears, in each round
    --random_rounds      R is drawn from 1..num_recursive_rounds each step

The thoughts that are sent come from true rollouts, as at inference; `--latents teacher` takes the
hidden states at the gold text instead, as published.
"""
import argparse
import copy
import dataclasses
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import common
import evaluate
from agents import apply_link
from link import KINDS, kind_name, save_outer
from recurse import load_agents, recurse
from styles import get_style
from tasks import generated_task

KNOWN_GB = 4           # of main memory for thoughts of round 1 that are kept over the epochs


def flags():
    """(the published flags and ours, the style)."""
    parser = common.Parser(__doc__.split("\n")[0])
    common.add_system_flags(parser)
    common.add_training_flags(parser, "--outer_lr", "--outer_dtype")
    add = parser.add_argument
    add("--save_dir", default="out/train_outer")
    add("--shuffle", action="store_true", help="changes nothing: rows are always shuffled")
    style = get_style(common.early_flags().style or "tiny")
    for i, role in enumerate(style.roles, start=1):
        for name in (f"agent{i}", role.name):      # the published flags, by number or by role
            add(f"--{name}_model_name_or_path", dest=f"{role.name}_model", default="")
            add(f"--{name}_inner_aligner_path", dest=f"{role.name}_inner", default="")
    for edge in style.edges:
        add(f"--{edge.key}_type", default="", help="kind of this one outer link")
    add("--inner_adapter_type_fallback", default="ln_res_adapter",
        help="kind of an inner link that has no adapter_config.json")
    add("--num_recursive_rounds", type=common.at_least(1), default=3, help="R")
    add("--max_length", type=common.at_least(1), default=4096, help="tokens of a gold text")
    add("--latents", default="rollout", choices=["rollout", "teacher", "teacher_aligned"],
        help="thoughts sent in training: true rollouts; states at the gold tokens, as published; "
             "or the latent_length states that predict them")
    add("--max_latent_tokens", type=common.at_least(1), default=80, help="cap of --latents teacher")
    add("--supervise_final_only", type=int, default=1, choices=[0, 1])
    add("--non_last_loss_weight", type=common.at_least(0, float), default=0.1,
        help="of the earlier rounds' answers, with --supervise_final_only 0")
    add("--role_loss_weight", type=common.at_least(0, float), default=0.0)
    add("--warm_start_steps", type=common.at_least(0), default=0)
    add("--random_rounds", type=int, default=0, choices=[0, 1])
    add("--gradient_checkpointing", type=int, default=1, choices=[0, 1],
        help="recompute each turn in the backward pass instead of keeping it")
    add("--outer_adapter_type", default="outer_ln_res_adapter",
        help=f"kind of link: {', '.join(KINDS)} or a published name")
    add("--seeds", type=int, nargs="+", default=None, help="repeat the run, one per seed")
    add("--eval_samples", type=common.at_least(0), default=500,
        help="problems of the comparison before and after, where the data set has test problems")
    args = common.parse_flags(parser, style.settings.get("train_outer", {}))
    kind_name(args.inner_adapter_type_fallback)               # said now if there is no such kind
    args.seeds = list(dict.fromkeys(args.seeds)) if args.seeds else None
    return args, common.with_prompts(style, args.prompts)


# ---- the losses ---------------------------------------------------------------------------------

def outer_loss(mas, rows, rounds, args, known=None):
    """(loss, final answer's cross-entropy, its number of tokens) of a batch of rows, unrolled over
    `rounds` rounds.

        loss = (CE_final + role_loss_weight sum_k CE_k) / (1 + role_loss_weight K)

    over the K turns that hear latents before the last one (all of them means per target token),
    and with --supervise_final_only 0: + non_last_loss_weight x mean of the earlier rounds'
    answers. known: see first_thoughts; None keeps nothing."""
    role_losses, early_answers, last_role = [], [], mas.style.roles[-1].name
    first = first_roles(mas.style) if known is not None else ()

    def targets(agent, role, round):
        return gold_tokens(agent, mas.style.role(role), rows, round, args.max_length)

    def cross_entropy(agent, past, targets):
        total, count = agent.answer_loss(past, targets)
        return total / max(count, 1)

    def turn(agent, role, round, read):
        """Thinking, as recurse asks for it, with this turn's losses taken on the way."""
        wanted = args.role_loss_weight > 0 or (role == last_role and not args.supervise_final_only)

        def think():
            past = read()
            hears_links = past.last.requires_grad          # else no link is involved in it
            loss = (cross_entropy(agent, past, targets(agent, role, round))
                    if wanted and hears_links else None)
            return thoughts(agent, past, mas.style.role(role), rows, round, args), loss

        if round == 1 and role in first:
            return first_thoughts(known, role, rows, agent.device, lambda: think()[0])
        H, loss = run_turn(think, args)
        if loss is not None:
            loss = loss.to(mas.agents[last_role].device)       # agents may sit on several cards
            role_losses.append(loss)
            if role == last_role:
                early_answers.append(loss)
        return H

    run = recurse(mas, [common.question_of(row) for row in rows], rounds, args.latent_length,
                  kind=[common.row_kind(row, args.mas_task) for row in rows], turn=turn)
    agent, role, round, read = run.last_turn
    answers = targets(agent, role, round)
    final = run_turn(lambda: cross_entropy(agent, read(), answers), args)
    weight = args.role_loss_weight
    loss = (final + weight * sum(role_losses)) / (1 + weight * len(role_losses))
    if early_answers and not args.supervise_final_only:
        loss = loss + args.non_last_loss_weight * sum(early_answers) / len(early_answers)
    return loss, final, sum(map(len, answers))


def first_roles(style):
    """The roles that hear nobody in round 1: those who speak to them speak later."""
    names = [role.name for role in style.roles]
    return {name for i, name in enumerate(names)
            if not any(edge.dst == name and edge.src in names[:i] for edge in style.edges)}


def first_thoughts(known, role, rows, device, think):
    """B thoughts (m, d) of a role that hears nobody in round 1. No outer link is in them, so they
    are the same in every epoch: known, {(role, id of a row): its thoughts}, keeps them in main
    memory, up to KNOWN_GB. One row that is not known, and the whole batch is thought again."""
    places = [(role, id(row)) for row in rows]
    if all(place in known for place in places):
        return [known[place].to(device) for place in places]
    H = list(think())
    if sum(h.nbytes for h in known.values()) < 1e9 * KNOWN_GB:
        # A copy: a view would keep the whole padded batch in memory.
        known.update((place, h.to("cpu", copy=True)) for place, h in zip(places, H))
    return H


def run_turn(turn, args):
    """One turn, or (to save memory) one that is run again in the backward pass.

    A whole turn, with its cache made inside: the library's per-layer switch drops the cache."""
    if args.gradient_checkpointing and torch.is_grad_enabled():
        return checkpoint(turn, use_reentrant=False)
    return turn()


def gold_tokens(agent, role, rows, round, max_length):
    """B token lists of the role's gold text in this round."""
    texts = [common.role_text(role, row, round) for row in rows]
    return [tokens[:max_length] for tokens in agent.tokenize(texts)]


def thoughts(agent, past, role, rows, round, args):
    """The thoughts that this turn sends: (B, m, d), or B tensors of different length."""
    if args.latents == "rollout":
        return agent.think(past, args.latent_length)
    if args.latents == "teacher":              # the states at the gold tokens
        start, length = 1, args.max_latent_tokens
    else:                                      # the states that predict them
        start, length = 0, args.latent_length
    tokens = gold_tokens(agent, role, rows, round, start + length - 1)
    states = agent.follow(past, tokens)                                # (B, 1 + n, d)
    return [states[b, start:len(row) + 1] for b, row in enumerate(tokens)]


def shared_tokens(source, target):
    """{source token id: target token id} of the token strings that both vocabularies hold.

    A word that begins behind a space is written Ġword by some tokenizers, ▁word by others."""
    ours, theirs = ({word.replace("▁", "Ġ"): token for word, token in agent.tokenizer
                     .get_vocab().items()} for agent in (source, target))
    return {token: theirs[word] for word, token in ours.items() if word in theirs}


def warm_start(mas, rows, args, seed, per_step):
    """Teach each outer link to translate: R_out(R_in(h_t)) ~ Emb_dst(token_(t+1)), by cosine, for
    the tokens that both vocabularies hold. Ours, not the paper's. Every rank does all of it."""
    for edge in mas.style.edges:
        source, target, link = mas.agents[edge.src], mas.agents[edge.dst], mas.outer[edge.key]
        known = shared_tokens(source, target)
        print(f"warm start {edge.key}: {len(known)} of {len(source.tokenizer.get_vocab())} tokens "
              f"of {edge.src} are in {edge.dst}'s vocabulary", flush=True)
        if not known:
            continue
        role = mas.style.role(edge.src)
        examples = common.role_examples(mas.style, role, rows, args.mas_task)
        optimizer = torch.optim.AdamW(link.requires_grad_(True).parameters(), lr=4e-3,
                                      betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.warm_start_steps)
        loss = torch.tensor(float("nan"))          # stays so if no text holds a shared token
        for step in common.progress(range(args.warm_start_steps), edge.key):
            batch = common.batch_of(examples, step, per_step, seed)
            pairs = common.gold_states(source, mas.style, role, batch, args.max_length)
            states = torch.cat([h for h, _ in pairs])                              # (n, d_src)
            wanted = [known.get(token, -1) for _, ids in pairs for token in ids.tolist()]
            wanted = torch.tensor(wanted, device=target.device)
            heard = wanted >= 0
            if not heard.any():
                continue
            inward = apply_link(source.inner, states[heard.to(states.device)], source.dtype)
            got = apply_link(link, inward.to(target.device), target.dtype)         # (n, d_dst)
            loss = 1 - F.cosine_similarity(got.float(), target.embedding(wanted[heard]).float(),
                                           dim=-1).mean()
            if not torch.isfinite(loss):
                continue
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(link.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        link.requires_grad_(False)
        print(f"  1-cos {loss.item():.3f}", flush=True)


# ---- one run ------------------------------------------------------------------------------------

def train(mas, args, seed, folder):
    """One training run: the system before and after; the trained links are saved in `folder`."""
    started = not args.seeds or (folder / "state.pt").is_file()      # --seeds: begin the others
    args = argparse.Namespace(**{**vars(args), "seed": seed, "save_dir": str(folder),
                                 "resume": args.resume and started})
    last = mas.style.roles[-1]
    every = args.role_loss_weight or args.warm_start_steps or args.latents != "rollout"
    rows = common.load_rows(args.dataset_name, args.dataset_split, args.dataset_json_field,
                            args.num_samples, seed)
    rows = common.keep_usable(rows, mas.style.roles if every else [last])
    kinds = {edge.key: getattr(args, f"{edge.key}_type") or args.outer_adapter_type
             for edge in mas.style.edges}
    mas = mas.with_fresh_outer(kinds, args.scale_match, seed)
    before = dataclasses.replace(mas, outer=copy.deepcopy(mas.outer))
    per_step = args.batch_size * args.grad_accum_steps * common.RANKS
    if args.warm_start_steps and not args.resume:
        warm_start(mas, rows, args, seed, per_step)
    total_steps = args.max_steps or -(-len(rows) * args.num_train_epochs // per_step)
    training = common.Training(mas.outer, args, args.outer_lr, folder, total_steps,
                               mas.agents[last.name].dtype)
    known = {} if total_steps * per_step > len(rows) else None       # more than one epoch
    for step in training.steps(f"outer links, seed {seed}"):
        rounds = args.num_recursive_rounds
        if args.random_rounds:
            rounds = random.Random(f"rounds {seed} {step}").randint(1, rounds)
        for batch in training.batches(rows, step):
            loss, final, tokens = outer_loss(mas, batch, rounds, args, known)
            training.backward(loss, tokens, final=final, rounds=rounds)
        training.step()
    if common.RANK == 0:
        task = args.mas_task if mas.style.links_by_task else None
        save_outer(mas.outer, folder, mas.style.name, args.save_format, task)
    print(f"seed {seed}: {total_steps} steps, {training.skipped} skipped; links in {folder}",
          flush=True)
    return before, mas


def main():
    """A run for each seed, then the comparison before and after."""
    (args, style), started = flags(), time.time()
    folder, given = Path(args.save_dir), vars(args)
    names = [role.name for role in style.roles]
    compared = args.eval_samples and generated_task(args.dataset_name)
    if compared:
        evaluate.need_matplotlib()
        if args.eval_samples < 2:
            raise ValueError("--eval_samples must be 0 (no comparison) or at least 2 (for shuffle)")
    inner, models = ({name: given[f"{name}_{what}"] for name in names if given[f"{name}_{what}"]}
                     for what in ("inner", "model"))
    common.load_rows(args.dataset_name, args.dataset_split, args.dataset_json_field,
                     args.num_samples)              # if they are missing, say so before loading
    mas = load_agents(style, args.device, args.dtype, args.mas_task, bool(args.trust_remote_code),
                      inner, args.revision, models,
                      inner_kind=args.inner_adapter_type_fallback,
                      thinking=bool(args.enable_thinking), capture=args.capture)
    trained = {}
    for seed in args.seeds or [args.seed]:
        trained[seed] = train(mas, args, seed, folder / f"seed_{seed}" if args.seeds else folder)
    print(f"trained in {time.time() - started:.0f} s", flush=True)
    if compared and common.RANK == 0:
        evaluate.compare(trained, args, folder)
    links = folder / f"seed_{args.seeds[0]}" if args.seeds else folder
    override = " ".join(f"{name}={folder}" for name, folder in {**inner, "outer": links}.items())
    print(f"{time.time() - started:.0f} s in all; links and log.jsonl are in {links}. Ask them:\n"
          f"python evaluate.py --style {args.style} --ckpt_override {override} "
          + ("--show 2" if generated_task(args.dataset_name) else "--dataset math500"))


if __name__ == "__main__":
    common.run(main)

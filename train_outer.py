"""Train the outer links: what agents send each other, through the whole unrolled recursion.

    python train_outer.py                               # the tiny system, under 2 minutes on a CPU
    python train_outer.py --style sequential_light --dataset_name RecursiveMAS/Sequential-Math

Agents and inner links are frozen. All R rounds are unrolled. In the last round, the gold answer
stands after the last agent's prompt, and its cross-entropy flows back through frozen models and
inner links into the outer links (the paper's outer loop; recurse.py says where gradients flow):

    loss = CE_final                                           as published, and for real styles

Four additions are ours. The published styles leave them off. docs/training.md measures what each
is worth on the tiny system.

    --role_loss_weight w    Every role that hears latents is also asked for its own gold text:
                            loss = (CE_final + w sum_k CE_k) / (1 + w K), over K such turns
    --random_rounds 1       R is drawn from 1 .. num_recursive_rounds at each step
    --warm_start_steps n    links first learn to translate single words: see training/warm_start.py
    --loss distill          every CE becomes the distance from an agent that reads words in the
                            place of thoughts: see training/distill.py

What is sent in training. `--latents rollout`: the thoughts of a true rollout, as at inference.
`teacher`, as published: the hidden states after each token of the gold text. `teacher_aligned`: the
states before each token, which predict it. Both cost one pass of the model. But at inference there
is no gold text, so links that were trained this way meet other vectors there.
"""
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

import evaluate
from checkpoints import load_agents, load_outer_links, local_folder, save_outer
from evaluation.gradients import keep_gradients, message_gradients, plot_gradients
from gpu.compiled import set_compile
from link import kind_name
from recurse import MAS, recurse
from remembered import fingerprints, need_as_trained
from styles import KINDS, get_style
from support import flags
from support.devices import settle
from support.errors import need
from support.files import claim, fingerprint
from support.ranks import rank
from tasks import generated_task
from training import rows as data
from training.distill import distance
from training.loop import (State, mean_over_tokens, micro_batches, new_scaler, new_schedule,
                           number_of_steps)
from training.warm_start import warm_start


def parse():
    """(flags, style). The flags have the published names where there are any."""
    parser = flags.Parser(__doc__)
    flags.add_system_flags(parser)
    flags.add_training_flags(parser, "--outer_lr", "--outer_dtype", KINDS)
    add, style = parser.add_argument, get_style(flags.first_look(parser).style)
    add("--save_dir", default="out/train_outer")
    add("--load_dir", default="", help="start from the outer links in this folder")
    # Who takes part: the published flags, by number or by role.
    for i, role in enumerate(style.roles, start=1):
        for name in (f"agent{i}", role.name):
            add(f"--{name}_model_name_or_path", dest=f"{role.name}_model", default="")
            add(f"--{name}_inner_aligner_path", dest=f"{role.name}_inner", default="",
                help="folder of its inner link, or soft_words: see soft_words.py")
    for edge in style.edges:
        add(f"--{edge.key}_type", default="", help="kind of this one outer link")
    add("--outer_adapter_type", default="outer_ln_res_adapter", help="kind of link: see link.py")
    add("--inner_adapter_type_fallback", type=kind_name, default="ln_res_adapter",
        help="kind of an inner link that has no adapter_config.json")
    # What is unrolled, and what the loss is: see the head of this file.
    add("--num_recursive_rounds", type=flags.at_least(1), default=3, help="R")
    add("--max_length", type=flags.at_least(1), default=4096, help="tokens of a gold text")
    add("--latents", default="rollout", choices=["rollout", "teacher", "teacher_aligned"])
    add("--max_latent_tokens", type=flags.at_least(1), default=80, help="cap of --latents teacher")
    add("--loss", default="answer", choices=["answer", "distill"])
    add("--supervise_final_only", default=1, **flags.SWITCH)
    add("--non_last_loss_weight", type=flags.at_least(0, float), default=0.1,
        help="of the earlier rounds' answers, with --supervise_final_only 0")
    add("--role_loss_weight", type=flags.at_least(0, float), default=0.0)
    add("--warm_start_steps", type=flags.at_least(0), default=0)
    add("--random_rounds", default=0, **flags.SWITCH)
    add("--gradient_checkpointing", default=1, **flags.SWITCH,
        help="run each turn again in the backward pass, which takes less memory than keeping it")
    add("--log_gradients", default=0, **flags.SWITCH, help="log and draw |dL/d(message)| by round")
    add("--eval_samples", type=flags.at_least(0), default=500, help="problems of the comparison")
    add("--shuffle", action="store_true", help="no effect: rows are always shuffled")
    # Given links have learnt their words already.
    given = {"warm_start_steps": 0} if flags.first_look(parser).load_dir else {}
    args = flags.parse(parser, {**style.settings.get("train_outer", {}), **given})
    need(not (Path(args.save_dir) / "adapter_config.json").is_file(), f"--save_dir {args.save_dir} "
         "holds an inner link: name another folder")
    return args, style


# ---- the loss -----------------------------------------------------------------------------------

@dataclass
class Outcome:
    """What a batch of rows gave."""
    loss: torch.Tensor           # to be minimised
    final: torch.Tensor          # the loss of the final answer alone, nats per token
    tokens: int                  # of the final answers
    sent: dict                   # (round, edge key): message, with --log_gradients


def outer_loss(mas, rows, rounds, args):
    """The Outcome of a batch of rows, unrolled over `rounds` rounds.

    All losses are means over target tokens. With --supervise_final_only 0, the last role's answers
    in earlier rounds count too: + non_last_loss_weight x their mean."""
    last, role_losses, early_answers = mas.style.roles[-1], [], []

    def take_turn(turn):
        """Think, as recurse() asks, and take this turn's own loss on the way if it counts."""
        early, gold = turn.role == last.name and not args.supervise_final_only, gold_of(turn)

        def think():
            context, loss = turn.read(), None
            # Without a gradient it has heard nothing through a link.
            if (early or args.role_loss_weight) and context.hidden.requires_grad:
                loss = loss_of(turn, context, gold)
            return thoughts(turn.agent, context, gold, args), loss

        H, loss = kept_or_rerun(think, args)
        if loss is not None:
            role_losses.append(loss.to(mas.agents[last.name].device))   # it may be on another card
            if early:
                early_answers.append(role_losses[-1])                   # it counts in both sums
        return H                                                        # (B, m, d)

    def gold_of(turn):
        """B token lists of what the role should say in this round."""
        said = [data.role_text(mas.style.role(turn.role), row, turn.round) for row in rows]
        return [tokens[:args.max_length] for tokens in turn.agent.tokenize(said)]

    def loss_of(turn, context, gold):
        """The loss of the gold tokens after what a turn has read."""
        if args.loss == "distill":
            return distance(turn, context, gold, mas.style, rows=rows, kind=args.mas_task)
        return torch.cat(turn.agent.answer_loss(context, gold)).mean()

    run = recurse(mas, [data.question_of(row) for row in rows], rounds, args.latent_length,
                  kind=[data.kind_of(row, args.mas_task) for row in rows], take_turn=take_turn,
                  trace=bool(args.log_gradients), columns=rows)
    turn, gold = run.last_turn, gold_of(run.last_turn)
    final = kept_or_rerun(lambda: loss_of(turn, turn.read(), gold), args)
    # loss = (CE_final + w sum_k CE_k) / (1 + w K)
    w = args.role_loss_weight
    loss = (final + w * sum(role_losses)) / (1 + w * len(role_losses))
    if early_answers:
        loss = loss + args.non_last_loss_weight * sum(early_answers) / len(early_answers)
    keep_gradients(run.sent)
    return Outcome(loss, final, sum(map(len, gold)), run.sent)


def kept_or_rerun(turn, args):
    """Run a turn, which is given as a function. With --gradient_checkpointing it is run again in
    the backward pass. Otherwise all that the backward pass needs is kept.

    The whole turn is run again, with its cache made inside. The library's own switch does this
    layer by layer, and silently drops the cache."""
    if args.gradient_checkpointing and torch.is_grad_enabled():
        return checkpoint(turn, use_reentrant=False)
    return turn()


def thoughts(agent, context, gold, args):
    """The thoughts that a turn sends: (B, m, d), or a list of B tensors (m_b, d)."""
    if args.latents == "rollout":
        return agent.think(context, args.latent_length)
    # State i has read i gold tokens. teacher_aligned starts at 0: with the state before each token.
    start = 1 if args.latents == "teacher" else 0
    length = args.max_latent_tokens if args.latents == "teacher" else args.latent_length
    gold = [tokens[:start + length - 1] for tokens in gold]
    states = agent.follow(context, gold)                                            # (B, 1 + n, d)
    return [states[b, start:len(tokens) + 1] for b, tokens in enumerate(gold)]


# ---- one run ------------------------------------------------------------------------------------

def new_system(args, style):
    """The system of the flags, with new outer links or those in --load_dir."""
    given = vars(args)
    models = {role.name: given[f"{role.name}_model"] for role in style.roles}  # "": the role's own
    inner = {role.name: given[f"{role.name}_inner"] or role.repo for role in style.roles}
    agents = load_agents(
        style, settle(style, args.device, args.threads), args.dtype, task=args.mas_task,
        trust_remote_code=bool(args.trust_remote_code), override=inner, revision=args.revision,
        models=models, inner_kind=args.inner_adapter_type_fallback,
        thinking=bool(args.enable_thinking))
    set_compile(agents.values(), args.compile)
    kinds = {edge.key: kind_name(given[f"{edge.key}_type"] or args.outer_adapter_type)
             for edge in style.edges}
    mas = MAS(style, agents, None).with_fresh_outer(kinds, args.scale_match, args.seed)
    if args.load_dir and not args.resume:                  # a state.pt holds the links as well
        folder = local_folder(args.load_dir, who="--load_dir")
        mas.outer = load_outer_links(folder, style, agents, args.mas_task)
        need_as_trained(folder, style, agents, inner, override=inner)     # a line is enough here
        found = {key: link.kind for key, link in mas.outer.items()}
        need(found == kinds, f"--load_dir {folder} holds {found}, but the flags ask for {kinds}")
    return mas


def rounds_of(step, args):
    """R of a step: all rounds, or with --random_rounds a number of them. It is drawn by seed and
    step, so all ranks draw the same."""
    fewest = 1 if args.random_rounds else args.num_recursive_rounds
    return random.Random(f"rounds {args.seed} {step}").randint(fewest, args.num_recursive_rounds)


def main():
    """Rows, agents, links, the loop, and the comparison."""
    (args, style), started = parse(), time.time()
    # 1. Rows, frozen agents, and outer links. Nothing but these links is trained.
    task = generated_task(args.dataset_name)
    all_roles = args.role_loss_weight or args.latents != "rollout" or args.loss == "distill"
    rows = data.keep_usable(data.load_rows(args), style.roles if all_roles else style.roles[-1:])
    claim(args.save_dir)
    mas = new_system(args, style)
    if task:
        task.check_m(mas.agents[style.roles[0].name], args.latent_length,
                     rounds=args.num_recursive_rounds)
    if args.warm_start_steps and not args.resume:
        warm_start(mas, args, task.leave_out if task else ())

    # 2. The optimizer, and the state of the run: a new one, or with --resume the saved one.
    links, last = mas.outer.requires_grad_(True), mas.agents[style.roles[-1].name]
    steps = number_of_steps(args, len(rows))
    optimizer = torch.optim.AdamW(links.parameters(), lr=args.outer_lr, betas=(0.9, 0.95),
                                  weight_decay=args.weight_decay, fused=True)
    schedule, scaler = new_schedule(optimizer, args, steps), new_scaler(links, last.dtype)
    inner = [agent.inner for agent in mas.agents.values()]
    state = State(args, steps, contents=fingerprint(inner, style.roles, style.edges, rows),
                  notes=fingerprints(style, mas.agents), links=links, optimizer=optimizer,
                  schedule=schedule, scaler=scaler)

    # 3. The loop.
    for step in state.steps("outer links"):
        rounds = rounds_of(step, args)
        for batch in micro_batches(rows, step, args):
            outcome = outer_loss(mas, batch, rounds, args)
            # The loss is a mean over tokens. Times its tokens it is a sum, and sums can be added
            # up. (The weight is in thousands of tokens. This keeps fp16 gradients in range.)
            weight = outcome.tokens / 1000
            if outcome.loss.requires_grad:          # not if no message arrives: it hears itself
                scaler.scale(outcome.loss * weight).backward()
            state.add(weight, loss=outcome.loss, final=outcome.final, rounds=rounds,
                      **message_gradients(outcome.sent, len(batch), weight * scaler.get_scale()))
        mean_over_tokens(links, state)                       # of all micro-batches and all ranks
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(links.parameters(), args.max_grad_norm or math.inf)
        finite = math.isfinite(norm) and math.isfinite(state.means["loss"])
        if finite:                                           # else the step is skipped
            scaler.step(optimizer)
            schedule.step()
        scaler.update()                                      # fp16: an overflow lowers the scale
        optimizer.zero_grad()
        state.end_step(norm.item(), finite)                  # the log, state.pt, Ctrl-C
    links.requires_grad_(False)
    finish(mas, args, task=task, state=state, started=started)


def finish(mas, args, task, state, started):
    """Save the links, and show what they are worth."""
    style, folder = mas.style, Path(args.save_dir)
    if rank() == 0:
        save_outer(mas.outer, folder, style.name, format=args.save_format,
                   task=args.mas_task if style.links_by_task else None)
    state.save()
    print(f"saved after {state.done} steps, {state.skipped} skipped, {time.time() - started:.0f} s")
    if args.log_gradients and rank() == 0:
        plot_gradients(folder)
    if args.eval_samples and task:
        evaluate.compare(mas, task, args, folder)
    print(f"{time.time() - started:.0f} s in all; links and log.jsonl are in {folder}. Ask them:\n"
          f"python evaluate.py --style {args.style} --ckpt_override outer={folder} "
          + data.flags_to_ask(task and args.dataset_name, style.settings, args.mas_task))


if __name__ == "__main__":
    flags.run(main)

"""Train the outer links: what agents send each other, through the whole unrolled recursion.

    python train_outer.py                               # the tiny system, under 2 minutes on a CPU
    python train_outer.py --style sequential_light --dataset_name RecursiveMAS/Sequential-Math

Agents and inner links are frozen. All R rounds are unrolled. In the last round, the gold answer
stands after the last agent's prompt, and its cross-entropy flows back through frozen models and
inner links into the outer links (the paper's outer loop; recurse.py says where gradients flow):

    loss = CE_final                                           as published, and for real styles

Three additions are ours. The published styles leave them off. docs/training.md measures what each
is worth on the tiny system.

    --role_loss_weight w    Every role that hears latents is also asked for its own gold text:
                            loss = (CE_final + w sum_k CE_k) / (1 + w K), over K such turns
    --random_rounds 1       R is drawn from 1 .. num_recursive_rounds at each step
    --warm_start_steps n    links first learn to translate single words: see warm_start.py

What is sent in training. `--latents rollout`: the thoughts of a true rollout, as at inference.
`teacher`, as published: the hidden states after each token of the gold text. `teacher_aligned`: the
states before each token, which predict it. Both cost one pass of the model. But at inference there
is no gold text, so links that were trained this way meet other vectors there.
"""
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

import evaluate
from link import KINDS as LINK_KINDS
from link import kind_name
from recurse import MAS, recurse
from styles import KINDS, get_style
from support import flags, report
from support import rows as data
from support.checkpoints import load_agents, save_outer
from support.compiled import set_compile
from support.devices import settle
from support.errors import need
from support.files import claim, fingerprint
from support.flags import RANK
from support.training import Training
from tasks import generated_task
from warm_start import warm_start


def parse():
    """(flags, style). The flags have the published names where there are any."""
    parser = flags.Parser(__doc__)
    flags.add_system_flags(parser)
    flags.add_training_flags(parser, "--outer_lr", "--outer_dtype", KINDS)
    add, style = parser.add_argument, get_style(flags.early(parser).style)
    add("--save_dir", default="out/train_outer")
    # Who takes part: the published flags, by number or by role.
    for i, role in enumerate(style.roles, start=1):
        for name in (f"agent{i}", role.name):
            add(f"--{name}_model_name_or_path", dest=f"{role.name}_model", default="")
            add(f"--{name}_inner_aligner_path", dest=f"{role.name}_inner", default="")
    for edge in style.edges:
        add(f"--{edge.key}_type", default="", help="kind of this one outer link")
    add("--outer_adapter_type", default="outer_ln_res_adapter",
        help=f"kind of link: {', '.join(LINK_KINDS)} or a published name")
    add("--inner_adapter_type_fallback", type=kind_name, default="ln_res_adapter",
        help="kind of an inner link that has no adapter_config.json")
    # What is unrolled, and what the loss is.
    add("--num_recursive_rounds", type=flags.at_least(1), default=3, help="R")
    add("--max_length", type=flags.at_least(1), default=4096, help="tokens of a gold text")
    add("--latents", default="rollout", choices=["rollout", "teacher", "teacher_aligned"],
        help="the thoughts that are sent in training: see the head of this file")
    add("--max_latent_tokens", type=flags.at_least(1), default=80, help="cap of --latents teacher")
    add("--supervise_final_only", type=int, default=1, choices=[0, 1])
    add("--non_last_loss_weight", type=flags.at_least(0, float), default=0.1,
        help="of the earlier rounds' answers, with --supervise_final_only 0")
    add("--role_loss_weight", type=flags.at_least(0, float), default=0.0)
    add("--warm_start_steps", type=flags.at_least(0), default=0)
    add("--random_rounds", type=int, default=0, choices=[0, 1])
    add("--gradient_checkpointing", type=int, default=1, choices=[0, 1],
        help="run each turn again in the backward pass instead of keeping it: less memory")
    add("--log_gradients", type=int, default=0, choices=[0, 1],
        help="log |dL/d(message)| for every edge and round, and draw it")
    add("--eval_samples", type=flags.at_least(0), default=500,
        help="problems of the comparison afterwards, where the data set has test problems")
    add("--shuffle", action="store_true", help="no effect: rows are always shuffled")
    args = flags.parse(parser, style.settings.get("train_outer", {}))
    need(args.eval_samples != 1, "--eval_samples must be 0 (no comparison) or at least 2")
    for role in style.roles:
        inner = vars(args)[f"{role.name}_inner"]
        need(not inner or Path(inner).resolve() != Path(args.save_dir).resolve(), f"--save_dir "
             f"{args.save_dir} holds the inner link of {role.name}: name another folder")
    return args, style


# ---- the loss -----------------------------------------------------------------------------------

@dataclass
class Outcome:
    """What a batch of rows gave."""
    loss: torch.Tensor           # to be minimised
    final: torch.Tensor          # cross-entropy of the final answer, nats a token
    tokens: int                  # of the final answers
    sent: dict                   # (round, edge key): message, with --log_gradients


def outer_loss(mas, rows, rounds, args):
    """The Outcome of a batch of rows, unrolled over so many rounds.

    All cross-entropies are means over target tokens. With --supervise_final_only 0, the last role's
    answers in earlier rounds count too: + non_last_loss_weight x their mean."""
    last, role_losses, early_answers = mas.style.roles[-1], [], []

    def take_turn(turn):
        """Think, as recurse() asks, and take this turn's own loss on the way if it counts."""
        early = turn.role == last.name and not args.supervise_final_only
        H, loss = kept_or_rerun(args, think_and_loss, turn, mas.style.role(turn.role), rows, args,
                                early or args.role_loss_weight > 0)
        if loss is not None:
            role_losses.append(loss.to(mas.agents[last.name].device))   # it may be on another card
            if early:
                early_answers.append(role_losses[-1])                   # it counts in both sums
        return H                                                        # (B, m, d)

    run = recurse(mas, [data.question_of(row) for row in rows], rounds, args.latent_length,
                  kind=[data.kind_of(row, args.mas_task) for row in rows], take_turn=take_turn,
                  trace=bool(args.log_gradients), columns=rows)
    targets = gold_tokens(run.last_turn, last, rows, args.max_length)
    final = kept_or_rerun(args, last_loss, run.last_turn, targets)
    # loss = (CE_final + w sum_k CE_k) / (1 + w K)
    w = args.role_loss_weight
    loss = (final + w * sum(role_losses)) / (1 + w * len(role_losses))
    if early_answers:
        loss = loss + args.non_last_loss_weight * sum(early_answers) / len(early_answers)
    for message in run.sent.values():
        for part in parts_of(message):
            if part.requires_grad:
                part.retain_grad()
    return Outcome(loss, final, sum(map(len, targets)), run.sent)


def think_and_loss(turn, role, rows, args, with_loss):
    """One turn: (H, the cross-entropy of the role's own gold text or None)."""
    context, loss = turn.read(), None
    if with_loss and context.hidden.requires_grad:     # else it has heard nothing through a link
        loss = mean_loss(turn.agent, context, gold_tokens(turn, role, rows, args.max_length))
    return thoughts(turn, context, role, rows, args), loss


def last_loss(turn, targets):
    """The last turn: the cross-entropy of the gold answer."""
    return mean_loss(turn.agent, turn.read(), targets)


def mean_loss(agent, context, targets):
    """Cross-entropy of B target token lists after a Context, as a mean over the tokens."""
    return torch.cat(list(agent.answer_loss(context, targets))).mean()


def kept_or_rerun(args, function, *inputs):
    """Run a turn. With --gradient_checkpointing it is run again in the backward pass; otherwise all
    that the backward pass needs is kept.

    The whole turn is run again, with its cache made inside. The library's own switch does this
    layer by layer, and silently drops the cache."""
    if args.gradient_checkpointing and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


def gold_tokens(turn, role, rows, max_length):
    """B token lists of what the role should say in this round."""
    texts = [data.role_text(role, row, turn.round) for row in rows]
    return [tokens[:max_length] for tokens in turn.agent.tokenize(texts)]


def thoughts(turn, context, role, rows, args):
    """The thoughts that this turn sends: (B, m, d), or a list of B tensors (m_b, d)."""
    if args.latents == "rollout":
        return turn.agent.think(context, args.latent_length)
    if args.latents == "teacher":              # the states at the gold tokens
        start, length = 1, args.max_latent_tokens
    else:                                      # the states that predict them
        start, length = 0, args.latent_length
    tokens = gold_tokens(turn, role, rows, start + length - 1)
    # State i has read i gold tokens.
    states = turn.agent.follow(context, tokens)                                     # (B, 1 + n, d)
    return [states[b, start:len(row) + 1] for b, row in enumerate(tokens)]


# ---- one run ------------------------------------------------------------------------------------

# A data set for each kind of question, for the command that is printed at the end.
SOME_QUESTIONS = {"math": "math500", "choice": "gpqa", "code": "mbppplus", "search": "bamboogle"}


def new_system(args, style):
    """The system of the flags, with new outer links."""
    given = vars(args)
    inner, models = ({role.name: given[f"{role.name}_{what}"] for role in style.roles
                      if given[f"{role.name}_{what}"]} for what in ("inner", "model"))
    device = settle(style, args.device, args.threads)
    agents = load_agents(style, device, args.dtype, args.mas_task,
                         bool(args.trust_remote_code), inner, args.revision, models,
                         args.inner_adapter_type_fallback, bool(args.enable_thinking))
    set_compile(agents.values(), args.compile)
    kinds = {edge.key: kind_name(given[f"{edge.key}_type"] or args.outer_adapter_type)
             for edge in style.edges}
    return MAS(style, agents, None).with_fresh_outer(kinds, args.scale_match, args.seed)


def rounds_of(step, args):
    """R of a step: all rounds, or with --random_rounds a number of them. It is drawn by seed and
    step, so all ranks draw the same."""
    if not args.random_rounds:
        return args.num_recursive_rounds
    return random.Random(f"rounds {args.seed} {step}").randint(1, args.num_recursive_rounds)


def learn_from(mas, rows, rounds, args, training):
    """Add the gradient of one micro-batch of rows, and note what the log says of it."""
    outcome = outer_loss(mas, rows, rounds, args)
    scale = training.backward(outcome.loss, outcome.tokens, final=outcome.final, rounds=rounds)
    for (round, key), message in outcome.sent.items():
        # |dL/d(message)| of one row, where L is the row's own loss. The batch's loss is a mean over
        # rows, hence the factor. float32, because in half precision early rounds read as zero.
        sizes = [part.grad.float().norm(dim=(-2, -1)).view(-1) for part in parts_of(message)
                 if part.grad is not None]
        if sizes:
            size = torch.cat(sizes).mean().item() * len(rows) / scale
            training.note(outcome.tokens, **{f"gradient_{key}_{round}": size})


def parts_of(message):
    """A message as tensors: (B, m, d), or one for each row where rows differ in length."""
    return [message] if torch.is_tensor(message) else message


def main():
    """Rows, agents, links, the loop, and the comparison."""
    (args, style), started = parse(), time.time()
    task = generated_task(args.dataset_name)
    # 1. The rows. If they are missing, say so before models are loaded.
    rows = data.load_rows(args.dataset_name, args.dataset_split, args.dataset_json_field,
                          args.num_samples, args.seed)
    all_roles = args.role_loss_weight or args.latents != "rollout"
    rows = data.keep_usable(rows, style.roles if all_roles else style.roles[-1:])
    if RANK == 0:
        claim(args.save_dir)

    # 2. Frozen agents, new outer links.
    mas = new_system(args, style)
    if task and task.check_m:
        task.check_m(mas.agents[style.roles[0].name], args.latent_length)
    if args.warm_start_steps and not args.resume:
        warm_start(mas, args, task.leave_out if task else ())

    # 3. The loop.
    inner, last = [agent.inner for agent in mas.agents.values()], mas.agents[style.roles[-1].name]
    training = Training(mas.outer, args, args.outer_lr, args.save_dir, len(rows), last.dtype,
                        fingerprint(inner, style.roles, style.edges, rows),
                        prompts=fingerprint([], style.words()))
    for step in training.steps("outer links"):
        rounds = rounds_of(step, args)
        for batch in training.batches(rows, step):
            with training.halved_if_full():
                learn_from(mas, batch, rounds, args, training)
        training.step()

    # 4. The links, and what they are worth.
    if RANK == 0:
        save_outer(mas.outer, args.save_dir, style.name, args.save_format,
                   args.mas_task if style.links_by_task else None)
    training.save()
    print(f"{training.summary()}, {time.time() - started:.0f} s; the links are in {args.save_dir}")
    if args.log_gradients and RANK == 0:
        report.plot_gradients(Path(args.save_dir))
    if args.eval_samples and task:
        evaluate.compare(mas, task, args, Path(args.save_dir))
    print(f"{time.time() - started:.0f} s in all; links and log.jsonl are in {args.save_dir}. Ask "
          f"them:\npython evaluate.py --style {args.style} --ckpt_override outer={args.save_dir}"
          + (" --show 2" if task else f" --dataset {SOME_QUESTIONS[args.mas_task]}"))


if __name__ == "__main__":
    flags.run(main)

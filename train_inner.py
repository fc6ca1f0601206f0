"""Train one agent's inner link: the model's next input from its own last thought.

    python train_inner.py                                        # tiny's planner, 20 seconds
    python train_inner.py --style tiny --mas_role critic --save_dir out/critic

The base model is frozen; along the role's gold text its hidden state h_t, sent through the link,
should look like the embedding of the token that comes next (the paper's inner loop):

    loss = cos_weight (1 - cos(R_in(h_t), Emb(token_(t+1)))) + mse_weight MSE(R_in(h_t), Emb(..))

Since the base never changes, neither do its hidden states: they are computed once and reused over
all epochs, from memory where they fit --feature_budget_gb, else from a file.
"""
import dataclasses
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import common
from agents import load_agent, pick_device
from link import KINDS, InnerLink, kind_name, load_inner, save_inner, write_json
from recurse import chunks, local_folder
from styles import PUBLISHED_DESIGNS, get_style


def flags():
    """(the published flags and ours, the style)."""
    parser = common.Parser(__doc__.split("\n")[0])
    common.add_system_flags(parser)
    common.add_training_flags(parser, "--adapter_lr", "--adapter_dtype")
    add = parser.add_argument
    add("--mas_role", default="planner", help="the role whose link is trained")
    add("--model_name_or_path", default="", help="base model, in place of the role's")
    add("--save_dir", default="out/train_inner")
    add("--load_dir", default="", help="start from the inner link in this folder")
    add("--max_length", type=common.at_least(1), default=2048, help="tokens of a gold text")
    add("--adapter_type", default="ln_res_adapter",
        help=f"kind of link: {', '.join(KINDS)} or a published name")
    add("--adapter_cos_weight", type=common.at_least(0, float), default=1.0)
    add("--adapter_mse_weight", type=common.at_least(0, float), default=0.0)
    add("--feature_budget_gb", type=common.at_least(0, float), default=4.0,
        help="memory (the device's) for hidden states; beyond it they go into a file")
    add("--mas_design", default="", choices=["", *PUBLISHED_DESIGNS],
        help="the published name of a style, in place of --style")
    add("--text_field", default="", help="column with the gold text, in place of the role's")
    early = common.early_flags()
    by_design = PUBLISHED_DESIGNS.get(early.mas_design, "")
    style = get_style(early.style or by_design or "tiny")
    if not style.name.startswith(by_design.split("_")[0]):
        raise ValueError(f"--mas_design {early.mas_design} is not the design of --style "
                         f"{early.style}: leave one of them away")
    args = common.parse_flags(parser, style.settings.get("train_inner", {}))
    args.style = early.style or style.name
    return args, common.with_prompts(style, args.prompts)


def inner_loss(link, embedding, states, tokens, args):
    """(loss, 1 - cos, MSE) of states (n, d) against the tokens (n,) that they should become."""
    wanted = embedding(tokens).float()                                  # Emb(token_(t+1))  (n, d)
    got = link(states.float())                                          # R_in(h_t)         (n, d)
    cosine = 1 - F.cosine_similarity(got, wanted, dim=-1).mean()
    mse = F.mse_loss(got, wanted)
    return args.adapter_cos_weight * cosine + args.adapter_mse_weight * mse, cosine, mse


@torch.no_grad()
def readability(agent, style, role, examples, args):
    """Do the latents, read through the vocabulary head, still say what the text would?

    Per latent step, the share of examples whose thought reads as the token that greedy decoding
    writes at that place. The first thought comes before any link, so it always does."""
    agreed, counted = torch.zeros(args.latent_length), torch.zeros(args.latent_length)
    for batch in chunks(examples, args.batch_size):
        for _, past in common.read_examples(agent, style, role, batch):
            thoughts = agent.think(past, args.latent_length)                # (b, m, d)
            read_out = agent.head(thoughts).argmax(-1).cpu()                # (b, m)
            for row, ids in zip(read_out, agent.write(past, args.latent_length).ids):
                agreed[:len(ids)] += row[:len(ids)] == torch.tensor(ids)
                counted[:len(ids)] += 1
    return (agreed / counted.clamp(min=1)).tolist()


def new_link(agent, args):
    """The link to train: fresh, or the one in --load_dir."""
    if args.load_dir:
        folder = local_folder(args.load_dir, who="--load_dir")
        return load_inner(folder, agent.width, args.mas_task).to(agent.device)
    torch.manual_seed(args.seed)
    gain = agent.embedding_rms if args.scale_match else 1.0
    return InnerLink(agent.width, kind_name(args.adapter_type), gain).to(agent.device)


def features_of(agent, style, role, examples, args):
    """[(states, tokens)] of all examples, computed once: on the device where they fit the budget,
    else in a file of --save_dir that is mapped into memory."""
    lengths = [min(len(ids), args.max_length)
               for ids in agent.tokenize([text for *_, text in examples])]
    shape = sum(lengths), agent.width
    size = shape[0] * shape[1] * agent.embedding.weight.element_size() / 1e9
    fits, file = size <= args.feature_budget_gb, features_file(args)
    print(f"{len(examples)} texts, {shape[0]} tokens: hidden states take {size:.2f} GB, kept "
          + (f"on {agent.device}" if fits else f"in {file}"), flush=True)
    if fits:
        states = torch.empty(shape, dtype=agent.dtype, device=agent.device)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(file.parent).free < 1.1e9 * size:
            raise ValueError(f"there is no room for {file}: raise --feature_budget_gb, or lower "
                             "--num_samples")
        states = torch.from_file(str(file), shared=True, size=shape[0] * shape[1],
                                 dtype=agent.dtype).view(shape)
    places, tokens = states.split(lengths), [None] * len(examples)
    # Texts of like length together: less is padding.
    by_length = sorted(range(len(examples)), key=lengths.__getitem__)
    for chunk in common.progress(chunks(by_length, args.batch_size), "hidden states"):
        read = common.gold_states(agent, style, role, [examples[i] for i in chunk],
                                  args.max_length)
        for i, (h, ids) in zip(chunk, read):
            places[i].copy_(h)
            tokens[i] = ids
    return list(zip(places, tokens))


def features_file(args):
    """Where this rank keeps hidden states that are too large for memory."""
    return Path(args.save_dir) / f"features.rank{common.RANK}.bin"


def main():
    """Rows, agent, hidden states, the loop, and what the trained link's latents say."""
    (args, style), started = flags(), time.time()
    role = style.role(args.mas_role)
    if args.text_field:
        role = dataclasses.replace(role, target=(args.text_field,))
    rows = common.load_rows(args.dataset_name, args.dataset_split, args.dataset_json_field,
                            args.num_samples, args.seed)
    rows = common.keep_usable(rows, [role])
    examples = common.role_examples(style, role, rows, args.mas_task)
    if len(examples) >= 400:
        held_out, examples = examples[:200], examples[200:]        # for readability alone
    else:
        held_out = examples
        print("too few texts to hold any out: readability is measured on the training texts")

    device, dtype = pick_device(args.device, args.dtype)
    base = local_folder(args.model_name_or_path or role.model, args.revision,
                        f"role {role.name}")
    agent = load_agent(base, device, dtype, bool(args.trust_remote_code),
                       bool(args.enable_thinking), capture=args.capture)
    agent.inner = new_link(agent, args)
    before = readability(agent, style, role, held_out, args)
    features = features_of(agent, style, role, examples, args)

    per_step = args.batch_size * args.grad_accum_steps * common.RANKS
    total_steps = args.max_steps or -(-len(examples) * args.num_train_epochs // per_step)
    training = common.Training(agent.inner, args, args.adapter_lr, args.save_dir, total_steps)
    for step in training.steps("inner link"):
        for batch in training.batches(features, step):
            states = torch.cat([h for h, _ in batch]).to(device)        # (n, d)
            next_tokens = torch.cat([ids for _, ids in batch])          # (n,)
            loss, cosine, mse = inner_loss(agent.inner, agent.embedding, states, next_tokens, args)
            training.backward(loss, len(states), cosine=cosine, mse=mse)
        training.step()
    features_file(args).unlink(missing_ok=True)

    if common.RANK > 0:
        return
    task = args.mas_task if style.links_by_task else None
    save_inner(agent.inner, args.save_dir, task, args.save_format)
    after = readability(agent, style, role, held_out, args)
    write_json(Path(args.save_dir) / "readability.json", {"before": before, "after": after})
    last = common.read_json_lines(Path(args.save_dir) / "log.jsonl")[-1]
    print(f"\n{style.name} {role.name}: 1-cos {last['cosine']:.4f}, mse {last['mse']:.5f} after "
          f"{total_steps} steps, {training.skipped} skipped, {time.time() - started:.0f} s")
    print("share of latents that read as the greedy text, by latent step:")
    for name, shares in (("before", before), ("after", after)):
        print(f"  {name:7s}" + " ".join(f"{share:.2f}" for share in shares))
    print(f"the link is in {args.save_dir}")


if __name__ == "__main__":
    common.run(main)

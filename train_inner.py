"""Train one agent's inner link: the agent's next input from its own last thought.

    python train_inner.py                                        # tiny's planner, 20 seconds
    python train_inner.py --style tiny --mas_role critic --save_dir out/critic

The base model is frozen. Along the role's gold text, its hidden state h_t predicts the next token.
Sent through the link, h_t should look like that token's embedding (the paper's inner loop):

    loss = cos_weight (1 - cos(R_in(h_t), Emb(token_(t+1)))) + mse_weight MSE(R_in(h_t), Emb(..))

If it does, then the model that reads R_in(h_t) goes on as if it had read the word. That is the
point of the inner link: the model thinks on without choosing a word.

The base model never changes, so its hidden states never change either. They are computed once and
kept for all epochs, in a file that is mapped into memory and may be larger than memory.
"""
import dataclasses
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from link import KINDS as LINK_KINDS
from link import InnerLink
from recurse import chunks
from styles import KINDS, PUBLISHED_DESIGNS, get_style
from support import flags
from support import rows as data
from support.checkpoints import load_agent, load_inner, local_folder, save_inner, write_json
from support.devices import pick_device
from support.errors import need
from support.flags import RANK
from support.training import Training

HELD_OUT = 200         # texts on which readability is measured, and which are not trained on


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
    add("--text_field", default="", help="column with the gold text, in place of the role's")
    add("--max_length", type=flags.at_least(1), default=2048, help="tokens of a gold text")
    add("--adapter_type", default="ln_res_adapter",
        help=f"kind of link: {', '.join(LINK_KINDS)} or a published name")
    add("--adapter_cos_weight", type=flags.at_least(0, float), default=1.0)
    add("--adapter_mse_weight", type=flags.at_least(0, float), default=0.0)
    known = flags.early(parser)
    design = PUBLISHED_DESIGNS.get(known.mas_design, "")
    style = get_style(design if design and known.style == "tiny" else known.style)
    need(style.name.startswith(design.split("_")[0]), f"--mas_design {known.mas_design} is not the "
         f"design of --style {known.style}: leave one of them away")
    args = flags.parse(parser, style.settings.get("train_inner", {}))
    role = style.role(args.mas_role)
    if args.text_field:
        role = dataclasses.replace(role, target=(args.text_field,))
    return args, style, role


def inner_loss(link, embedding, states, tokens, args):
    """(loss, 1 - cos, MSE) of states (n, d) against the tokens (n,) that they should become."""
    wanted = embedding(tokens).float()                                  # Emb(token_(t+1))  (n, d)
    got = link(states.float())                                          # R_in(h_t)         (n, d)
    cosine = 1 - F.cosine_similarity(got, wanted, dim=-1).mean()
    mse = F.mse_loss(got, wanted)
    return args.adapter_cos_weight * cosine + args.adapter_mse_weight * mse, cosine, mse


def hidden_states(agent, style, role, examples, args):
    """Hidden states along all gold texts, computed once: [(states (n, d), tokens (n,))].

    They lie in a file of --save_dir that is mapped into memory. The file has no name any more when
    this returns, so it goes away with the process, however that ends."""
    lengths = [min(len(ids), args.max_length)
               for ids in agent.tokenize([text for *_, text in examples])]
    file = Path(args.save_dir) / f"hidden_states.rank{RANK}.bin"
    file.parent.mkdir(parents=True, exist_ok=True)
    size = sum(lengths) * agent.width * agent.embedding.weight.element_size()
    need(shutil.disk_usage(file.parent).free > 1.1 * size, f"there is no room for {file} "
         f"({size / 1e9:.1f} GB): lower --num_samples, or use another --save_dir")
    states = torch.from_file(str(file), shared=True, size=sum(lengths) * agent.width,
                             dtype=agent.dtype).view(-1, agent.width)              # (all n, d)
    print(f"{len(examples)} texts, {len(states)} tokens: {size / 1e9:.2f} GB of hidden "
          f"states in {file}", flush=True)
    places, tokens = states.split(lengths), [None] * len(examples)
    by_length = sorted(range(len(examples)), key=lengths.__getitem__)      # so little is padding
    for chunk in flags.progress(chunks(by_length, args.batch_size), "hidden states"):
        pairs = data.gold_states(agent, style, role, [examples[i] for i in chunk], args.max_length)
        for i, (h, ids) in zip(chunk, pairs):
            places[i].copy_(h)
            tokens[i] = ids
    file.unlink()
    return list(zip(places, tokens))


@torch.no_grad()
def readability(agent, style, role, examples, args):
    """Do the latents, read through the vocabulary head, say what the text would say?

    For each latent step, the share of examples whose thought reads as the token that greedy
    decoding writes at that place. The first thought comes before any link, so it always does."""
    agreed, counted = torch.zeros(args.latent_length), torch.zeros(args.latent_length)
    for batch in chunks(examples, args.batch_size):
        context = data.read_examples(agent, style, role, batch)
        thoughts = agent.think(context, args.latent_length)                 # (b, m, d)
        read_out = agent.head(thoughts).argmax(-1).cpu()                    # (b, m)
        for row, ids in zip(read_out, agent.write(context, args.latent_length)):
            agreed[:len(ids)] += row[:len(ids)] == torch.tensor(ids)
            counted[:len(ids)] += 1
    return (agreed / counted.clamp(min=1)).tolist()


def new_link(agent, args):
    """The link to train: a new one, or the one in --load_dir."""
    if args.load_dir:
        folder = local_folder(args.load_dir, who="--load_dir")
        return load_inner(folder, agent.width, args.mas_task).to(agent.device)
    torch.manual_seed(args.seed)
    gain = agent.embedding_rms if args.scale_match else 1.0               # see link.py
    return InnerLink(agent.width, args.adapter_type, gain).to(agent.device)


def main():
    """Texts, agent, hidden states, the loop, and what the trained link is worth."""
    (args, style, role), started = parse(), time.time()
    # 1. The texts. Some are held out for readability, if there are enough.
    rows = data.load_rows(args.dataset_name, args.dataset_split, args.dataset_json_field,
                          args.num_samples, args.seed)
    examples = data.role_examples(style, role, data.keep_usable(rows, [role]), args.mas_task)
    held_out = examples[:HELD_OUT] if len(examples) >= 2 * HELD_OUT else examples
    examples = examples[HELD_OUT:] if len(examples) >= 2 * HELD_OUT else examples
    if held_out is examples:
        print("too few texts to hold any out: readability is measured on the training texts")

    # 2. The frozen agent, its link, and its hidden states.
    device, dtype = pick_device(args.device, args.dtype)
    base = local_folder(args.model_name_or_path or role.model, args.revision, f"role {role.name}")
    agent = load_agent(base, device, dtype, bool(args.trust_remote_code),
                       bool(args.enable_thinking))
    agent.inner = new_link(agent, args)
    before = readability(agent, style, role, held_out, args)
    pairs = hidden_states(agent, style, role, examples, args)

    # 3. The loop.
    training = Training(agent.inner, args, args.adapter_lr, args.save_dir, len(examples))
    for step in training.steps("inner link"):
        for batch in training.batches(pairs, step):
            states = torch.cat([h for h, _ in batch]).to(device)            # (n, d)
            tokens = torch.cat([ids for _, ids in batch])                   # (n,)
            loss, cosine, mse = inner_loss(agent.inner, agent.embedding, states, tokens, args)
            training.backward(loss, len(states), cosine=cosine, mse=mse)
        training.step()

    # 4. The link, and what it is worth.
    if RANK > 0:
        return
    task = args.mas_task if style.links_by_task else None
    save_inner(agent.inner, args.save_dir, task, args.save_format)
    after = readability(agent, style, role, held_out, args)
    write_json(Path(args.save_dir) / "readability.json", {"before": before, "after": after})
    print(f"\n{style.name} {role.name}: 1-cos {training.logged['cosine']:.4f}, mse "
          f"{training.logged['mse']:.5f}, {training.summary()}, {time.time() - started:.0f} s")
    print("share of latents that read as the greedy text, by latent step:")
    for name, shares in (("before", before), ("after", after)):
        print(f"  {name:7s}" + " ".join(f"{share:.2f}" for share in shares))
    print(f"the link is in {args.save_dir}")


if __name__ == "__main__":
    flags.run(main)

"""Can this model be an agent? And can these two talk to each other at all?

    python check_model.py tiny/solver                                     # seconds
    python check_model.py HuggingFaceTB/SmolLM2-135M-Instruct Qwen/Qwen2.5-Coder-0.5B-Instruct

A model is a folder or a repo of the hub, as in a style. Its table ends with `it can be an agent`,
or with one line that says why not (exit code 2). Four of its rows are worth a look first:

    check ..         the error of our way of reading it against the library's, relative to the
                     spread of its logits (proof.py): rounding, or about 1 if it is read wrongly
    system text      what becomes of a role's `system` in this model's chat template
    date             what the template gets as the date of the day (chats.py)
    KV cache         what one question takes, for each 1,000 tokens that stay in memory

For two models a new outer link is trained in each direction, as train_outer.py begins its training
(training/warm_start.py): a word's embedding goes in, and the other model's embedding of the same
word should come out. No model runs for that. The two above take a minute of one core. Then words
that the link has not seen are sent. How many arrive nearer to the right word than to any other word
of the receiver's vocabulary? By chance, one in V words arrives (V: the size of that vocabulary).

What this says, and what it does not. If no more words arrive than by chance, the receiver cannot
hear the sender through such a link. If most arrive, there is a channel for words, from which
training goes on (docs/real.md). Whether more than single words comes through, and whether that
helps, is for evaluate.py to measure.
"""
import datetime

import torch

from chats import DAY, render
from checkpoints import load_agent, local_folder
from evaluation.statistics import wilson
from link import OuterLink
from proof import held, need_proved, prove
from support import flags
from support.devices import Clock, pick_device
from training.warm_start import learn_words

DATES = "%d %b %Y", "%d %B %Y", "%B %d, %Y", "%Y-%m-%d", "%d/%m/%Y"     # as templates write a day
TOKENS = 32             # a cache is measured after 32 tokens, and after 64


def parse():
    """The flags. The models stand without a flag, in the order in which they speak first."""
    parser = flags.Parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="a folder or a hub id")
    parser.add_argument("other", metavar="MODEL2", nargs="?", help="can MODEL talk to this one?")
    flags.add_model_flags(parser)
    parser.add_argument("--warm_start_steps", type=flags.at_least(1), default=200,
                        help="of the link in each direction")
    parser.set_defaults(scale_match=1)         # links start as train_outer.py's do: see link.py
    return parser.parse_args()


# ---- one model ----------------------------------------------------------------------------------

def figures(agent):
    """{label: text} of what the model is: its sizes, and what its configuration says.

    Two things to compare before two models are linked. An outer link maps one width to the other,
    and what it sends is as long as the embeddings of the model that hears it (their RMS)."""
    config, words = agent.body.config, agent.tokenizer.convert_ids_to_tokens
    parameters = sum(weight.numel() for weight in agent.model.parameters())
    return {
        "family": config.model_type,
        "width": agent.width,
        "layers": config.num_hidden_layers,
        "vocabulary": f"{agent.embedding.num_embeddings} embeddings, {len(agent.tokenizer)} tokens",
        "parameters": f"{parameters / 1e6:.1f} million, {agent.dtype}".replace("torch.", ""),
        "positions": str(agent.positions).replace("inf", "the configuration names no limit"),
        "embedding RMS": f"{agent.embedding_rms:.4f}",
        "end tokens": ", ".join(f"{token} {words(token)}" for token in sorted(agent.end_tokens)),
    }


def prompt_figures(agent):
    """{label: text} of what the chat template makes of a prompt. It is asked, not read: the same
    words are rendered in two ways, and the results are compared."""
    if not agent.chat:
        return {"prompt": "it has no chat template, so its roles need chat=False"}
    plain, asked = agent.render("", "Hello."), agent.render("Be brief.", "Hello.")
    switched = render(agent.tokenizer, "", "Hello.", not agent.thinking)
    # Templates without a system role get the system text there, and some put it there themselves.
    moved = asked == agent.render("", "Be brief.\n\nHello.")
    dated = any(datetime.date.today().strftime(date) in plain for date in DATES)
    return {
        "prompt": repr(plain),
        "system text": "at the head of the user's turn" if moved else "where the template puts it",
        "thinking": "the template has no switch" if switched == plain
                    else "--enable_thinking changes the prompt",
        "date": "THE DAY'S DATE IS IN EACH PROMPT: results change with it" if dated
                else f"none, or always {DAY}",
    }


@torch.no_grad()
def cache_growth(agent):
    """(bytes for each token, bytes at any length) of one question's cache, measured on a real one.

    Keys and values grow with each token, those of a sliding window too (cache.py says why). The
    states of linear attention keep their size."""
    embeds = agent.embedding(torch.zeros(1, TOKENS, dtype=torch.long, device=agent.device))
    mask = torch.ones(1, TOKENS, dtype=torch.long, device=agent.device)                # (1, T)
    once = agent.read(embeds, mask)
    first, both = (sum(tensor.nbytes for tensor in held(context))
                   for context in (once, agent.read(embeds, mask, once)))
    return (both - first) / TOKENS, 2 * first - both


def report(agent):
    """Print the table of one model. Raises ValueError at its end if it cannot be an agent."""
    def show(rows):
        for label, text in rows.items():
            print(f"  {label:15s} {text}", flush=True)

    print(f"\n{agent.name}")
    show({**figures(agent), **prompt_figures(agent)})
    errors = prove(agent)
    show({f"check {name}": error if isinstance(error, str) else f"{error:.0e}"
          for name, error in errors.items()})
    if not any(isinstance(error, str) for error in errors.values()):       # else reading may raise
        growth, fixed = cache_growth(agent)
        show({"KV cache": f"{growth / 1000:.3f} MB for 1,000 tokens (MB: 10^6 bytes)"
                          + f", and {fixed / 1e6:.3f} MB at any length" * (fixed > 0)})
    need_proved(agent)                   # every script asks this of a model that it loads
    print("it can be an agent")


# ---- two models ---------------------------------------------------------------------------------

def talk(source, target, args):
    """Train a new link from one agent to the other, and print how many new words arrive.

    The verdict is drawn from the 95 % interval of that share, and not from the share alone."""
    torch.manual_seed(args.seed)
    link = OuterLink(source.width, target.width, gain=target.embedding_rms).to(target.device)
    with Clock() as clock:
        right = learn_words(link, source, target, args, f"{source.name} -> {target.name}")    # (n,)
    n, chance = len(right), 1 / target.embedding.num_embeddings
    if n == 0:
        print("  they share too few words to hold some out: nothing is known about new words")
        return
    low, high = wilson(right.sum().item(), n)
    print(f"  {right.float().mean():.3f} of {n} new words arrive (95 % interval {low:.3f} to "
          f"{high:.3f}, by chance {chance:.6f}); {args.warm_start_steps} steps took "
          f"{clock.seconds:.0f} s")
    print("  these two " + (
        "cannot talk through a link that is trained this way" if low <= chance else
        "can talk through a trained link, as far as single words say it" if low > 0.5 else
        "may talk through a trained link: words arrive, yet it is not clear that most do"))


def main():
    # 1. The models, one after the other. Several devices are shared out, as in other scripts.
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    places = [pick_device(device.strip(), args.dtype) for device in args.device.split(",")]
    agents = []
    for name, place in zip(filter(None, (args.model, args.other)), 2 * places):
        agents.append(load_agent(local_folder(name, args.revision), *place,
                                 trust_remote_code=args.trust_remote_code))
        report(agents[-1])
    # 2. One link in each direction. What one of them carries says little about the other.
    # No model runs here. The links see embeddings alone.
    if args.other:
        talk(*agents, args)
        talk(*reversed(agents), args)


if __name__ == "__main__":
    flags.run(main)

"""Where is a word lost: at the sender, in the link, or at the receiver? Each place alone.

    python docs/places.py --style relay_list --ckpt_override outer=out/lists --out out/places
    python docs/places.py .. --dataset relay_list_4 --dataset_split train --out out/places_train

The flags are those of evaluate.py. The style has two roles and one edge, and the data set is a
relay (tasks/relay.py). A word goes through three places:

    sender      its thought has to say the word          H, R_in(H)
    link        what arrives has to mean the word        R_out(R_in(H))
    receiver    it has to write the word that it reads

A word that is lost at one place cannot be found at the next. So the next place is also measured
with an input that has no fault. Shares of words, by length of the list:

    says         the sender in words: its text has the word at its place (method text)
    thinks       the thought at the word's place, read through the sender's vocabulary head
    inward       R_in(thought) is nearest to the word's embedding, of all in the sender's table
    arrives      R_out(R_in(thought)) is nearest to it, of all in the receiver's table
    link         the same for R_out(true embedding of the sender): the faults of the link alone
    writes       the receiver writes the word at its place: the whole system (method latent)
    told_link    the same with R_out(true embeddings) in the slot: the sender has no fault
    told_words   the same with the receiver's own embeddings: the sender and the link have none

A word may be several tokens of the sender. It counts as thought if all of them are. `arrives` and
`link` are measured on words that are one token of both models, since the link learns such pairs.
An interval counts each list as one answer (Wilson), because words of a list are not independent.

OUT/places.json holds the shares. docs/capacity.py makes the table and the picture.
"""
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import evaluate  # noqa: E402
from agents import apply_link  # noqa: E402
from evaluation.answers import in_batches  # noqa: E402
from evaluation.statistics import wilson  # noqa: E402
from recurse import load_mas_system  # noqa: E402
from support.batches import progress  # noqa: E402
from support.errors import need  # noqa: E402
from support.files import write_json  # noqa: E402
from support.flags import run  # noqa: E402
from tasks.relay import at_place  # noqa: E402
from training.warm_start import as_thoughts, nearest_tokens, shared_tokens  # noqa: E402
from writing import Writing  # noqa: E402

PLACES = ("says", "thinks", "inward", "arrives", "link", "writes", "told_link", "told_words")
AT_ONCE = 256                # vectors that are compared with a whole vocabulary at once


# ---- which tokens are a word --------------------------------------------------------------------

def spans_of(agent, row):
    """(token ids of the row's plan, [(start, end)]: the tokens of each word of its answer)."""
    plan, ends, cut = row["plan"].rstrip(), [], 0
    for word in row["answer"].split():
        start = plan.index(word, cut)
        ends.append((plan[:start].rstrip(), plan[:start + len(word)]))
        cut = start + len(word)
    ids = agent.tokenize([plan, *(text for pair in ends for text in pair)])
    lengths = list(map(len, ids[1:]))
    return ids[0], list(zip(lengths[::2], lengths[1::2]))


def nearest(agent, vectors):
    """nearest_tokens of vectors (n, d), some at a time: a list of n token ids."""
    return [token for part in vectors.float().split(AT_ONCE)
            for token in nearest_tokens(agent, part).tolist()]


# ---- the three places ---------------------------------------------------------------------------

@torch.no_grad()
def batch_counts(mas, examples, m, writing):
    """{place: [(right words, words) of each example]} of a batch of lists."""
    edge, = mas.style.edges
    source, target = mas.agents[edge.src], mas.agents[edge.dst]
    rows = [one.row for one in examples]
    plans, spans = zip(*(spans_of(source, row) for row in rows))

    def ask(method="latent", change=None):                       # -> (texts, Recursion)
        return mas.respond([one.question for one in examples], 1, m, kind="search", trace=True,
                           method=method, columns=rows, writing=writing, change=change)

    def written(texts):                                          # -> [(right words, words)]
        return [(at_place(one.gold, text), len(one.gold.split()))
                for one, text in zip(examples, texts)]

    # 1. The sender: in words, and thought by thought.
    in_words = ask("text")[1].texts[1, edge.src]
    texts, happened = ask()
    H = happened.thoughts[1, edge.src]                                              # (B, m, d)
    said = source.logits(H).argmax(-1).tolist()                                     # (B, m)
    inward = apply_link(source.inner, H, source.dtype)                              # R_in(H)
    near = nearest(source, inward.flatten(0, 1))
    near = [near[b * m:(b + 1) * m] for b in range(len(rows))]
    counts = {"says": written(in_words)}
    for place, read in (("thinks", said), ("inward", near)):
        counts[place] = [
            (sum(tokens[start:end] == plan[start:end] for start, end in words), len(words))
            for tokens, plan, words in zip(read, plans, spans)]

    # 2. The link: what arrives of the thoughts, and of the sender's true embeddings.
    pairs = dict(shared_tokens(source, target))                  # {sender's token: receiver's}
    pairs.pop(source.tokenizer.unk_token_id, None)
    places = [[start for start, end in words
               if end == start + 1 and end <= m and plan[start] in pairs]
              for plan, words in zip(plans, spans)]
    true = [apply_link(mas.outer[edge.key], as_thoughts(
        source, torch.tensor(plan, device=source.device), True).to(target.device), target.dtype)
        for plan in plans]                                                          # B x (n, d_dst)
    for place, message in (("arrives", happened.sent[1, edge.key]), ("link", true)):
        found = iter(nearest(target, torch.cat([sent[at] for sent, at in zip(message, places)])))
        counts[place] = [(sum(next(found) == pairs[plan[i]] for i in at), len(at))
                         for plan, at in zip(plans, places)]

    # 3. The receiver: what it writes of the message, and of messages without a fault.
    own = [target.embedding(torch.tensor(ids, device=target.device))
           for ids in target.tokenize([row["plan"].rstrip() for row in rows], goes_on=True)]
    counts["writes"] = written(texts)
    for place, message in (("told_link", true), ("told_words", own)):
        counts[place] = written(ask(change=lambda *_, message=message: message)[0])
    return counts


def measure(mas, examples, m, writing, batch_size, split="test"):
    """The rows of places.json: for each length of the lists, the share of each place.

    Raises ValueError for a style or questions of another form."""
    need(len(mas.style.roles) == 2 and len(mas.style.edges) == 1, f"style {mas.style.name}: this "
         "measures a sender, a link and a receiver, so it takes a style of two roles and one edge")
    need(all({"plan", "answer"} <= one.row.keys() and one.row["answer"] in one.row["plan"]
             for one in examples), "the rows have no plan that holds the answer: choose a relay, "
         "as --dataset relay_list")
    by_length = defaultdict(lambda: defaultdict(list))
    for batch in progress(in_batches(examples, batch_size), "places"):
        for place, counted in batch_counts(mas, batch, m, writing).items():
            for one, count in zip(batch, counted):
                by_length[len(one.gold.split())][place].append(count)
    return [{"split": split, "length": length, "lists": len(counted["writes"]),
             **{place: share_of(counted[place]) for place in PLACES}}
            for length, counted in sorted(by_length.items())]


def share_of(counted):
    """{share, ci95, words} of [(right words, words)] of lists, None for a share of no words."""
    right, words = map(sum, zip(*counted))
    lists = sum(count > 0 for _, count in counted)
    if not words:
        return {"share": None, "ci95": None, "words": 0}
    return {"share": right / words, "ci95": wilson(right / words * lists, lists), "words": words}


def main():
    """Questions, system, shares."""
    args, style = evaluate.parse()
    task, examples = evaluate.chosen_questions(args)
    mas = load_mas_system(
        style, args.device, args.dtype, task="search", threads=args.threads,
        trust_remote_code=bool(args.trust_remote_code), revision=args.revision,
        ckpt_override=evaluate.overrides(args.ckpt_override))
    task.check_m(mas.agents[style.roles[0].name], args.latent_length)
    rows = measure(mas, examples, args.latent_length, Writing(args.max_new_tokens),
                   args.batch_size, args.dataset_split or "test")
    write_json(Path(args.out) / "places.json", {"settings": vars(args), "rows": rows})
    print(f"{'words':>5s}  " + "  ".join(f"{place:>10s}" for place in PLACES))
    for row in rows:
        shares = [row[place]["share"] for place in PLACES]
        print(f"{row['length']:5d}  " + "  ".join(
            f"{'none':>10s}" if share is None else f"{share:10.3f}" for share in shares))
    print(f"places.json is in {args.out}")


if __name__ == "__main__":
    run(main)

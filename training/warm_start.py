"""The outer links' warm start: a dictionary between two vocabularies.

This is ours, not the paper's. An untrained outer link sends noise. After a message of noise, the
loss of the answer gives almost no signal: from scratch, 100 steps of it stay at chance. But the
first thing that a link has to learn needs no recursion, no text and no run of a model. After the
inner link, a thought that predicts a word looks like that word's embedding in the sender's space.
The receiver should get its own embedding of the same word:

    loss = 1 - cos(R_out(Emb_src(word) + noise), Emb_dst(word)) + contrast        (see link.py)

over all words that both vocabularies hold. A thought never equals an embedding, so the input gets
noise of .3 of its own size. (On the tiny system this cannot be measured: 400 steps alone give .427
.723 1.000 at R = 1, 2, 3, n = 300, with noise and without it. On real models more noise harms: of
SmolLM2's thoughts at 300 arrows with new words, .56 arrive nearest to the right one of 100 words in
Qwen2.5 with a noise of .3, .33 with 1, and .17 with 2.)
The contrast matters between real models: from SmolLM2 to Qwen2.5, 3,000 steps of the cosine alone
bring .43 of 500 held-out words nearest to their own embedding, of 151,936. With it, it is .82.
"""
import torch
import torch.nn.functional as F

from agents import apply_link
from link import contrast, word_losses
from support.batches import progress

BATCH, LEARNING_RATE, NOISE = 512, 2e-3, 0.3


def shared_tokens(source, target):
    """[(source token id, target token id)] of the words that both agents' vocabularies hold.

    A word behind a blank begins with U+0120 in some vocabularies and with U+2581 in others. The
    library lists a vocabulary in another order each time, so the pairs are sorted."""
    ours, theirs = ({word.replace("\u2581", "\u0120"): token
                     for word, token in agent.tokenizer.get_vocab().items()}
                    for agent in (source, target))
    return sorted((token, theirs[word]) for word, token in ours.items() if word in theirs)


def nearest_tokens(agent, vectors):
    """The token whose embedding points most in the same direction, for each of vectors (n, d)."""
    cosines = [F.normalize(vectors, dim=-1) @ F.normalize(agent.embedding(ids).float(), dim=-1).T
               for ids in torch.arange(agent.embedding.num_embeddings,
                                       device=agent.device).split(16384)]
    return torch.cat(cosines, 1).argmax(1)                                         # (n,)


def as_thoughts(agent, tokens, scale_match):
    """Embeddings of tokens (n,) as long as what the agent's inner link puts out: (n, d)."""
    embeds = F.rms_norm(agent.embedding(tokens).float(), (agent.width,), eps=1e-12)
    return embeds * (agent.embedding_rms if scale_match else 1.0)


def warm_start(mas, args, leave_out=()):
    """Train every outer link in use for --warm_start_steps.

    leave_out: words of the test, which no link may see. All ranks do the same, with one result."""
    for edge in mas.style.edges:                 # if R = 1, nobody hears those who speak after it
        if args.num_recursive_rounds > 1 or edge.src in mas.style.heard_first(edge.dst):
            learn_words(mas.outer[edge.key], mas.agents[edge.src], mas.agents[edge.dst], args,
                        f"warm start {edge.key}", leave_out)


def learn_words(link, source, target, args, name, leave_out=()):
    """Train one outer link, from agent `source` to agent `target`. Returns (n,): does each held-out
    word arrive nearest to its own embedding? Of fewer than 1,000 words none is held out (n = 0)."""
    shared = shared_tokens(source, target)
    pairs = [pair for pair in shared if source.tokenizer.decode(pair[:1]).strip() not in leave_out]
    if not pairs:
        print(f"{name}: no word is in both vocabularies, nothing to learn")
        return torch.zeros(0)
    generator = torch.Generator().manual_seed(args.seed)
    pairs = torch.tensor(pairs)[torch.randperm(len(pairs), generator=generator)]       # (n, 2)
    count = min(500, len(pairs) // 1000 * 50)           # does it know words it was not told?
    held_out, seen = pairs[:count].to(source.device), pairs[count:]
    optimizer = torch.optim.AdamW(link.requires_grad_(True).parameters(), lr=LEARNING_RATE,
                                  betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.warm_start_steps)
    for _ in progress(range(args.warm_start_steps), name):
        batch = seen[torch.randperm(len(seen), generator=generator)[:BATCH]]           # (n, 2)
        x = as_thoughts(source, batch[:, 0].to(source.device), args.scale_match)       # (n, d_src)
        noise = torch.randn(x.shape, generator=generator).to(x.device)
        x = (x + NOISE * x.pow(2).mean().sqrt() * noise).to(target.device)
        got = apply_link(link, x, target.dtype).float()                                # (n, d_dst)
        words = batch[:, 1].to(target.device)
        # loss = 1 - cos + contrast
        loss = word_losses(got, words, target.embedding)[0] + contrast(got, words, target.embedding)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    link.requires_grad_(False)
    got = link(as_thoughts(source, held_out[:, 0], args.scale_match).to(target.device))
    right = nearest_tokens(target, got) == held_out[:, 1].to(target.device)            # (n,)
    share = f", {right.float().mean():.2f} of {count} held-out words are nearest" * (count > 0)
    print(f"{name}: {len(shared)} words in both vocabularies, loss {loss:.3f}{share}", flush=True)
    return right

"""The outer links' warm start: translate single words before whole rollouts.

This is ours, not the paper's. An untrained outer link sends noise, and behind noise the loss of the
recursion says next to nothing: from scratch, 150 steps of it stay at chance. But the first thing
that a link has to learn needs no recursion at all. After the inner link, a thought that predicts a
word looks like that word's embedding in the sender's space. The receiver should get its own
embedding of the same word:

    loss = 1 - cos(R_out(R_in(h_t)), Emb_dst(token_(t+1)))

This is learnt along the sender's gold texts, for all tokens that both vocabularies hold.
"""
import torch
import torch.nn.functional as F

from agents import apply_link
from support import rows as data
from support.flags import progress
from support.training import batch_of, per_step


def shared_tokens(source, target):
    """{source token id: target token id} of the words that both agents' vocabularies hold.

    A word behind a blank begins with U+0120 in some vocabularies and with U+2581 in others."""
    ours, theirs = ({word.replace("\u2581", "\u0120"): token
                     for word, token in agent.tokenizer.get_vocab().items()}
                    for agent in (source, target))
    return {token: theirs[word] for word, token in ours.items() if word in theirs}


def warm_start(mas, rows, args):
    """Train every outer link for --warm_start_steps. Every rank does the same, so that all ranks
    have the same links."""
    for edge in mas.style.edges:
        source, target, link = mas.agents[edge.src], mas.agents[edge.dst], mas.outer[edge.key]
        shared = shared_tokens(source, target)
        print(f"warm start {edge.key}: {len(shared)} of {len(source.tokenizer.get_vocab())} tokens "
              f"of {edge.src} are in {edge.dst}'s vocabulary", flush=True)
        if not shared:
            continue
        role = mas.style.role(edge.src)
        examples = data.role_examples(mas.style, role, rows, args.mas_task)
        optimizer = torch.optim.AdamW(link.requires_grad_(True).parameters(), lr=4e-3,
                                      betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.warm_start_steps)
        loss = torch.tensor(float("nan"))             # stays so if no text holds a shared token
        for step in progress(range(args.warm_start_steps), edge.key):
            batch = batch_of(examples, step, per_step(args), args.seed)
            pairs = data.gold_states(source, mas.style, role, batch, args.max_length)
            states = torch.cat([h for h, _ in pairs])                              # (n, d_src)
            wanted = [shared.get(token, -1) for _, ids in pairs for token in ids.tolist()]
            wanted = torch.tensor(wanted, device=target.device)                    # (n,)
            known = wanted >= 0
            if not known.any():
                continue
            inward = apply_link(source.inner, states[known.to(states.device)], source.dtype)
            got = apply_link(link, inward.to(target.device), target.dtype)         # (n', d_dst)
            loss = 1 - F.cosine_similarity(got.float(), target.embedding(wanted[known]).float(),
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

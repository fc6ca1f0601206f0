"""Latent thoughts, read as words through the vocabulary head: argmax head(h_i), i = 1 .. m.

    show(mas, examples, plan)               what each agent thinks about a question, turn by turn
    readability(agent, texts, m, ..)        how often a thought reads as the word it should be

    prompt             start 3 s1 x7 s2 flip <|notes|> none
    greedy words       s1 x7 1 s2 flip 8
    thoughts, read     s1 x7 1 s2 flip 8          all six agree: the inner link is worth something
"""
from pathlib import Path

import torch

from evaluation.answers import Job
from support.batches import chunks, progress
from support.errors import shown
from support.files import write_json
from training.rows import read_role_texts


@torch.no_grad()
def in_words(mas, example, plan):
    """What the agents think about a question, turn by turn, read through their vocabulary heads.

    A list of (round, role, "thinks", m words, one for each thought). Its last entry is the last
    turn, (round, role, "writes", [the written text])."""
    job = Job(None, plan, "latent", max(plan.rounds), examples=[example])
    (text, *_), run = mas.respond(job.request(mas), trace=True, writing=plan.writing)
    last, turns = run.last_turn, []
    for (round, role), H in run.thoughts.items():
        agent = mas.agent(role)
        tokens = agent.logits(H[0]).argmax(-1).tolist()                              # m tokens
        turns.append((round, role, "thinks", agent.tokenizer.convert_ids_to_tokens(tokens)))
    return [*turns, (last.round, last.role, "writes", [text])]


def show(mas, examples, plan):
    """Print problems with the latents of every turn, in words."""
    for example in examples:
        print(shown(f"\n{example.question}    (gold: {example.gold})"))
        for round, role, does, words in in_words(mas, example, plan):
            print(shown(f"  round {round}  {role:10s} {does}  {' '.join(words)}"))


@torch.no_grad()
def readability(agent, texts, m, batch_size):
    """Do m latents, read through the vocabulary head, say what the text would say?

    texts: RoleTexts, whose prompts are asked. Returns, for each latent step, the share of prompts
    whose thought reads as the token that greedy decoding writes there; and the first prompt's
    thoughts in words. The first thought comes before any link, so it always agrees."""
    agreed, counted, words = torch.zeros(m), torch.zeros(m), ""
    for batch in progress(chunks(texts, batch_size), "readability"):
        context = read_role_texts(agent, batch)
        thoughts = agent.think(context, m)                                  # (B, m, d)
        read_out = agent.logits(thoughts).argmax(-1).cpu()                    # (B, m)
        words = words or agent.tokenizer.decode(read_out[0])
        for read, ids in zip(read_out, agent.write(context, m)):
            agreed[:len(ids)] += read[:len(ids)] == torch.tensor(ids)
            counted[:len(ids)] += 1
    return (agreed / counted.clamp(min=1)).tolist(), words


def tell(count, before, after, folder):
    """Print and save what readability() returned before and after training."""
    write_json(Path(folder) / "readability.json", {"before": before[0], "after": after[0]})
    print(f"share of {count} prompts that read as written, by latent; the first one's in words:")
    for name, (shares, words) in (("before", before), ("after", after)):
        print(f"  {name:7s}" + " ".join(f"{share:.2f}" for share in shares) + f"   {words!r}")
    print(f"the link is in {folder}")

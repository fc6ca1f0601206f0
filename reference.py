"""The whole method on one page: slow, plain, one question at a time. Read this file first.

    h       = body(e_1 .. e_T)[-1]     a prompt's embeddings go in, its last hidden state comes out
    e_(T+1) = R_in(h)                  the inner link turns this thought into the next input
    message = R_out(R_in(h_1 .. h_m))  the outer link makes m thoughts readable to another agent

Three things happen, and each is one function here. An agent *thinks*: it feeds its own hidden state
back into itself, m times. Agents *recurse*: the message of one agent stands in the next one's
prompt, where words would stand, and the agents take turns for R rounds. The last agent *writes*.

This is the paper's algorithm and nothing else: no cache, no batch, no padding, no device. agents.py
and recurse.py do the same faster, and add chats, sampling, tools and baselines. The tests compare
them with this page, number by number, and `python -m bench` measures how much faster they are.

What it works on. An agent has a tokenizer, an embedding (token ids -> vectors), a body (the model
without its vocabulary head), logits (hidden state -> a score for each word) and inner (its R_in). A
mas, the multi-agent system, has agents {role: agent}, outer {edge key: R_out}, and a style: its
roles in their order of speaking, and its edges (key, src, dst), which say who hears whom.

Shapes: T tokens of a prompt, m latent thoughts, d hidden width of an agent.
"""
import torch


def embed(agent, parts):
    """A prompt as one sequence of embeddings, (T, d).

    parts: what the prompt is made of, in order. A part is a text, or a message of another agent, a
    tensor (m, d) that stands where m words would stand."""
    sequence = []
    for part in parts:
        if isinstance(part, str):
            tokens = agent.tokenizer(part, add_special_tokens=False)["input_ids"]
            part = agent.embedding(torch.tensor(tokens, dtype=torch.long))
        sequence.append(part)
    return torch.cat(sequence)


def hidden_states(agent, embeds):
    """Hidden states after the model's final norm, (T, d). The whole sequence is run, every time.

    (The library takes a batch of sequences. Here it is a batch of one.)"""
    return agent.body(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0]


def think(agent, embeds, m):
    """m latent thoughts after a prompt, (m, d).

        h_i = body(e_1 .. e_T, R_in(h_1) .. R_in(h_(i-1)))[-1]"""
    thoughts = []
    for _ in range(m):
        h = hidden_states(agent, embeds)[-1:]                                  # h_i     (1, d)
        thoughts.append(h)
        embeds = torch.cat([embeds, agent.inner(h)])                           # R_in(h_i) is next
    return torch.cat(thoughts)


def write(agent, embeds, max_new_tokens):
    """Greedy words after a prompt, as token ids. It is the same loop through the vocabulary head:

        token_i = argmax logits(h_i)"""
    tokens = []
    while len(tokens) < max_new_tokens and not (tokens and tokens[-1] in agent.end_tokens):
        h = hidden_states(agent, embeds)[-1]                                   # (d,)
        tokens.append(int(agent.logits(h).argmax()))
        embeds = torch.cat([embeds, agent.embedding(torch.tensor(tokens[-1:]))])
    return tokens


def recurse(mas, prompt, rounds, m):
    """All rounds for one question, up to the last agent's last turn.

    prompt(role, heard) gives the parts of a role's prompt; heard is {role heard: message (m, d)}.
    Returns the last agent, its last prompt's embeddings (T, d), and all that was sent before,
    {(round, edge key): (m, d_dst)}. What is done with that last prompt is up to the caller: write()
    answers the question, and in training the gold answer's cross-entropy after it is the loss."""
    heard = {role.name: {} for role in mas.style.roles}      # {who: {from whom: the last message}}
    sent = {}
    for round in range(1, rounds + 1):
        for role in mas.style.roles:
            agent = mas.agents[role.name]
            embeds = embed(agent, prompt(role, heard[role.name]))              # (T, d)
            if round == rounds and role is mas.style.roles[-1]:
                return agent, embeds, sent
            H = think(agent, embeds, m)                                        # (m, d)
            for edge in mas.style.edges:
                if edge.src == role.name:
                    message = mas.outer[edge.key](agent.inner(H))              # R_out(R_in(H))
                    heard[edge.dst][role.name] = message                       # (m, d_dst)
                    sent[round, edge.key] = message

"""Soft words: an inner link with nothing to train. How much does a trained inner link lose?

    python train_outer.py --planner_inner_aligner_path soft_words
    python evaluate.py --ckpt_override planner=soft_words:0.5           a temperature of .5

A soft word is the mean of all words' embeddings, each weighted by the probability that the agent
gives to its word:

    R_in(h) = g rms_norm( softmax(head(h) / T) Emb )        g: the RMS of the embeddings

This is not the paper's method. (It is known as soft thinking, arXiv 2505.15778.) An agent that is
sure of its next word sends that word's embedding, also if no training has shown this word. So soft
words in the place of trained inner links tell how much is lost in these, and how much elsewhere:
docs/real.md has the figures. T < 1 makes likely words likelier. Near T = 0 a thought is the
likeliest word, and the agents exchange words. (On the tiny system nothing is lost in the trained
links: with soft words in all roles, too, accuracy is .427, .723 and 1.000 at R = 1, 2, 3, n = 300,
for T = .1, 1 and 3. At T = 10 it is at chance.)

Each thought costs a run of the vocabulary head, which an inner link does not need.
"""
import math

import torch.nn as nn
import torch.nn.functional as F

from support.errors import blame, need

NAME = "soft_words"              # stands where a folder with an inner link may stand


class SoftWords(nn.Module):
    """R_in of an agent, by its own head and embeddings. It has no weights, so no file holds it."""

    def __init__(self, agent, temperature=1.0):
        super().__init__()
        self.kind, self.temperature = f"{NAME}:{temperature:g}", temperature
        self.agent, self.gain = agent, agent.embedding_rms

    def forward(self, h):
        """R_in(h), (.., width) -> (.., width)."""
        logits = self.agent.logits(h.to(self.agent.dtype)).to(h.dtype)              # (.., V)
        # softmax(head(h) / T) Emb: the weights of all words, and the mean of their embeddings
        weights = (logits / self.temperature).softmax(-1).to(self.agent.dtype)      # (.., V)
        mean = (weights @ self.agent.embedding.weight).to(h.dtype)                  # (.., width)
        # g rms_norm(..): as long as a word's embedding. (eps is far below any embedding's square.)
        return self.gain * F.rms_norm(mean, mean.shape[-1:], eps=1e-20)             # (.., width)


def is_soft_words(name):
    """Is this the name of soft words, and not of a folder?"""
    return str(name).partition(":")[0] == NAME


def soft_words(name, agent):
    """The SoftWords that `soft_words` or `soft_words:T` names. Raises ValueError for another T."""
    with blame(f"{name}: give a temperature above 0, as in {NAME}:0.5"):
        temperature = float(str(name).partition(":")[2] or 1)
        need(0 < temperature < math.inf, f"it cannot be {temperature}")
    return SoftWords(agent, temperature)

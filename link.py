"""The two RecursiveLinks. Nothing else is ever trained.

    R_in (h) = LN_post(    h + W2 GELU(W1 LN_pre(h)))     inner link: width d     -> width d
    R_out(x) = LN_t   ( W3 x + W2 GELU(W1 LN_s  (x)))     outer link: width d_src -> width d_dst

A language model turns an input embedding into a hidden state. To think without words, an agent has
to read its own hidden state where it is used to read an embedding. The two are not alike: they
differ in length and in direction, and two agents differ in width as well. A link closes this gap.
The inner link makes an agent's thought readable to the agent itself. An outer link makes it
readable to another agent.

(The equations are those of arXiv 2604.25917, section 3. The LayerNorms come with the released
weights; the paper writes the equations without them.)

The last LayerNorm's gain. With a gain of 1, a link sends vectors whose entries have a root mean
square (RMS) of 1. Token embeddings have an RMS of .02 to .2, so such a vector is many times longer
than any word. Training does not correct the length: the inner loss is a cosine, which does not
depend on length. We therefore start the gain at the RMS of the embeddings of the model that will
read the vector (`gain=agent.embedding_rms`). On the tiny system this gives a better start and the
same end: after train_inner.py all thoughts read as the right word, with either gain. Before
training, the share of the planner's thoughts that read as the right word is:

    thought               3       4       5       6
    gain 1                .97     .56     .64     .67
    matched gain          1.00    .71     .72     .74

On a real model only the matched gain gives readable thoughts. SmolLM2's thoughts 2 to 8 read as the
right word for .77 to .80 of the questions. With gain 1 the share is .28 for thought 2, and at most
.03 for the others (docs/real.md).

checkpoints.py saves and loads links. Parameters keep the names that they have in the released
files: proj1, proj2, pre_ln, post_ln, residual_proj, ln_source, ln_target.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from support.errors import need

# The paper compares several designs. Left: our name. Right: the published name of the inner link.
# An outer link's published name is the same with "outer_" in front.
# To add a kind, for example one that ends in a tanh:
# 1. Name it here: "2layer_ln_res_tanh": "tanh_adapter". Both names are new. A name has parts, which
#    are joined by "_". Here the part "tanh" is new. (If all are known, this line is enough.)
# 2. Write "tanh" into PARTS of InnerLink, OuterLink or both, and build it in __init__ and forward.
# Flags, saved files and tests then know it. A class refuses a kind if a part is not in its PARTS.
KINDS = {
    "1layer": "linear_adapter",             # W1 h
    "1layer_res": "linear_res_adapter",     # h + W1 h
    "2layer": "adapter",                    # W2 GELU(W1 h)
    "2layer_res": "res_adapter",            # h + W2 GELU(W1 h)
    "2layer_ln": "ln_adapter",              # LN(W2 GELU(W1 LN(h))), published as an outer link only
    "2layer_ln_res": "ln_res_adapter",      # the two equations above
}
RELEASED = "2layer_ln_res"                  # the kind that was released
need(len(set(KINDS.values())) == len(KINDS), "KINDS of link.py names one published kind twice")


def kind_name(name, link=None):
    """Our name of a kind, given ours or the published one. Raises ValueError if it is unknown, or
    if the class of `link` does not build it."""
    for ours, published in KINDS.items():
        if name in (ours, published, "outer_" + published):
            need(not link or set(ours.split("_")) <= link.PARTS, f"{type(link).__name__} does not "
                 f"build link kind '{name}': see KINDS in link.py")
            return ours
    raise ValueError(f"unknown link kind '{name}': choose one of {', '.join(KINDS)}")


class InnerLink(nn.Module):
    """R_in: an agent's latent thought -> the same agent's next input embedding.

    Input and output are (.., width). kind: one of KINDS. gain: where the last LayerNorm's gain
    starts (see the head of this file); a kind without LayerNorms has no gain to set."""
    PARTS = {"1layer", "2layer", "ln", "res"}       # parts of names that this class can build

    def __init__(self, width, kind=RELEASED, gain=1.0):
        super().__init__()
        self.kind = kind_name(kind, self)
        self.two_layers, self.residual = "2layer" in self.kind, "_res" in self.kind
        self.proj1 = nn.Linear(width, width)
        if self.two_layers:
            self.proj2 = nn.Linear(width, width)
        # An Identity has no parameters, so a kind without LayerNorms keeps the released names.
        self.pre_ln = self.post_ln = nn.Identity()
        if "_ln" in self.kind:
            self.pre_ln, self.post_ln = nn.LayerNorm(width), nn.LayerNorm(width)
            nn.init.constant_(self.post_ln.weight, gain)

    def forward(self, h):
        """R_in(h), (.., width) -> (.., width)."""
        y = self.proj1(self.pre_ln(h))              # W1 LN_pre(h)
        if self.two_layers:
            y = self.proj2(F.gelu(y))               # W2 GELU(..)
        if self.residual:
            y = h + y                               # h + ..        starts from the thought itself
        return self.post_ln(y)                      # LN_post(..)   sets the length of the result


class OuterLink(nn.Module):
    """R_out: the sender's R_in(h) -> the receiver's input embedding.

    Input is (.., src_width), output (.., dst_width). kind and gain are as in InnerLink. The agents
    differ in width, so the residual goes through a matrix W3. The hidden width is 2 dst_width with
    LayerNorms and dst_width without them, as in the released links."""
    PARTS = {"1layer", "2layer", "ln", "res"}

    def __init__(self, src_width, dst_width, kind=RELEASED, gain=1.0):
        super().__init__()
        self.kind = kind_name(kind, self)
        self.widths = (src_width, dst_width)
        self.two_layers, self.residual = "2layer" in self.kind, "_res" in self.kind
        hidden_width = 2 * dst_width if self.two_layers and "_ln" in self.kind else dst_width
        self.proj1 = nn.Linear(src_width, hidden_width)
        if self.two_layers:
            self.proj2 = nn.Linear(hidden_width, dst_width)
        if self.residual:
            self.residual_proj = nn.Linear(src_width, dst_width)
        self.ln_source = self.ln_target = nn.Identity()
        if "_ln" in self.kind:
            self.ln_source, self.ln_target = nn.LayerNorm(src_width), nn.LayerNorm(dst_width)
            nn.init.constant_(self.ln_target.weight, gain)

    def forward(self, x):
        """R_out(x), (.., src_width) -> (.., dst_width)."""
        y = self.proj1(self.ln_source(x))           # W1 LN_s(x)
        if self.two_layers:
            y = self.proj2(F.gelu(y))               # W2 GELU(..)
        if self.residual:
            y = self.residual_proj(x) + y           # W3 x + ..
        return self.ln_target(y)                    # LN_t(..)


# ---- what a link learns first: words ------------------------------------------------------------

TEMPERATURE = 0.05


def word_losses(got, tokens, embedding):
    """(1 - cos, MSE) of a link's outputs (n, d) and the words (n,) they should look like."""
    wanted = embedding(tokens).float()                                             # (n, d)
    return 1 - F.cosine_similarity(got, wanted, dim=-1).mean(), F.mse_loss(got, wanted)


def contrast(got, tokens, embedding):
    """The loss of a classifier: which of the batch's words is each of a link's outputs (n, d)
    nearest to? `tokens` (n,) are the right ones.

    1 - cos (the paper's loss) pulls an output towards its word's embedding. But the embeddings of a
    real model lie close together, so an output may be near its word and nearer to another one. So
    we compare it with all of the batch's words:

        contrast = - log softmax_w( cos(got, Emb(w)) / .05 )[the right word]

    The head of training/warm_start.py says what this gains."""
    words, right = torch.unique(tokens, return_inverse=True)                       # right: (n,)
    vectors = F.normalize(embedding(words).float(), dim=-1)                        # (words, d)
    return F.cross_entropy(F.normalize(got, dim=-1) @ vectors.T / TEMPERATURE, right)

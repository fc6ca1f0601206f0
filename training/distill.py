"""`--loss distill`: an agent that reads words is the teacher of the same agent that reads thoughts.

    teacher     the prompt with the texts of the rows in the slots          q(token), frozen
    student     the same prompt with the thoughts of others in the slots    p(token)

    loss = KL(q || p) = sum over all words v of  q(v) (log q(v) - log p(v))

at each token of the role's gold text, as a mean over the tokens. The cross-entropy of the gold text
falls too if a message tells the form of the answer alone. This loss falls if the message says what
the text says, because all that differs between the two is what stands in the slots. The gradient
goes into the thoughts, and so to the outer links.

The teacher reads the texts of the rows, and not what the agents would write. The rows are there
already, all ranks and seeds have the same ones, and a weak agent's own text may mislead the reader:
on GSM8K the solver of docs/real.md answers worse with its planner's text than alone.
"""
import torch
import torch.nn.functional as F

from training.rows import read_role_texts, turn_in_words


def distance(turn, context, gold, style, rows, kind):
    """KL(teacher || student) in nats, the mean over the tokens of B gold token lists.

    context: what the student has read in this turn. The teacher reads the texts of `rows` that the
    role hears in this round. kind: of rows that do not say theirs."""
    agent, role = turn.agent, style.role(turn.role)
    with torch.no_grad():
        teacher = read_role_texts(agent, [turn_in_words(style, role, row, turn.round, kind)
                                          for row in rows])
        theirs = F.log_softmax(agent.answer_logits(teacher, gold), -1)               # (N, V)
    ours = F.log_softmax(agent.answer_logits(context, gold), -1)                     # (N, V)
    return F.kl_div(ours, theirs, log_target=True, reduction="batchmean")            # sum / N

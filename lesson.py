# %% [markdown]
"""The method, built up in eight cells: python lesson.py

Run the file from top to bottom (a minute on a laptop), or open it in an editor that knows cells
(`# %%`: VS Code, PyCharm, Spyder). Or make a notebook of it, which has to stay in this folder:

    pip install jupytext nbclient ipykernel && jupytext --to ipynb lesson.py

Each cell makes a claim, measures it, prints it and asserts it. You need a little PyTorch. Read
reference.py first, which is the whole method on one page. All of it runs on the shipped tiny
system; the head of tasks/tiny.py says what its three agents do. The picture goes to out/lesson.
docs/exercises.md has exercises.
"""
# %%
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure      # draws into files, so no window is needed

import reference
from evaluation.report import save_figure
from link import InnerLink, OuterLink, contrast, word_losses
from recurse import load_mas_system
from tasks import get_task

# Three frozen models. Each has another width: 96, 80 and 112. (The style sets one thread, because
# its matrices are too small for more.)
torch.manual_seed(0)
PICTURE = Path("out/lesson/lesson.png")
mas = load_mas_system("tiny", device="cpu")
planner, critic, solver = mas.agents.values()
task = get_task("tiny")
examples = task.load(100)                            # 100 problems of the test
rows = task.train_rows(300, seed=0)                  # 300 other problems, to train on


def prompt(role, heard, question):
    """A role's prompt as parts for reference.embed: texts, and messages (m, d) in their slots."""
    role = mas.style.role(role)
    words = mas.style.words_for(role, "math", list(heard)).replace("{question}", question)
    parts = re.split(r"\{(\w+)\}", mas.agents[role.name].render(role.system, words))
    return [heard.get(part, part) for part in parts if part]


# %% [markdown]
# 1. A language model is a function from embeddings to a hidden state.
#
# The prompt's embeddings go in, and a hidden state comes out at each position. The vocabulary head
# reads the last one and gives a score to each word. Writing means: take the best word, put its
# embedding after the prompt, and run again. Nothing in the model asks for a *word* there. It asks
# for a vector of width d.
#
# What to notice: T tokens became T embeddings, and one hidden state is enough to choose the next
# word. The head is the only part that knows words. An agent that needs no word can leave it out.
# %%
question = examples[0].question
with torch.no_grad():
    embeds = reference.embed(planner, prompt("planner", {}, question))           # (T, d)
    h = reference.hidden_states(planner, embeds)[-1]                             # (d,)
    written = reference.write(planner, embeds, 6)
print(f"1. the question   {question}")
print(f"   embeddings     {tuple(embeds.shape)}, the last hidden state {tuple(h.shape)}")
print(f"   in words       {planner.tokenizer.decode(written)}")
# The claim: one hidden state of width d chooses the first word.
assert h.shape == (planner.width,) and int(planner.logits(h).argmax()) == written[0]

# %% [markdown]
# 2. So let the model read its own hidden state. What goes wrong without a link?
#
# Two things. Length: a hidden state comes out of a norm, and an embedding does not, so a hidden
# state is many times longer. Direction: the hidden state points near the next word's embedding, but
# also elsewhere. We let the planner think six thoughts with three inner links: none (the hidden
# state as it is), the hidden state cut to the embeddings' length, and the trained link. A thought
# is right if it reads as the word that the planner would have written there.
#
# What to notice: the first thought is right with any link, because it comes before all links. Then
# errors add up, because each thought is made from the one before it. The right length mends a part
# of the loss. The trained link also mends the direction, and loses nothing over six thoughts.
# %%
def shorter(h):
    """h (.., d) as long as an embedding: h / rms(h) * rms(embeddings)."""
    return h / h.pow(2).mean(-1, keepdim=True).sqrt() * planner.embedding_rms


@torch.no_grad()
def readable(agent, link, role="planner", m=6, count=20):
    """The share of problems whose i-th thought reads as the i-th written word: m numbers."""
    trained, right = agent.inner, torch.zeros(m)
    agent.inner = link                                   # reference.think asks the agent for it
    for example in examples[:count]:
        embeds = reference.embed(agent, prompt(role, {}, example.question))
        words = reference.write(agent, embeds, m)
        thoughts = reference.think(agent, embeds, m)                             # (m, d)
        right += agent.logits(thoughts).argmax(-1) == torch.tensor(words)
    agent.inner = trained
    return right / count


links = {"no link": torch.nn.Identity(), "right length": shorter, "trained": planner.inner}
curves = {name: readable(planner, link) for name, link in links.items()}
with torch.no_grad():
    thoughts = reference.think(planner, embeds, 6)                               # (6, d)
size = h.pow(2).mean().sqrt().item()
read = planner.tokenizer.decode(planner.logits(thoughts).argmax(-1))   # each one's likeliest word
print(f"2. rms of the hidden state {size:.2f}, of an embedding {planner.embedding_rms:.2f}")
print(f"   six thoughts, read as words: {read}")
for name, curve in curves.items():
    print(f"   {name:13s} reads as written, by thought: "
          + " ".join(f"{share:.2f}" for share in curve.tolist()))
# The claims: a hidden state is more than twice too long, and each repair helps.
assert size > 2 * planner.embedding_rms and curves["no link"][-1] < .5 < curves["right length"][
    -1] < .95 < curves["trained"].min()

# %% [markdown]
# 3. The inner link, trained in twenty lines.
#
# Along a text, the hidden state at each word predicts the next word. The link should turn it into
# that word's embedding. The model is frozen, so its hidden states along a text never change. They
# are computed once. Then only the small link is run:
#
#     loss = 1 - cos(R_in(h_t), Emb(word_(t+1)))
#
# What to notice: no thought is ever rolled out in this training, and still six thoughts in a row
# stay readable. That works because R_in(h) is so near to the word's embedding that the model goes
# on as if it had read the word. So errors do not add up any more.
# %%
def states_and_words(agent, role, column, rows):
    """Hidden states along the role's texts, and the words that they predict: (n, d) and (n,)."""
    states, words = [], []
    for row in rows:
        # The prompt and the text stand one behind the other. State t has read t words of the text.
        text = row[column][0] if isinstance(row[column], list) else row[column]
        tokens = agent.tokenize([text])[0]
        embeds = reference.embed(agent, prompt(role, {}, row["question"]))       # (T, d)
        along = torch.cat([embeds, agent.embedding(torch.tensor(tokens[:-1]))])
        states.append(reference.hidden_states(agent, along)[-len(tokens):])
        words.append(torch.tensor(tokens))
    return torch.cat(states), torch.cat(words)


with torch.no_grad():
    states, words = states_and_words(planner, "planner", "plan", rows)
R_in = InnerLink(planner.width, gain=planner.embedding_rms)
before = readable(planner, R_in)
optimizer = torch.optim.AdamW(R_in.parameters(), lr=4e-3)
for step in range(500):
    # Any states will do, in any order: no state depends on the link.
    pick = torch.randint(len(words), (256,))
    wanted = planner.embedding(words[pick])                                      # Emb(word) (n, d)
    loss = 1 - F.cosine_similarity(R_in(states[pick]), wanted, dim=-1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
after = readable(planner, R_in)
print(f"3. an inner link of our own, {len(words)} states, 500 steps: 1 - cos = {loss.item():.3f}")
for name, curve in {"untrained": before, "trained": after}.items():
    print(f"   {name:13s} reads as written, by thought: "
          + " ".join(f"{share:.2f}" for share in curve.tolist()))
assert after.min() > .95 > before.min()

# %% [markdown]
# 4. One thought goes to another agent.
#
# The planner's thoughts have 96 entries, and the critic reads embeddings of 80. So something has to
# translate. The outer link translates: R_out(R_in(H)). Its vectors stand in the critic's prompt
# where the planner's words would stand. We ask how often the critic then writes what it writes
# after the planner's words.
#
# What to notice: this is the test of the whole method, and it needs no right answers. A message is
# understood if it does to the receiver what the words do. A new link has the right shape and the
# right length, and is not understood.
# %%
@torch.no_grad()
def understood(link, count=20):
    """The share of problems where the critic writes the same after latents as after words."""
    same = 0
    for example in examples[:count]:
        embeds = reference.embed(planner, prompt("planner", {}, example.question))
        said = planner.tokenizer.decode(reference.write(planner, embeds, 6))
        message = link(planner.inner(reference.think(planner, embeds, 6)))       # (6, 80)
        # The same critic is asked twice. Only what stands in the planner's slot differs.
        answers = [reference.write(critic, reference.embed(
            critic, prompt("critic", {"planner": heard}, example.question)), 6)
            for heard in (said, message)]
        same += answers[0] == answers[1]
    return same / count


new_link = OuterLink(planner.width, critic.width, gain=critic.embedding_rms)
shares = {"a new link": understood(new_link), "the shipped link": understood(mas.outer["outer_12"])}
print("4. the critic writes the same after the planner's latents as after its words:")
for name, share in shares.items():
    print(f"   {name:18s} {share:.2f}")
assert shares["a new link"] < .5 < .95 < shares["the shipped link"]

# %% [markdown]
# 5. The outer link, trained in twenty lines.
#
# After the inner link, a thought that predicts a word looks like that word's embedding. So the
# outer link can begin as a dictionary: the planner's embedding of a word goes in, the critic's
# embedding of the same word should come out. No model is run for this. A thought never equals an
# embedding, so some noise is added to what goes in. (training/warm_start.py does this for all
# links. train_outer.py goes on from there with the paper's loss, through the whole recursion.)
#
# What to notice: the link learnt a dictionary of single words, and now translates whole thoughts.
# This is our way and not the paper's, and it rests on the inner link: if thoughts do not look like
# words, a dictionary cannot read them. So thoughts are soft words here: they are trained to be.
# %%
theirs = critic.tokenizer.get_vocab()
pairs = [(token, theirs[word]) for word, token in planner.tokenizer.get_vocab().items()]
source, target = torch.tensor(pairs).T
R_out = OuterLink(planner.width, critic.width, gain=critic.embedding_rms)
optimizer = torch.optim.AdamW(R_out.parameters(), lr=2e-3)
with torch.no_grad():
    # As long as what R_in puts out. (rms_norm makes the rms 1.)
    x = F.rms_norm(planner.embedding(source), (planner.width,)) * planner.embedding_rms
for step in range(400):
    noise = .3 * planner.embedding_rms * torch.randn_like(x)
    got = R_out(x + noise)
    cosine, _ = word_losses(got, target, critic.embedding)
    loss = cosine + contrast(got, target, critic.embedding)   # near the word, and nearest to it
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
# The dictionary is asked to carry whole thoughts, which it has never seen.
share = understood(R_out)
print(f"5. our own dictionary link, 400 steps: understood {share:.2f}")
assert share > .9

# %% [markdown]
# 6. Rounds. The solver's thoughts go back to the planner, and all of it starts again.
#
# The loop is reference.recurse (slow and plain) and recurse.recurse (fast). Both give the same
# vectors. One round does four of a problem's 2 to 12 events, so accuracy has to rise with the
# rounds.
#
# What to notice: two rounds of three agents have six turns, and only five messages are sent. The
# last turn writes. A third round needs no new link, because the same three serve in every round.
# %%
with torch.no_grad():
    agent, embeds, sent = reference.recurse(
        mas, lambda role, heard: prompt(role.name, heard, question), rounds=2, m=6)
    plain = agent.tokenizer.decode(reference.write(agent, embeds, 32), skip_special_tokens=True)
fast = mas.answer([question], rounds=2, latent_length=6)[0]
print(f"6. two rounds sent {len(sent)} messages: {', '.join(f'{r} {key}' for r, key in sent)}")
print(f"   the answer: {fast}")


def accuracy(method="latent", rounds=3, system=mas):
    """The share of the 100 problems that are answered rightly."""
    answers = system.answer([one.question for one in examples], rounds, 6, method=method,
                            max_new_tokens=32)
    return sum(task.score(*pair).correct for pair in zip(examples, answers)) / len(examples)


by_rounds = [accuracy(rounds=rounds) for rounds in (1, 2, 3)]
print("   accuracy in 1, 2, 3 rounds: " + " ".join(f"{share:.2f}" for share in by_rounds))
assert plain.strip() == fast and by_rounds[0] + .2 < by_rounds[1] < by_rounds[2] - .2

# %% [markdown]
# 7. Controls. Does anything travel, or does the solver do the work alone?
#
# A number means little without its controls. `single` asks the solver alone, once. `zero` sends
# zeros. `shuffle` sends the thoughts about another problem. `untrained` sends through new outer
# links. All four are near chance (one in ten), and `text` is as good as the latents. `single_loop`
# is the strongest baseline without links: the solver reads its own answer and answers again, in as
# many turns as all three agents have. It does nine events of twelve, and so it is in between.
#
# What to notice: `shuffle` is the hardest control. Its messages have the right form, come from
# trained links and are about a problem of the same kind. Only the content is wrong. If a system is
# as good with `shuffle` as without, then nothing travels through its links.
# %%
controls = {method: accuracy(method) for method in "text single_loop single zero shuffle".split()}
controls["untrained"] = accuracy(system=mas.with_fresh_outer())
print("7. three rounds: " + ", ".join(f"{name} {share:.2f}" for name, share in controls.items()))
assert controls["text"] > .9 > controls["single_loop"] > .5 > .3 > sorted(controls.values())[-3]

# %% [markdown]
# 8. Where gradients go.
#
# The only loss is the cross-entropy of the last answer. It flows back through the frozen solver
# into the messages that it heard, through the links, through the rollouts that made them, round by
# round. We ask how large dL/d(message) is for each message of three rounds. It shrinks from round
# to round on its way back, so the first round hardly trains the links. Frozen weights keep no
# gradient at all.
#
# What to notice: the picture's scale is logarithmic. The links are shared by all rounds, so they do
# get a gradient, but nearly all of it comes from the last round. docs/training.md has a cure: a
# loss for every role.
# %%
row = rows[0]
mas.outer.requires_grad_(True)
last, embeds, sent = reference.recurse(
    mas, lambda role, heard: prompt(role.name, heard, row["question"]), rounds=3, m=6)
for message in sent.values():
    message.retain_grad()                                  # torch drops it otherwise
gold = last.tokenize([row["answer"][2]])[0]                # the text of round 3
along = torch.cat([embeds, last.embedding(torch.tensor(gold[:-1]))])
logits = last.logits(reference.hidden_states(last, along)[-len(gold):])
F.cross_entropy(logits, torch.tensor(gold)).backward()
sizes = {f"{key} in round {r}": message.grad.norm().item() for (r, key), message in sent.items()}
print("8. |dL/d(message)|:")
for name, size in sizes.items():
    print(f"   {name}  {size:.1e}")
# The claims: the earlier a message, the less it gets. Every link gets something, weights nothing.
assert list(sizes.values()) == sorted(sizes.values())
assert sizes["outer_12 in round 3"] + sizes["outer_23 in round 3"] > 0.9 * sum(sizes.values())
assert all(link.proj1.weight.grad is not None for link in mas.outer.values())
assert all(p.grad is None for agent in mas.agents.values() for p in agent.model.parameters())

# %%
# All of it in one picture: what a link is worth, what rounds and content are worth, and gradients.
figure = Figure(figsize=(13, 3.6), layout="constrained")
left, middle, right = figure.subplots(1, 3)
for name, curve in {**curves, "our own": after}.items():
    left.plot(range(1, 7), curve, marker="o", label=name)
left.set(xlabel="thought", ylabel="reads as written", ylim=(0, 1.05), title="2, 3: inner links")
left.legend()
bars = {"1 round": by_rounds[0], "2 rounds": by_rounds[1], "3 rounds": by_rounds[2], **controls}
middle.bar(list(bars), list(bars.values()))
middle.set(ylim=(0, 1.05), ylabel="accuracy", title="6, 7: rounds and controls")
middle.tick_params(axis="x", rotation=45)
right.barh(list(sizes), list(sizes.values()))
right.set(xscale="log", title="8: |dL/d(message)|")
save_figure(figure, PICTURE)
print(f"the picture is {PICTURE}")

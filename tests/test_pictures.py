"""The pictures of docs/pictures.py: they are whole, and they show what the project computes."""
import dataclasses
import re
import sys
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from conftest import PROJECT, tiny_in_float64
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import evaluate
import reference
from tasks import get_task

sys.path.insert(0, str(PROJECT / "docs"))
import pictures  # noqa: E402

FOLDER = PROJECT / "docs" / "pictures"
NAMES = ("method", "links", "rounds", "accuracy", "thoughts", "gradients")
QUESTIONS, BATCH = 24, 2
CLOSE = 1e-3


@dataclasses.dataclass
class Drawn:
    """Where the pictures were drawn, and the figures by name as they were saved."""
    folder: object
    figures: dict


@pytest.fixture(scope="module")
def drawn(shipped, tmp_path_factory):
    """All pictures, of fewer questions and rows, drawn by the script's own function."""
    save, figures = pictures.report.save_figure, {}

    def keep(figure, path):
        figures[path.stem] = figure
        save(figure, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures.report, "save_figure", keep)
        folder = tmp_path_factory.mktemp("pictures")
        pictures.draw_all(shipped, folder, QUESTIONS, BATCH)
    return Drawn(folder, figures)


# ---- whole pictures -----------------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_a_real_image(drawn, name):
    """The one drawn now, and the one that comes with the project: a PNG of the same size."""
    sizes = []
    for path in (drawn.folder / f"{name}.png", FOLDER / f"{name}.png"):
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG" and len(image.convert("RGB").getcolors(2**20)) > 20
            sizes.append(image.size)
        assert path.stat().st_size < 120_000
    assert sizes[0] == sizes[1] and sizes[0][0] == 1200 and 500 < sizes[0][1] < 900


def test_nothing_else_is_drawn(drawn):
    for folder in (drawn.folder, FOLDER):
        assert sorted(path.name for path in folder.iterdir()) == sorted(f"{n}.png" for n in NAMES)
    assert re.findall(r"^    (\w+)\.png", pictures.__doc__, re.MULTILINE) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_no_text_is_cut_or_covers_another(drawn, name):
    figure = drawn.figures[name]
    renderer = FigureCanvasAgg(figure).get_renderer()
    axes, = figure.axes
    texts = [text for text in (*axes.texts, axes.xaxis.label, axes.yaxis.label)
             if text.get_text() and text.get_visible()]
    boxes = [text.get_window_extent(renderer) for text in texts]
    for text, box in zip(texts, boxes):
        assert box.x0 >= 0 and box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
    for (one, first), (other, second) in combinations(zip(texts, boxes), 2):
        assert not first.overlaps(second), (one, other)


def test_pages_show_pictures_that_exist():
    """The pictures in Markdown, and every picture of docs/pictures that a page names."""
    shown = []
    for page in (PROJECT / "README.md", *sorted(PROJECT.glob("docs/*.md"))):
        text = page.read_text()
        shown += [page.parent / name for name in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text)]
        shown += [FOLDER / name for name in re.findall(r"pictures/([\w.-]+\.png)", text)]
    assert shown
    for path in shown:
        assert path.is_file(), path


def test_the_script_draws_where_it_is_told(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(pictures, "draw_all", lambda mas, out: asked.append((mas.style.name, out)))
    monkeypatch.setattr(pictures.sys, "argv", ["pictures.py", "--out", str(tmp_path)])
    pictures.main()
    monkeypatch.setattr(pictures.sys, "argv", ["pictures.py"])
    pictures.main()
    assert asked == [("tiny", tmp_path), ("tiny", FOLDER)]


# ---- what they show -----------------------------------------------------------------------------

def test_the_thoughts_are_those_of_show(drawn, monkeypatch, capsys):
    """Row by row as evaluate.py --show 1 prints them."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--show", "1"])
    evaluate.main()
    line = r"^  round (\d)  (\w+) +(thinks|writes)  (.*)$"
    printed = re.findall(line, capsys.readouterr().out, re.MULTILINE)
    assert len(printed) == 9
    axes, = drawn.figures["thoughts"].axes
    rows = {}                                     # {height: texts from left to right}
    for text in sorted(axes.texts, key=lambda text: text.get_position()[0]):
        rows.setdefault(round(text.get_position()[1], 3), []).append(text.get_text())
    grid = [rows[y] for y in sorted(rows, reverse=True)][2:]      # below the question and the head
    assert [(name.split(), " ".join(words)) for name, *words in grid] == [
        (["round", number, role, does], words) for number, role, does, words in printed]
    assert [len(words) for _, *words in grid] == [6] * 8 + [1]


def test_the_bars_are_shares_of_right_answers(drawn, shipped):
    """Asked and scored here one method at a time, in the order of evaluate.py's batches."""
    task = get_task("tiny")
    examples = sorted(task.load(QUESTIONS), key=lambda example: len(example.question))

    def share(method, rounds):
        answers = shipped.answer([one.question for one in examples], rounds, 6, method=method,
                                 max_new_tokens=32, batch_size=QUESTIONS)
        return sum(task.score(*pair).correct for pair in zip(examples, answers)) / QUESTIONS

    axes, = drawn.figures["accuracy"].axes
    for method, bars in zip(("latent", "text", "shuffle"), axes.containers):
        assert bars.get_label().startswith(method)
        assert [bar.get_height() for bar in bars] == pytest.approx(
            [share(method, rounds) for rounds in (1, 2, 3)])
    line, = (line for line in axes.lines if line.get_label().startswith("single"))
    assert line.get_ydata()[0] == pytest.approx(share("single", 1))
    # A perfect system does four events a round, and guesses one in ten of the rest.
    lengths = [example.question.count(" s") for example in examples]
    dashes = [one.get_segments()[0] for one in axes.collections[-3:]]
    for (rounds, dash) in enumerate(dashes, start=1):
        done = sum(length <= 4 * rounds for length in lengths)
        assert dash[0][1] == dash[1][1] == pytest.approx((done + (QUESTIONS - done) / 10)
                                                         / QUESTIONS)


def plain_gradients(mas, rows, weight):
    """{(round, edge key): |dL/d(message)|} by reference.py, where one row after another is run.

    Each gold text has six words, so a mean over words is a mean over rows."""
    columns = {"planner": "plan", "critic": "refined_plan", "solver": "answer"}
    losses, messages = [], []

    def word_loss(agent, embeds, text):
        gold = torch.tensor(agent.tokenizer.convert_tokens_to_ids(text.split()))
        x = torch.cat([embeds, agent.embedding(gold[:-1])])
        return F.cross_entropy(agent.head(reference.hidden_states(agent, x)[-len(gold):]), gold)

    for row in rows:
        turns = []                                       # (role, parts of its prompt), as asked

        def prompt(role, heard):
            said = list(heard.values()) or ["none"]
            turns.append((role.name, [f"<bos> <|user|> {row['question']} <|notes|>", *said,
                                      "<|assistant|>"]))
            return turns[-1][1]

        *_, sent = reference.recurse(mas, prompt, 3, 6)
        messages.append(sent)
        by_turn = [word_loss(mas.agents[role], reference.embed(mas.agents[role], parts),
                             row[columns[role]][turn // 3])
                   for turn, (role, parts) in enumerate(turns) if turn]     # who heard latents
        losses.append((by_turn[-1] + weight * sum(by_turn[:-1])) / (1 + weight * 7))
    for sent in messages:
        for message in sent.values():
            message.retain_grad()
    (sum(losses) / len(rows)).backward()
    return {place: torch.stack([sent[place].grad for sent in messages]).norm().item()
            for place in messages[0]}


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_gradients_equal_the_plain_unrolling(weight):
    """New links, so that the loss is large, in float64: see `double` in test_train.py."""
    mas = tiny_in_float64()
    rows = get_task("tiny").train_rows(BATCH, seed=0)
    ours = pictures.measure_gradients(mas, rows, weight)
    assert not any(p.requires_grad or p.grad is not None for p in mas.outer.parameters())
    mas.outer.requires_grad_(True)
    plain = plain_gradients(mas, rows, weight)
    assert list(ours) == list(plain) and len(plain) == 8
    assert list(ours.values()) == pytest.approx(list(plain.values()), rel=CLOSE)


def test_the_gradients_drawn_are_those_measured(drawn, shipped):
    axes, = drawn.figures["gradients"].axes
    rows = get_task("tiny").train_rows(BATCH, seed=0)
    assert axes.get_yscale() == "log" and len(axes.lines) == 2
    for line, weight in zip(axes.lines, (0.0, 1.0)):
        sizes = pictures.measure_gradients(shipped, rows, weight)
        assert list(line.get_ydata()) == pytest.approx(list(sizes.values()), rel=1e-6)
    edges = {"outer_12": "planner\nto critic", "outer_23": "critic\nto solver",
             "outer_31": "solver\nto planner"}
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [
        f"{edges[key]}\nround {number}" for number, key in sizes]

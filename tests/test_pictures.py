"""docs/pictures are whole pictures, and docs/pictures.py shows what the project computes."""
import math
import re

import pytest
import torch
from helpers import PROJECT, tiny_in_float64
from PIL import Image

import evaluate
import reference
from docs import pictures
from tasks import tiny

FOLDER = PROJECT / "docs" / "pictures"
MEASURED, DIAGRAMS = ("accuracy", "thoughts", "gradients"), ("method", "links", "rounds")
QUESTIONS, BATCH = 12, 2


@pytest.fixture(scope="module")
def drawn(shipped, tmp_path_factory):
    """(folder, {name: figure}) of the measured pictures, drawn of fewer questions and rows."""
    save, figures, folder = pictures.report.save_figure, {}, tmp_path_factory.mktemp("pictures")

    def keep(figure, path):
        figures[path.stem] = figure
        save(figure, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures.report, "save_figure", keep)
        pictures.draw_all(shipped, folder, QUESTIONS, BATCH)
    return folder, figures


def test_pictures_are_whole(drawn):
    """The shipped ones, and the measured ones as they are drawn now: PNG files of the same size."""
    for folder, names in ((FOLDER, MEASURED + DIAGRAMS), (drawn[0], MEASURED)):
        for file in (f"{name}.png" for name in names):
            with Image.open(folder / file) as image, Image.open(FOLDER / file) as shipped:
                assert image.format == "PNG" and len(image.convert("RGB").getcolors(2**20)) > 20
                assert image.size == shipped.size and image.width == 1200
    assert re.findall(r"^    (\w+)\.png", pictures.__doc__, re.M) == [*MEASURED, *DIAGRAMS]


def test_pages_show_pictures_that_exist():
    shown = []
    for page in (PROJECT / "README.md", *sorted(PROJECT.glob("docs/*.md"))):
        text = page.read_text()
        shown += [page.parent / name for name in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text)]
        shown += [FOLDER / name for name in re.findall(r"pictures/([\w.-]+\.png)", text)]
    assert {path.stem for path in shown} >= {*MEASURED, *DIAGRAMS}
    assert all(path.is_file() for path in shown), shown


def test_the_script_draws_where_it_is_told(run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(pictures, "draw_all", lambda mas, out: asked.append((mas.style.name, out)))
    codes = [run(pictures, *options)[0] for options in (["--out", tmp_path], [])]
    assert codes == [0, 0] and asked == [("tiny", tmp_path), ("tiny", FOLDER)]


def test_the_thoughts_are_those_of_show(drawn, run):
    _, printed, _ = run(evaluate, "--show", 1)
    turns = re.findall(r"^  round (\d)  (\w+) +(thinks|writes)  (.*)$", printed, re.MULTILINE)
    axes, = drawn[1]["thoughts"].axes
    lines = [[] for _ in turns]                                  # words from left to right
    for text in sorted(axes.texts, key=lambda text: text.get_position()[0]):
        lines[text.get_position()[1]].append(text.get_text())
    names = [tick.get_text().split() for tick in axes.get_yticklabels()]
    assert list(zip(names, map(" ".join, lines), strict=True)) == [
        (["round", number, role, does], words) for number, role, does, words in turns]
    assert [len(words) for words in lines] == [6] * 8 + [1]
    for cell, text in zip(axes.patches, axes.texts, strict=True):
        assert cell.get_bbox().contains(*text.get_position())


def test_the_bars_are_shares_of_right_answers(drawn, shipped):
    """Asked and scored here one method at a time, in the order of evaluate.py's batches."""
    examples = sorted(tiny.load(QUESTIONS), key=lambda example: len(example.question))

    def share(method, rounds):
        answers = shipped.answer([one.question for one in examples], rounds, 6, method=method,
                                 max_new_tokens=32, batch_size=QUESTIONS)
        return sum(tiny.score(*pair).correct for pair in zip(examples, answers)) / QUESTIONS

    axes, = drawn[1]["accuracy"].axes
    for method, bars in zip(("latent", "text", "shuffle"), axes.containers):
        assert bars.get_label().startswith(method)
        assert [bar.get_height() for bar in bars] == pytest.approx(
            [share(method, rounds) for rounds in (1, 2, 3)])
    line, = (line for line in axes.lines if line.get_label().startswith("single"))
    assert line.get_ydata()[0] == pytest.approx(share("single", 1))
    # A perfect system does four events a round, and guesses one in ten of the rest.
    for rounds, dash in enumerate(axes.collections[-3:], start=1):
        (_, left), (_, right) = dash.get_segments()[0]
        done = sum(one.question.count(" s") <= 4 * rounds for one in examples)
        assert left == right == pytest.approx((done + (QUESTIONS - done) / 10) / QUESTIONS)


def plain_gradients(mas, row):
    """{(round, edge key): |dL/d(message)|} of one row by reference.py."""
    def prompt(role, heard):
        return [f"<bos> <|user|> {row['question']} <|notes|>", *(heard.values() or ["none"]),
                "<|assistant|>"]

    agent, embeds, sent = reference.recurse(mas, prompt, 3, 6)
    for message in sent.values():
        message.retain_grad()
    gold = torch.tensor(agent.tokenizer.convert_tokens_to_ids(row["answer"][2].split()))
    states = reference.hidden_states(agent, torch.cat([embeds, agent.embedding(gold[:-1])]))
    torch.nn.functional.cross_entropy(agent.logits(states[-len(gold):]).float(), gold).backward()
    return {which: message.grad.norm().item() for which, message in sent.items()}


def test_gradients_equal_the_plain_unrolling():
    """In float64 (but for the cross-entropy), with new links, so that the loss is large."""
    mas, rows = tiny_in_float64(), tiny.train_rows(BATCH, seed=0)
    ours = pictures.measure_gradients(mas, rows, 0.0)
    assert not any(p.requires_grad or p.grad is not None for p in mas.outer.parameters())
    mas.outer.requires_grad_(True)
    # Each gold text has six words, so the mean over all words is the mean over rows.
    plain = [plain_gradients(mas, row) for row in rows]
    assert ours == pytest.approx({which: math.hypot(*(one[which] for one in plain)) / BATCH
                                  for which in plain[0]}, rel=1e-5)


def test_the_gradients_drawn_are_those_measured(drawn, shipped):
    """Two curves: with the last answer's loss alone, and with a loss for every role."""
    axes, = drawn[1]["gradients"].axes
    for line, weight in zip(axes.lines, (0.0, 1.0), strict=True):
        sizes = pictures.measure_gradients(shipped, tiny.train_rows(BATCH, seed=0), weight)
        assert list(line.get_ydata()) == pytest.approx(list(sizes.values()), rel=1e-6)
    ends = {edge.key: f"{edge.src} to {edge.dst}" for edge in shipped.style.edges}
    assert [" ".join(tick.get_text().split()) for tick in axes.get_xticklabels()] == [
        f"{ends[key]} round {number}" for number, key in sizes] and axes.get_yscale() == "log"

"""docs/pictures are whole pictures, and docs/pictures.py shows what the project computes."""
import re

import pytest
from helpers import PROJECT
from PIL import Image

import evaluate
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
    examples = sorted(tiny.Tiny("tiny").load(QUESTIONS), key=lambda example: len(example.question))

    def share(method, rounds):
        answers = shipped.answer([one.question for one in examples], rounds, 6, method=method,
                                 max_new_tokens=32, batch_size=QUESTIONS)
        return sum(tiny.score(*pair).correct for pair in zip(examples, answers)) / QUESTIONS

    axes, = drawn[1]["accuracy"].axes
    for method, bars in zip(("latent", "text", "single_loop", "shuffle"), axes.containers,
                            strict=True):
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


def test_the_gradients_drawn_are_those_measured(drawn, shipped):
    """Two curves: with the last answer's loss alone, and with a loss for every role."""
    axes, = drawn[1]["gradients"].axes
    for line, weight in zip(axes.lines, (0.0, 1.0), strict=True):
        sizes = pictures.measure_gradients(shipped, tiny.train_rows(BATCH, seed=0), weight)
        assert list(line.get_ydata()) == pytest.approx(list(sizes.values()), rel=1e-6)
    ends = {edge.key: f"{edge.src} to {edge.dst}" for edge in shipped.style.edges}
    assert [" ".join(tick.get_text().split()) for tick in axes.get_xticklabels()] == [
        f"{ends[key]} round {number}" for number, key in sizes] and axes.get_yscale() == "log"

"""Styles: what is refused and how it is said, what a role is asked, and the published styles."""
import json
import re
import sys
from dataclasses import replace

import pytest
from helpers import PROJECT, lines_of, made_style, refuses

from styles import ANSWER_FORMAT, KINDS, Edge, all_styles, get_style

sys.path.insert(0, str(PROJECT / "docs"))
import published_prompts  # noqa: E402

DATA = PROJECT / "tests/data"
# The columns that stand in a role's prompts in place of the question.
TOLD = {"relay planner": "told", "relay_list planner": "told", "told planner": "plan",
        "chase planner": "planner_table", "chase solver": "solver_table"}
# {style: {settings, roles: [name, base model, repo (* is the start of all), columns],
#          edges: [key from to]}}
PUBLISHED = json.loads((DATA / "published_styles.json").read_text())
CLONE = (DATA / "published_clone.txt").read_text()          # of the published project's prompts.py


PAIR, TRIO = made_style("pair"), made_style("trio")
ALONE = TRIO.alone()
BOB = replace(PAIR.roles[1], first="go {question}")
SILENT = replace(PAIR, roles=(PAIR.roles[0], BOB)).alone()          # it cannot hear its own text
# The names of `odd` mean something in a pattern.
STYLES = {"pair": PAIR, "trio": TRIO, "odd": made_style("odd"), "alone": ALONE, "silent": SILENT}


# ---- what is refused ----------------------------------------------------------------------------

@pytest.mark.parametrize("case", lines_of("styles/broken.jsonl"), ids=lambda case: case["why"])
def test_broken_styles_are_refused_when_made(case):
    """Some of its roles have other fields, or there is a third one, or there are other edges."""
    style, changed = STYLES[case["style"]], case.get("roles", {})
    roles = [replace(one, **changed.get(one.name, {})) for one in style.roles]
    if "third" in case:
        roles.append(replace(PAIR.roles[1], **case["third"]))
    edges = [Edge(*edge) for edge in case["edges"]] if "edges" in case else style.edges
    with refuses(f"style {style.name}", *case["named"]):
        replace(style, roles=tuple(roles), edges=tuple(edges))


# ---- what a role is asked -----------------------------------------------------------------------

@pytest.mark.parametrize("style, name, kind, heard, words", lines_of("styles/words.jsonl"))
def test_words_are_those_for_the_roles_heard(style, name, kind, heard, words):
    """If it hears all: the whole `prompt`. Before: `first`. Alone: `first`, then `own`."""
    style = STYLES[style]
    assert style.words_for(style.role(name), kind, heard.split()) == words


@pytest.mark.parametrize("style, name, kind, heard, which", lines_of("styles/missing_words.jsonl"))
def test_missing_words_are_named(style, name, kind, heard, which):
    """No text has these slots alone, or there is none for this kind."""
    style = STYLES[style]
    with refuses(f"style {style.name}", f"role {name}", f"`{which}`", f"'{kind}'", *heard.split()):
        style.words_for(style.role(name), kind, heard.split())


def test_roles_are_heard_in_the_order_of_speaking():
    for trio in (TRIO, replace(TRIO, edges=TRIO.edges[::-1])):
        assert [trio.heard_by(name) for name in "abc"] == [["b", "c"], ["a", "c"], ["a", "b"]]
        assert [trio.heard_first(name) for name in "abc"] == [[], ["a"], ["a", "b"]]
    assert ALONE.heard_by("c") == ["c"] and len(ALONE.edges) == 1
    assert ALONE.roles == (replace(TRIO.roles[2], prompt=TRIO.roles[2].own),)


def test_names_of_roles_and_styles():
    assert TRIO.role("b") is TRIO.roles[1] and get_style(TRIO) is TRIO
    with refuses("style trio", "'d'", "a, b, c"):
        TRIO.role("d")
    with refuses("'parallel'", *PUBLISHED, "tiny", "relay", "duo"):
        get_style("parallel")


# ---- the shipped styles -------------------------------------------------------------------------

@pytest.mark.parametrize("name", PUBLISHED)
def test_roles_and_edges_are_the_published_ones(name):
    shipped, published = get_style(name), PUBLISHED[name]
    start = f"RecursiveMAS/{name.replace('_', '-').title()}-"
    assert [" ".join([one.name, one.model, one.repo, *one.target]) for one in shipped.roles] == [
        line.replace("*", start) for line in published["roles"]]
    assert [f"{edge.key} {edge.src} {edge.dst}" for edge in shipped.edges] == published["edges"]
    assert shipped.repo == start + "Outerlinks"
    assert shipped.tools == (("python", "search") if name == "deliberation" else ())


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_the_published_ones(name):
    """Those of the inference. The training has its own published defaults."""
    settings, published = dict(get_style(name).settings), dict(PUBLISHED[name]["settings"])
    assert settings.pop("evaluate")["batch_size"] == published.pop("batch_size")
    for flag, told in published.items():
        assert {data: flags[flag] for data, flags in settings.items() if flag in flags} == told
    assert not {"train_inner", "train_outer"} & set(settings)


def test_published_names_are_understood():
    """A role's published name is its first column. Only the sequential style has plain columns."""
    for design, name in (("hie", "mixture"), ("distill", "distillation"),
                         ("deliberation", "deliberation")):
        for one in get_style(name).roles:
            assert get_style(design).role(one.target[0]) is one
    light = get_style("sequential_light")
    assert get_style("sequential") is light and light.role("refiner") is light.role("critic")


@pytest.mark.parametrize("name", all_styles())
def test_prompts_of_the_shipped_styles(name):
    """All are there. The question and each slot is there once, but in a text that is to be
    continued, where lines come again; and no slot of others. A published
    style also has other words for each kind. Its question stands before the slots, so all before
    them is read once. Its last role alone is told the format of the answer."""
    style, roles = get_style(name), get_style(name).roles
    asked = [(style, one, heard) for one in roles
             for heard in ([], style.heard_first(one.name), style.heard_by(one.name))]
    asked += [(style.alone(), style.alone().roles[0], heard) for heard in ([], [roles[-1].name])]
    for kind in roles[0].prompt if isinstance(roles[0].prompt, dict) else KINDS:
        for asking, one, heard in asked:
            text = asking.words_for(one, kind, heard)
            column = TOLD.get(f"{name} {one.name}", "question")
            counts = [text.count(f"{{{part}}}") for part in (column, *heard)]
            assert all(counts) and (one.chat is False or max(counts) == 1)   # or lines to repeat
            if name in PUBLISHED:
                assert all(text.index("{question}") < text.index(f"{{{other}}}") for other in heard)
                assert ("{answer_format}" in text) == (one.name == roles[-1].name)
                for part in ("question", "answer_format", *heard):
                    text = text.replace(f"{{{part}}}", "X")
                assert not re.search("[{}]|\n\n\n|  ", text) and text == text.strip(), text
    for one in roles if name in PUBLISHED else ():
        assert one.system.strip() and not re.search("[{}]", one.system)
        for prompts in (one.prompt, one.first, *([one.own] if one is roles[-1] else [])):
            assert set(prompts) == set(KINDS) and len(set(prompts.values())) == len(KINDS)


def test_answer_formats():
    for kind in KINDS:
        assert ("```python" if kind == "code" else "\\boxed{") in ANSWER_FORMAT[kind]


# ---- the words that the released links were trained under ---------------------------------------

@pytest.fixture
def ask(tmp_path, run, monkeypatch):
    """ask(flags): the style that docs/published_prompts.py makes of the clone, or its error."""
    (tmp_path / "clone/inference_utils").mkdir(parents=True)
    (tmp_path / "clone/inference_utils/notes.py").write_text("NOTE = 'with tools'")
    monkeypatch.setattr(sys, "path", [*sys.path])

    def asked(*flags, clone=CLONE):
        (tmp_path / "clone/prompts.py").write_text(
            re.sub(r"(?m)^(\w+_prompt.*?\)): (.*)$", r"def build_\1: return f'\2'", clone))
        code, said, errors = run(published_prompts, tmp_path, *flags)
        if code:
            assert (code, said, len(errors)) == (2, "", 1)
            return errors[0]
        (tmp_path / "mine.py").write_text(said)
        return get_style(str(tmp_path / "mine.py"))
    return asked


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_words_are_read_slot_for_slot(name, ask):
    mine, shipped = ask("--style", name), get_style(name)
    assert (mine.name, mine.edges, mine.repo) == (shipped.name, shipped.edges, shipped.repo)
    for one in mine.roles:
        for heard in (mine.heard_by(one.name), mine.heard_first(one.name)):
            for kind in ("math", "choice", "code"):
                words = mine.words_for(one, kind, heard)             # it checks the slots
                assert "{question}" in words and "<<" not in words and "A. one" not in words
        with refuses(f"role {one.name}", "`prompt`", "'search'"):
            mine.words_for(one, "search", mine.heard_by(one.name))
        assert one.system.startswith("I am ") and one.own == shipped.role(one.name).own


@pytest.mark.parametrize("flags, name, which, kind, words",
                         lines_of("styles/published_words.jsonl"))
def test_published_words_of_some_roles(flags, name, which, kind, words, ask):
    assert getattr(ask(*flags.split()).role(name), which)[kind] == words


def test_a_system_text_is_published_and_the_tiny_style_is_not(ask):
    assert ask().role("critic").system == "I am refiner of sequential."
    assert "style tiny " in ask("--style", "tiny")


@pytest.mark.parametrize("old, new, named", lines_of("styles/clones.jsonl"))
def test_a_clone_of_another_layout_is_one_line(old, new, named, ask):
    assert old in CLONE
    error = ask(clone=CLONE.replace(old, new))
    assert all(one in error for one in named), error

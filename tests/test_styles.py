"""Styles: what is refused and how it is said, what a role is asked, and the published styles."""
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from helpers import PROJECT, refuses

from styles import ANSWER_FORMAT, KINDS, Edge, Role, Style, all_styles, get_style

sys.path.insert(0, str(PROJECT / "docs"))
import published_prompts  # noqa: E402

DATA = PROJECT / "tests/data"
# {style: {roles: [name, base model, repo (* is the start of all), columns], edges: [key from to]}}
PUBLISHED = json.loads((DATA / "published_styles.json").read_text())
CLONE = (DATA / "published_clone.txt").read_text()          # of the published project's prompts.py


def role(name, prompt, **prompts):
    return Role(name, "some/model", "some/repo", prompt, **prompts)


A = role("ann", "{question}\nheard {bob}", first="{question}")
B = role("bob", "{question}\nheard {ann}")
AB, BA = Edge("key_ab", "ann", "bob"), Edge("key_ba", "bob", "ann")
PAIR = Style("pair", (A, B), (AB, BA))


# ---- what is refused ----------------------------------------------------------------------------

def ann(**changes):
    return dict(roles=(replace(A, **changes), B))


def bob(**changes):
    return dict(roles=(A, replace(B, **changes)))


BROKEN = [       # what is changed in PAIR, what the error names beside the style
    (dict(roles=(A, B, B)), ["bob"]),
    *((dict(roles=(A, B, role(word, "{question}"))), [word])
      for word in ("question", "answer_format", "outer", "agent1")),
    (dict(edges=(AB, replace(BA, key="key_ab"))), ["key_ab"]),
    (dict(edges=(AB, BA, replace(AB, key="again"))), ["ann -> bob"]),
    (dict(edges=(AB, replace(BA, src="carl"))), ["key_ba", "carl", "ann, bob"]),
    (dict(edges=(AB, BA, Edge("key_ac", "ann", "carl"))), ["key_ac", "carl", "ann, bob"]),
    *((dict(edges=(AB, replace(BA, key=key))), [f"'{key}'"])           # not a file, or a module's
      for key in ("b/a", "to", "training", "lr_scheduler")),
    (dict(roles=(A, role("bob", "{question}")), edges=(BA,)), ["bob"]),      # it hears nobody
    (ann(model=""), ["role ann", "model"]),
    *((bob(**{which: {"maths": B.prompt}}), ["role bob", "maths", *KINDS])
      for which in ("prompt", "first", "own")),
    # The question is missing.
    (ann(first="begin"), ["role ann", "'begin'", "{question}"]),
    (bob(own="mine {bob}"), ["role bob", "'mine {bob}'", "{question}"]),
    (bob(prompt={"math": B.prompt, "code": "of {ann}"}), ["role bob", "'of {ann}'", "{question}"]),
    # The slots are not those of the roles heard there, or there are no words.
    (ann(first="{question} {bob}"), ["role ann", "`first`"]),
    (bob(first="{question} {ann}"), ["role bob", "`first`"]),
    (bob(own="{question}"), ["role bob", "`own`", "{bob}"]),
    (bob(prompt="{question} {ann} {bob}"), ["role bob", "`prompt`", "{ann}"]),
    (bob(prompt={"math": B.prompt, "code": "{question}"}), ["`prompt`", "'code'", "{ann}"]),
    (ann(first=""), ["role ann", "`first`"]),
    *((bob(prompt=words), ["role bob", "`prompt`"])
      for words in ("", {}, {"math": B.prompt, "code": ""})),
]


@pytest.mark.parametrize("changes, named", BROKEN)
def test_broken_styles_are_refused_when_made(changes, named):
    with refuses("style pair", *named):
        replace(PAIR, **changes)


# ---- what a role is asked -----------------------------------------------------------------------

BRACES = "\\boxed{} {question} \\boxed{{x}}\n{a}\n{unknown} {0} %s\n\n{b}\n{answer_format}"
TRIO = Style("trio", (
    role("a", "{question}\nfrom b: {b}\nfrom c: {c}",
         first={"math": "plan {question}", "code": "outline {question}"}),
    role("b", {"math": "{question}\n{a} and {c}", "code": "{question}, {a}, {c}"},
         first={"math": "{question}\n{a} says", "code": "{question} {a}"}),
    role("c", BRACES, first="{question}!", own={"math": "{question}{c}", "code": "{c}{question}"})),
    tuple(Edge(key, *key) for key in ("ab", "ac", "bc", "ba", "ca", "cb")))
ODD = Style("odd", (role("a.b+", "{question}"), role("a|b", "{question} {a.b+}")),
            (Edge("ab", "a.b+", "a|b"),))                    # its names mean something in a pattern
ALONE = TRIO.alone()
SILENT = replace(PAIR, **bob(first="go {question}")).alone()        # it cannot hear its own text


@pytest.mark.parametrize("style, name, kind, heard, words", [
    # All whom it hears, in any order: `prompt`, of which nothing is cut.
    (TRIO, "a", "math", "b c", "{question}\nfrom b: {b}\nfrom c: {c}"),
    (TRIO, "b", "math", "c a", "{question}\n{a} and {c}"),
    (TRIO, "b", "code", "a c", "{question}, {a}, {c}"),
    *((TRIO, "c", kind, "a b", BRACES) for kind in KINDS),
    (ODD, "a|b", "math", "a.b+", "{question} {a.b+}"),
    # Until then: `first`. The first speaker has heard nobody, the second one the first one.
    (TRIO, "a", "math", "", "plan {question}"), (TRIO, "a", "code", "", "outline {question}"),
    (TRIO, "b", "math", "a", "{question}\n{a} says"), (TRIO, "b", "code", "a", "{question} {a}"),
    (TRIO, "c", "math", "", "{question}!"),
    # The last role alone: `first`, then `own`.
    (ALONE, "c", "code", "", "{question}!"), (SILENT, "bob", "math", "", "go {question}"),
    (ALONE, "c", "math", "c", "{question}{c}"), (ALONE, "c", "code", "c", "{c}{question}")])
def test_words_are_those_for_the_roles_heard(style, name, kind, heard, words):
    assert style.words_for(style.role(name), kind, heard.split()) == words


@pytest.mark.parametrize("style, name, kind, heard, which", [
    # No text has these slots alone.
    (TRIO, "a", "math", "b", "first"), (TRIO, "b", "math", "", "first"),
    (TRIO, "b", "math", "c", "first"), (TRIO, "c", "math", "a", "first"),
    (PAIR, "bob", "math", "", "first"), (SILENT, "bob", "math", "bob", "own"),
    # There is none for this kind.
    (TRIO, "b", "choice", "a c", "prompt"), (TRIO, "b", "choice", "a", "first"),
    (TRIO, "a", "choice", "", "first"), (ALONE, "c", "choice", "c", "own")])
def test_missing_words_are_named(style, name, kind, heard, which):
    with refuses(f"style {style.name}", f"role {name}", f"`{which}`", f"'{kind}'", *heard.split()):
        style.words_for(style.role(name), kind, heard.split())


@pytest.mark.parametrize("first", ["{question}", "{question} {c}", "{question} {a} {c}"])
def test_a_first_has_the_slots_of_earlier_speakers(first):
    """b hears a, who speaks before it, and c, who speaks after it. In round 1 it has heard a."""
    a, b, c = TRIO.roles
    with refuses("style trio", "role b", "`first`", "{a}"):
        replace(TRIO, roles=(a, replace(b, first=first), c))


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
    settings, light = dict(get_style(name).settings), name == "sequential_light"
    assert settings.pop("evaluate")["batch_size"] == (32 if light else 16)

    def told(flag):
        return {data: flags[flag] for data, flags in settings.items() if flag in flags}

    assert told("max_new_tokens") == {
        "math500": 1000 if light else 2000, "aime25": 16000, "aime26": 16000,
        **dict.fromkeys(("gpqa", "medqa", "mbppplus", "livecodebench"), 4000)}
    assert told("temperature") == {"mbppplus": 0.2, "livecodebench": 0.2}
    assert told("latent_length") == {
        "sequential_light": {"math500": 48, "medqa": 32, "gpqa": 32, "mbppplus": 16},
        "sequential_scaled": {"math500": 32, "medqa": 48, "gpqa": 48, "mbppplus": 16}}.get(name, {})
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
    """All are there. The question and each slot is there once, and no slot of others. A published
    style also has other words for each kind. Its question stands before the slots, so all before
    them is read once. Its last role alone is told the format of the answer."""
    style, roles = get_style(name), get_style(name).roles
    asked = [(style, one, heard) for one in roles
             for heard in ([], style.heard_first(one.name), style.heard_by(one.name))]
    asked += [(style.alone(), style.alone().roles[0], heard) for heard in ([], [roles[-1].name])]
    for kind in roles[0].prompt if isinstance(roles[0].prompt, dict) else KINDS:
        for asking, one, heard in asked:
            text = asking.words_for(one, kind, heard)
            column = "told" if (name, one.name) == ("relay", "planner") else "question"
            assert all(text.count(f"{{{part}}}") == 1 for part in (column, *heard))
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


def test_files_are_short():
    """A style has under 60 lines (sequential, which holds two, 100), a line 100 characters."""
    for path in PROJECT.glob("styles/[!_]*.py"):
        assert len(path.read_text().splitlines()) <= (100 if path.stem == "sequential" else 59)
    assert [f"{path.name}:{number}" for path in sorted(PROJECT.rglob("*.py"))
            for number, line in enumerate(path.read_text().splitlines(), start=1)
            if len(line) > 100] == []


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


def test_published_words_of_some_roles(ask):
    planner, critic, solver = ask().roles
    assert critic.system == "I am refiner of sequential."
    assert planner.first["code"] == "Plan a function: {question}"
    assert planner.prompt["math"] == "Plan anew: {question} {solver}"
    assert critic.prompt["code"] == "A function: {question} {planner}"
    assert solver.prompt == {"math": r"{critic} {question} in \boxed{} chain",
                             "choice": "{critic} {question} with a letter chain",
                             "code": "Write: {critic} {question}"}
    before = ask("--solver_pre_question", "1").roles[2].prompt
    assert before["math"] == r"{question} {critic} in \boxed{} chain"
    science = ask("--style", "mixture").role("science")
    assert science.first["choice"] == "hie_science_expert on choice: {question}"
    assert "style tiny " in ask("--style", "tiny")                           # it was not published


@pytest.mark.parametrize("old, new, named", [
    ("math_refiner_prompt_with_slot", "refiner_prompt", ["build_math_refiner_prompt_with_slot"]),
    ("def get_system_prompt", "def get_prompt", ["get_system_prompt"]),
    ("planner_prompt(question)", "planner_prompt(question, shots)", ["planner_prompt", "shots"]),
    ("from inference_utils", "from inference_utilities", ["prompts.py", "inference_utilities"]),
    ("{PLANNER_SLOT}", "", ["role critic", "`prompt`", "{planner}"])])
def test_a_clone_of_another_layout_is_one_line(old, new, named, ask):
    assert old in CLONE
    error = ask(clone=CLONE.replace(old, new))
    assert all(one in error for one in named), error


def test_published_prompts_as_a_command(tmp_path):
    """It runs from any folder, and an error is one line."""
    done = subprocess.run([sys.executable, PROJECT / "docs/published_prompts.py", tmp_path],
                          capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ") and str(tmp_path) in done.stderr

"""Styles: what is refused and how it is said, what a role is asked, and the published styles."""
import dataclasses
import re
from pathlib import Path

import pytest

import styles
from styles import (ANSWER_FORMAT, KINDS, Edge, Role, Style, all_styles, by_kind, check, get_style)


STYLE_FOLDER = Path(styles.__file__).parent
PROJECT = STYLE_FOLDER.parent


def role(name, prompt, **settings):
    return Role(name, "some/model", "some/repo", prompt, **settings)


A = role("a", "{question}\nheard {b}", first="{question}")
B = role("b", "{question}\nheard {a}")
AB, BA = Edge("ab", "a", "b"), Edge("ba", "b", "a")


change = dataclasses.replace


def style(roles=(A, B), edges=(AB, BA), **settings):
    return Style("duo", tuple(roles), tuple(edges), **settings)


# ---- what is refused ----------------------------------------------------------------------------

def test_the_unbroken_style_is_fine():
    """So that each error below is due to its one change."""
    assert style().name == "duo"
    assert style(roles=[A, change(B, prompt={"math": B.prompt})]).heard_by("b") == ["a"]


BROKEN = {
    "no roles": (
        dict(roles=[], edges=[]), ["no roles", "at least one"]),
    "two of one name": (
        dict(roles=[A, B, B]), ["two roles", " b", "rename"]),
    "role named question": (
        dict(roles=[A, B, role("question", "{question}")]), ["question", "rename"]),
    "role named answer_format": (
        dict(roles=[A, B, role("answer_format", "{question}")]), ["answer_format", "rename"]),
    "two edges of one key": (
        dict(edges=[AB, change(BA, key="ab")]), ["two edges", "ab", "rename"]),
    "edge from nowhere": (
        dict(edges=[AB, change(BA, src="x")]), ["edge ba", "role x", "one of a, b"]),
    "edge to nowhere": (
        dict(edges=[AB, BA, Edge("ax", "a", "x")]), ["edge ax", "role x", "one of a, b"]),
    "last role that nobody reaches": (
        dict(roles=[A, role("b", "{question}")], edges=[BA]), [" b", "last role", "add an edge"]),
    "no model": (
        dict(roles=[change(A, model=""), B]), ["role a", "no model", "hub id"]),
    "unknown kind": (
        dict(roles=[A, change(B, prompt={"maths": B.prompt})]), ["role b", "maths", *KINDS]),
    "no question in a prompt": (
        dict(roles=[A, change(B, prompt="heard {a}")]),
        ["role b", "prompt", "{question}", "add it"]),
    "no question in a first": (
        dict(roles=[change(A, first="begin"), B]), ["role a", "first", "{question}", "add it"]),
    "no question in one kind": (
        dict(roles=[A, change(B, prompt={"math": B.prompt, "code": "heard {a}"})]),
        ["role b", "code", "{question}", "add it"]),
    "a slot in a first": (
        dict(roles=[change(A, first="{question} {b}"), B]), ["role a", "first", "{b}", "take"]),
    "a missing slot": (
        dict(roles=[A, change(B, prompt="{question}")]), ["role b", "hears a", "{a}", "add one"]),
    "a missing slot in one kind": (
        dict(roles=[A, change(B, prompt={"math": B.prompt, "code": "{question}"})]),
        ["role b", "code", "{a}", "add one"]),
    "a slot without an edge": (
        dict(roles=[A, change(B, prompt="{question} {a} {b}")]),
        ["role b", "{b}", "add an edge b -> b"]),
    "an empty prompt": (
        dict(roles=[A, change(B, prompt="")]), ["role b", "prompt", "add it"]),
    "an empty dict of prompts": (
        dict(roles=[A, change(B, prompt={})]), ["role b", "prompt"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_styles_are_refused_when_made(case):
    """One line that names the style, the role and the fix."""
    changes, named = BROKEN[case]
    with pytest.raises(ValueError) as problem:
        style(**changes)
    text = str(problem.value)
    assert text.startswith("style duo: ") and "\n" not in text
    for part in named:
        assert part in text, text


def test_a_style_changed_later_is_checked_again():
    """dataclasses.replace, as --prompts uses it, makes a new Style."""
    with pytest.raises(ValueError, match="style duo: .*last role"):
        change(style(), edges=(BA,))
    check(style())


def test_roles_with_odd_names():
    """A name with characters that mean something in a pattern is a name like any other."""
    odd = Style("odd", (role("a.b+", "{question}\n{a|b}"), role("a|b", "{question}\n{a.b+}")),
                (Edge("1", "a.b+", "a|b"), Edge("2", "a|b", "a.b+")))
    assert odd.prompt(odd.roles[0], "math", ["a|b"]) == "{question}\n{a|b}"
    assert odd.prompt(odd.roles[1], "math", []) == "{question}"


def test_a_question_that_would_vanish_with_a_slot_is_refused():
    """The last role alone, and the first one in round 1, hear nothing: their slot's line goes."""
    good, beside = "{question}\n{%s}", "{question} {%s}"
    edges = (Edge("1", "a", "b"), Edge("2", "b", "a"))
    for prompts in ((beside, good), (good, beside)):
        roles = [role(name, prompt % other)
                 for name, other, prompt in zip("ab", "ba", prompts)]
        with pytest.raises(ValueError, match="shares its line with a slot"):
            Style("pair", tuple(roles), edges)
        roles = [dataclasses.replace(one, first="{question}") for one in roles]
        assert Style("pair", tuple(roles), edges).prompt(roles[0], "math", []) == "{question}"


def test_published_role_names_are_understood():
    assert get_style("sequential_light").role("refiner").name == "critic"
    assert get_style("tiny").role("critic").name == "critic"


# ---- what a role is asked -----------------------------------------------------------------------

TRIO = Style("trio", (
    role("a", "{question}\nfrom b: {b}\nfrom c: {c}\nend {answer_format}",
         first={"math": "plan {question}", "code": "outline {question}"}),
    role("b", {"math": "{question}\n{a} is what a says\nthink", "code": "{question} and {a}\ngo"}),
    role("c", "\\boxed{} {question} \\boxed{{x}}\n{a}\n{unknown} {0} %s\n\n{b}\n{answer_format}")),
    (Edge("ab", "a", "b"), Edge("ac", "a", "c"), Edge("bc", "b", "c"), Edge("ba", "b", "a"),
     Edge("ca", "c", "a")))


def test_first_is_used_until_something_is_heard():
    a = TRIO.role("a")
    assert TRIO.prompt(a, "math", []) == "plan {question}"
    assert TRIO.prompt(a, "code", {}) == "outline {question}"
    assert TRIO.prompt(a, "math", ["b", "c"]) == a.prompt


def test_lines_with_an_unfilled_slot_are_left_out():
    """Just those lines, also where something else is heard already, also without a `first`."""
    a, b, c = TRIO.roles
    assert TRIO.prompt(a, "math", ["c"]) == "{question}\nfrom c: {c}\nend {answer_format}"
    assert TRIO.prompt(b, "math", []) == "{question}\nthink"
    assert TRIO.prompt(b, "math", ["a"]) == "{question}\n{a} is what a says\nthink"
    assert TRIO.prompt(c, "math", ["b"]) == (
        "\\boxed{} {question} \\boxed{{x}}\n{unknown} {0} %s\n\n{b}\n{answer_format}")


def test_other_braces_survive():
    assert TRIO.prompt(TRIO.role("c"), "math", ["a", "b"]) == TRIO.role("c").prompt


def test_heard_by_is_in_order_of_speaking():
    assert TRIO.heard_by("a") == ["b", "c"] and TRIO.heard_by("c") == ["a", "b"]
    assert change(TRIO, edges=TRIO.edges[::-1]).heard_by("c") == ["a", "b"]


def test_by_kind():
    """A str serves every kind; a dict only its own, and says which."""
    assert by_kind(TRIO, A, "same", "search") == "same"
    with pytest.raises(ValueError) as problem:
        TRIO.prompt(TRIO.role("b"), "choice", ["a"])
    for part in ("style trio", "role b", "'choice'", "math, code"):
        assert part in str(problem.value)
    with pytest.raises(ValueError, match="role a.*'choice'.*math, code"):
        TRIO.prompt(TRIO.role("a"), "choice", [])


def test_role_by_name():
    assert TRIO.role("b") is TRIO.roles[1]
    with pytest.raises(ValueError, match="style trio.*'d'.*a, b, c"):
        TRIO.role("d")


def test_alone_hears_itself():
    """The last role with its own text in its first slot; lines with other slots are left out."""
    alone = TRIO.alone()
    [last] = alone.roles
    assert last.name == "c" and alone.heard_by("c") == ["c"] and len(alone.edges) == 1
    assert last.prompt == ("\\boxed{} {question} \\boxed{{x}}\n{c}\n{unknown} {0} %s\n\n"
                           "{answer_format}")
    assert "{c}" not in alone.prompt(last, "math", [])
    assert (last.model, last.repo, alone.name) == ("some/model", "some/repo", "trio")


def test_alone_by_kind_and_with_first():
    texts = {"math": "{question}\nheard {a}", "code": "{a} {question}"}
    last = role("b", texts, first="go {question}")
    alone = style(roles=(A, last)).alone()
    assert alone.roles[0].prompt == {"math": "{question}\nheard {b}", "code": "{b} {question}"}
    assert alone.prompt(alone.roles[0], "code", []) == "go {question}"
    assert alone.prompt(alone.roles[0], "code", ["b"]) == "{b} {question}"


def test_alone_with_all_slots_in_one_line():
    """A style that loads has its single-agent baselines."""
    roles = (*TRIO.roles[:2], role("c", "{question}\nheard {a} and {b}\nend"))
    alone = change(TRIO, roles=roles).alone()
    assert alone.heard_by("c") == ["c"] and "{question}" in alone.roles[0].prompt
    assert alone.prompt(alone.roles[0], "math", []) == "{question}\nend"


@pytest.mark.parametrize("name", sorted(all_styles()))
def test_every_shipped_style_has_its_baselines(name):
    """alone() of each; and every kind it has a prompt for, it has for all roles."""
    shipped = get_style(name)
    assert shipped.alone().roles[0].name == shipped.roles[-1].name
    for one in shipped.roles:
        kinds = one.prompt if isinstance(one.prompt, dict) else KINDS
        for kind in kinds:
            for other in shipped.roles:
                assert "{question}" in shipped.prompt(other, kind, shipped.heard_by(other.name))
                assert "{question}" in shipped.prompt(other, kind, [])


# ---- the shipped styles -------------------------------------------------------------------------

def test_get_style():
    """By name, or a Style as it is; an unknown name lists the known ones."""
    assert get_style("sequential_light").name == "sequential_light"
    duo = style()
    assert get_style(duo) is duo
    with pytest.raises(ValueError, match="'parallel'.*sequential_light.*sequential_scaled.*tiny"):
        get_style("parallel")
    assert all(name == found.name for name, found in all_styles().items())


def test_answer_formats():
    assert set(ANSWER_FORMAT) == set(KINDS)
    for kind, text in ANSWER_FORMAT.items():
        assert ("```python" if kind == "code" else "\\boxed{") in text


LIGHT_EDGES = {("outer_12", "planner", "critic"), ("outer_23", "critic", "solver"),
               ("outer_31", "solver", "planner")}
PUBLISHED = {      # as published: {style: (start of the repos, roles, edges, tools)}, a role being
    "sequential_light": ("Sequential-Light-", (      # (name, base, end of its repo, columns)
        ("planner", "Qwen/Qwen3-1.7B", "Planner-Qwen3-1.7B", "plan"),
        ("critic", "meta-llama/Llama-3.2-1B-Instruct", "Critic-Llama3.2-1B", "refined_plan"),
        ("solver", "Qwen/Qwen2.5-Math-1.5B-Instruct", "Solver-Qwen2.5-Math-1.5B", "answer")),
        LIGHT_EDGES, ()),
    "sequential_scaled": ("Sequential-Scaled-", (
        ("planner", "google/gemma-3-4b-it", "Planner-Gemma3-4B", "plan"),
        ("critic", "meta-llama/Llama-3.2-3B-Instruct", "Critic-Llama3.2-3B", "refined_plan"),
        ("solver", "Qwen/Qwen3.5-4B", "Solver-Qwen3.5-4B", "answer")),
        LIGHT_EDGES, ()),
    "mixture": ("Mixture-", (
        ("math", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "Math-DeepSeek-R1-Distill-Qwen-1.5B",
         "hie_math_expert math_expert expert_math"),
        ("code", "Qwen/Qwen2.5-Coder-3B-Instruct", "Code-Qwen2.5-Coder-3B",
         "hie_code_expert code_expert expert_code"),
        ("science", "BioMistral/BioMistral-7B", "Science-BioMistral-7B",
         "hie_science_expert science_expert expert_science"),
        ("summarizer", "Qwen/Qwen3.5-2B", "Summarizer-Qwen3.5-2B",
         "hie_summarizer summary answer")),
        {("outer_1s", "math", "summarizer"), ("outer_2s", "code", "summarizer"),
         ("outer_3s", "science", "summarizer"), ("outer_s1", "summarizer", "math"),
         ("outer_s2", "summarizer", "code"), ("outer_s3", "summarizer", "science")}, ()),
    "distillation": ("Distillation-", (
        ("expert", "Qwen/Qwen3.5-9B", "Expert-Qwen3.5-9B",
         "distill_expert refined_plan expert_plan"),
        ("learner", "Qwen/Qwen3.5-4B", "Learner-Qwen3.5-4B",
         "distill_learner answer learner_answer")),
        {("outer_el", "expert", "learner"), ("outer_le", "learner", "expert")}, ()),
    "deliberation": ("Deliberation-", (
        ("reflector", "Qwen/Qwen3.5-4B", "Reflector-Qwen3.5-4B", "deliberation_reflector answer"),
        ("toolcaller", "Qwen/Qwen3.5-4B", "Toolcaller-Qwen3.5-4B",
         "deliberation_toolcaller answer")),
        {("outer_rt", "reflector", "toolcaller"), ("outer_tr", "toolcaller", "reflector")},
        ("python", "search")),
}
ALIASES = {      # as published: (design, role) -> (style, role)
    ("sequential", "planner"): ("sequential_light", "planner"),
    ("sequential", "refiner"): ("sequential_light", "critic"),
    ("sequential", "solver"): ("sequential_light", "solver"),
    ("hie", "hie_math_expert"): ("mixture", "math"),
    ("hie", "hie_code_expert"): ("mixture", "code"),
    ("hie", "hie_science_expert"): ("mixture", "science"),
    ("hie", "hie_summarizer"): ("mixture", "summarizer"),
    ("distill", "distill_expert"): ("distillation", "expert"),
    ("distill", "distill_learner"): ("distillation", "learner"),
    ("deliberation", "deliberation_reflector"): ("deliberation", "reflector"),
    ("deliberation", "deliberation_toolcaller"): ("deliberation", "toolcaller"),
}


def test_every_published_style_is_shipped():
    assert set(all_styles()) == {*PUBLISHED, "tiny"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_styles_are_the_published_ones(name):
    """Roles in their order, base models, repos, columns, edges, tools."""
    shipped, (start, roles, edges, tools) = get_style(name), PUBLISHED[name]
    assert [(one.name, one.model, one.repo, one.target) for one in shipped.roles] == [
        (role_name, model, f"RecursiveMAS/{start}{repo}", tuple(columns.split()))
        for role_name, model, repo, columns in roles]
    assert shipped.repo == f"RecursiveMAS/{start}Outerlinks"
    assert {(edge.key, edge.src, edge.dst) for edge in shipped.edges} == edges
    assert len(shipped.edges) == len(edges) and shipped.tools == tools


@pytest.mark.parametrize("design, alias", ALIASES)
def test_published_names_of_designs_and_roles(design, alias):
    name, role_name = ALIASES[design, alias]
    assert get_style(design) is get_style(name)
    assert get_style(design).role(alias) is get_style(name).role(role_name)


@pytest.mark.parametrize("path", sorted(STYLE_FOLDER.glob("[!_]*.py")), ids=lambda path: path.stem)
def test_a_style_file_is_short(path):
    """Under 60 lines (sequential, which holds two styles, 100)."""
    assert len(path.read_text().splitlines()) <= (100 if path.stem == "sequential" else 59)


def test_lines_are_short():
    """At most 100 characters, in all of the project."""
    assert [f"{path.name}:{number}" for path in sorted(PROJECT.rglob("*.py"))
            for number, line in enumerate(path.read_text().splitlines(), start=1)
            if len(line) > 100] == []


def prompts_of(shipped):
    """(role, kind, whom it has heard, prompt) of every prompt a run of a style can ask for."""
    for one in shipped.roles:
        for kind in KINDS:
            for heard in ([], shipped.heard_by(one.name)):
                yield one, kind, heard, shipped.prompt(one, kind, heard)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_role_has_a_prompt_for_every_kind(name):
    """All kinds differ for each role, and each role says who it is."""
    for one in get_style(name).roles:
        assert set(one.prompt) == set(KINDS) == set(one.first or KINDS)
        assert len(set(one.prompt.values())) == len(KINDS) and one.system.strip()


@pytest.mark.parametrize("name", PUBLISHED)
def test_questions_stand_before_slots(name):
    """So that all before the first slot is read once; and only the last role, which answers, is
    told the format."""
    shipped = get_style(name)
    for one, _, heard, text in prompts_of(shipped):
        slots = [text.index(f"{{{other}}}") for other in heard]
        assert all(text.index("{question}") < slot for slot in slots)
        assert ("{answer_format}" in text) == (one is shipped.roles[-1])


@pytest.mark.parametrize("name", PUBLISHED)
def test_nothing_is_left_open(name):
    """Each slot once, for those heard and no others; no brace is left; no gaps, no loose ends."""
    shipped = get_style(name)
    for one, kind, heard, text in prompts_of(shipped):
        for part in ("question", *heard):
            assert text.count(f"{{{part}}}") == 1
            text = text.replace(f"{{{part}}}", "X")
        text = text.replace("{answer_format}", "X")
        assert not re.search(r"[{}]", text), (one.name, kind, text)
        assert "\n\n\n" not in text and text == text.strip() and "  " not in text
        assert not re.search(r"[{}]", one.system)


def test_published_settings():
    """As published: latent lengths, batches and budgets of the inference."""
    light, scaled = get_style("sequential_light").settings, get_style("sequential_scaled").settings
    for settings, batch, lengths in ((light, 32, (48, 32, 32, 16)), (scaled, 16, (32, 48, 48, 16))):
        assert settings["evaluate"]["batch_size"] == batch
        assert tuple(settings[data]["latent_length"]
                     for data in ("math500", "medqa", "gpqa", "mbppplus")) == lengths
        assert settings["mbppplus"]["temperature"] == 0.2
    assert light["math500"]["max_new_tokens"] == 1000
    assert scaled["math500"]["max_new_tokens"] == 2000
    for name in PUBLISHED:
        settings = get_style(name).settings
        budgets = {data: settings[data]["max_new_tokens"] for data in (
            "aime25", "aime26", "gpqa", "medqa", "mbppplus", "livecodebench")}
        assert list(budgets.values()) == [16000, 16000, 4000, 4000, 4000, 4000]
        assert settings["math500"]["max_new_tokens"] == (
            1000 if name == "sequential_light" else 2000)
        assert settings["livecodebench"]["temperature"] == 0.2
        assert settings["evaluate"]["batch_size"] == (32 if name == "sequential_light" else 16)
        assert not {"train_inner", "train_outer"} & set(settings)       # the published defaults

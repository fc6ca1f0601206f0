"""Styles: what is refused and how it is said, what a role is asked, and the published styles."""
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

import styles
from styles import (ANSWER_FORMAT, KINDS, Edge, Role, Style, all_styles, check, get_style,
                    published)

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

def test_a_single_role_without_a_comma_is_named():
    with pytest.raises(ValueError, match="style duo: its edges are no tuple of Edge: .* comma"):
        Style("duo", (A, B), AB)


def test_the_unbroken_style_is_fine():
    """So that each error below is due to its one change."""
    assert style().name == "duo"
    assert style(roles=[A, change(B, prompt={"math": B.prompt})]).heard_by("b") == ["a"]


BROKEN = {
    "no roles": (
        dict(roles=[], edges=[]), ["roles are no tuple", "(Role(..), ..)"]),
    "two edges of one way": (
        dict(edges=[AB, BA, change(AB, key="again")]), ["two ways", "a -> b", "take one out"]),
    "edge key that a module has": (
        dict(edges=[AB, change(BA, key="to")]), ["edge key 'to'", "taken", "other letters"]),
    "no model": (
        dict(roles=[change(A, model=""), B]), ["role a", "no model", "hub id"]),
    "target that is no tuple": (
        dict(roles=[change(A, target="plan"), B]), ["role a", "target", "('plan',)"]),
    "unknown kind": (
        dict(roles=[A, change(B, prompt={"maths": B.prompt})]), ["role b", "maths", *KINDS]),
    "unknown kind in a first": (
        dict(roles=[change(A, first={"maths": "{question}"}), B]), ["role a", "maths", *KINDS]),
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
    "edge key that is no file name": (
        dict(edges=[AB, change(BA, key="b/a")]), ["edge key 'b/a'", "letters"]),
    "last role that nobody reaches": (
        dict(roles=[A, role("b", "{question}")], edges=[BA]), [" b", "last role", "add an edge"]),
    "no question in a prompt": (
        dict(roles=[A, change(B, prompt="heard {a}")]),
        ["role b", "'heard {a}'", "{question}", "add it"]),
    "no question in a first": (
        dict(roles=[change(A, first="begin"), B]), ["role a", "'begin'", "{question}", "add it"]),
    "no question in an own": (
        dict(roles=[A, change(B, own="mine {b}")]), ["role b", "'mine {b}'", "{question}"]),
    "no question in one kind": (
        dict(roles=[A, change(B, prompt={"math": B.prompt, "code": "heard {a}"})]),
        ["role b", "'heard {a}'", "{question}", "add it"]),
    "a slot in the first speaker's first": (
        dict(roles=[change(A, first="{question} {b}"), B]), ["role a", "`first`", "(nobody)"]),
    "a slot in the last role's first": (
        dict(roles=[A, change(B, first="{question} {a}")]), ["role b", "`first`", "(nobody)"]),
    "an own without its slot": (
        dict(roles=[A, change(B, own="{question}")]), ["role b", "`own`", "({b})"]),
    "a missing slot": (
        dict(roles=[A, change(B, prompt="{question}")]),
        ["role b", "`prompt`", "({a})", "or change the edges"]),
    "a missing slot in one kind": (
        dict(roles=[A, change(B, prompt={"math": B.prompt, "code": "{question}"})]),
        ["role b", "`prompt`", "'code'", "({a})", "or change the edges"]),
    "a slot without an edge": (
        dict(roles=[A, change(B, prompt="{question} {a} {b}")]),
        ["role b", "`prompt`", "({a})", "or change the edges"]),
    "an empty prompt": (
        dict(roles=[A, change(B, prompt="")]), ["role b", "`prompt`", "add it"]),
    "an empty dict of prompts": (
        dict(roles=[A, change(B, prompt={})]), ["role b", "`prompt`", "add it"]),
    "a role that hears later ones has no first": (
        dict(roles=[change(A, first=""), B]), ["role a", "`first`", "(nobody)", "add it"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_styles_are_refused_when_made(case):
    """The error is one line that names the style, the role and the fix."""
    changes, named = BROKEN[case]
    with pytest.raises(ValueError) as problem:
        style(**changes)
    text = str(problem.value)
    assert text.startswith("style duo: ") and "\n" not in text
    for part in named:
        assert part in text, text


def test_a_first_between_two_sides_holds_early_slots():
    """A role that hears one role before it and one after it has heard the former in round 1."""
    roles = [role("a", "{question}"), role("b", "{question} {a} {c}", first="{question} {a}"),
             role("c", "{question} {b}")]
    edges = (Edge("ab", "a", "b"), Edge("bc", "b", "c"), Edge("cb", "c", "b"))
    assert style(roles, edges).roles[1].first == "{question} {a}"
    for first in ("{question}", "{question} {c}", "{question} {a} {c}"):
        roles[1] = change(roles[1], first=first)
        with pytest.raises(ValueError, match=r"role b has no `first`.*\({a}\)"):
            style(roles, edges)


def test_a_style_changed_later_is_checked_again():
    """dataclasses.replace, as a style file uses it, makes a new Style."""
    with pytest.raises(ValueError, match="style duo: .*last role"):
        change(style(), edges=(BA,))
    check(style())


def test_roles_with_odd_names():
    """A name with characters that mean something in a pattern is a name like any other."""
    odd = Style("odd", (role("a.b+", "{question}\n{a|b}", first="{question}"),
                        role("a|b", "{question}\n{a.b+}")),
                (Edge("1", "a.b+", "a|b"), Edge("2", "a|b", "a.b+")))
    assert odd.prompt(odd.roles[0], "math", ["a|b"]) == "{question}\n{a|b}"
    assert odd.prompt(odd.roles[0], "math", []) == "{question}"
    assert odd.prompt(odd.roles[1], "math", ["a.b+"]) == "{question}\n{a.b+}"


def test_published_role_names_are_understood():
    assert get_style("sequential_light").role("refiner").name == "critic"
    assert get_style("tiny").role("critic").name == "critic"


# ---- what a role is asked -----------------------------------------------------------------------

C_PROMPT = "\\boxed{} {question} \\boxed{{x}}\n{a}\n{unknown} {0} %s\n\n{b}\n{answer_format}"
TRIO = Style("trio", (
    role("a", "{question}\nfrom b: {b}\nfrom c: {c}\nend {answer_format}",
         first={"math": "plan {question}", "code": "outline {question}"}),
    role("b", {"math": "{question}\n{a} is what a says, {c} is what c says\nthink",
               "code": "{question}, {a} and {c}\ngo"},
         first={"math": "{question}\n{a} is what a says\nthink", "code": "{question} and {a}"}),
    role("c", C_PROMPT, first="\\boxed{} {question} alone", own="{question}\n{c}\nagain")),
    (Edge("ab", "a", "b"), Edge("ac", "a", "c"), Edge("bc", "b", "c"), Edge("ba", "b", "a"),
     Edge("ca", "c", "a"), Edge("cb", "c", "b")))


def test_prompt_is_used_once_all_are_heard():
    """Nothing is cut from it: a question may share its line with a slot."""
    for one in TRIO.roles:
        heard = TRIO.heard_by(one.name)
        wanted = one.prompt if isinstance(one.prompt, str) else one.prompt["math"]
        assert TRIO.prompt(one, "math", heard) == wanted
        assert TRIO.prompt(one, "math", heard[::-1]) == wanted
    beside = change(B, prompt="{question} {a}", first="{question}")
    assert style([A, beside]).prompt(beside, "math", ["a"]) == "{question} {a}"
    assert style([A, beside]).prompt(beside, "math", []) == "{question}"


def test_first_is_used_until_all_are_heard():
    """The first speaker has heard nobody, the second one has heard the first one."""
    a, b, c = TRIO.roles
    assert TRIO.prompt(a, "math", []) == "plan {question}"
    assert TRIO.prompt(a, "code", {}) == "outline {question}"
    assert TRIO.prompt(b, "math", ["a"]) == "{question}\n{a} is what a says\nthink"
    assert TRIO.prompt(b, "code", ["a"]) == "{question} and {a}"
    assert TRIO.prompt(c, "math", []) == "\\boxed{} {question} alone"


@pytest.mark.parametrize("name, heard", [("a", ["b"]), ("a", ["c"]), ("b", []), ("b", ["c"]),
                                         ("c", ["a"]), ("c", ["b"])])
def test_a_style_without_words_for_what_was_heard_says_so(name, heard):
    """No prompt holds these slots and no others. No slot is left open, and none is left out."""
    with pytest.raises(ValueError) as problem:
        TRIO.prompt(TRIO.role(name), "math", heard)
    text = str(problem.value)
    assert "\n" not in text
    for part in ("style trio", f"role {name}", "`first`", "'math'", *heard, "add it"):
        assert part in text, text


def test_a_role_without_first_has_no_words_alone():
    """B hears A before it speaks. It needs a `first` for method single alone."""
    assert style().prompt(B, "math", ["a"]) == B.prompt
    with pytest.raises(ValueError, match="style duo.*role b.*`first`.*nobody.*add it"):
        style().prompt(B, "math", [])


def test_other_braces_survive():
    assert TRIO.prompt(TRIO.role("c"), "math", ["a", "b"]) == C_PROMPT


def test_heard_by_is_in_order_of_speaking():
    assert TRIO.heard_by("a") == ["b", "c"] and TRIO.heard_by("c") == ["a", "b"]
    assert change(TRIO, edges=TRIO.edges[::-1]).heard_by("c") == ["a", "b"]


def test_heard_first_are_those_who_speak_before():
    assert [TRIO.heard_first(name) for name in "abc"] == [[], ["a"], ["a", "b"]]
    assert change(TRIO, edges=TRIO.edges[::-1]).heard_first("c") == ["a", "b"]


def test_prompts_by_kind():
    """A text serves every kind. A dict serves its own kinds alone, and the error says which one
    is missing."""
    for kind in KINDS:
        assert TRIO.prompt(TRIO.role("c"), kind, ["a", "b"]) == C_PROMPT
    for name, which, heard in (("b", "prompt", ["a", "c"]), ("b", "first", ["a"]),
                               ("a", "first", [])):
        with pytest.raises(ValueError) as problem:
            TRIO.prompt(TRIO.role(name), "choice", heard)
        for part in ("style trio", f"role {name}", f"`{which}`", "'choice'", "add it"):
            assert part in str(problem.value)
    empty = change(B, prompt={"math": B.prompt, "code": ""})
    with pytest.raises(ValueError, match="role b.*`prompt`.*'code'"):
        style([A, empty]).prompt(empty, "code", ["a"])


def test_role_by_name():
    assert TRIO.role("b") is TRIO.roles[1]
    with pytest.raises(ValueError, match="style trio.*'d'.*a, b, c"):
        TRIO.role("d")


def test_alone_hears_itself():
    """The last role is asked its `first` where it has heard nothing, then its `own`."""
    alone = TRIO.alone()
    [last] = alone.roles
    assert last.name == "c" and alone.heard_by("c") == ["c"] and len(alone.edges) == 1
    assert alone.prompt(last, "math", []) == "\\boxed{} {question} alone"
    assert alone.prompt(last, "math", ["c"]) == "{question}\n{c}\nagain"
    assert (last.model, last.repo, alone.name) == ("some/model", "some/repo", "trio")


def test_alone_by_kind():
    last = change(B, first="go {question}",
                  own={"math": "{question}\nmine {b}", "code": "{b} {question}"})
    alone = style([A, last]).alone()
    assert alone.prompt(alone.roles[0], "code", []) == "go {question}"
    assert alone.prompt(alone.roles[0], "code", ["b"]) == "{b} {question}"
    assert alone.prompt(alone.roles[0], "math", ["b"]) == "{question}\nmine {b}"
    with pytest.raises(ValueError, match="role b.*`own`.*'choice'"):
        alone.prompt(alone.roles[0], "choice", ["b"])


def test_alone_without_own():
    """Such a style loads, and its last role can be asked alone. Hearing its own text needs `own`,
    and the error names that."""
    alone = style([A, change(B, first="go {question}")]).alone()
    assert alone.prompt(alone.roles[0], "math", []) == "go {question}"
    with pytest.raises(ValueError, match="style duo.*role b.*`own`.*add it"):
        alone.prompt(alone.roles[0], "math", ["b"])


@pytest.mark.parametrize("name", sorted(all_styles()))
def test_every_shipped_style_has_its_baselines(name):
    """It has the last role alone. Every kind that it has a prompt for, it has for all roles."""
    shipped = get_style(name)
    alone = shipped.alone()
    [last] = alone.roles
    assert last.name == shipped.roles[-1].name
    for one in shipped.roles:
        kinds = one.prompt if isinstance(one.prompt, dict) else KINDS
        for kind in kinds:
            for other in shipped.roles:
                asked = "{told}" if (name, other.name) == ("relay", "planner") else "{question}"
                for heard in ([], shipped.heard_by(other.name), shipped.heard_first(other.name)):
                    assert asked in shipped.prompt(other, kind, heard)
            for heard in ([], [last.name]):
                assert "{question}" in alone.prompt(last, kind, heard)


# ---- the shipped styles -------------------------------------------------------------------------

def test_get_style():
    """A style is found by its name, or is a Style already. An unknown name lists the known ones.
    """
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
    assert set(all_styles()) == {*PUBLISHED, "tiny", "relay", "duo"}


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


@pytest.mark.parametrize("path", [path for path in sorted(STYLE_FOLDER.glob("[!_]*.py"))
                                  if path.stem != "published"], ids=lambda path: path.stem)
def test_a_style_file_is_short(path):
    """Under 60 lines (sequential, which holds two styles, 100). published.py is a script."""
    assert len(path.read_text().splitlines()) <= (100 if path.stem == "sequential" else 59)


def test_lines_are_short():
    """At most 100 characters, in all of the project."""
    assert [f"{path.name}:{number}" for path in sorted(PROJECT.rglob("*.py"))
            for number, line in enumerate(path.read_text().splitlines(), start=1)
            if len(line) > 100] == []


def prompts_of(shipped):
    """(role, kind, whom it has heard, prompt) of every prompt a run of a style can ask for."""
    alone = shipped.alone()
    for kind in KINDS:
        for one in shipped.roles:
            for heard in ([], shipped.heard_by(one.name)):
                yield one, kind, heard, shipped.prompt(one, kind, heard)
        last = alone.roles[0]
        yield last, kind, [last.name], alone.prompt(last, kind, [last.name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_role_has_a_prompt_for_every_kind(name):
    """All kinds differ for each role, and each role says who it is."""
    roles = get_style(name).roles
    for one in roles:
        for prompts in (one.prompt, one.first, *([one.own] if one is roles[-1] else [])):
            assert set(prompts) == set(KINDS) and len(set(prompts.values())) == len(KINDS)
        assert one.system.strip()


@pytest.mark.parametrize("name", PUBLISHED)
def test_questions_stand_before_slots(name):
    """So all before the first slot is read once. Only the last role answers, so only it is told
    the format."""
    shipped = get_style(name)
    for one, _, heard, text in prompts_of(shipped):
        slots = [text.index(f"{{{other}}}") for other in heard]
        assert all(text.index("{question}") < slot for slot in slots)
        assert ("{answer_format}" in text) == (one.name == shipped.roles[-1].name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_nothing_is_left_open(name):
    """Each slot is there once, for those heard and no others. No brace is left open, and there are
    no gaps and no loose ends."""
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


# ---- the words that the released links were trained under ---------------------------------------

# A stand-in for prompts.py of the published repository: the same function names and arguments, and
# other words. It imports a neighbour, as the original does.
CLONE = '''
from inference_utils.notes import NOTE
PLANNER_SLOT, REFINED_SLOT, FEEDBACK_SLOT = "<<P>>", "<<R>>", "<<F>>"
HIE_MATH_EXPERT_SLOT, HIE_CODE_EXPERT_SLOT, HIE_SCIENCE_EXPERT_SLOT = "<<m>>", "<<c>>", "<<s>>"
HIE_FEEDBACK_SLOT = "<<hf>>"
DISTILL_EXPERT_SLOT, DISTILL_FEEDBACK_SLOT = "<<de>>", "<<df>>"
DELIBERATION_REFLECTOR_SLOT, DELIBERATION_FEEDBACK_SLOT = "<<dr>>", "<<dc>>"

def get_system_prompt(mas_design, mas_role):
    return f"I am {mas_role} of {mas_design}."

def build_math_planner_prompt(question):
    return f"Plan: {question}"
def build_math_planner_prompt_with_feedback_slot(question):
    return f"Plan anew: {question} {FEEDBACK_SLOT}"
def build_math_refiner_prompt_with_slot(question):
    return f"Refine: {question} {PLANNER_SLOT}"
def build_math_solver_prompt_with_slots(question, args=None, mas_shape="chain"):
    end = "with a letter" if "\\nB. " in question else r"in \\boxed{}"
    parts = [REFINED_SLOT, question]
    if getattr(args, "solver_pre_question", 0) == 1:
        parts.reverse()
    return " ".join([*parts, end, mas_shape])

def build_code_planner_prompt(question, task_type, fn_name):
    return f"Plan a {task_type}: {question}"
def build_code_planner_prompt_with_feedback_slot(question, task_type, fn_name):
    return f"Plan a {task_type} anew: {question} {FEEDBACK_SLOT}"
def build_code_refiner_prompt_with_slot(question, task_type, fn_name):
    return f"Refine a {task_type}: {question} {PLANNER_SLOT}"
def build_code_solver_prompt_with_slots(question, task_type, args, mas_shape, fn_name):
    return f"Write a {task_type}: {REFINED_SLOT} {question}"

def build_hie_expert_prompt(question, hie_role, mas_task, task_type, fn_name):
    return f"{hie_role} on {mas_task}: {question}"
def build_hie_expert_prompt_with_feedback_slot(question, hie_role, mas_task, task_type, fn_name):
    return f"{hie_role} on {mas_task}: {question} {HIE_FEEDBACK_SLOT}"
def build_hie_summarizer_prompt_with_slots(question, mas_task, task_type=None, fn_name=None):
    slots = [HIE_MATH_EXPERT_SLOT, HIE_CODE_EXPERT_SLOT, HIE_SCIENCE_EXPERT_SLOT]
    return f"Sum up {mas_task}: {question} {' '.join(slots)}"

def build_distill_expert_prompt(question, mas_task):
    return f"Teach {mas_task}: {question}"
def build_distill_expert_prompt_with_feedback_slot(question, mas_task):
    return f"Teach {mas_task}: {question} {DISTILL_FEEDBACK_SLOT}"
def build_distill_learner_prompt_with_slot(question, mas_task):
    return f"Learn {mas_task}: {question} {DISTILL_EXPERT_SLOT}"

def build_deliberation_reflector_prompt(question, mas_task):
    return f"Reflect on {mas_task}: {question}"
def build_deliberation_reflector_prompt_with_feedback_slot(question, mas_task):
    return f"Reflect on {mas_task}: {question} {DELIBERATION_FEEDBACK_SLOT}"
def build_deliberation_toolcaller_prompt_with_slot(question, mas_task):
    return f"Act on {mas_task}: {NOTE} {question} {DELIBERATION_REFLECTOR_SLOT}"
'''


@pytest.fixture
def clone(tmp_path):
    (tmp_path / "clone/inference/inference_utils").mkdir(parents=True)
    (tmp_path / "clone/inference/prompts.py").write_text(CLONE)
    (tmp_path / "clone/inference/inference_utils/notes.py").write_text("NOTE = 'with tools'")
    return tmp_path / "clone"


@pytest.fixture
def ask_clone(clone, monkeypatch, capsys):
    """The style that styles/published.py makes of the clone with these flags."""
    def ask(*flags, folder=clone):
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(sys, "argv", ["published.py", str(folder), *flags])
        published.main()
        (clone / "mine.py").write_text(capsys.readouterr().out)
        return get_style(str(clone / "mine.py"))
    return ask


def test_the_command_of_published_words(clone):
    """It runs from any folder, and an error is one line."""
    done = subprocess.run([sys.executable, PROJECT / "styles/published.py", clone, "--style",
                           "deliberation"], capture_output=True, text=True, cwd=clone)
    assert done.returncode == 0 and done.stdout.startswith('"""deliberation in the words of ')
    done = subprocess.run([sys.executable, PROJECT / "styles/published.py", clone, "--style",
                           "tiny"], capture_output=True, text=True, cwd=clone)
    assert (done.returncode, done.stdout, done.stderr) == (
        2, "", "error: style tiny was not published: choose one that was\n")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_words_are_read_slot_for_slot(name, ask_clone):
    mine, shipped = ask_clone("--style", name), get_style(name)
    assert (mine.name, mine.edges, mine.repo) == (shipped.name, shipped.edges, shipped.repo)
    for role in mine.roles:
        heard, early = mine.heard_by(role.name), mine.heard_first(role.name)
        for kind in ("math", "choice", "code"):
            for told in (heard, early):              # the style's own check holds for the slots
                prompt = mine.prompt(role, kind, told)
                assert "{question}" in prompt and "<<" not in prompt and "A. one" not in prompt
        with pytest.raises(ValueError, match="no `prompt` prompt for kind 'search'"):
            mine.prompt(role, "search", heard)
        assert role.system.startswith("I am ") and role.own == shipped.role(role.name).own


def test_published_words_of_the_sequential_style(ask_clone):
    mine = ask_clone()
    planner, critic, solver = mine.roles
    assert critic.system == "I am refiner of sequential."
    assert planner.first == {"math": "Plan: {question}", "choice": "Plan: {question}",
                             "code": "Plan a function: {question}"}
    assert planner.prompt["math"] == "Plan anew: {question} {solver}"
    assert critic.prompt["code"] == "Refine a function: {question} {planner}"
    assert solver.prompt == {"math": r"{critic} {question} in \boxed{} chain",
                             "choice": "{critic} {question} with a letter chain",
                             "code": "Write a function: {critic} {question}"}
    before = ask_clone("--solver_pre_question", "1").roles[2].prompt
    assert before["math"] == r"{question} {critic} in \boxed{} chain"
    mixed = ask_clone("--style", "mixture")
    assert mixed.role("science").first["choice"] == "hie_science_expert on choice: {question}"


@pytest.mark.parametrize("change, named", [
    (("def build_math_refiner_prompt_with_slot", "def build_refiner"),
     ["no function build_math_refiner_prompt_with_slot", "another layout"]),
    (("def get_system_prompt", "def get_prompt"), ["get_system_prompt"]),
    (("build_math_planner_prompt(question)", "build_math_planner_prompt(question, shots)"),
     ["build_math_planner_prompt", "shots"]),
    ((' "<<F>>"', ' "<<G>>"'), None),
    (("from inference_utils", "from inference_utilities"), ["does not run", "inference_utilities"]),
    (("{PLANNER_SLOT}", ""), ["role critic has no `prompt` prompt", "({planner})"])])
def test_a_clone_of_another_layout_is_one_line(change, named, clone, ask_clone):
    file = clone / "inference/prompts.py"
    assert change[0] in file.read_text()
    file.write_text(file.read_text().replace(*change))
    if named is None:               # what a mark looks like does not matter
        assert ask_clone().roles[0].prompt["math"].endswith("{solver}")
        return
    with pytest.raises(ValueError) as caught:
        ask_clone()
    assert all(one in str(caught.value) for one in named) and "\n" not in str(caught.value)


def test_a_folder_that_is_no_clone(ask_clone, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there is no prompts.py in"):
        ask_clone(folder=tmp_path / "empty")

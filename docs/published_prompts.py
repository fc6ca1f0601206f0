"""A style with the words that the released links were trained under.

    python docs/published_prompts.py ~/RecursiveMAS --style sequential_light > my_style.py
    python evaluate.py --style my_style.py --dataset math500

The prompts of styles/ are our own words. A link that was trained under other words works best under
those. This script asks the functions in prompts.py of your own clone of the published repository
for them, slot for slot, for math, choice and code. None of them is copied into this project.
"""
import inspect
import pprint
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from styles import PUBLISHED_DESIGNS, PUBLISHED_ROLES, get_style    # noqa: E402: needs the path
from support.errors import blame, need    # noqa: E402
from support.flags import Parser, run    # noqa: E402

PUBLISHED = {ours: theirs for theirs, ours in PUBLISHED_ROLES.items()}
# {design: constants of prompts.py that mark where each role is heard, in the order of the roles}
SLOTS = {"sequential": ["PLANNER_SLOT", "REFINED_SLOT", "FEEDBACK_SLOT"],
         "hie": ["HIE_MATH_EXPERT_SLOT", "HIE_CODE_EXPERT_SLOT", "HIE_SCIENCE_EXPERT_SLOT",
                 "HIE_FEEDBACK_SLOT"],
         "distill": ["DISTILL_EXPERT_SLOT", "DISTILL_FEEDBACK_SLOT"],
         "deliberation": ["DELIBERATION_REFLECTOR_SLOT", "DELIBERATION_FEEDBACK_SLOT"]}
# This text after a question makes it look like one with options. It is cut out again afterwards.
OPTIONS = "\nA. one\nB. two\nC. three\nD. four"


def words_of(module, style, design, role, which, kind, args):
    """One of our prompts, with its slots and its question as {names}: what prompts.py asks a role
    (by its published name) about a question of `kind`. which: prompt, or first for round 1."""
    name = "build_" + re.sub("(hie)_.*_expert", r"\1_expert", role)    # one for all three experts
    if design == "sequential":
        name = name.replace("build", "build_code" if kind == "code" else "build_math")
    ends = ("_with_feedback_slot", "_with_slots", "_with_slot") if which == "prompt" else ("",)
    found = [name + "_prompt" + end for end in ends if name + "_prompt" + end in module]
    need(found, f"prompts.py has no function {name}_prompt{ends[-1]}: this clone has another "
         "layout than the release of May 2026")
    offered = {"question": "{question}" + (OPTIONS if kind == "choice" else ""), "mas_task": kind,
               "hie_role": role, "args": args, "task_type": "function", "fn_name": None,
               "mas_shape": "chain"}
    takes = inspect.signature(module[found[0]]).parameters
    with blame(f"{found[0]} of prompts.py asks for other things than in the release"):
        text = module[found[0]](**{key: offered[key] for key in takes if key in offered})
        for heard, constant in zip(style.roles, SLOTS[design]):
            text = text.replace(module[constant], f"{{{heard.name}}}")
    return text.replace(OPTIONS, "")


def main():
    """Ask for all prompts, check the style that they make, and print it as a style file."""
    parser = Parser(__doc__)
    parser.add_argument("clone", help="folder of your clone of the published repository")
    parser.add_argument("--style", default="sequential_light", help="the style to change")
    parser.add_argument("--solver_pre_question", type=int, default=0, choices=[0, 1],
                        help="1: the question stands before the slot, as with their flag")
    args = parser.parse_args()
    style = get_style(args.style)
    light = style.name.replace("_scaled", "_light")      # both have the same words
    design = {ours: theirs for theirs, ours in PUBLISHED_DESIGNS.items()}.get(light)
    need(design, f"style {style.name} was not published: choose one that was")
    files = list(Path(args.clone).expanduser().rglob("prompts.py"))
    need(files, f"prompts.py is missing in {args.clone}: give the folder of your clone")
    file = min(files, key=lambda path: len(path.parts))     # at the root, or in a folder below
    sys.path.insert(0, str(file.parent))                    # it imports its neighbours
    with blame(f"{file} does not run"):
        module = runpy.run_path(str(file))                  # {name: value}
    words = {}
    for role in style.roles:
        theirs = PUBLISHED.get(role.name, role.name)
        with blame(f"get_system_prompt of {file}"):
            words[role.name] = {"system": module["get_system_prompt"](design, theirs)}
        # A role that hears later speakers is asked in other words in round 1.
        early = style.heard_first(role.name) == style.heard_by(role.name)
        for which in ("prompt",) if early else ("prompt", "first"):
            words[role.name][which] = {
                kind: words_of(module, style, design, theirs, which, kind, args)
                for kind in ("math", "choice", "code")}
    replace(style, roles=tuple(replace(role, **words[role.name]) for role in style.roles))  # checks
    print(f'"""{style.name} in the words of {file}, by docs/published_prompts.py."""\n'
          "from dataclasses import replace\n\nfrom styles import get_style\n\n"
          f"WORDS = {pprint.pformat(words, width=100, sort_dicts=False)}\n\n"
          f'style = get_style("{style.name}")\n'
          "style = replace(style, roles=tuple(\n"
          "    replace(role, **WORDS[role.name]) for role in style.roles))")


if __name__ == "__main__":
    run(main)

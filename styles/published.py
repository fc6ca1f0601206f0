"""A style with the words that the released links were trained under.

    python styles/published.py ~/RecursiveMAS --style sequential_light > my_style.py
    python evaluate.py --style my_style.py --dataset math500

The prompts of styles/ are our own words. A link that was trained under other words works best under
those. This script asks the functions in prompts.py of your own clone of the published repository
for them, slot for slot, for math, choice and code. None of them is copied into this project.
"""
import importlib.util
import inspect
import pprint
import sys
from dataclasses import replace
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from styles import PUBLISHED_DESIGNS, PUBLISHED_ROLES, get_style    # noqa: E402: needs the path
from support.errors import blame, need    # noqa: E402
from support.flags import Parser, run    # noqa: E402

PUBLISHED = {ours: theirs for theirs, ours in PUBLISHED_ROLES.items()}
# What follows a question to make it look like one with options. It is cut out of the prompt again.
OPTIONS = "\nA. one\nB. two\nC. three\nD. four"
# {design: {role: (the function of its `prompt`, that of its `first`)}}. {} stands for math or code.
FUNCTIONS = {
    "sequential": {
        "planner": ("build_{}_planner_prompt_with_feedback_slot", "build_{}_planner_prompt"),
        "critic": ("build_{}_refiner_prompt_with_slot",),
        "solver": ("build_{}_solver_prompt_with_slots",)},
    "hie": {
        **dict.fromkeys(("math", "code", "science"), (
            "build_hie_expert_prompt_with_feedback_slot", "build_hie_expert_prompt")),
        "summarizer": ("build_hie_summarizer_prompt_with_slots",)},
    "distill": {
        "expert": ("build_distill_expert_prompt_with_feedback_slot", "build_distill_expert_prompt"),
        "learner": ("build_distill_learner_prompt_with_slot",)},
    "deliberation": {
        "reflector": ("build_deliberation_reflector_prompt_with_feedback_slot",
                      "build_deliberation_reflector_prompt"),
        "toolcaller": ("build_deliberation_toolcaller_prompt_with_slot",)},
}
# {constant of prompts.py: the role that is heard there}
SLOTS = {
    "sequential": {"PLANNER_SLOT": "planner", "REFINED_SLOT": "critic", "FEEDBACK_SLOT": "solver"},
    "hie": {"HIE_MATH_EXPERT_SLOT": "math", "HIE_CODE_EXPERT_SLOT": "code",
            "HIE_SCIENCE_EXPERT_SLOT": "science", "HIE_FEEDBACK_SLOT": "summarizer"},
    "distill": {"DISTILL_EXPERT_SLOT": "expert", "DISTILL_FEEDBACK_SLOT": "learner"},
    "deliberation": {"DELIBERATION_REFLECTOR_SLOT": "reflector",
                     "DELIBERATION_FEEDBACK_SLOT": "toolcaller"},
}


def load_prompts(clone):
    """The module prompts.py of a clone. It lies at the root or in a folder below."""
    found = sorted(Path(clone).expanduser().rglob("prompts.py"), key=lambda file: len(file.parts))
    need(found, f"there is no prompts.py in {clone}: give the folder of your clone")
    sys.path.insert(0, str(found[0].parent))            # it imports its neighbours
    spec = importlib.util.spec_from_file_location("published_prompts", found[0])
    module = importlib.util.module_from_spec(spec)
    with blame(f"{found[0]} does not run"):
        spec.loader.exec_module(module)
    return module


def words_of(module, design, role, name, kind, args):
    """What a function of prompts.py asks `role` about a question of `kind`, as one of our prompts:
    its slots and its question are {names}."""
    name = name.format("code" if kind == "code" else "math")
    function = getattr(module, name, None)
    need(callable(function), f"{module.__file__} has no function {name}: this clone has another "
         "layout than the release of May 2026")
    offered = {"question": "{question}" + (OPTIONS if kind == "choice" else ""), "mas_task": kind,
               "hie_role": PUBLISHED.get(role, role), "args": args, "task_type": "function",
               "fn_name": None, "mas_shape": "chain"}
    takes = inspect.signature(function).parameters
    with blame(f"{name} of {module.__file__} asks for other things than in the release"):
        text = function(**{key: value for key, value in offered.items() if key in takes})
        for constant, heard in SLOTS[design].items():
            text = text.replace(getattr(module, constant, constant), f"{{{heard}}}")
    return text.replace(OPTIONS, "")


def main():
    """Ask for all prompts, check the style that they make, and print it as a style file."""
    parser = Parser(__doc__)
    parser.add_argument("clone", help="folder of your clone of the published repository")
    parser.add_argument("--style", default="sequential_light", help="the style to change")
    parser.add_argument("--solver_pre_question", type=int, default=0, choices=[0, 1],
                        help="1: the question stands before the slot, as with their flag")
    args = parser.parse_args()
    style, module = get_style(args.style), load_prompts(args.clone)
    design = {ours.split("_")[0]: theirs for theirs, ours in PUBLISHED_DESIGNS.items()}.get(
        style.name.split("_")[0])
    need(design, f"style {style.name} was not published: choose one that was")
    words = {}
    for role, functions in FUNCTIONS[design].items():
        with blame(f"get_system_prompt of {module.__file__}"):
            words[role] = {"system": module.get_system_prompt(design, PUBLISHED.get(role, role))}
        for which, name in zip(("prompt", "first"), functions):
            words[role][which] = {kind: words_of(module, design, role, name, kind, args)
                                  for kind in ("math", "choice", "code")}
    replace(style, roles=tuple(replace(role, **words[role.name]) for role in style.roles))  # checks
    print(f'"""{style.name} in the words of {module.__file__}, by styles/published.py."""\n'
          "from dataclasses import replace\n\nfrom styles import get_style\n\n"
          f"WORDS = {pprint.pformat(words, width=100, sort_dicts=False)}\n\n"
          f'style = get_style("{style.name}")\n'
          "style = replace(style, roles=tuple(\n"
          "    replace(role, **WORDS[role.name]) for role in style.roles))")


if __name__ == "__main__":
    run(main)

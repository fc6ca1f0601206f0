"""Planner -> critic -> solver -> planner ..: the paper's sequential style, light and scaled.

The prompts are our own words: the released links were trained under others, so they may score
lower here than published; `evaluate.py --prompts FILE.json` puts other words in.
"""
from styles import Edge, Role, Style

TASK = {
    "math": "Problem:\n{question}",
    "choice": "Multiple-choice question:\n{question}",
    "code": "Programming task:\n{question}",
}
PLAN = {
    "math": "Lay out the steps that lead to the result. Do not carry them out.",
    "choice": "Say which facts decide between the options. Do not choose yet.",
    "code": "Outline an algorithm, with its edge cases. Do not write the program.",
}
SOLVE = {
    "math": "Solve the problem step by step. {answer_format}",
    "choice": "Weigh the options one by one, then choose. {answer_format}",
    "code": "Write the program. {answer_format}",
}


def prompts(*parts):
    """{kind: prompt}, each put together from parts that are a str or a {kind: str}."""
    return {kind: "\n\n".join(part if isinstance(part, str) else part[kind] for part in parts)
            for kind in TASK}


def sequential(name, title, planner, critic, solver, settings):
    """The style over three base models, given as (hub id, name in the released repo)."""
    def repo(part):
        return f"RecursiveMAS/Sequential-{title}-{part}"

    return Style(
        name=name,
        repo=repo("Outerlinks"),
        roles=(
            Role("planner", planner[0], repo(f"Planner-{planner[1]}"), target=("plan",),
                 system="You are the planner of a team of three.",
                 prompt=prompts(TASK, "The solver's last attempt: {solver}",
                                "Find what went wrong in it, then make a better plan.", PLAN),
                 first=prompts(TASK, PLAN)),
            Role("critic", critic[0], repo(f"Critic-{critic[1]}"), target=("refined_plan",),
                 system="You are the critic of a team of three.",
                 prompt=prompts(TASK, "The planner's plan: {planner}",
                                "Check the plan, mend its gaps and errors, and state it anew.")),
            Role("solver", solver[0], repo(f"Solver-{solver[1]}"), target=("answer",),
                 system="You are the solver of a team of three.",
                 prompt=prompts(TASK, "The plan to follow where it is right: {critic}", SOLVE)),
        ),
        edges=(Edge("outer_12", "planner", "critic"), Edge("outer_23", "critic", "solver"),
               Edge("outer_31", "solver", "planner")),
        settings=settings,
    )


sequential_light = sequential(
    "sequential_light", "Light", ("Qwen/Qwen3-1.7B", "Qwen3-1.7B"),
    ("meta-llama/Llama-3.2-1B-Instruct", "Llama3.2-1B"),
    ("Qwen/Qwen2.5-Math-1.5B-Instruct", "Qwen2.5-Math-1.5B"),
    {"evaluate": {"batch_size": 32}, "math500": {"latent_length": 48, "max_new_tokens": 1000},
     "gpqa": {"latent_length": 32}, "medqa": {"latent_length": 32},
     "mbppplus": {"latent_length": 16, "temperature": 0.2}})

sequential_scaled = sequential(
    "sequential_scaled", "Scaled", ("google/gemma-3-4b-it", "Gemma3-4B"),
    ("meta-llama/Llama-3.2-3B-Instruct", "Llama3.2-3B"), ("Qwen/Qwen3.5-4B", "Qwen3.5-4B"),
    {"evaluate": {"batch_size": 16}, "math500": {"latent_length": 32, "max_new_tokens": 2000},
     "gpqa": {"latent_length": 48}, "medqa": {"latent_length": 48},
     "mbppplus": {"latent_length": 16, "temperature": 0.2},
     "aime25": {"max_new_tokens": 16000}, "aime26": {"max_new_tokens": 16000}})

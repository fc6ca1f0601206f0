"""Planner -> critic -> solver -> planner ..: the paper's sequential style, light and scaled."""
from styles import Edge, Role, Style
from styles.words import SOLVE, TASK, benchmark_settings, per_kind

PLAN = {
    "math": "Lay out the steps that lead to the result. Do not carry them out.",
    "choice": "Say which facts decide between the options. Do not choose yet.",
    "code": "Outline an algorithm, with its edge cases. Do not write the program.",
    "search": "Say which facts have to be found, and in which order. Do not answer yet.",
}
CHECK = "Check the plan, mend its gaps and errors, and state it anew."


def sequential(name, title, planner, critic, solver, settings):
    """The style over three base models, each given as (hub id, name in the released repo)."""
    def repo(part):
        return f"RecursiveMAS/Sequential-{title}-{part}"

    return Style(
        name=name,
        repo=repo("Outerlinks"),
        roles=(
            Role("planner", planner[0], repo(f"Planner-{planner[1]}"), target=("plan",),
                 system="You are the planner of a team of three.",
                 first=per_kind(TASK, PLAN),
                 prompt=per_kind(TASK, "The solver's last attempt: {solver}",
                                 "Find what went wrong in it, then make a better plan.", PLAN)),
            Role("critic", critic[0], repo(f"Critic-{critic[1]}"), target=("refined_plan",),
                 system="You are the critic of a team of three.",
                 first=per_kind(TASK, CHECK),
                 prompt=per_kind(TASK, "The planner's plan: {planner}", CHECK)),
            Role("solver", solver[0], repo(f"Solver-{solver[1]}"), target=("answer",),
                 system="You are the solver of a team of three.",
                 first=per_kind(TASK, SOLVE),
                 prompt=per_kind(TASK, "The plan to follow where it is right: {critic}", SOLVE),
                 own=per_kind(TASK, "Your own last answer: {solver}", SOLVE)),
        ),
        edges=(Edge("outer_12", "planner", "critic"), Edge("outer_23", "critic", "solver"),
               Edge("outer_31", "solver", "planner")),
        settings=settings,
        links_by_task=True,
    )


sequential_light = sequential(
    "sequential_light", "Light", ("Qwen/Qwen3-1.7B", "Qwen3-1.7B"),
    ("meta-llama/Llama-3.2-1B-Instruct", "Llama3.2-1B"),
    ("Qwen/Qwen2.5-Math-1.5B-Instruct", "Qwen2.5-Math-1.5B"),
    benchmark_settings(32, {"math500": 48, "gpqa": 32, "medqa": 32, "mbppplus": 16},
                       math500_tokens=1000))

sequential_scaled = sequential(
    "sequential_scaled", "Scaled", ("google/gemma-3-4b-it", "Gemma3-4B"),
    ("meta-llama/Llama-3.2-3B-Instruct", "Llama3.2-3B"), ("Qwen/Qwen3.5-4B", "Qwen3.5-4B"),
    benchmark_settings(16, {"math500": 32, "gpqa": 48, "medqa": 48, "mbppplus": 16}))

"""Three experts side by side -> summarizer -> back to each expert: the paper's mixture style."""
from styles import Edge, Role, Style
from styles.words import SOLVE, TASK, benchmark_settings, per_kind

REPO = "RecursiveMAS/Mixture-"


def expert(name, subject, model, repo):
    """One of the experts. In round 1 it has not heard the summarizer yet."""
    share = (f"Say what {subject} contributes to the answer: the facts, methods and steps that you "
             "are sure of, and where others are likely to go wrong.")
    return Role(
        name, model, REPO + repo, target=(f"hie_{name}_expert", f"{name}_expert", f"expert_{name}"),
        system=f"You are the {subject} expert in a team of three experts and a summarizer.",
        first=per_kind(TASK, share),
        prompt=per_kind(TASK, "What the summarizer made of the last round: {summarizer}", share))


mixture = Style(
    name="mixture",
    repo=REPO + "Outerlinks",
    roles=(
        expert("math", "mathematics", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
               "Math-DeepSeek-R1-Distill-Qwen-1.5B"),
        expert("code", "programming", "Qwen/Qwen2.5-Coder-3B-Instruct", "Code-Qwen2.5-Coder-3B"),
        expert("science", "natural and life sciences", "BioMistral/BioMistral-7B",
               "Science-BioMistral-7B"),
        Role("summarizer", "Qwen/Qwen3.5-2B", REPO + "Summarizer-Qwen3.5-2B",
             target=("hie_summarizer", "summary", "answer"),
             system="You put together what a mathematician, a programmer and a scientist say: "
                    "keep what holds, drop what does not.",
             first=per_kind(TASK, SOLVE),
             prompt=per_kind(TASK,
                             "What is known so far, of mathematics: {math}\n"
                             "Of programming: {code}\n"
                             "Of science: {science}", SOLVE),
             own=per_kind(TASK, "Your own last answer: {summarizer}", SOLVE)),
    ),
    edges=(Edge("outer_1s", "math", "summarizer"), Edge("outer_2s", "code", "summarizer"),
           Edge("outer_3s", "science", "summarizer"), Edge("outer_s1", "summarizer", "math"),
           Edge("outer_s2", "summarizer", "code"), Edge("outer_s3", "summarizer", "science")),
    settings=benchmark_settings(16, {}),
)

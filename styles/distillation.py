"""Expert -> learner -> expert ..: a large model guides a smaller one, which answers."""
from styles import Edge, Role, Style
from styles.words import SOLVE, TASK, benchmark_settings, per_kind

REPO = "RecursiveMAS/Distillation-"
GUIDE = ("Guide the learner: name the idea that matters, the steps in their order and the traps. "
         "Leave the answer to the learner.")

distillation = Style(
    name="distillation",
    repo=REPO + "Outerlinks",
    roles=(
        Role("expert", "Qwen/Qwen3.5-9B", REPO + "Expert-Qwen3.5-9B",
             target=("distill_expert", "refined_plan", "expert_plan"),
             system="You are the teacher of a capable learner.",
             first=per_kind(TASK, GUIDE),
             prompt=per_kind(TASK, "What the learner made of it so far: {learner}", GUIDE)),
        Role("learner", "Qwen/Qwen3.5-4B", REPO + "Learner-Qwen3.5-4B",
             target=("distill_learner", "answer", "learner_answer"),
             system="You learn from a teacher and answer on your own.",
             first=per_kind(TASK, SOLVE),
             prompt=per_kind(TASK, "The teacher's guidance: {expert}", SOLVE),
             own=per_kind(TASK, "Your own last answer: {learner}", SOLVE)),
    ),
    edges=(Edge("outer_el", "expert", "learner"), Edge("outer_le", "learner", "expert")),
    settings=benchmark_settings(16, {}),
    links_by_task=True,
)

"""Reflector -> tool-caller -> reflector ..: one thinks it over, the other uses tools and answers.

In the rounds before the last the tool-caller only thinks. In the last round it writes. Text that it
writes between <python> or <search> tags is run (writing.py), and the result is put after it.
"""
from styles import Edge, Role, Style
from styles.words import SOLVE, TASK, benchmark_settings, per_kind

REPO = "RecursiveMAS/Deliberation-"
REFLECT = ("Say what is known, what has to be computed or looked up, and what would show an answer "
           "to be wrong.")
TOOLS = ("You have two tools. To run a Python program, write <python> program </python>; it has to "
         "print what you want to see. To search the web, write <search> query </search>. Stop "
         "there: the outcome follows between <result> and </result>. You may use them five times "
         "in all.")

deliberation = Style(
    name="deliberation",
    repo=REPO + "Outerlinks",
    roles=(
        Role("reflector", "Qwen/Qwen3.5-4B", REPO + "Reflector-Qwen3.5-4B",
             target=("deliberation_reflector", "answer"),
             system="You think ahead for a partner who can run programs and search the web.",
             first=per_kind(TASK, REFLECT),
             prompt=per_kind(TASK, "How far your partner has come: {toolcaller}", REFLECT)),
        Role("toolcaller", "Qwen/Qwen3.5-4B", REPO + "Toolcaller-Qwen3.5-4B",
             target=("deliberation_toolcaller", "answer"),
             system="You answer questions with the help of a partner's advice and of tools.",
             first=per_kind(TASK, TOOLS, SOLVE),
             prompt=per_kind(TASK, "Your partner's advice: {reflector}", TOOLS, SOLVE),
             own=per_kind(TASK, "Your own last answer: {toolcaller}", TOOLS, SOLVE)),
    ),
    edges=(Edge("outer_rt", "reflector", "toolcaller"),
           Edge("outer_tr", "toolcaller", "reflector")),
    tools=("python", "search"),
    settings=benchmark_settings(16, {}),
)

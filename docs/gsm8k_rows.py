r"""GSM8K's rows with a box around the result, as train_outer.py and `--measure loss` want them.

    python docs/gsm8k_rows.py train > gsm8k_train.jsonl               rows from the hub
    python docs/gsm8k_rows.py rows.jsonl > gsm8k_train.jsonl          rows from a file
    python docs/gsm8k_rows.py train --blind > blind_train.jsonl       the planner alone is asked

    from    {"question": "..", "answer": "He has <<2+3=5>>5 eggs.\n#### 5"}
    to      {"question": "..", "plan": "He has 5 eggs.",
             "answer": "He has 5 eggs.\nThe answer is \\boxed{5}.\n#### 5"}

The plan is the first step of the solution. It is what `--text gold` trains the planner on, and what
`--latents teacher` sends. The style `told` tells it to the planner. The number after #### is what
the data set `gsm8k` scores by.

With --blind, the plan is the question itself, and the question is the same sentence in all rows. So
in the style `told` the planner alone knows what is asked.
"""
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.errors import need  # noqa: E402
from support.flags import Parser, run  # noqa: E402
from support.sources import read_rows  # noqa: E402

BLIND = "Only your partner knows the problem. Solve the problem that your partner tells you."


def main():
    """Read, put the box in, print."""
    parser = Parser(__doc__)
    parser.add_argument("source", help="a file of rows, or a split of the hub's: train, test")
    parser.add_argument("--blind", action="store_true", help="let the planner alone know it")
    args = parser.parse_args()
    source = args.source
    is_file = source.endswith((".json", ".jsonl"))
    for where, row in read_rows(source) if is_file else read_rows("openai/gsm8k", "main", source):
        steps, _, result = re.sub("<<.*?>>", "", row.get("answer", "")).partition("\n#### ")
        need(result, f"{where} has no answer with a number after ####")
        answer = f"{steps}\nThe answer is \\boxed{{{result}}}.\n#### {result}"
        question, plan = row["question"], steps.split("\n")[0]
        if args.blind:
            question, plan = BLIND, question
        print(json.dumps({"question": question, "plan": plan, "answer": answer}))


if __name__ == "__main__":
    run(main)

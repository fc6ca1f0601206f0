"""A task of one's own: where does the counter stand after four events? (docs/exercises.md)

    python evaluate.py --dataset docs/after_four.py --method latent text zero

The questions are those of tasks/tiny.py. Only the right answer is another one, so this file says
what is asked and how it is scored, and nothing else. It may lie anywhere, or in tasks/.
"""
from dataclasses import replace

from tasks import Task, get_task
from tasks.tiny import score, test_problems


class AfterFour(Task):
    """load() and score() are all that a task has to define."""
    names, kind = ("after_four",), "math"

    def load(self, limit=None, split=None):
        """The first `limit` test problems. A shorter chain is asked for its end."""
        return [replace(example, id=f"after-four-{i}", gold=str(problem.values[:5][-1]), row={})
                for i, (example, problem) in enumerate(
                    zip(get_task("tiny").load(limit), test_problems()))]

    def score(self, example, text):
        """The word after the first `answer`, as in tiny."""
        return score(example, text)

r"""Questions to look up: Bamboogle and HotpotQA. Does the answer match, to the word?

    record     {"Question": "Who composed the anthem of the country with Oslo as capital?",
                "Answer": "Rikard Nordraak"}
    question   Who composed the anthem of the country with Oslo as capital?
    gold       Rikard Nordraak
    answer     Oslo lies in Norway. The anthem: \boxed{\text{the rikard nordraak.}}
    score      Score(correct=True, parsed='the rikard nordraak.', note='exact match')

An exact match is as usual for such questions: lower case, no punctuation, no a/an/the, single
blanks. Any one gold answer will do. Unlike usual, a sign in or before a number counts: 1.5 is not
15, nor 5-4 54, nor -5 5, nor 9/11 911, nor 10,5 105. But 1,000 is 1000, F-16 is F16, and all signs
between two digits are one, but for the point: 3-2 is 3:2, and 5%-10% is 5-10%. LaTeX and unicode
have several ways to write a letter: `Beyonc\'{e}` is Beyoncé, but Zurich is not Zürich. An answer
without an exact match goes to a judge, if one is configured (API_KEY, API_MODEL and API_BASE_URL,
see tools/web.py). `Score.note` says which of the two decided. HotpotQA brings ten paragraphs with
each question. They are left out, because the agents are to search.
"""
import re
import string
import unicodedata

from scoring.boxes import last_box, replaced, without_fonts
from support.errors import need
from tasks import BOXED_RETRY, Example, RowTask, Score, Unusable, cell_text, column, in_time

GOLDS = ("Answer", "answer", "golden_answers", "answer_aliases")   # the last: FlashRAG's, MuSiQue's
NUMBERS = (              # what is found in a number, what replaces it, and an example
    (r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{2,3})*,\d{3}(?!,?\d)",                # 1,000 and 1,23,456
     lambda one: one[0].replace(",", "")),
    (r"(?<![^\W\d])\.(?=\d)", "point"),                                    # 1.5, .5, but No.5
    (r"(?<=\d)(?:[^\w\s]|_)+(?=\d)", "sign"),                              # 9/11, 10--12, 1{,}5
    (r"(?:^[-–−] ?|(?<!\w)[-–−])(?=[$€£]?\d)", "minus"))                   # -5, - 5, but F-16


class Search(RowTask):
    """Bamboogle, HotpotQA, or rows in their columns."""
    kind, retry = "search", BOXED_RETRY
    # data set: its id on the hub, its configuration, its usual split
    names = {"bamboogle": ("chiayewken/bamboogle", None, "test"),
             "hotpotqa": ("hotpotqa/hotpot_qa", "distractor", "validation")}

    def make_example(self, source, row):
        """The Example of one row: a column question, and of GOLDS (texts, or lists of texts)."""
        cells = [row[name] for name in GOLDS if name in row] or [column(source, row, *GOLDS)]
        answers = [cell_text(source, one) for cell in cells
                   for one in (cell if isinstance(cell, list) else [cell])]
        answers = [text for text in dict.fromkeys(answers) if text]
        need(answers, f"{source} has no answer", Unusable)
        return Example("", column(source, row, "Question", "question"), " or ".join(answers),
                       kind="search", row={"answers": answers})

    @staticmethod
    def score(example, text):
        """The last box of `text` by exact match, else by the judge.

        Raises ValueError or ServiceError if a judge is configured and cannot be asked."""
        score = in_time(exact_match, text, example.row["answers"])
        from tools.web import judge, judge_settings
        if score.correct or not score.parsed or judge_settings() is None:
            return score
        verdict = judge(example.question, example.row["answers"], score.parsed)
        return Score(verdict == "correct", score.parsed, f"judge: {verdict}")

    def ready(self, allow_unsafe=False):
        """Print how answers without an exact match will be scored."""
        from tools.web import judge_settings
        print("answers without an exact match: " + (
            "counted as wrong, no judge is configured" if judge_settings() is None else
            "sent to the configured judge"), flush=True)


score = Search.score


def exact_match(text, answers):
    """The Score of the last box of a text by exact match with one of the gold answers."""
    answer = without_fonts(last_box(text) or "")
    if not normalise(answer):
        return Score(False, None)
    same = normalise(answer) in map(normalise, answers)
    return Score(same, answer, "exact match" if same else "no exact match")


def normalise(text):
    """The text that exact match compares. A text that is only an article (the grade A) stays."""
    text = replaced(unicodedata.normalize("NFC", text).lower(), NUMBERS)
    text = "".join(letter for letter in text if letter not in string.punctuation
                   and not unicodedata.category(letter).startswith("P"))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split()) or text.strip()

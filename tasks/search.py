r"""Questions to look up: Bamboogle and HotpotQA. Does the answer match, to the word?

    record     {"Question": "Who composed the anthem of the country with Oslo as capital?",
                "Answer": "Rikard Nordraak"}
    question   Who composed the anthem of the country with Oslo as capital?
    gold       Rikard Nordraak
    answer     Oslo lies in Norway. The anthem: \boxed{\text{the rikard nordraak.}}
    score      Score(correct=True, parsed='the rikard nordraak.', note='exact match')

Exact match as usual for such questions: lower case, no punctuation, no a/an/the, single blanks; any
one gold answer will do. (Not as usual: 1.5 is not 15.) LaTeX and unicode have several ways to write
a letter: `Beyonc\'{e}` is Beyoncé, but Zurich is not Zürich. Where that fails a judge decides, if
one is configured (API_KEY, API_MODEL and API_BASE_URL, see support/web.py): `Score.note` says which
of the two it was. HotpotQA brings ten paragraphs with each question; they are left out, for the
agents are to search.
"""
import re
import string
import unicodedata

from tasks import BOXED_RETRY, Example, Score, Unusable, column, last_box, row_task, without_fonts

SOURCES = {                     # name: hub id, configuration, split
    "bamboogle": ("chiayewken/bamboogle", None, "test"),
    "hotpotqa": ("hotpotqa/hotpot_qa", "distractor", "validation"),
}
NAMES = tuple(SOURCES)


def task(name, path=None):
    """The Task. Its rows stand in the file `path`, or on the hub."""
    return row_task(name, "search", path, SOURCES.get(name), make_example, score, ready=ready,
                    retry=BOXED_RETRY)


def make_example(place, row):
    """The Example of one row: columns question and answer (a text, or a list of texts)."""
    answers = row.get("Answer", row.get("answer"))
    if not isinstance(answers, list):
        answers = [column(place, row, "Answer", "answer")]
    answers = [str(answer).strip() for answer in answers if str(answer).strip()]
    if not answers:
        raise Unusable(f"{place} has no answer")
    return Example("", column(place, row, "Question", "question"), " or ".join(answers), "search",
                   {"answers": answers})


def normalise(text):
    """What exact match compares. What is nothing but an article (the grade A) stays as it is."""
    text = re.sub(r"(?<=\d)\.(?=\d)", "point", unicodedata.normalize("NFC", text).lower())
    text = "".join(letter for letter in text if letter not in string.punctuation
                   and not unicodedata.category(letter).startswith("P"))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split()) or text.strip()


def score(example, text):
    """The last box of `text` by exact match, else by the judge.

    Raises ValueError or ServiceError if a judge is configured and cannot be asked."""
    boxed = last_box(text)
    answer = without_fonts(boxed) if boxed else ""
    if not normalise(answer):
        return Score(False, None)
    if normalise(answer) in [normalise(gold) for gold in example.row["answers"]]:
        return Score(True, answer, "exact match")
    from support.web import judge, judge_settings
    if judge_settings() is None:
        return Score(False, answer, "no exact match")
    verdict = judge(example.question, example.row["answers"], answer)
    return Score(verdict == "correct", answer, f"judge: {verdict}")


def ready(allow_unsafe=False):
    """Say how answers without an exact match will be scored."""
    from support.web import judge_settings
    print("answers without an exact match: " + (
        "counted as wrong, no judge is configured" if judge_settings() is None else
        "sent to the configured judge"), flush=True)

r"""Multiple choice: GPQA (diamond) and MedQA. Which letter was chosen?

    record     {"query": "Which vitamin does sunlight make in skin?", "answer": "Vitamin D",
                "options": ["A. Vitamin A", "B. Vitamin C", "C. Vitamin D"]}
    question   Which vitamin does sunlight make in skin?
               A. Vitamin A
               B. Vitamin C
               C. Vitamin D
    gold       C
    answer     A good guess is vitamin A, but the sun makes D: \boxed{C}
    score      Score(correct=True, parsed='C', note='')

The last box decides: a letter (`C`, `(C)`, `C. Vitamin D`), or the exact text of one option. Only
without a box does the last statement like `the answer is (C)`, and its letter must stand alone:
`the answer is A vitamin` or `C. difficile` names no option. All else is unparsed and wrong (nobody
who said nothing said A). A row without a right option, or with it twice, is left out and printed.
"""
import functools
import random
import re

from tasks import (BOXED_RETRY, Example, Score, Task, Unusable, column, examples_from, last_box,
                   row_id, source_rows, without_fonts)

SOURCES = {                     # name: hub id, config, split
    "gpqa": ("Idavidrein/gpqa", "gpqa_diamond", "train"),
    "medqa": ("GBaker/MedQA-USMLE-4-options", None, "test"),
}
NAMES = tuple(SOURCES)
LETTERS = "ABCDEFGHIJ"
MARK = re.compile(r"\(?([A-J])[.):] ?(?=.)")                   # the `A. ` before an option's text
BOXED = re.compile(r"(?:(?:the )?answer(?: is|:) |option |choice )?\(?([A-J])"
                   r"(?:[).:]*$|[).:]+ (?!and\b|or\b|\(?[A-J][).:]*$))", re.IGNORECASE)
STATED = re.compile(
    r"(?i:(?<!wrong )(?<!incorrect )\b(?:answer|(?:correct|right|best) (?:option|choice))"
    r"(?: is:?|:)\s*(?:option |choice )?)"
    r"(?:\(([A-Ja-j])\)|([A-J])\b"                             # (C), or C before the end of a
    r"(?=[,;:!?)]|\.(?! ?[a-z])|\s*$| because\b))"             # clause: not A vitamin, C. difficile
    r"(?! *(?:,|/|or\b|and\b) *\(?[A-J]\b)", re.MULTILINE)     # not A or B


def load(name, path, limit=None, split=None, seed=42):
    """The first `limit` questions as Examples; `seed` decides the order of GPQA's options.
    Raises ValueError or OSError naming file and row."""
    rows = source_rows(SOURCES.get(name), path, split)
    return examples_from(rows, functools.partial(make_example, seed=seed), name, path, limit)


def make_example(place, row, seed=42):
    """The Example of one row in GPQA's columns, or in MedQA's."""
    if "Correct Answer" in row:
        question = column(place, row, "Question")
        right = column(place, row, "Correct Answer").strip()
        options = [right] + [column(place, row, f"Incorrect Answer {i}").strip() for i in (1, 2, 3)]
        random.Random(f"{seed} {question}").shuffle(options)   # the same whatever rows surround it
    else:
        question = column(place, row, "question", "query")
        options = option_texts(place, row.get("options"))
        right = right_text(place, row, options)
    if options.count(right) != 1:
        raise Unusable(f"{place} has its right answer {options.count(right)} times")
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, options)]
    return Example(id=row_id(row, "id", "Record ID"), gold=LETTERS[options.index(right)],
                   question="\n".join([question.strip(), *lines]), kind="choice",
                   row={**row, "options": options})


def option_texts(place, options):
    """The texts in the order A, B, ..; options: {letter: text}, or texts that may begin `A. `."""
    if isinstance(options, dict):
        options = [f"{letter}. {options[letter]}" for letter in sorted(options) if options[letter]]
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"{place} needs 'options': 2 to {len(LETTERS)} texts, or {{letter: text}}")
    options = [str(text).strip() for text in options]
    marks = [MARK.match(text) for text in options]
    if all(marks) and "".join(mark[1] for mark in marks) != LETTERS[:len(options)]:
        raise Unusable(f"{place} has options that are not marked A, B, .. in order")
    return [MARK.sub("", text, count=1) for text in options] if all(marks) else options


def right_text(place, row, options):
    """The right option's text, from answer_idx (a letter), or answer (a text, or a letter)."""
    answer = column(place, row, "answer_idx", "answer").strip()
    if "answer_idx" not in row:
        for text in (answer, MARK.sub("", answer, count=1)):
            if text in options:
                return text
    if len(answer) != 1 or answer not in LETTERS[:len(options)]:
        raise Unusable(f"{place} has the answer '{answer[:40]}', which is none of its options")
    return options[LETTERS.index(answer)]


def score(example, text):
    """The letter chosen in `text` against example.gold."""
    options, letter, boxed = example.row["options"], None, last_box(text)
    if boxed is not None:
        boxed = without_fonts(boxed)
        same = [i for i, option in enumerate(options) if without_fonts(option) == boxed]
        match = BOXED.match(boxed)
        if len(same) == 1 and len(boxed) > 1:                  # an option may begin `C. ` itself
            letter = LETTERS[same[0]]
        elif match:
            letter = match[1].upper()
    else:
        for match in STATED.finditer(re.sub(r"\\(text|math)\w*|[*_`$\\{}]", "", text)):
            letter = (match[1] or match[2]).upper()
    letter = letter if letter in set(LETTERS[:len(options)]) else None
    return Score(letter == example.gold, letter)


def task(name, path=None):
    """The Task."""
    return Task(name, "choice", functools.partial(load, name, path), score, retry=BOXED_RETRY)

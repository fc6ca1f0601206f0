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

The last box decides: a letter (`C`, `(C)`, `C - Vitamin D`), or the text of one option. If it is
neither (a value, on the way), or if there is none, then the last statement behind it decides, like
`the answer is (C)` or `option C is correct`. A letter must stand alone, or before its own option:
`A vitamin` and `C. difficile` name no option, and `A or B` names two. All else is unparsed and
wrong (nobody who said nothing said A). A row without a right option, or with it twice, is left out
and printed.
"""
import functools
import random
import re

from tasks import (BOXED_RETRY, Example, Score, Task, Unusable, column, examples_from, last_box,
                   row_id, source_rows, without_fonts)
from tasks.boxes import STEPS, replaced

SOURCES = {                     # name: hub id, config, split
    "gpqa": ("Idavidrein/gpqa", "gpqa_diamond", "train"),
    "medqa": ("GBaker/MedQA-USMLE-4-options", None, "test"),
}
NAMES = tuple(SOURCES)
LETTERS = "ABCDEFGHIJ"
MARK = re.compile(r"\(?([A-J])[.):] ?(?=.)")                   # the `A. ` before an option's text
SAYS = r"(?:answer(?: is| (?:must|should|would|will|seems to) be|\s*:)|(?:option|choice) is)"
STATED = re.compile(rf"(?<!wrong )(?<!incorrect )\b{SAYS}[\s:]*(?:therefore|thus|clearly)?", re.I)
IS_RIGHT = re.compile(r"(?<![Ii]f )(?:\b(?i:option|choice|answer) \(?|\()([A-J])\)? is (?:the )?"
                      r"(?:correct|right|best)")
# A letter, the signs that set it apart, and what follows.
LETTER = re.compile(r"[(\[\"'“‘]*([A-Ja-j])(?![\w-])([)\]\"'”’.:]*)\s*(.*)", re.DOTALL)
# What follows, if it names a second letter; if it leaves the letter alone.
SECOND = re.compile(r"(?:and|or|/|,|&)\s*[(\[]?[A-J]\b|[(\[]?[A-J][).:\]]*$|\([A-J]\)")
ASIDE = re.compile(r"[,;:!?(–—-]|(?:because|since|as|is|and not)\b|$")


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
    # The publishers' own files list the options in the question, too, some of them twice.
    listed = r"\s*".join(rf"\(?{line[0]}[.):] *{re.escape(line[3:])}" for line in lines)
    question = re.sub(rf"(?:\s*{listed})+\s*$", "", question)
    return Example(id=row_id(row, "id", "Record ID"), gold=LETTERS[options.index(right)],
                   question="\n".join([question.strip(), *lines]), kind="choice",
                   row={**row, "options": options})


def option_texts(place, options):
    """The texts in the order A, B, ..

    options: {letter: text}, [{key: letter, value: text}, ..], or texts that may begin `A. `."""
    if isinstance(options, list) and all(isinstance(one, dict) for one in options):
        options = {str(one.get("key")): one.get("value") for one in options}
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
    options, box = [without_fonts(option) for option in example.row["options"]], last_box(text)
    words = without_fonts(box or "")
    letter = letter_in(words.upper() if len(words) == 1 else words, options)
    if not letter:
        behind = box + text.rpartition("{" + box)[2] if box else text
        behind = IS_RIGHT.sub(r"answer: \1;", replaced(behind, STEPS))
        for found in STATED.finditer(behind):
            said = behind[found.end():found.end() + 200].partition("\n")[0]
            letter = letter_in(said, options) or letter
    return Score(letter == example.gold, letter)


def letter_in(said, options):
    """The letter that some words name, alone or with the text of its option, or None."""
    letters, said = list(LETTERS[:len(options)]), said.strip()
    said = re.sub("^(?:option|choice) +", "", said, flags=re.IGNORECASE)
    for fold in (str, folded):                         # capitals may tell two options apart
        same = [letter for letter, text in zip(letters, options) if fold(text) == fold(said)]
        if len(same) == 1 and said not in letters:
            return same[0]
    found = LETTER.match(said)
    letter, signs, rest = (found[1].upper(), found[2], found[3]) if found else ("", "", "")
    if letter not in letters or SECOND.match(rest) or said == "a":
        return None
    text, follows = folded(options[letters.index(letter)]), folded(rest).strip("()[] ")
    if follows in map(folded, options):
        return letter if follows == text else None     # the text of another option
    begins = follows.split()[:1] == text.split()[:1] or text in follows
    alone = ASIDE.match(rest) or signs.strip(".") or signs and (begins or not rest[0].islower())
    return letter if alone and (found[1].isupper() or signs or not rest) else None


def folded(text):
    """A text without capitals, and without the signs around it."""
    return text.casefold().strip(" .,;!\"'“”‘’")


def task(name, path=None):
    """The Task."""
    return Task(name, "choice", functools.partial(load, name, path), score, retry=BOXED_RETRY)

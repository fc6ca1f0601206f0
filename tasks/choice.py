r"""Multiple choice: GPQA (diamond), MedQA, MMLU-Pro and ARC (challenge). Which letter was chosen?

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
neither (a value, on the way), or if there is no box, then the last statement after it decides, like
`the answer is most likely (C)`, `option C is correct`, or a heading `Final Answer` with the letter
below. A letter must stand alone, or before its own option: `A vitamin` and `C. difficile` name no
option, and `C (or D)` names two. What is supposed, denied or reported is no statement: `if the
answer is D`, `the least likely answer is D`, `according to the critic, the answer is D`. There is
no default letter: everything else is unparsed and wrong. Not read are clear wordings that state no
answer (`Choice: C`, `I'll go with C`, `So C.`), what follows from an `if` (`if we leave A out, the
answer is C`), and other languages. Wrongly read is what others say in rarer words (`the planner
wrote: the answer is D`), and a letter that is taken back in rarer words (`The answer is D. Hmm,
no.`). A row without a right option, or with it twice, is left out and printed. A number in
answer_index or answer_idx counts from 0.
"""
import random
import re

from scoring.boxes import STEPS, last_box, replaced, without_fonts
from support.errors import blame, need
from tasks import BOXED_RETRY, Example, RowTask, Score, Unusable, column, in_time

GPQA_OPTIONS = ("Correct Answer", *(f"Incorrect Answer {number}" for number in (1, 2, 3)))
LETTERS = "ABCDEFGHIJ"
MARK = re.compile(r"\(?([A-J])[.):] ?(?=.)")                   # the `A. ` before an option's text
# A statement: "answer is probably", "it must be", or a heading "Answer" or "Conclusion".
STATED = re.compile(
    r"\b(?:(?:answer|option|choice|(?:correct|best) response) (?:is|(?:must|should|would|will|"
    r"seems to) be)\b|it must be\b|(?:answer|final choice)[^\w\n.?!]*[:\n]|"
    r"conclusion(?=\W*\n\W*[A-J]\W*\Z))[\s:`]*(?:(?:therefore|thus|hence|most|indeed|and|"
    r"(?!un|hard|possib)\w+ly|I (?:think|believe)|it(?: i|['’])s)\b[\s,:]*){0,5}", re.I)
# "Option C is correct", "Thus C is the right one", but not "A and (C) is correct"
IS_RIGHT = re.compile(
    r"(?<![A-J] and )(?<![A-J]\) and )(?<!or )(?<!also )(?:\b(?i:option|choice|answer) \(?|\(|"
    r"(?:^|[.;:] |\b(?i:so|thus|hence|therefore|that),? )(?=\w is the ))([A-J])\)? is (?:the )?"
    r"(?:correct|right|best|answer)", re.M)
# The sentence before it may not suppose it. (", so" begins a new sentence.) Nor may its clause
# deny, doubt or report it, or a word just before it: "the least likely answer", "her answer".
SENTENCE = re.compile(r"[.!?]\s+(?!then\b)|(?<!,)\n|, (?:and )?(?:so|thus|hence|therefore)\b", re.I)
SUPPOSED = re.compile(r"\b(?:if|unless|suppos\w+|assum(?:es?|ing)|imagine|pretend|hypothetical\w*|"
                      r"in case|the case|given that|according to)\b|"
                      r"^\W*(?:were|had|should|say|provided) ", re.I)
CLAUSE = re.compile(
    r"[;:—]|,(?! that\b)|(?<!-)\b(?:so|thus|hence|therefore|because|and|but)\b", re.I)
DENIED = re.compile(
    r"\b(?:not|never|cannot|(?<!no )(?<!a )(?<!out )doubt|unlikely|rule out|except|false|mistake|"
    r"whether|may|might|could|perhaps|maybe|possibly|says|said|claims|thinks|believes|argues)\b|"
    r"n['’]t\b|\b(?:wrong|incorrect|least|less|worst|first|second|initial|previous|other|"
    r"another|alternative|possible|almost|nearly|rejected|discarded|eliminated|excluded|his|her|"
    r"their|\w+s?['’]s?)\b(?! (?:the|my|our)\b)(?: \w+)?\W*$", re.I)
# It may not be taken back right behind the letter: "D?", "D if ..", "D. That is wrong.", "D. No, C"
TAKEN_BACK = re.compile(
    r"(?:(?!because)[^.!?\n])*(?:\?|\b(?:if(?! I)|unless)\b)|[^.!\n]*[.,;!]+\s*(?:but )?(?:(?:that|"
    r"this|it|which) (?:is (?:wrong|incorrect|false)(?! to| in)|fails)|(?:no|wait)[,.!:]|"
    r"[A-J] is also)", re.I | re.M)
# A letter, the signs that set it apart, and the text after it.
LETTER = re.compile(r"[(\[【\"'“‘`]*([A-Ja-j])(?!['’]?\w|-)([)\]】\"'”’`.。:]*)\s*(.*)", re.DOTALL)
# The text after it, up to a reason, may name a second letter. One with a small word behind it opens
# a clause (C; A is wrong), if no sign joins it to the first. An aside leaves the letter alone.
WHY = re.compile(r"\b(?:because|since|as (?!well|[A-J])|not|rather|instead|unlike|due|based|while|"
                 r"which|(?:al|even )?though)\b|\. (?!.\W*$)")
SECOND = re.compile(r"^[)\]\s]*(?:(?:and|or|plus|[,/&+])\W*)+(?:option )?(?!I \w)[A-J](?!\w|-| is )"
                    r"|(?<![\w'’-])[A-J](?!['’]?\w|-| [a-z])|[(\[][a-j][)\]]")
ASIDE = re.compile(r"[,;:!?(–—-]|and not\b|is (?:the )?(?:correct|right|best)\b|$")


class Choice(RowTask):
    """GPQA, MedQA, MMLU-Pro, ARC, or rows in their columns."""
    kind, retry = "choice", BOXED_RETRY
    # data set: its id on the hub, its configuration, its usual split
    names = {"gpqa": ("Idavidrein/gpqa", "gpqa_diamond", "train"),
             "medqa": ("GBaker/MedQA-USMLE-4-options", None, "test"),
             "mmlu_pro": ("TIGER-Lab/MMLU-Pro", None, "test"),
             "arc": ("allenai/ai2_arc", "ARC-Challenge", "test")}

    def make_example(self, source, row):
        """The Example of one row in GPQA's columns, in MedQA's and MMLU-Pro's, or in ARC's."""
        if "answerKey" in row:
            row = from_arc(source, row)
        if "Correct Answer" in row:
            question = column(source, row, "Question")
            options = [column(source, row, name) for name in GPQA_OPTIONS]
            right = options[0]
            # The order depends on the question alone, and not on the rows around it.
            random.Random(f"42 {row['Question']}").shuffle(options)
        else:
            question = column(source, row, "question", "query")
            options = option_texts(source, row.get("options"))
            right = right_text(source, row, options)
        times = options.count(right)
        need(times == 1, f"{source} has its right answer {times} times", Unusable)
        lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, options)]
        # The publishers' own files list the options in the question as well, some of them twice.
        listed = r"\s*".join(rf"\(?{line[0]}[.):] *{re.escape(line[3:])}" for line in lines)
        question = re.sub(rf"(?:\s*{listed})+$", "", question).strip()
        return Example("", "\n".join([question, *lines]), LETTERS[options.index(right)],
                       kind="choice", row={**row, "options": options})

    @staticmethod
    def score(example, text):
        """The letter chosen in `text` against example.gold."""
        return in_time(chosen, text, example.row["options"], example.gold)


score = Choice.score


def from_arc(source, row):
    """A row of ARC, in MedQA's columns. It has "choices": {"label": ["1", ..], "text": [..]} and
    "answerKey": "1". (Most rows have letters as labels.)"""
    with blame(f"{source} needs 'choices' with 'label' and 'text', and one of the labels as "
               "'answerKey'", Unusable):
        number = row["choices"]["label"].index(row["answerKey"])
        return {**row, "options": row["choices"]["text"], "answer_idx": LETTERS[number]}


def option_texts(source, options):
    """The texts in the order A, B, ..

    options: {letter: text}, [{key: letter, value: text}, ..], or texts that may begin `A. `."""
    if isinstance(options, list) and all(isinstance(one, dict) for one in options):
        options = {str(one.get("key")): one.get("value") for one in options}
    if isinstance(options, dict):
        options = [f"{letter}. {text}" for letter, text in sorted(options.items())
                   if text not in (None, "")]
    need(isinstance(options, list) and 2 <= len(options) <= len(LETTERS),
         f"{source} needs 'options': 2 to {len(LETTERS)} texts, or {{letter: text}}")
    options = [str(text).strip() for text in options]
    marks = [MARK.match(text) for text in options]
    if not all(marks):
        return options
    need("".join(mark[1] for mark in marks) == LETTERS[:len(options)],
         f"{source} has options that are not marked A, B, .. in order", Unusable)
    return [MARK.sub("", text, count=1) for text in options]


def right_text(source, row, options):
    """The right option's text, from answer_idx or answer_index (a letter, or a number from 0), or
    from answer (a text, or a letter)."""
    answer = column(source, row, "answer_idx", "answer_index", "answer")
    meant = dict(zip(LETTERS, options))
    if "answer_idx" in row or "answer_index" in row:
        meant |= {str(number): text for number, text in enumerate(options)}
    else:                                              # a text goes before a letter
        meant |= {text: text for text in options}
    bare = MARK.sub("", answer, count=1)               # `B. iron`
    if answer not in meant and bare not in meant:
        raise Unusable(f"{source} has the answer '{answer[:40]}', which is not an option")
    return meant.get(answer, meant.get(bare))


def chosen(text, options, gold):
    """The Score of the letter that a text chooses among the options' texts."""
    # \boxed{C} or \boxed{D} is one box with two letters.
    text = re.sub(r"\}(?:[\s$]|\\text\{)*(and|or)[\s$}]*\\boxed\{", r" \1 ", text)
    options, box = list(map(without_fonts, options)), last_box(text)
    words = without_fonts(box or "")
    letter = letter_in(words.upper() if len(words) == 1 else words, options)
    if not letter:
        after = re.split("boxed|fbox", text)[-1] if box else text
        after = IS_RIGHT.sub(r"the answer: \1;", replaced(after, STEPS))
        for found in STATED.finditer(after):
            said = after[found.end():found.end() + 200]
            before = SENTENCE.split(after[max(0, found.start() - 300):found.start()])[-1]
            named = letter_in(said.partition("\n")[0], options)
            clause = CLAUSE.split(before)[-1]
            if named is not None and not SUPPOSED.search(before) and not DENIED.search(clause):
                letter = "" if TAKEN_BACK.match(said) else named
    return Score(letter == gold, letter or None)


def letter_in(said, options):
    """The letter that these words name, alone or with the text of its option. None: they name no
    letter. "": they name two."""
    letters, said = list(LETTERS[:len(options)]), said.strip()
    said = re.sub("^(?:option|choice) +", "", said, flags=re.IGNORECASE)
    for fold in (str, folded):                         # capitals may tell two options apart
        same = [letter for letter, text in zip(letters, options) if fold(text) == fold(said)]
        if len(same) == 1 and said not in letters:
            return same[0]
    found = LETTER.match(said)
    letter, signs, rest = (found[1].upper(), found[2], found[3]) if found else ("", "", "")
    if letter not in letters or said == "a":
        return None
    text, follows = folded(options[letters.index(letter)]), folded(rest).strip("()[] ")
    if follows in map(folded, options):
        return letter if follows == text else None     # the text of another option
    beyond = re.sub(rf"^\W*{re.escape(text)}", "", rest, flags=re.IGNORECASE)
    beyond = WHY.split(beyond if beyond != rest else f"{signs} {rest}", 1)[0]
    names = [(rf"(?i)\b{re.escape(one)}", "") for one in options if len(one) > 1]    # Vitamin K
    if SECOND.search(replaced(beyond, names)):
        return ""
    begins = follows.split()[:1] == text.split()[:1] or text in follows
    alone = ASIDE.match(rest) or WHY.match(rest) or signs and (
        begins or not rest[0].islower() or signs.strip(".") and not rest.startswith("is "))
    return letter if alone and (found[1].isupper() or signs or not rest) else None


def folded(text):
    """A text without capitals, and without the signs around it."""
    return text.casefold().strip(" .,;!\"'“”‘’")

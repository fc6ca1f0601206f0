r"""The last box of an answer, and its words without LaTeX.

    text     First \boxed{4}. No: \boxed{\textbf{Ren\'e}~Descartes}. (It was to be in \boxed{}.)
    box      \textbf{Ren\'e}~Descartes            last_box(text)
    words    René Descartes                       without_fonts(box)

The last box that says something counts. An empty box, or one with dots, is an echo of the prompt,
which asks for "\boxed{...}". \fbox{12}, and \boxed 12 without braces, are boxes too.
"""
import re
import unicodedata

LONGEST_ANSWER = 2000    # characters in a box; longer ones answer nothing and cost a scorer minutes

# Signs that open and close braces. An escaped sign does neither: \{ is a brace that is printed.
BRACE = re.compile(r"(\nFinal Answer: )?\\\\?(?:boxed|fbox)\s*(?:\{|(-?\d[\d.,/]*|[A-J]\b))"
                   r"|\\.|[{}]", re.DOTALL)
# Not an answer: `...`, `\ldots`, `???`, `\text{your answer}`. (But \{\} is one: the empty set.)
SILENT = re.compile(r"(?:[\s\0.…?!_*~{}$-]|\\(?:[lc]?dots|text|quad|square|_)|(?i:your |answer))*")
ACCENTS = dict(zip("'`^\"~=.uvHckr", "\u0301\u0300\u0302\u0308\u0303\u0304\u0307\u0306\u030c\u030b"
                                     "\u0327\u0328\u030a"))
LETTERS = dict(zip("ss o O l L ae AE oe OE aa AA i j".split(), "ß ø Ø ł Ł æ Æ œ Œ å Å i j".split()))
FONTS = ("text text\\w+ math\\w+ operatorname boldsymbol bm bf rm it sf tt em emph underline "
         "displaystyle mbox fbox boxed left right").replace(" ", "|")
STEPS = (                # what is found in LaTeX, what replaces it, and an example
    (r"(?<=\d)\\[,;! ](?=\d{3}\b)|\\!", ""),                                   # 1\,000
    (r'(?<!\w)\\"([^"\\]*)\\"(?!\w)', r'"\1"'),                                # \"Emma\"
    (r"(?<=[A-Za-z])\\'(?=[st]\b|[A-Z])", "'"),                                # John\'s, O\'Neil
    (r"\\(['`^\"~=.]|[uvHckr](?=\{))\s*\{?\\?([A-Za-z])\}?",                   # Z\"urich, \c{c}a
     lambda found: found[2] + ACCENTS[found[1]]),
    (r"[（）：．Ａ-Ｊａ-ｊ]", lambda found: chr(ord(found[0]) - 0xFEE0)),           # （Ｃ）
    (r"\\(?:q?quad|thinspace)(?![A-Za-z])|\\[,;:> ]|~|\\\\", " "),             # James~Madison
    (rf"\\({'|'.join(LETTERS)})(?![A-Za-z])(?:\{{\}}| )?", lambda found: LETTERS[found[1]]),  # \o
    (rf"\\(?:{FONTS})(?![A-Za-z])|\*\*|\\?[${{}}]", ""),                       # \text{(C)}, **C**
    (r"\\([^A-Za-z\s]|$)", r"\1"))                                             # AT\&T


def last_box(text):
    r"""The content of the last box of a text whose braces balance, or None without such a box.

    The outermost of nested boxes counts, and the inner ones are unwrapped: `\boxed{x = \boxed{5}}`
    gives `x = {5}`. The text is read once, so 200 kB of braces take as long as 200 kB of words.
    """
    opened, found = [], None               # where the open braces' contents begin; None: not a box
    for mark in BRACE.finditer(text):
        if mark[2]:                                          # \boxed 12
            found = mark.span(2)
        elif mark[0] == "}" and opened:
            start, end = opened.pop(), mark.start()
            if start is not None and (end - start > 60 or not SILENT.fullmatch(text, start, end)):
                found = (start, end)
        elif mark[0] == "{":
            opened.append(None)
        elif mark[0].endswith("{") and len(mark[0]) > 2:     # \boxed{
            # A box that was left open before we asked once more is dropped. It would hold ours.
            opened = [] if mark[1] else opened
            opened.append(mark.end())
    if found is None or found[1] - found[0] > LONGEST_ANSWER:
        return None
    return re.sub(r"\\(?:boxed|fbox)|\0", "", text[slice(*found)]).strip() or None


def replaced(text, steps):
    """A text after the steps (pattern, replacement), taken one after the other."""
    for pattern, replacement in steps:
        text = re.sub(pattern, replacement, text)
    return text


def without_fonts(latex):
    r"""The plain words of a short answer: `\text{(C)}` -> `(C)`, `Z\"urich` -> `Zürich`,
    `10\,\text{km}` -> `10 km`, `1\,000` -> `1000`."""
    return unicodedata.normalize("NFC", " ".join(replaced(latex, STEPS).split()))

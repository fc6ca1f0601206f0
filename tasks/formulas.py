r"""Mathematical answers in plain writing: rewrites what math-verify misreads or cannot read.

The same steps run on the gold answer and on the model's. They are many, and these figures are their
reason: with them 264 of the 264 right answers of the tests' cases are accepted and 189 of the 189
wrong ones refused, without them 139 and 169. Each step of STEPS has an example beside it. The last
step, about words, is units():

    12 eggs, 12 \text{ eggs}                   12
    15 \text{ cups} + 5 \text{ cups}           15 + 5
    5 \text{ hours } 30 \text{ minutes}        \text{5 hours 30 minutes}
    not 0, 5 and a half, AB                    \text{not 0}, \text{5, a half}, \text{AB}
    2xy, 3 abc, 5 sin x                        as they are

An answer that is one \text{..} as a whole is a word to math-verify, equal to the same word alone.
It drops any other \text{..} at the end of an answer. So it takes 5 hours and 30 minutes for 5. And
it reads AB as a product, equal to BA.
"""
import re
import unicodedata
from string import ascii_lowercase

from tasks.boxes import replaced

# Signs that math-verify does not know. (It knows ≤, π, ∪ and more.)
SIGNS = str.maketrans({"–": "-", "·": r"\cdot ", "∞": r"\infty ", "°": r"^\circ ", "∈": r"\in ",
                       "⁄": "}{", "€": "", "£": "", "¥": ""})
SCALES = dict(dozen=12, hundred=100, thousand=1000, million=10**6, billion=10**9, trillion=10**12)
TEXT = r"\\text\{([^{}]*)\}"
RUN = r"(?<![\\A-Za-z{])[A-Za-z]+(?:[ '/-]+[A-Za-z]+)*(?![A-Za-z])"       # one or several words
FUNCTIONS = set("sin cos tan cot sec csc log exp sqrt mod gcd lcm max min infinity".split())
# A text after a number that begins with one of these words makes it another number: 5 and a half,
# 5 tenths, 5 or more.
NO_UNIT = set("a half halves squared cubed factorial base plus minus less if not over third thirds "
              "quarters fourths fifth fifths sixths eighths tenths hundredths thousandths".split())


def unfold(found):
    """The content of a font. Words (two letters in a row, no digit) become \\text{..}."""
    return rf"\text{{{found[1]}}}" if re.fullmatch(r"\D*[A-Za-z]{2}\D*", found[1]) else found[1]


def fraction(found):
    """0.1666.. as a fraction: (16 - 1) / 90."""
    once, again = found[1] + found[2], found[3]
    nines = "9" * len(again) + "0" * len(found[2])
    return rf"\frac{{{int(once + again) - int(once or 0)}}}{{{nines}}}"


def scaled(found):
    """million as a factor. A \\text{ that began before the word begins after it."""
    return rf" \cdot {SCALES[found[2]]}{found[1] or ''}"


STEPS = (                # what is found, what replaces it, and an example
    (r"([¼-¾⅐-⅞])", r"\\frac{\1}"),                                        # 2½
    (r"([⁰¹²³⁴-⁹⁺⁻ⁿ]+)", r"^{\1}"),                                        # x²
    (r"([₀-₉]+)", r"_{\1}"),                                               # x₁
    # NFKC would turn ² into 2 and ½ into 1⁄2. So the steps above read these first.
    (r"[^\0-~]+", lambda found: unicodedata.normalize("NFKC", found[0]).translate(SIGNS)),  # 45°
    (r"√\s*(?:\{([^{}]*)\}|\(([^()]*)\)|(\d+|\w))", r"\\sqrt{\1\2\3}"),    # √3
    (r"\\(?:text)?color\{\w*\}|^\s*\*\*|\*\*\s*$", ""),                    # **5**
    (r"\\(?:text\w*|math(?:rm|bf|it|sf|tt)|[mh]box|emph|underline)\s*\{([^{}]*)\}", unfold),
    (r"\\(?:bm|bf|rm|it|boldsymbol|math(?:rm|bf|it)|underline|pounds|euro)\b\s*", ""),    # \bm{5}
    (r"(?<!\\)\\(?:[,;:> ]|q?quad\b)|~(?!=)", " "),                        # 10\,080
    (r"(?<![\d.])\d{1,3}(?: \d{3})+(?! ?[\d/])", lambda found: found[0].replace(" ", "")),
    (r"\\colon\b|(?:\\text\{ *| )to(?: *\}| ) *(?=\d)", ":"),              # 3 to 5
    (r"^ *([\d.]+) *: *([\d.]+) *: *([\d.]+)$", r"(\1, \2, \3)"),          # 1:2:3
    (r"(?:(?<!\\right)(?<!\\left)[.,;]|\s)+(\}*)$|[\\\s]+$", r"\1"),     # 5.
    (r"^(?:\\text\{|[^=,;\\])*(?:\b(?:is|are|equals)\b|[a-z]{2} *\}? *[:=]) *\}?", ""),   # x is 5
    (r"\b(?:about|approximately|exactly|only|total)\b", ""),               # about 5
    (r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?", fraction),       # 0.1\overline{6}
    *[(rf"(?<=[\d}}])( *\\text\{{)? *({'|'.join(SCALES)})s?\b", scaled)] * 2,  # 5 hundred million
    (r"(?:\\text\{ *)?\bpercent\b *\}?", r"\\%"),                          # 5 percent
    (r"(?<![\\A-Za-z])(pi|theta|alpha|beta)(?![A-Za-z])", r"\\\1 "),       # 2pi
    (r"(?<=\d) +(?:[ckm]?m|ft|in|yd|mi|USD)(?:\^\{?[23]\}?|/(?:h|s))?(?!\w)", ""),        # 5 cm^2
    (r"(\\text\{[^{}]*\})\^\{?[23]\}?(?!\w)", r"\1"))                      # 5 \text{ cm}^2


def plain(formula):
    """A boxed answer in the form that math-verify reads."""
    return units(replaced(formula, STEPS).strip())


def units(formula):
    """A number without its words. If the words make it another number, the whole is one text."""
    opened = re.sub(r" *\b(?:and|or)\b", ",", re.sub(TEXT, r" \1 ", formula))
    words, bare = re.findall(RUN, opened), re.findall(RUN, re.sub(TEXT, "", formula))
    if not words or not all(run in ("and", "or") or is_text(run, formula) for run in bare):
        return formula
    # The words that stand after a number, and not before one.
    units = re.findall(rf"(?<=[\w}})%]) *({RUN})(?! *(?:[\d(]|\\[dt]?frac))", opened)
    kinds = {unit.rstrip("s") for unit in units}
    if units == words and len(kinds) == 1 and not NO_UNIT & {unit.split()[0] for unit in units}:
        return re.sub(RUN, "", opened)
    return r"\text{%s}" % " ".join(re.sub(r"[\\{}]", " ", opened).split())


def is_text(run, formula):
    """Are these letters words? A word has a vowel, and its letters do not follow each other in the
    alphabet: uvw is a product. Capitals alone are points: AB."""
    words = re.findall(r"\b[A-Za-z][a-z]{2,}\b", run)
    points = run == formula and len(run) > 1 and run.isupper()
    return points or not FUNCTIONS & set(words) and any(
        re.search("[aeiou]", word) and word not in ascii_lowercase for word in words)

r"""Mathematical answers as a scorer takes them apart: plain ink, pieces, words.

    plain       ½, \mathbf{5}, 10\,080, 5.              \frac{1}{2}, {5}, 10080, 5
    pieces      1, (2, 3) at its commas                 1 and (2, 3)
    opened      \frac{1 \pm x}{2}                       \frac{1 +x}{2} and \frac{1 -x}{2}
    worded      12 eggs, 12 cm^2, 2xyz                  12 \text{eggs}, 12\text{cm}^2, 2xyz
    separate    12 \text{inches}^2                      12, and the kinds {in, 2}
    literal     x \equiv 3 \pmod{5}                     x\equiv3\pmod5

The same steps run on the gold answer and on the model's. Each step of STEPS has an example beside
it, and pays: without it, a right answer of the tests' tables is refused or a wrong one accepted.
"""
import itertools
import re
import unicodedata
from string import ascii_lowercase

from scoring.boxes import replaced

# Signs that the parser does not know. (It knows ≤, π, ∪ and more.)
SIGNS = str.maketrans({"–": "-", "·": r"\cdot ", "∞": r"\infty ", "°": r"^\circ ", "∈": r"\in ",
                       "⁄": "}{", "€": r"\euro ", "£": r"\pounds ", "±": r"\pm "})
SCALES = dict(dozen=12, hundred=100, thousand=1000, million=10**6, billion=10**9, trillion=10**12)
TEXT = r"\\text\{([^{}]*)\}"
RUN = r"(?<![\\A-Za-z{])[A-Za-z]+(?:[ '/-]+[A-Za-z]+)*(?![A-Za-z])"       # one or several words
FUNCTIONS = set("sin cos tan cot sec csc log exp sqrt mod gcd lcm max min infinity".split())
# A text after a number that begins with one of these words makes it another number: 5 and a half,
# 5 tenths, 5 or more.
NO_UNIT = set("a and or half halves squared cubed factorial base plus minus less if not over third "
              "thirds quarters fourths fifth fifths sixths eighths tenths hundredths thousandths "
              "no".split())
# Words of one unit. The first one stands for all.
UNITS = """cm centimeter centimetre; m meter metre; km kilometer kilometre; mm millimeter millimetre
    ; ft foot feet; in inch; yd yard; mi mile; kg kilogram; g gram; lb pound; h hr hour; min minute
    ; s sec second; 2 square sq; 3 cubic cu; degree deg; $ usd dollar; l liter litre"""
# Units that are known without \text. (Other letters after a number are variables.)
BARE = "am|pm|AM|PM|BCE?|AD|CE|USD|[ckm]?m|ft|in|yd|mi|k?g|lb|hr?s?|mins?|s|secs?"
UNIT = r"(?:[ /-]|\\cdot)*\\text\{(?! *[ei] *\})[^{}]*\}(?:\^\{?\d\}?)?"   # not the numbers e and i


def stem(word):
    """A word without its ending: minute and minutes are minut. Two letters stay: S is not E."""
    return re.sub(r"(?<=\w\w)e?s?$", "", word.lower())


KINDS = {stem(word): words.split()[0] for words in UNITS.split(";") for word in words.split()}


def kind(word):
    """The first word of its unit, or else the word itself: in for inches, apple for apples."""
    return KINDS.get(stem(word), stem(word))


def unfold(found):
    """The content of an upright font. Words and units (no digit) become \\text{..}."""
    is_word = re.fullmatch(r"[^\d()]*[A-Za-z][^\d()]*", found[1])
    return rf"\text{{{found[1]}}}" if is_word else found[1]


def fraction(found):
    """0.1666.. as a fraction: (16 - 1) / 90."""
    once, again = found[1] + found[2], found[3]
    nines = "9" * len(again) + "0" * len(found[2])
    return rf"\frac{{{int(once + again) - int(once or 0)}}}{{{nines}}}"


def scaled(found):
    """million as a factor. A \\text{ that began before the word begins after it."""
    return rf" \cdot {SCALES[found[2]]}{found[1] or ''}"


def known(found):
    """Signs beyond ASCII in LaTeX."""
    return unicodedata.normalize("NFKC", found[0]).translate(SIGNS)


STEPS = (                # what is found, what replaces it, and an example
    (r"([¼-¾⅐-⅞])", r"\\frac{\1}"),                                        # 2½
    (r"([⁰¹²³⁴-⁹⁺⁻ⁿ]+)", r"^{\1}"),                                        # x²
    (r"([₀-₉]+)", r"_{\1}"),                                               # x₁
    # NFKC would turn ² into 2 and ½ into 1⁄2. So the steps above read these first.
    (r"[^\0-~]+", known),                                                  # 45°
    (r"√\s*(?:\{([^{}]*)\}|\(([^()]*)\)|(\d+|\w))", r"\\sqrt{\1\2\3}"),    # √3
    (r"\\(?:text)?color\{\w*\}|^\s*\*\*|\*\*\s*$|(?<!\\)\$", ""),      # **5**, $5$
    (r"\\(?:left|right)(?:\.|(?![a-z]))|\\[bB]igg?[lrm]?(?![A-Za-z])|\\!", ""),            # \big(
    (r"(?<!\\)\\(?:[,;:> ]|q?quad\b)|~(?!=)", " "),                        # 10\,080
    (r"\\(?:text\w*|math(?:rm|sf|tt)|[mh]box|emph|operatorname)\s*\{([^{}]*)\}", unfold),
    (r"\\(?:bm|bf|rm|it|boldsymbol|math(?:bf|it)|underline)\b\s*", ""),        # \bm{5}
    (r"\\(\$|euro|pounds)(?![a-z])", r"\\text{\1}"),                       # \$5
    (r"\\[dtc]frac", r"\\frac"),                                           # \dfrac
    (r"\\mathbb ([A-Z])", r"\\mathbb{\1}"),                                # \mathbb R
    (r"\\[lc]?dots[a-z]?(?![a-z])|\.\.\.", r"\\ldots "),                   # 1, 2, ..., n
    (r"(?:[.,;]|\s)+(\}*)$|[\\\s]+$", r"\1"),                              # 5.
    (r"\\varnothing|^\\\{ *\\\}$", r"\\emptyset "),                        # \{\}
    (r"^\\\{ *([a-z])(?: *\\in *\\mathbb\{R\})? *(?:\\mid|[:|]) *(.*\1.*)\\\}$", r"\2"),  # {x: x>2}
    (r"(\d) +(\d+)/(\d+)", r"\1\\frac{\2}{\3}"),                           # 2 1/3
    (r"(?<![\d.])\d{1,3}(?: \d{3})+(?! ?[\d/])", lambda found: found[0].replace(" ", "")),
    (r"\(?(?:\\text\{ *\(?|\\[bp]?|\b)mod\b[ {}]*(\w+)\}?\)?\}?", r"\\pmod{\1}"),          # (mod 5)
    (r"\bmph\b", "mi/h"),                                                  # 60 mph
    (r"\b([ap])\. ?m\b\.?", r"\1m"),                                       # 5 p.m.
    (r"\\colon\b|\{:\}|(?:\\text\{ *| )to(?: *\}| ) *(?=\d)", ":"),              # 3 to 5
    (r"^(?:\\text\{|[^=,;\\])*(?:\b(?:is|are|equals)\b|[a-z]{2} *\}? *[:=]) *\}?", ""),    # x is 5
    (r"\b(?:about|approximately|exactly|only|total)\b|^ *\\approx", ""),   # about 5
    (r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?", fraction),       # 0.1\overline{6}
    *[(rf"(?<=[\d}}])( *\\text\{{)? *({'|'.join(SCALES)})s?\b", scaled)] * 2,  # 5 hundred million
    (r"(?:\\text\{ *)?\bpercent\b *\}?", r"\\%"),                          # 5 percent
    (r"(?<![\\A-Za-z])(pi|theta|alpha|beta)(?![A-Za-z])", r"\\\1 "))       # 2pi


def plain(formula):
    """A boxed answer in plain ink."""
    return replaced(formula, STEPS).strip()


def pieces(formula, signs):
    """(the pieces of a formula between the signs that stand outside all brackets, these signs)."""
    depth, parts, found = 0, [""], []
    for sign, mark in re.findall(rf"({signs})|(\\[A-Za-z]+|\\?.)", formula, re.DOTALL):
        if sign and not depth:
            parts.append("")
            found.append(sign)
        else:
            parts[-1] += sign or mark
            depth += mark.endswith(("(", "[", "{", r"\begin"))
            depth -= mark.endswith((")", "]", "}", r"\end"))
    return [part.strip() for part in parts], found


def opened(formula):
    r"""The formulas that \pm stands for. Several \pm mean all combinations."""
    first, *others = re.split(r"\\pm(?![A-Za-z])", formula)
    for signs in itertools.product("+-", repeat=len(others)):
        yield first + "".join(sign + other for sign, other in zip(signs, others))


def worded(formula):
    r"""An element in which bare words are \text{..}, and so is a bare unit after a number. m is a
    unit in 5 m alone: in 5m, 5 m n and (5 m + 3)/2 it is a variable."""
    formula = re.sub(r"\^\{?\\circ\}?$", r"\\text{deg}", formula)
    formula = re.sub(r"^(-?) *(\\text\{(?:\$|euro|pounds)\}) *(.+)", r"\1\3\2", formula)
    formula = re.sub(rf"{TEXT}|{RUN}", lambda found: rf"\text{{{found[0]}}}"
                     if found[1] is None and is_text(found[0], formula) else found[0], formula)
    number = r"(?:[^A-Za-z\\]|\\(?!text)[A-Za-z]+)*[\d})]"
    unit = rf" +(?:{BARE})(?:/(?:{BARE}))?|(?!s\b|m\b|g\b|h\b)(?:{BARE})"
    found = re.fullmatch(rf"({number})({unit})((?:\^\{{?\d\}}?)?)", formula)
    return rf"{found[1]}\text{{{found[2]}}}{found[3]}" if found else formula


def separate(formula):
    """(an element without the units at its end, the kinds of these units)."""
    units = re.search(rf"(?<=[\w}})!%])(?:{UNIT})+$", formula)
    words = re.findall(r"[a-z]+|[\d$]", units[0].replace(r"\text", "").lower()) if units else []
    if not words or words[0] in NO_UNIT:
        return formula, set()
    return formula[:units.start()], {*map(kind, words)} - {"per"}


def literal(formula):
    """A formula without the blanks that mean nothing, and words without their case."""
    if r"\text" in formula:
        formula = re.sub(TEXT, lambda text: f" {' '.join(map(kind, text[1].split()))} ", formula)
    formula = re.sub(r"(?<!\d) | (?!\d)", "", " ".join(formula.split()))      # 2 3 is not 23
    return re.sub(r"\{(\w)\}", r"\1", formula)


def is_text(run, formula):
    """Are these letters words? A word has a vowel, and its letters do not follow each other in the
    alphabet: uvw is a product. Capitals alone are points: AB."""
    words = re.findall(r"\b[A-Za-z][a-z]{2,}\b", run)
    points = run == formula and len(run) > 1 and run.isupper() or run.lower() == "no"
    return points or not FUNCTIONS & set(words) and any(
        re.search("[aeiou]", word) and word not in ascii_lowercase for word in words)

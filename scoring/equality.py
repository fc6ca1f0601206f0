r"""Are two answers in mathematics equal? Both are taken apart in the same way (see formulas.py),
and each part is compared with its counterpart:

    lists          1, 2 and 3       the same elements, in any order; \pm 2 is 2, -2
    relations      x^2 + 4 = 0      one is a multiple of the other; the name in x = 5 may be missing
    pairs          [1, 2)           the same brackets, and the same parts in order
    other signs    3 \pmod 5        the same signs, and the same parts between them
    units          12 inches        one may be missing, or said in part; a different one is wrong
    values         5/6              equal at six points; decimals to six digits
    texts          \text{even}      the same words, and so is what the parser cannot read

The last rule is why little passes by mistake: math-verify alone searches an answer for a part that
it can read, and drops the rest. We give each part to its parser ourselves, and what the parser does
not read to the end must stand literally on both sides.

Numbers and expressions are equal if they are so at six points, to 200 digits.

Three answers of the tests' tables are judged otherwise than a careful reader judges them: of two
boxes the last one alone counts, an answer without a box is not read, and a huge power takes longer
than the clock allows. Of 310 pairs written to find faults, 20 were judged otherwise. Of 1,600 real
golds (four draws of 400), 3,054 harmless rewritings are all accepted. Of 4,971 answers that differ
in one place, 4 are accepted: three are the same as the gold (-\pm x for \pm x), and one differs in
the tenth digit. A comparison takes 3 ms in the middle, and the clock ends it after 4 s.

Let pass: 10 for 10\%, a sum not added up (3+2 for 5), a ratio as a fraction.
Refused, though right:

    x>1 \text{ and } x<4 for (1, 4)                          5 hours 30 minutes for 5.5 hours
    x<2, x \ge 5 for (-\infty,2)\cup[5,\infty)               x_1=1, x_2=2 for x=1, x=2
    xy=1 for y=\frac{1}{x} (not a constant multiple)         f(x)=x^2 for y=x^2
    \langle 1,2\rangle for (1,2)                             3 \pmod 7 for x \equiv 3 \pmod 7
    6:20 for 3:10, for it may be a time
Let pass, though wrong:
    1, 234 for 1,234: it may be a list                       (y,x)=(3,4) for (3, 4)
    x=1.0000001 for x=1.0000002: six digits count            4, 3 for 3 cats, 4 dogs
    \mathbf{b} \times \mathbf{a} for \mathbf{a} \times \mathbf{b}: letters commute
"""
import logging
import random
import re
from functools import lru_cache

from scoring.formulas import TEXT, is_text, literal, opened, pieces, plain, separate, worded

AND = r";|\\text\{ *(?:and|or) *\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])"
ORDER = re.compile(r"[<>]|\\(?:[lg]e|[lg]t|ne)")
CLOCK = re.compile(r"\d?\d:\d\d")
# Signs that the parser cannot read, or not as we do.
BETWEEN = r"\\(?:approx|equiv|pmod|mid|to|sim|cong|propto)(?![A-Za-z])|[:@]"
# What the parser takes and drops: f' would be f, A^T be A, \gcd(a, b) be 1, I_1 be I, dy/dx be 0,
# and 5 6 be 11.
DROPPED = re.compile(r"'|\^\{?(?:T|\\top)\b|\\(?:gcd|lcm|angle|triangle)|(?<![A-Za-z])[eEiI]_|\|_|"
                     r"\\frac\{(?:d|\\partial) ?[a-z]?\}\{(?:d|\\partial)|"
                     r"(?<!\\frac )(?<!_)\d +\d")


def load_grammar():
    """Load math-verify with its grammar. Both take a second. (The parser learns by reading.)"""
    import math_verify
    logging.getLogger("math_verify").setLevel(logging.ERROR)    # it warns: we keep the time
    read(r"x=\frac{-1+\sqrt{2}}{3}y^{2}")


def equal(gold, answer):
    r"""Have two formulas the same elements? A comma in 1,234 may divide thousands, or elements, and
    the parts of a union are elements too. So all readings are tried."""
    if literal(gold) == literal(answer):
        return True
    for sign in (r"(?<!\d),|,(?!\d{3}(?!\d))", ",", r"\\cup"):
        (golds, words), (answers, others) = elements(gold, sign), elements(answer, sign)
        # 1 and 4 is 1 or 4, but x > 1 and x < 4 is another set than x > 1 or x < 4.
        if sign == r"\\cup" and not words == others == {"or"} or ORDER.search(gold) and (
                words | others == {"and", "or"}):
            continue
        if len(golds) != len(answers):
            golds, answers = together(golds), together(answers)
        names, ours = {named(one)[0] for one in golds}, {named(one)[0] for one in answers}
        # A list that goes on has an order. So has one whose elements have several names, where the
        # other one leaves them out: a=3, b=4 is 3, 4 and not 4, 3.
        ordered = r"\ldots" in golds or len(names | ours) > 2 and "" in names ^ ours
        if same_list(golds, answers, ordered):
            return True
    return False


def elements(formula, sign):
    r"""(the elements of a list 1, 2; 3 or 4, or of a set \{1, 2\}, the words "and" and "or" between
    them). The elements of a set differ."""
    inner = re.fullmatch(r"\\\{((?:(?!\\\}).)*)\\\}", formula)
    parts, signs = pieces(inner[1] if inner else formula, rf"{sign}|{AND}")
    listed = [worded(one) for part in parts if part for one in opened(part)]
    words = set(re.findall("and|or", " ".join(signs).replace("cup", "or")))
    return list(dict.fromkeys(listed)) if inner else listed, words


def together(listed):
    """x = 3, y = 4 as the pair (3, 4), in the order of the names. Other lists as they are."""
    values = {name: sides[-1] for name, sides in map(named, listed) if name}
    if not len(values) == len(listed) > 1:
        return listed
    return [f"({', '.join(values[name] for name in sorted(values))})"]


def same_list(golds, answers, ordered):
    """Is each element the same as one of the others, and none is left? If ordered, the first is the
    same as the first, and so on."""
    if len(golds) != len(answers) or ordered:
        return len(golds) == len(answers) and all(map(same, golds, answers))
    left = list(answers)
    for gold in golds:
        found = next((answer for answer in left if same(gold, answer)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def same(gold, answer):
    """Are two elements the same: by their signs, by their parts, or by their values?"""
    if literal(gold) == literal(answer):
        return True
    # 1. Signs that the parser cannot read. They are the same, and so is each part between them.
    (golds, signs), (answers, others) = pieces(gold, BETWEEN), pieces(answer, BETWEEN)
    if signs or others:
        if [literal(sign) for sign in signs] == [literal(sign) for sign in others]:
            times = CLOCK.fullmatch(gold) and CLOCK.fullmatch(answer)        # 3:20 is not 6:40
            return all(map(equal, golds, answers)) or signs == [":"] and not times and same_value(
                gold, answer)
        if signs + others != [":"]:            # 3:5 is 3/5 too, and 10 \approx 9.9 is 10
            return {*signs, *others} == {r"\approx"} and "-" not in answers and any(
                re.search(r"\d", one) and equal(one, other) for one in golds for other in answers)
    # 2. Equations. A name may be missing: x = 5 and 15 + 5 = 20 end with a value.
    (name, sides), (other, ours) = named(gold), named(answer)
    if len(sides) == len(ours) > 1 and all(map(equal, sides, ours)):
        return True
    short = 1 in (len(sides), len(ours)) or name == other != "" and len(sides) != len(ours)
    if short and len(sides) + len(ours) > 2 and None not in (name, other):
        return equal(sides[-1], ours[-1])
    # 3. Numbers in a base. The parser does not see it: 204_5, 204_6, 204.
    their_base, our_base = in_base(gold), in_base(answer)
    if our_base:
        return our_base == (their_base or (gold, "10"))
    gold = their_base[0] if their_base else gold         # the question asked for this base
    # 4. Pairs and intervals.
    if gold[0] in "([" and (gold[0], gold[-1]) == (answer[0], answer[-1]):
        (inner, _), (ours, _) = pieces(gold[1:-1], ","), pieces(answer[1:-1], ",")
        if len(inner) == len(ours) > 1:
            return all(map(equal, inner, ours))
    # 5. Values and their units, of which one may be missing or be said in part.
    (number, kinds), (our_number, our_kinds) = separate(gold), separate(answer)
    if kinds and our_kinds and {"2", "3"} & (kinds ^ our_kinds):             # m is not m^2
        return False
    return (kinds <= our_kinds or our_kinds <= kinds) and same_value(number, our_number)


def named(element):
    r"""(the name of an element, its sides): y and [y, 2x] of y = 2x, S_n and [S_n, n^2], "" without
    a name (2 + 3 = 5, or 5), and None for an equation between formulas."""
    sides, _ = pieces(element, r"=|\\in\b")
    beside = rf"\^\{{-1\}}|_(?:\{{[^{{}}]*\}}|\w)|\([^()]*\)|{TEXT}"
    first = re.sub(beside, "", sides[0])
    if len(sides) > 1 and re.fullmatch(r"[\\A-Za-z '{}|]*", first):
        return literal(sides[0]), sides
    before = re.sub(rf"\\(?!text)[A-Za-z]+|{TEXT}", "", " ".join(sides[:-1]))
    return None if re.search("[A-Za-z]", before) else "", sides


@lru_cache(1000)
def read(formula):
    """The formula for sympy, or None if the parser cannot read all of it. What it drops without a
    word (DROPPED) counts as not read."""
    import sympy
    from latex2sympy2_extended import latex2sympy2
    formula = re.sub(TEXT, lambda font: font[not is_text(font[1], font[1])], formula)
    if r"\text" in formula or DROPPED.search(formula):
        return None
    ink = latex2sympy2.NormalizationConfig(malformed_operators=True, boxed="none")
    case = latex2sympy2.ConversionConfig(lowercase_symbols=False)             # M/m is not 1
    try:
        value = latex2sympy2.latex2sympy(formula, is_real=True, normalization_config=ink,
                                         conversion_config=case)
        letter = sympy.Symbol("i", real=True)
        return value.xreplace({letter: sympy.I}) if letter in value.free_symbols else value
    except Exception:       # it raises nothing narrower over a sign that it cannot read
        return None


def same_value(gold, answer):
    """Are two formulas equal by their values? Equations and inequalities are compared by us: for
    math-verify all that have no solution are equal. So are numbers and expressions: math-verify
    rounds to six digits after the point, so to it 1/1996! is 1/1998!."""
    from math_verify import verify
    from sympy import And, Eq, UnevaluatedExpr
    from sympy.core.relational import Relational
    gold, answer = read(gold), read(answer)
    if gold is None or answer is None or isinstance(gold, Eq) != isinstance(answer, Eq):
        return False
    theirs, ours = (one.args if isinstance(one, And) else [one] for one in (gold, answer))
    if all(isinstance(one, Relational) for one in (*theirs, *ours)):
        return len(theirs) == len(ours) and all(
            any(multiple(one, other) for other in ours) for one in theirs)
    percent = gold.has(UnevaluatedExpr) or answer.has(UnevaluatedExpr)
    same = None if percent else agree(gold, answer)
    if same is None:
        same = verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None)
    return bool(same)


def at_points(*formulas):
    r"""The values of formulas at six points, or one value each if they have no letters. (To
    simplify a difference takes sympy 8 seconds over a sum of sines.) Where all are real at several
    points, these count: \ln(xy) is \ln x + \ln y where both exist. [] if one has no value, or if
    points say little: |x| is x at one half of them, and a sum up to n has no value for n = 1/2."""
    from sympy import Abs, Expr, Rational, ceiling, floor
    from sympy.concrete.expr_with_limits import ExprWithLimits
    if not all(isinstance(one, Expr) and not one.is_Matrix
               and not one.has(ExprWithLimits, Abs, ceiling, floor) for one in formulas):
        return []
    letters = sorted(set.union(*(one.free_symbols for one in formulas)), key=str)
    points = []
    for seed in range(6 if letters else 1):
        draw = random.Random(seed)
        point = {letter: Rational(draw.randrange(1, 99, 2) * (-1)**seed, 52) for letter in letters}
        points.append([one.evalf(250, subs=point) for one in formulas])
    if not all(value.is_finite for point in points for value in point):
        return []
    real = [point for point in points if all(value.is_real for value in point)]
    return real if len(real) > 1 else points


def agree(gold, answer):
    """Are two expressions equal, and None if that cannot be computed. Decimals are compared to six
    significant digits, and to six after the point."""
    from sympy import Float, N
    points = at_points(gold, answer)
    if not points:
        return None
    if gold.has(Float) or answer.has(Float):
        return all(str(N(theirs, 6)) == str(N(ours, 6)) and abs(theirs - ours) < 1e-6
                   for theirs, ours in points)
    return all(near(theirs, ours) for theirs, ours in points)


def near(value, other):
    """Are two numbers, which may be complex, the same to 200 digits?"""
    from sympy import N
    # |value - other| <= |value| / 10^200
    return N(abs(value - other), 20) <= N(abs(value), 20) / 10**200


def multiple(gold, answer):
    """Is one relation the other one times a positive number, as written or turned round?

    2y = x is y = x/2, and x > 3 is 3 < x. 1 = 2 is not a multiple of x^2 = -1, though no number
    solves either. Relations between numbers alone have no multiples."""
    for other in (answer, answer.reversed):
        points = gold.free_symbols and type(gold) is type(other) and at_points(
            *gold.args, *other.args)
        ratios = points and [(left - right) / (ours - turned)
                             for left, right, ours, turned in points]
        if ratios and ratios[0].is_positive and all(near(ratio, ratios[0]) for ratio in ratios):
            return True
    return False


def in_base(formula):
    """(digits, base) of a number like 204_5 or (204)_{5}, else None."""
    found = re.fullmatch(r"\(?(\d[\dA-F]*)\)?_\{?(\d+)\}?", formula)
    return found and found.groups()

r'''Which part of an answer is the program? Is what it printed or returned right?

The program is the last ```python block. (Words may stand before its fence.) If there is none, it is
the last block that names no language. (Where a function is asked for, it is the last such block
that defines something, because an example of its use may follow.) If there is no block, it is the
text up to the first fence, if that is Python and begins as a program does (import, from, def,
class, @). A block that the end of the text cuts off counts if it is Python: a model may forget the
last fence. Everything else is unparsed and wrong.
'''
import ast
import contextlib
import decimal
import io
import itertools
import math
import re
import textwrap

# ``` or ~~~ on a line of its own, maybe after the mark of a list, maybe with a language.
# (A line with another ` is none. The lookahead finds it once: trying all ways would be quadratic.)
FENCE = re.compile(r"^[ \t]*(?:(?:[-*+]|\d+[.)])[ \t]+)?(`{3,}(?!`)|~{3,}(?!~))(?=[^`\n]*$)"
                   r"[ \t]*(\w*).*", re.M)
# A fence after some code, which it ends, or after words. Then it may name the language.
LATE_FENCE = re.compile(r"^([^#`~\n]*[^#`~\s])[ \t]*((?:```+|~~~+)[ \t]*(?:python3?|py)?)[ \t]*$",
                        re.M | re.I)
DEFINES = re.compile(r"^[ \t]*(?:async )?(?:def|class) ", re.M)
BEGINS = re.compile(r"(?:#.*\n\s*)*(import \w|from [\w.]+ import |def \w+\(|class \w+|@\w)")
NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,9})?", re.ASCII)


def program_in(text, defines=False):
    """The program in a text, or None: see the head of this file.

    defines: the program must define something. So a later block that only uses it does not count.
    """
    blocks = [block for block in blocks_of(LATE_FENCE.sub(r"\1\n\2", text)) if any(block)]
    programs = ([program for language, program in blocks if language in ("python", "py", "python3")]
                or [program for language, program in blocks if not language])
    if defines and programs and programs[-1]:
        programs = [program for program in programs if DEFINES.search(program)] or programs
    if programs:
        return programs[-1] or None
    bare = text.partition("\n```")[0].strip()
    return bare if BEGINS.match(bare) and is_python(bare) else None


def blocks_of(text):
    """Yields (language, program) of each block in a text.

    A block ends at the first fence up to which it is valid Python, so not at one in a docstring. A
    block that is not Python ends at its first fence. The program is "" where the end of the text
    cuts it off."""
    fences, end = list(FENCE.finditer(text)), 0
    for number, opens in enumerate(fences):
        if opens.start() < end:                       # it belongs to the block before
            continue
        start = opens.end() + 1
        stops = [(fence.start(), fence.start() if fence[2] else fence.end())    # a language: the
                 for fence in fences[number + 1:number + 9]                     # next block begins
                 if fence[2] or fence[1].startswith(opens[1])]
        if not stops or number + 9 > len(fences):     # for every fence it would take ages
            stops.append((len(text), len(text)))
        good = next((stop for stop in stops if is_python(text[start:stop[0]])), None)
        stop, end = good or stops[0]
        whole = good or stop < len(text)
        yield opens[2].lower(), textwrap.dedent(text[start:stop]).rstrip() if whole else ""


def is_python(code):
    """Is a text, which may be indented as a whole, a Python program?"""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        return bool(ast.parse(textwrap.dedent(code)))


def same_output(printed, expected):
    """Are two texts the same, line by line: without outer blanks, or as exact decimals?

    Lines are read one at a time. Texts over 1 MB are not read as numbers, because 8 MB of text are
    500 MB as a list of numbers."""
    def content(line):
        words = line.split() if len(printed) < 10**6 else [line]
        numbers = all(map(NUMBER.fullmatch, words))
        return [decimal.Decimal(word) for word in words] if numbers else line.strip()

    lines = (io.StringIO(text.strip()) for text in (printed, expected))
    return all(ours.strip() == theirs.strip() or content(ours) == content(theirs)
               for ours, theirs in itertools.zip_longest(*lines, fillvalue="\0"))


def same_value(value, expected):
    """Are two JSON values the same? Where one is a float, to a millionth."""
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(same_value, value, expected))
    if isinstance(value, float) or isinstance(expected, float):
        with contextlib.suppress(TypeError, OverflowError):    # not a number, or 400 digits long
            return math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-6)
    return value == expected

"""Reading the final answer out of a solution: a number, a letter, yes or no, or a text.

Every reader returns a canonical string, equal for equal answers, or None where it finds nothing to read. Time is linear
in the text's length, whatever the text: patterns never repeat a repetition, and only a text's end is read.
"""

from __future__ import annotations

import re
from fractions import Fraction

HASH = re.compile(r"####")
BOXED = re.compile(r"\\boxed\s*\{")
A_COLON = re.compile(r"\bA:")
THE_ANSWER = re.compile(r"\bthe (?:final |correct )?answer is\b", re.IGNORECASE)
MARKS = (HASH, BOXED, A_COLON, THE_ANSWER)
"""What announces a final answer, most trusted first. The last occurrence counts."""

LONGEST = 100_000
"""Characters, from the end, that are read at all; some ten times the longest answers that models write."""

MOST_DIGITS = 40
"""A longer number is no answer to any question here, and could be made to cost time or memory."""

_NUMBER = re.compile(
    r"(?<!\d)(?<!\d[.,])"  # never start inside a number: 1,2345 is none
    r"(?P<sign>(?<![\w)])[-\u2212])?(?:\\?[$\u20ac\u00a3](?P<late_sign>-)?)?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++)?|(?<!\w)\.\d++)"
    r"(?:\s?/\s?(?P<denominator>\d++))?"
)
# What makes a number a part of something else: a power, an unfinished calculation, a date or time, 2 1/2.
_GOES_ON = re.compile(r"\s?(?:\^|\*\*)\s?[({\d-]|\s?[-+*/\u00d7]\s?\$?\d|[.,:]\d|\s\d{1,9}\s?/\s?\d")
_BEGAN_BEFORE = re.compile(r"[\d)}]\s?(?:\^|\*\*|[-+*/\u00d7])\s?[({$]?$")
_FRAC = re.compile(r"\\[dt]?frac\{(\d{1,9})\}\{(\d{1,9})\}")

_LETTER = r"(?:([b-e])\b|(a)\b(?!\s+(?!is\b)[a-z]))(?!\s?[\^/*+])"  # "the answer is a number" names no letter
_IS = r"(?:is|will be|would be|should be|must be)?"
_LETTERS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"####[\s(\"'*:]*+{_LETTER}",
        rf"\\boxed\s*+\{{(?:\\text(?:bf)?)?[\s({{]*+{_LETTER}",
        rf"\b(?:answer|ans)\b[\s\"'.=:,-]*+{_IS}[\s:]*+(?:option|choice)?[\s(\"'*:]*+{_LETTER}",
        rf"\b(?:option|choice)\b[\s\"'.=:,-]*+{_IS}[\s(\"'*:]*+{_LETTER}",
        r"\b(?:([b-e])|(a))[\s)\"'*]*+(?:is|would be) the (?:correct |right )?(?:answer|option|choice)",
    )
)
_BARE_LETTER = re.compile(r"[\s(*\"']*+([a-e])[\s).*\"':]*+", re.IGNORECASE)

# Punctuation, the end or a reason must follow: "no doubt", "yes men" and "No. 5" state nothing.
_SAID = (
    r"[\s*\"'(:{]{0,6}+(?:(not)\s+)?\"?(yes|no|true|false)\b"
    r"(?!\.?\s?\d)(?=\s*+(?:[^\w\s]|$)|\s+(?:because|since|as)\b)"
)
_YES_NO = tuple(
    re.compile(pattern + _SAID, re.IGNORECASE)
    for pattern in (
        r"####",
        r"\\boxed\s*+\{(?:\\text)?",
        r"\banswer(?: to the question)?(?:\s+(?:is|would be|must be))?",
        r"(?:^|[.!?\n])",
    )
)


def number(text: str, *, marked: bool = False) -> str | None:
    """The number that a solution ends in, exact: "18", "-3", "25/2".

    It stands after the last `####`, else `\\boxed{`, else `A:`, else "the answer is" (after that line's last equals
    sign, if it has one); without any of these it is the text's last number. Thousands separators, currency, percent
    and units are dropped. A part of something else (9**9, 16 - 3, 10:30) and more than 40 digits are unreadable.

    Args:
      marked: read after `####` only, so that an answer cut short is unreadable.

    >>> number("She makes 9 * 2 = $18.00 a day.\\n#### 18"), number("A: $1,250"), number("It is 9**9**9"), number("?")
    ('18', '1250', None, None)
    """
    text = _FRAC.sub(r"\1/\2", text[-LONGEST:].replace("{,}", ","))
    stated = _stated(text, (HASH,) if marked else MARKS)
    if stated is not None:
        found = _NUMBER.search(stated.rsplit("=", 1)[-1])
    else:
        found = None if marked else _last(_NUMBER, text)
    return None if found is None else _exact(found)


def letter(text: str) -> str | None:
    """The option, a to e, that a solution names: "#### c", "\\boxed{c}", "answer : c", "option c", or "(c)" alone.

    >>> letter("so the answer is (C)."), letter("c )"), letter("the answer is a number")
    ('c', 'c', None)
    """
    text = text[-LONGEST:].rstrip()
    for pattern in _LETTERS:
        if found := _last(pattern, text):
            return (found[1] or found[2]).lower()
    found = _BARE_LETTER.fullmatch(text.rsplit("\n", 1)[-1])
    return found[1].lower() if found else None


def yes_no(text: str) -> str | None:
    """Whether a solution says yes or no: "#### yes", "the answer is no", or a sentence that opens with "Yes,".

    The most trusted kind of statement counts, of that kind the last; "not yes" is no.

    >>> yes_no("No one knows. Yes, it is."), yes_no("The answer is not yes."), yes_no("There is no doubt.")
    ('yes', 'no', None)
    """
    for pattern in _YES_NO:
        if found := _last(pattern, text[-LONGEST:]):
            said_yes = found[2].lower() in ("yes", "true")
            return "yes" if said_yes != bool(found[1]) else "no"
    return None


def free_text(text: str) -> str | None:
    """The text after the last mark, else the last line; case, spaces and the closing period do not count.

    >>> free_text("It lies in France.\\n#### Mont  Blanc.")
    'mont blanc'
    """
    text = text[-LONGEST:].rstrip()
    stated = _stated(text, MARKS)
    if stated is None:
        stated = text.rsplit("\n", 1)[-1]
    return " ".join(stated.split()).strip(" .:").casefold() or None


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    found = None
    for found in pattern.finditer(text):
        pass
    return found


def _stated(text: str, marks: tuple[re.Pattern[str], ...]) -> str | None:
    """The first line of what follows the last occurrence of the most trusted mark; None without a mark."""
    for mark in marks:
        if found := _last(mark, text):
            line = text[found.end() :].lstrip(" \t\r\n:*").split("\n", 1)[0]
            return line.split("}", 1)[0] if mark is BOXED else line
    return None


def _exact(found: re.Match[str]) -> str | None:
    """The number as a fraction in lowest terms; None where it is part of something else, or far too long."""
    text, start = found.string, found.start()
    digits, denominator = found["digits"].replace(",", ""), found["denominator"] or "1"
    if _BEGAN_BEFORE.search(text[max(0, start - 5) : start]) or _GOES_ON.match(text, found.end()):
        return None
    if len(digits) > MOST_DIGITS or len(denominator) > MOST_DIGITS or int(denominator) == 0:
        return None
    value = Fraction(digits) / int(denominator)
    return str(-value if found["sign"] or found["late_sign"] else value)

"""Reading the final answer out of a solution: a number, a letter, yes or no, or a text.

Every reader returns a canonical string, equal for equal answers, or None where it finds nothing to read. Time is linear
in the text's length, whatever the text: patterns are anchored on a literal and never repeat a repetition.
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

MOST_DIGITS = 40
"""A longer number is no answer to any question here, and could be made to cost time or memory."""

_NUMBER = re.compile(
    r"(?<![\d.,])"  # never start inside a number: keeps a long run of digits linear
    r"(?P<sign>(?<![\w)])[-\u2212])?(?:\\?[$\u20ac\u00a3])?(?P<late_sign>(?<=[$\u20ac\u00a3])-)?"
    r"(?P<whole>\d{1,3}(?:,\d{3})++(?!\d)|\d++)?(?P<decimals>\.\d++)?"
    r"(?(whole)|(?(decimals)|(?!)))"
    r"(?:\s?/\s?(?P<denominator>\d++))?"
)
_POWER_AFTER = re.compile(r"\s?(?:\^|\*\*)\s?[({\d-]")
_POWER_BEFORE = re.compile(r"[\d)}]\s?(?:\^|\*\*)\s?[({]?$")

_LETTER = r"(?:([b-e])\b|(a)\b(?!\s+[a-z]))"  # "the answer is a number" names no letter
_LETTERS = tuple(
    re.compile(pattern + r"[\s(\"'*:{]*+" + _LETTER, re.IGNORECASE)
    for pattern in (
        r"####",
        r"\\boxed\s*+\{(?:\\text(?:bf)?)?",
        r"\b(?:answer|ans)\b[\s\"'.=:,-]*+(?:is|would be)?\s*+:?\s*+(?:option|choice)?",
        r"\b(?:option|choice)\b",
    )
)
_BARE_LETTER = re.compile(r"[\s(*\"']*+([a-e])[\s).*\"':]*+", re.IGNORECASE)

_ENDS = r"(?=\s*+(?:[^\w\s]|$)|\s+(?:because|since|as)\b)"  # "no doubt", "yes men" state nothing
_YES_NO = tuple(
    re.compile(pattern + r"[\s*\"'(:{]*+(?:(not)\s+)?\"?(yes|no|true|false)\b" + _ENDS, re.IGNORECASE)
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
    and units are dropped. An unevaluated power and a number of more than 40 digits are unreadable.

    Args:
      marked: read after `####` only, so that an answer cut short is unreadable.

    >>> number("She makes 9 * 2 = $18.00 a day.\\n#### 18"), number("A: $1,250"), number("It is 9**9**9"), number("?")
    ('18', '1250', None, None)
    """
    stated = _stated(text, (HASH,) if marked else MARKS)
    if stated is not None:
        found = _NUMBER.search(stated.rsplit("=", 1)[-1])
    elif marked:
        return None
    else:
        found = None
        for found in _NUMBER.finditer(text):
            pass
    return None if found is None else _exact(found)


def letter(text: str) -> str | None:
    """The option, a to e, that a solution names: "#### c", "\\boxed{c}", "answer : c", "option c", or "(c)" alone.

    >>> letter("so the answer is (C)."), letter("c )"), letter("the answer is a number")
    ('c', 'c', None)
    """
    for pattern in _LETTERS:
        found = None
        for found in pattern.finditer(text):
            pass
        if found:
            return (found[1] or found[2]).lower()
    last_line = text.rstrip()[-200:].rsplit("\n", 1)[-1]
    found = _BARE_LETTER.fullmatch(last_line)
    return found[1].lower() if found else None


def yes_no(text: str) -> str | None:
    """Whether a solution says yes or no: "#### yes", "the answer is no", or a sentence that opens with "Yes,".

    The most trusted kind of statement counts, of that kind the last; "not yes" is no.

    >>> yes_no("No one knows. Yes, it is."), yes_no("The answer is not yes."), yes_no("There is no doubt.")
    ('yes', 'no', None)
    """
    for pattern in _YES_NO:
        found = None
        for found in pattern.finditer(text):
            pass
        if found:
            said = found[2].lower() in ("yes", "true")
            return "yes" if said != bool(found[1]) else "no"
    return None


def words(text: str) -> str | None:
    """The text after the last mark, else the last line; case, spaces and the closing period do not count.

    >>> words("It lies in France.\\n#### Mont  Blanc.")
    'mont blanc'
    """
    stated = _stated(text, MARKS)
    if stated is None:
        stated = text.rstrip().rsplit("\n", 1)[-1]
    return " ".join(stated.split()).strip(" .:").casefold() or None


def _stated(text: str, marks: tuple[re.Pattern[str], ...]) -> str | None:
    """The first line of what follows the last occurrence of the most trusted mark; None without a mark."""
    for mark in marks:
        found = None
        for found in mark.finditer(text):
            pass
        if found:
            line = text[found.end() :].lstrip().split("\n", 1)[0]
            return line.split("}", 1)[0] if mark is BOXED else line
    return None


def _exact(found: re.Match[str]) -> str | None:
    digits = (found["whole"] or "0").replace(",", "") + (found["decimals"] or "")
    denominator = found["denominator"] or "1"
    around = found.string[max(0, found.start() - 4) : found.start()], found.string[found.end() : found.end() + 4]
    if _POWER_BEFORE.search(around[0]) or _POWER_AFTER.match(around[1]):
        return None
    if len(digits) > MOST_DIGITS or len(denominator) > MOST_DIGITS or int(denominator) == 0:
        return None
    value = Fraction(digits) / int(denominator)
    return str(-value if found["sign"] or found["late_sign"] else value)

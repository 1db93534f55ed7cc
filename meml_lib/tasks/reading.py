"""Reading the final answer out of a solution: a number, a letter, yes or no, or a text.

Every reader returns a canonical string, equal for equal answers, or None where it finds nothing to read: a refusal, a
formula, or an answer that was cut off. Time is linear in the text's length, whatever the text: patterns never repeat a
repetition, and only a text's end is read. Chosen and checked on real models' answers: `tests/reading_agreement.py`.
"""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import chain

MARKS = (
    re.compile(r"(?:^[ \t]*+|[.?!] )A:|\b[Aa]nswer(?:\*\*)?:(?=[\s*]*+[-\u2212\\$\u20ac\u00a3\d])", re.MULTILINE),
    re.compile(r"\bthe (?:final |correct )?answer is\b", re.IGNORECASE),
)
"""What announces a number where there is neither `####` nor a box, the more trusted first. The last one counts."""

LONGEST = 50_000
"""Characters, from the end, that are read at all; some ten times what models write after their reasoning."""

MOST_DIGITS = 40
"""A longer number is no answer to any question here, and could be made to cost time or memory."""

_BOX = re.compile(r"\\(?:boxed|fbox)\s*+\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_ALONE = re.compile(r"\W*+(?:[a-e]|yes|no|true|false|[\d.,/]++%?)\W*+", re.IGNORECASE)  # no heading

_UNSEEN = re.compile(r"[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")  # zero-width, and marks of direction
_SEPARATOR = re.compile(r"(?<=\d)(?:\{,\}|,?\\[,!]|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")  # 1{,}234, 1\,234
_MIXED = re.compile(r"(?<=\d)\s*+(?=\\[dt]?frac)")
_FRAC = re.compile(r"\\[dt]?frac\s?(?:\{\s?(-?\d{1,9})\s?\}\s?\{\s?(\d{1,9})\s?\}|(\d)\s?(\d)(?!\d))")
_NUMBER = re.compile(
    r"(?<!\d)(?<!\d[.,])"  # never start inside a number: 1,2345 is none
    r"(?P<sign>(?<![\w)])[-\u2212\u2013])?(?P<money>\\?[$\u20ac\u00a3]\s?(?P<late_sign>-)?)?"
    r"(?:(?P<whole>\d{1,9})\s(?:and\s)?(?=\d{1,9}\s?/\s?\d))?"  # 2 1/2
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++)?|(?<!\w)\.\d++)"
    r"(?:\s?/\s?(?P<denominator>\d++)|:00(?![:\d]))?"  # 2:00 is 2
)
# What makes a number a part of something else: a power, an unfinished calculation, a date or time, 3x, 1e6.
_GOES_ON = re.compile(
    r"(?:\s?\^\s?(?!\{?\\circ)|\*\*|\s\*\*\s?)[({\d-]|\s?[-+*/\u00d7\u00f7\u2013x]\s?\\?\$?(?:\d|[xyzXYZ]\b)|[.,:]\d"
    r"|[eE][-+]?\d|\s\d{1,9}\s?/\s?\d|\s?\*?\s?[xyzXYZ]\b|\s?\\(?:times|cdot|div|pm|sqrt|pi)\b"
    r"|[\u00bc\u00bd\u00be\u00b2\u00b3]|\s?[-+/,=]\s*+\Z"
)
_BEGAN_BEFORE = re.compile(
    r"(?:[\d)}]|(?<![A-Za-z])[xyzXYZ])(?:\*\*|\s\*\*\s|\s?[-\u2013+*/^\u00d7\u00f7x]\s?)[({$]*+$"
    r"|\d[eE:'\u2019][+-]?$|\\(?:times|cdot|div|pm|sqrt|[dt]?frac)\W{0,3}$"
)

_SENTENCES = re.compile(r"(?<=[.!?])(?<![DM][rs]\.)(?<!Mrs\.)[\s*]++(?=[\"'(*\\$]{0,4}+[A-Z\d])|\n")
_ENDED = re.compile(r"[.!?\u3002][\"'\u201d\u2019)*$`\\\]]{0,6}\Z|\\[\])]\Z|\$\$\Z")
_BARE = re.compile(  # 18; $18; 18 dollars; Total: 18
    r"(?:[^\d=:]{0,60}+[=:])?[^\w.]{0,8}+[\d.,/]++\\?%?(?: [A-Za-z]++){0,2}+[*$)]*+"
)
_BOLD = re.compile(r"(?<![\w)])\*\*([^*\n]*+)\*\*(?!\d)")
_REFUSED = re.compile(
    r"(?:can ?not|can['\u2019]t|could not|unable to|(?:im|not )possible to|not able to)\s(?:\w++\s){0,2}"
    r"(?:determin|calculat|answer|solv|comput|provid)"
    r"|(?:more|enough|insufficient|additional) (?:information|data)|\bsorry\b",
    re.IGNORECASE,
)
_POLITE = re.compile(r"\b(?:hope th[ai]|let me know|feel free|(?:more|other|further) questions)\b", re.IGNORECASE)

_OPENS = r"(?:\\[a-z]++\s?\{|[\s(\[{\"'*:$\\])*+"
_LETTER = (  # "the answer is a number" names no letter
    _OPENS + r"(?:([b-e])\b|(a)\b(?!\s+(?!(?:is|because|since|as)\b)[a-z]))(?!\s?[\^/*+](?!\*))"
)
_IS = r"(?:is|will be|would be|should be|must be)?"
_LETTERS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"\b(?:answer|ans)\b[\s\"'.=:,*-]*+{_IS}[\s:]*+(?:option|choice)?{_LETTER}",
        rf"\b(?:option|choice)\b[\s\"'.=:,*-]*+{_IS}{_LETTER}",
        rf"\b(?:choose|pick|select|go with)\s(?:option|choice|answer)?{_LETTER}",
        r"\b(?:([b-e])|(a))[\s)\"'*]*+(?:is|would be) (?:correct|the (?:correct |right )?(?:answer|option|choice))",
    )
)
_STATED_LETTER = re.compile(_LETTER, re.IGNORECASE)
_LAST_LETTER = re.compile(
    rf"(?:^|\n|[^A-Za-z\s(\[{{\"'*$\\+/^-])\s*+{_OPENS}([a-e])[\s).*\"':}}$]*\Z", re.IGNORECASE
)
_LETTERED = re.compile(r"[\s(*\"']*+([a-e])(?:\s?\)|[.:])[^\n=]{0,60}+", re.IGNORECASE)

# Punctuation, the end or a reason must follow: "no doubt", "yes men" and "No. 5" state nothing.
_SAID = (
    r"(?:\\text(?:bf)?\{|[\s*\"'(:{$\\]){0,6}+(?:(not)\s+)?\"?(yes|no|true|false)\b"
    r"(?!\.?\s?\d)(?=\s*+(?:[^\w\s/]|$)|\s+(?:because|since|as)\b)"
)
_SURELY = r"(?:\s+(?:(?:most )?(?:likely|probably|definitely|clearly|simply|therefore)|an? \w{1,12}))?"
_YES_NO = tuple(
    re.compile(pattern + _SAID, re.IGNORECASE)
    for pattern in (
        rf"\banswer(?: to (?:the|this|that|your) question)?(?:\**+\s+(?:is|would be|must be|should be))?{_SURELY}",
        r"(?:^|[.!?\n]|\b(?:so|therefore|thus|hence|conclusion|statement is|claim is)\b,?)",
    )
)
_STATED_YES_NO = re.compile(_SAID, re.IGNORECASE)


def number(text: str, *, marked: bool = False) -> str | None:
    """The number that a solution ends in, exact: "18", "-3", "25/2".

    It stands after the last `####` or in the last `\\boxed{}`, whichever is later, else after `A:` or `Answer:`, else
    "the answer is" (after that line's last equals sign, if it has one). Without any of these the last sentence is
    read, if it is complete and no refusal: of its numbers (of those in bold, if any) the one that the last equals sign
    gave, else an amount of money, else the last. Thousands separators, currency, percent and units are dropped. A part
    of something else (9**9, 16 - 3, 10:30, 3x) and more than 40 digits are unreadable.

    Args:
      marked: read after `####` only, so that an answer cut short is unreadable.

    >>> number("She makes 9 * 2 = $18.00 a day.\\n#### 18"), number("A: $1,250"), number("It is 9**9**9."), number("?")
    ('18', '1250', None, None)
    >>> number("8 * 30 = 240. So 240 apples in 30 days."), number("They eat 8 * 30 = 24"), number("\\\\boxed{24")
    ('240', None, None)
    """
    text = _SEPARATOR.sub(",", _UNSEEN.sub("", text[-LONGEST:]))
    text = _FRAC.sub(r"\1\3/\2\4", _MIXED.sub(" ", text))
    stated = _stated(text, marked)
    if stated is not None:
        found = _NUMBER.search(stated.rsplit("=", 1)[-1])
        refused = found and _REFUSED.search(stated.partition(found[0])[0])  # "cannot be determined from 3 facts"
        return _exact(found) if found and not refused else None
    return None if marked else _concluded(text.rstrip())


def letter(text: str) -> str | None:
    """The option, a to e, that a solution names: "#### c", "\\boxed{c}", "answer : c", "option c", or "(c)" at its end.

    >>> letter("so the answer is (C)."), letter("c )"), letter("the answer is a number")
    ('c', 'c', None)
    """
    text = text[-LONGEST:].rstrip()
    found = _STATED_LETTER.match(_stated(text, marks=()) or "")
    for pattern in _LETTERS:
        found = found or _last(pattern, text)
    found = found or _LAST_LETTER.search(text[-40:]) or _LETTERED.fullmatch(text)
    return found[found.lastindex].lower() if found else None


def yes_no(text: str) -> str | None:
    """Whether a solution says yes or no: "#### yes", "the answer is no", or a sentence that opens with "Yes,".

    The most trusted kind of statement counts, of that kind the last; "not yes" is no.

    >>> yes_no("No one knows. Yes, it is."), yes_no("The answer is not yes."), yes_no("There is no doubt.")
    ('yes', 'no', None)
    """
    text = text[-LONGEST:]
    found = _STATED_YES_NO.match(_stated(text, marks=()) or "")
    for pattern in _YES_NO:
        found = found or _last(pattern, text)
    if found is None:
        return None
    return "yes" if (found[2].lower() in ("yes", "true")) != bool(found[1]) else "no"


def free_text(text: str) -> str | None:
    """The text after the last mark, else the last line; case, spaces, bold and the closing period do not count.

    >>> free_text("It lies in France.\\n#### Mont  Blanc.")
    'mont blanc'
    """
    text = text[-LONGEST:].rstrip()
    stated = _stated(text)
    if stated is None:
        stated = text.rsplit("\n", 1)[-1]
    stated = re.sub(r"\\text(?:bf)?\{([^{}]*+)\}", r"\1", stated)
    return " ".join(stated.split()).strip(" .:*$").casefold() or None


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    found = None
    for found in pattern.finditer(text):
        pass
    return found


def _stated(text: str, marked: bool = False, marks: tuple[re.Pattern[str], ...] = MARKS) -> str | None:
    """What follows the last mark on its line, or stands in the last box ("" where that is never closed), else None.

    A line such as "#### Step 2: add up" with more text below it is a heading, unless `marked`.
    """
    box, at = None if marked else _last(_BOX, text), text.rfind("####")
    if box and box.start() > at:
        return _braced(text, box.end())
    line, _, below = text[at + 4 :].lstrip(" \t\r\n:*").partition("\n")
    if at >= 0 and (marked or _ALONE.fullmatch(line) or not below.strip()):
        return line
    if box:
        return _braced(text, box.end())
    for mark in () if marked else marks:
        if found := _last(mark, text):
            return text[found.end() :].lstrip(" \t\r\n:*").partition("\n")[0]
    return None


def _braced(text: str, start: int) -> str:
    """The text from `start` to the brace that closes what was opened before it; "" where none does."""
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : brace.start()]
    return ""


def _concluded(text: str) -> str | None:
    """The number that the last sentence of a text without marks states, None where it states none for certain."""
    text = text[-LONGEST // 5 :]
    sentences = _SENTENCES.split(text)
    while len(sentences) > 1 and (_POLITE.search(sentences[-1]) or not sentences[-1].strip()):
        sentences.pop()
    last = sentences[-1].strip()
    if _REFUSED.search(last) or not (_ENDED.search(last) or _BARE.fullmatch(text.rsplit("\n", 1)[-1].strip())):
        return None
    bold = [part for part in _BOLD.findall(last) if _NUMBER.search(part)]
    numbers = list(_NUMBER.finditer(bold[-1] if bold else last))
    given = _NUMBER.search(text[text.rfind("=") + 1 :][:40]) if "=" in text else None
    result = given and _exact(given)
    latest = numbers[::-1]
    same = (found for found in latest if result and (_exact(found) or "").lstrip("-") == result.lstrip("-"))
    money = (found for found in latest if found["money"])
    chosen = next(chain(same, money, latest), None)
    return _exact(chosen) if chosen else None


def _exact(found: re.Match[str]) -> str | None:
    """The number as a fraction in lowest terms; None where it is part of something else, or far too long."""
    text, start = found.string, found.start()
    digits, denominator = found["digits"].replace(",", ""), found["denominator"] or "1"
    if _BEGAN_BEFORE.search(text[max(0, start - 12) : start]) or _GOES_ON.match(text, found.end()):
        return None
    if len(digits) > MOST_DIGITS or len(denominator) > MOST_DIGITS or int(denominator) == 0:
        return None
    value = Fraction(digits) / int(denominator) + int(found["whole"] or 0)
    return str(-value if found["sign"] or found["late_sign"] else value)

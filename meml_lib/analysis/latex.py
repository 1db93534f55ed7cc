"""Tables as LaTeX (booktabs): a file each to \\input into a paper, and tables.tex, which holds all and compiles alone.

Text columns wrap so that a table fits the page, upright or else in landscape; one that is longer than a page becomes a
longtable. Whatever text a cell holds is escaped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

_FIGURE, _SIGN = "\u2007", "\u2008"  # room for a digit, for a sign
_SOURCE = {c: f"\\{c}" for c in "&%$#_{}"} | {_FIGURE: r"\phantom{0}", _SIGN: r"\phantom{$-$}"}
_TEXT = "backslash asciitilde asciicircum less greater bar quotedbl quotesingle asciigrave rightarrow leftarrow bullet"
_SOURCE |= {c: f"\\text{name}{{}}" for c, name in zip("\\~^<>|\"'`→←•", _TEXT.split(), strict=True)}
_MATHS = "le ge ne approx infty surd times alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi"
_MATHS = [*_MATHS.split(), *"rho varsigma sigma tau upsilon phi chi psi omega".split()]
_SOURCE |= {c: f"$\\{name}$" for c, name in zip("≤≥≠≈∞✓✗αβγδεζηθικλμνξπρςστυφχψω", _MATHS, strict=True)} | {"−": "$-$"}
_AS_THEY_STAND = "–—‘’“”…\N{NO-BREAK SPACE}"  # beside the letters and signs of Latin alphabets
_EMS = dict.fromkeys("ijl.,:;'|!()[]/ \xa0", 0.3) | dict.fromkeys("frst-", 0.4) | dict.fromkeys("mwMW%&@→—", 1.1)
_EMS[_FIGURE] = 0.53
# A line may break here, besides at a space: after these signs, and anywhere in a word that is very long.
_BREAK = re.compile(r"(?<=[/+_=\]])(?=[\w[])|(?<=\w{20})(?=\w{4})")
_HEAD = r"""\documentclass[a4paper]{article}
\usepackage[T1]{fontenc}
\usepackage[utf8]{inputenc}
\IfFileExists{lmodern.sty}{\usepackage{lmodern}}{}
\usepackage{array,booktabs,longtable,pdflscape}
\usepackage[margin=15mm]{geometry}
\usepackage[font=small,position=above,skip=4pt]{caption}
\begin{document}
"""


class Sheet(NamedTuple):
    """A table, its title, and the note below it: n, seeds, what brackets mean, the command."""

    frame: pd.DataFrame
    caption: str
    note: str = ""


class _Page(NamedTuple):
    """An A4 page with margins of 15 mm and a type size; `across` (em) and `down` (lines) is what it holds."""

    landscape: bool
    size: str
    across: int
    down: int
    readable: int
    """Text columns of this many em may be wrapped before the next page is tried."""


_PAGES = (
    _Page(False, "footnotesize", 60, 72, 16),
    _Page(True, "footnotesize", 88, 48, 12),
    _Page(True, "scriptsize", 94, 57, 8),
    _Page(True, "tiny", 110, 76, 0),
)


def write(folder: Path, sheets: Mapping[str, Sheet], title: str) -> Path:
    """Write NAME.tex for each table, and tables.tex, for `pdflatex tables.tex`, twice, in that folder; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{_HEAD}\\section*{{{escape(title)}}}", r"\listoftables"]
    for name, sheet in sheets.items():
        text, landscape = table(name, sheet)
        (folder / f"{name}.tex").write_text(text, encoding="utf-8")
        lines.append(rf"\begin{{landscape}}\input{{{name}}}\end{{landscape}}" if landscape else rf"\input{{{name}}}")
    (folder / "tables.tex").write_text("\n".join([*lines, "\\end{document}", ""]), encoding="utf-8")
    return folder / "tables.tex"


def table(name: str, sheet: Sheet) -> tuple[str, bool]:
    """(LaTeX source of one table, labelled tab:NAME; whether it needs a landscape page)."""
    frame = sheet.frame if len(sheet.frame) else pd.DataFrame({"": ["Not run."]})
    columns = [[str(head), *_aligned(frame.iloc[:, place])] for place, head in enumerate(frame.columns)]
    page = next(page for page in _PAGES if page is _PAGES[-1] or sum(_wrapped(columns, page.readable)) <= page.across)
    caps = range(page.across, page.readable, -1)
    cap = next((cap for cap in caps if sum(_wrapped(columns, cap)) <= page.across), page.readable)
    widths = [width - 1 for width in _wrapped(columns, cap)]
    spec = "@{}" + "".join(rf">{{\raggedright\arraybackslash}}p{{{width:.1f}em}}" for width in widths) + "@{}"
    head, *rows = (" & ".join(map(_breakable, cells)) + r" \\" for cells in zip(*columns, strict=True))
    across = max(32, sum(widths) + len(widths) - 1)
    lines_of = (max(_em(c) / width for c, width in zip(row, widths, strict=True)) for row in zip(*columns, strict=True))
    lines = sum(math.ceil(count) + 0.4 for count in lines_of) + 1.2 * _em(sheet.note + sheet.caption) / across
    long = lines + 4 > page.down
    caption = rf"\caption{{{escape(sheet.caption)}}}\label{{tab:{name}}}"
    begin, end = [r"\toprule", head, r"\midrule"], ["\n\\addlinespace[0.3em]\n".join(rows), r"\bottomrule"]
    if long:
        heads = [rf"{caption}\\", *begin, r"\endfirsthead", *begin, r"\endhead"]
        body = [rf"\begin{{longtable}}{{{spec}}}", *heads, *end, r"\end{longtable}"]
    else:
        body = [caption, rf"\begin{{tabular}}{{{spec}}}", *begin, *end, r"\end{tabular}"]
    around = "center" if long else "table"
    needs = f"% Needs array, booktabs{', longtable' if long else ''}{'; a landscape page' if page.landscape else ''}."
    start = rf"\begin{{{around}}}{'' if long else '[!htbp]'}\centering\{page.size}\setlength{{\tabcolsep}}{{0.5em}}"
    note = rf"\par\smallskip\parbox{{{across:.1f}em}}{{\raggedright {escape(sheet.note)}}}"
    return "\n".join([needs, start, *body, *[note] * bool(sheet.note), rf"\end{{{around}}}", ""]), page.landscape


def escape(text: str) -> str:
    """LaTeX source of any text; a character that pdflatex may have no glyph for becomes its code point, [U+4E2D].

    >>> print(escape("50 % of x_1: -0.5 → ≤ λ"))
    50 \\% of x\\_1: $-$0.5 \\textrightarrow{} $\\le$ $\\lambda$
    """
    source = "".join(_SOURCE.get(c, c) for c in _plain(text))
    return re.sub(r"([-,])(?=\1)", r"\1{}", source)  # -- would become a dash, ,, a quotation mark


def _plain(text: str) -> str:
    """One space between words, a minus sign (no hyphen) before a number, and only characters that there are."""
    text = re.sub(r"(?<![\w)\]-])-(?=\.?\d)", "−", re.sub(r"[ \t\r\n]+", " ", text))
    return "".join(c if _has_glyph(c) else f"[U+{ord(c):04X}]" for c in text)


def _has_glyph(c: str) -> bool:
    latin = c.isprintable() and ord(c) < 0x17F and c not in "ĦħĸĿŀŉŦŧ"
    return latin or c in _SOURCE or c in _AS_THEY_STAND


def _breakable(cell: str) -> str:
    return r"\allowbreak{}".join(map(escape, _BREAK.split(cell)))


def _aligned(values: Iterable[Any]) -> list[str]:
    """Cells as text; in a column of numbers with room before these, so that they stand in line."""
    cells = ["—" if pd.isna(value) else _plain(str(value)) for value in values]
    begins = [re.match(r"([+−]?)(\d+)", cell) for cell in cells]
    if any(not begin and re.search(r"\d", cell) for begin, cell in zip(begins, cells, strict=True)):
        return cells  # prose
    signed, widest = any(b[1] for b in begins if b), max((len(b[2]) for b in begins if b), default=0)
    pads = [_SIGN * (signed and not b[1]) + _FIGURE * (widest - len(b[2])) if b else "" for b in begins]
    return [pad + cell for pad, cell in zip(pads, cells, strict=True)]


def _wrapped(columns: Sequence[Sequence[str]], cap: float) -> list[float]:
    """Width of each column in em, its gap (1) included: its widest cell's, at most `cap` unless a word is wider."""
    words = [[word for cell in column for word in re.split(f" |(?<=-)|{_BREAK.pattern}", cell)] for column in columns]
    longest = [1.3 + max(map(_em, of_column)) for of_column in words]
    natural = [1.3 + max(map(_em, column[1:])) for column in columns]
    return [max(word, min(whole, cap)) for word, whole in zip(longest, natural, strict=True)]


def _em(text: str) -> float:
    return sum(_EMS.get(c, 0.8 if c.isupper() or c > "\u017f" else 0.53) for c in text)

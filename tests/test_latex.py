"""LaTeX tables: any text survives, numbers stand in line, nothing runs off the page, and pdflatex takes it all."""

import re
import shutil
import subprocess

import pandas as pd
import pytest

from meml_lib.analysis import latex
from meml_lib.analysis.latex import Sheet

CELL = "53.2 [50.1,\N{NO-BREAK SPACE}56.0]"
LATIN = "".join(c for c in map(chr, range(32, 0x180)) if c.isprintable())


def ems(text: str) -> list[float]:
    return [float(width) for width in re.findall(r"p\{([\d.]+)em\}", text)]


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("5 % & a_b #1 $x {y}", r"5 \% \& a\_b \#1 \$x \{y\}"),
        (r"\~^<|>", r"\textbackslash{}\textasciitilde{}\textasciicircum{}\textless{}\textbar{}\textgreater{}"),
        ("--set 'a=[1]'", r"-{}-set \textquotesingle{}a=[1]\textquotesingle{}"),
        (",,\"`", r",{},\textquotedbl{}\textasciigrave{}"),
        ("1 → 2 — ± ° λ ≤ ✓", r"1 \textrightarrow{} 2 — ± ° $\lambda$ $\le$ $\surd$"),
        ("αορςσω", r"$\alpha$[U+03BF]$\rho$$\varsigma$$\sigma$$\omega$"),  # omicron has no sign in mathematics
        ("-1.5 (-.5) [-2, -3] a-1 1e-6 2024-01", "$-$1.5 ($-$.5) [$-$2, $-$3] a-1 1e-6 2024-01"),
        ("a\n\t b\N{NO-BREAK SPACE}c", "a b\N{NO-BREAK SPACE}c"),
        ("é ő 中\x07", "é ő [U+4E2D][U+0007]"),
    ],
)  # fmt: skip
def test_every_character_is_escaped_or_named(text, source):
    assert latex.escape(text) == source


def test_a_table_has_caption_label_rules_and_note():
    text, landscape = latex.table(
        "table-4", Sheet(pd.DataFrame({"arm": ["A & B"], "%": [CELL]}), "5 % of", "n = 3 & seeds")
    )
    order = [r"\begin{table}", r"\caption{5 \% of}\label{tab:table-4}", r"\toprule", r"arm & \% \\", r"\midrule",
             rf"A \& B & {CELL} \\", r"\bottomrule", r"\end{tabular}", r"n = 3 \& seeds", r"\end{table}"]  # fmt: skip
    places = [text.index(part) for part in order]
    assert places == sorted(places) and not landscape


def test_numbers_stand_in_line_whatever_their_sign_and_length():
    text, _ = latex.table(
        "x", Sheet(pd.DataFrame({"points": ["-1.0 [-2.0, 3.0]", "23.4 [1.0, 2.0]", "5.0", "not run"]}), "x")
    )
    cells = text.split("\\midrule\n")[1].split("\\bottomrule")[0].replace(" \\\\", "").splitlines()[::2]
    assert cells == [
        r"\phantom{0}$-$1.0 [$-$2.0, 3.0]", r"\phantom{$-$}23.4 [1.0, 2.0]", r"\phantom{$-$}\phantom{0}5.0", "not run",
    ]  # fmt: skip


def test_prose_that_begins_with_numbers_is_left_alone():
    text, _ = latex.table("x", Sheet(pd.DataFrame({"evidence": ["8 of 28 arms", "10 arms", "commit 45d0"]}), "x"))
    assert "phantom" not in text


def test_a_missing_value_is_a_dash_and_an_empty_table_says_so():
    text, _ = latex.table("x", Sheet(pd.DataFrame({"a": [None, float("nan"), 1.5], "b": "y"}), "x"))
    assert text.count("— & y") == 2
    assert "Not run." in latex.table("x", Sheet(pd.DataFrame(), "x"))[0]


def sheets() -> dict[str, Sheet]:
    signs = "".join([*latex._SOURCE, *latex._AS_THEY_STAND, "中🙂\u200b\x07"])
    glyphs = [text[at : at + 12] for text in (LATIN, signs) for at in range(0, len(text), 12)]
    words = "Multi-expert (equations, story): SFT + GRPO with a buffer and mutual learning"
    cells, paths = [CELL, "-1.0", None], ["a/b_c+d/" * 9] * 99
    frames = {
        "glyphs": pd.DataFrame({"a_b & c%": glyphs}),
        "wide": pd.DataFrame({"arm": [words] * 3} | {f"pass@{k}": cells for k in range(14)}),
        "prose": pd.DataFrame({"item": [words], "answer": ["partly"], "evidence": [words * 5]}),
        "long": pd.DataFrame({"run": paths, "hash": "0123456789abcdef" * 8}),
    }
    caption, note = r"50 % of x^2 # {~} \ <b> 'λ'", "--set 'a=[1]' ``x'' " * 9
    return {name: Sheet(frame, caption, note) for name, frame in frames.items()}


def test_wide_tables_wrap_or_turn_and_long_ones_break():
    made = {name: latex.table(name, sheet) for name, sheet in sheets().items()}
    assert [landscape for _, landscape in made.values()] == [False, True, False, False]
    assert ["longtable" in text for text, _ in made.values()] == [False, False, False, True]
    assert made["long"][0].count(r"run & hash") == 2 == made["long"][0].count(r"\toprule")  # on each page; one caption
    assert made["long"][0].count(r"\caption") == 1
    size = {name: next(page for page in latex._PAGES if rf"\{page.size}" in made[name][0]) for name in made}
    assert size["wide"].size == "tiny" and size["prose"].size == "footnotesize"
    for name, (text, landscape) in made.items():
        across = next(p.across for p in latex._PAGES if p.size == size[name].size and p.landscape == landscape)
        assert sum(ems(text)) + len(ems(text)) <= across, name


def test_pdflatex_compiles_the_document_alone_and_nothing_is_too_wide(tmp_path):
    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex on this machine: the tables' LaTeX was not compiled")
    file = latex.write(tmp_path, sheets(), "A & B: 100 %")
    assert file == tmp_path / "tables.tex" and (tmp_path / "prose.tex").is_file()
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", file.name]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120, check=False)
        log = (tmp_path / "tables.log").read_text(encoding="latin-1")
        assert done.returncode == 0, log[-2000:]
    faults = [
        line for line in log.splitlines() if re.search("Overfull|Missing character|multiply|Float too large", line)
    ]
    assert not faults and (tmp_path / "tables.pdf").stat().st_size > 10_000

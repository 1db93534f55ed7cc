"""What a notebook shows of an answers table: shares in percent, one question's answers side by side."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from meml_lib.analysis import figures, overlap, stats
from meml_lib.runs import RunFolder


LABELS = {"share": "% [95 % interval]", "iou": "intersection / union, %"}
LABELS |= {"all_wrong_share": "wrong for all, %", "phi": "phi"}
_NO_FORMULAS = 'class="mathjax_ignore"'
"""Else JupyterLab takes what stands between two dollar signs for a formula, and questions are about money."""


def percent(table: pd.DataFrame) -> pd.DataFrame:
    """The table with each number and its interval as one column of text, in percent (phi as it is): 53.2 [50.1, 56.0];
    an em dash for NaN."""
    shown = table.rename(columns={"low": "share_low", "high": "share_high"})
    for name in shown.columns.intersection(LABELS):
        columns, form = [name, f"{name}_low", f"{name}_high"], {"scale": 1, "digits": 2} if name == "phi" else {}
        rows = shown[columns].set_axis(["mean", "low", "high"], axis=1).to_dict("records")
        shown = shown.drop(columns=columns).assign(**{LABELS[name]: [stats.text(row, **form) for row in rows]})
    return shown


def wide(table: pd.DataFrame, index: str, columns: str) -> pd.DataFrame:
    """`percent`, and n, as a matrix: a row for each value of `index`, a column for each of `columns`, as the table has them."""
    cells = percent(table)[LABELS["share"]] + ", n = " + table["n"].astype(str)
    shown = table.assign(cells=cells).pivot(index=index, columns=columns, values="cells")
    order = pd.unique(pd.concat([table[index], table[columns]]))  # one order for both where they hold the same names
    return shown.reindex(index=table[index].unique(), columns=[name for name in order if name in shown]).fillna("\u2014")


def table(frame: pd.DataFrame):
    """A table of texts in full, from the left, without row numbers; an em dash for what is not there."""
    left = {"selector": "th, td", "props": "text-align: left; vertical-align: top"}
    shown = frame.style.hide().format(precision=0, na_rep="—", escape="html").set_table_styles([left])
    return shown.set_table_attributes(_NO_FORMULAS)


def pass_at_k(folder: RunFolder) -> figures.Picture | str:
    """pass@k of each expert on a stage's sampled test answers; where none were sampled, a line that says so."""
    if not folder.table("test_sampled").is_file():
        return "no sampled answers here: evaluate.samples_per_expert is 0"
    sampled = folder.read_table("test_sampled")
    ks = [2**n for n in range(sampled["sample"].nunique().bit_length()) if 2**n <= sampled["sample"].nunique()]
    note = f"{sampled['sample'].nunique()} samples each; lines: 95 % intervals (questions random)"
    title = f"pass@k after {folder.path.name}: one of k samples right"
    return figures.shares(overlap.pass_at_k(sampled, ks), "k", title=title, xlabel="k", note=note)


@dataclass(frozen=True)
class SideBySide:
    """All experts' answers to one question, as a notebook shows them."""

    question_id: str
    question: pd.Series
    answers: pd.DataFrame

    def _repr_html_(self) -> str:
        colours = {True: ("right", "#007a55"), False: ("wrong", "#b04a00"), None: ("unreadable", "#777777")}
        verdicts = [colours[None if pd.isna(ok) else bool(ok)] for ok in self.answers["correct"]]
        cells = "".join(
            f"<td style='vertical-align:top;text-align:left'><b>{html.escape(expert)}</b>: "
            f"read as {html.escape(str(answer))}, <b style='color:{colour}'>{verdict}</b>"
            f"<div style='white-space:pre-wrap'>{html.escape(text)}</div></td>"
            for expert, answer, text, (verdict, colour) in zip(
                self.answers["expert"], self.answers["answer"], self.answers["text"], verdicts, strict=True
            )
        )
        question = f"<b>{html.escape(self.question_id)}</b>: {html.escape(self.question['text'])}"
        gold = f"Right answer: <b>{html.escape(self.question['gold'])}</b>"
        table = f"<table style='table-layout:fixed;width:100%'><tr>{cells}</tr></table>"
        return f"<div {_NO_FORMULAS}><p>{question}<br>{gold}</p>{table}</div>"


def side_by_side(answers: pd.DataFrame, questions: pd.DataFrame, question_id: str | None = None) -> SideBySide:
    """Every expert's first answer to one question; None: the first on which experts disagree, or else the first.

    Raises: KeyError for a question that is not in `questions`.
    """
    first = answers[answers["sample"] == 0]
    if question_id is None:
        right = first.assign(right=first["correct"].fillna(False)).groupby("question_id", sort=False)["right"]
        question_id = right.nunique().gt(1).idxmax()
    question = questions.set_index("question_id").loc[question_id]
    return SideBySide(question_id, question, first[first["question_id"] == question_id])


@dataclass(frozen=True)
class Page:
    """An HTML page inside a notebook."""

    path: Path

    def _repr_html_(self) -> str:
        page = html.escape(self.path.read_text(encoding="utf-8"))
        return f"<iframe srcdoc='{page}' style='width:98%;height:900px;border:1px solid #ccc'></iframe>"

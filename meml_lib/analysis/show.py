"""What a notebook shows of an answers table: shares in percent, shared errors, one question's answers side by side."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from meml_lib.analysis import figures, overlap, stats
from meml_lib.runs import RunFolder


def percent(table: pd.DataFrame) -> pd.DataFrame:
    """The table with `share, low, high` as one column of text, in percent: 53.2 [50.1, 56.0]; an em dash for NaN."""
    rows = table.rename(columns={"share": "mean"})[["mean", "low", "high"]].to_dict("records")
    text = [stats.text(None if math.isnan(row["mean"]) else row) for row in rows]
    return table.drop(columns=["share", "low", "high"]).assign(**{"% [95 % interval]": text})


def table(frame: pd.DataFrame):
    """A table of texts in full, from the left, without row numbers."""
    left = {"selector": "th, td", "props": "text-align: left; vertical-align: top"}
    return frame.style.hide().format(precision=0).set_table_styles([left])


def shared_errors(answers: pd.DataFrame) -> pd.DataFrame:
    """Both readings of the overlap of all experts' errors: reading, wrong_for_all, of (counts), share, low, high."""
    found = overlap.overlap_all(answers)
    readings = {
        "intersection / union: of those any gets wrong": found.any_wrong,
        "wrong for all: of all questions": found.questions,
    }
    rows = []
    for reading, whole in readings.items():
        interval = stats.wilson(found.all_wrong, whole) if whole else stats.Interval(float("nan"), 0.0, 1.0, 0, 1)
        counts = {"reading": reading, "wrong_for_all": found.all_wrong, "of": whole}
        rows.append({**counts, "share": interval.mean, "low": interval.low, "high": interval.high})
    return pd.DataFrame(rows)


def pass_at_k(folder: RunFolder) -> figures.Picture | str:
    """pass@k of each expert on a stage's sampled test answers; where none were sampled, a line that says so."""
    if not folder.table("test_sampled").is_file():
        return "no sampled answers here: evaluate.samples_per_expert is 0"
    sampled = folder.read_table("test_sampled")
    ks = [2**n for n in range(sampled["sample"].nunique().bit_length()) if 2**n <= sampled["sample"].nunique()]
    scores = overlap.pass_at_k(sampled, ks).rename(columns={"expert": "label", "share": "mean"})
    counts = f"{folder.path.name}: n = {scores['n'].iloc[0]} test questions, {scores['samples'].iloc[0]} samples each"
    return figures.pass_at_k(scores, note=f"{counts}; bands: 95 % intervals (questions random)")


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
        return f"<p>{question}<br>{gold}</p><table style='table-layout:fixed;width:100%'><tr>{cells}</tr></table>"


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

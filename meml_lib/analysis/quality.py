"""Teachers' answers as training data: what they hold, how long they are, what they copy; from an answers table."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pandas as pd

from meml_lib.analysis import overlap, stats
from meml_lib.tasks import Task, leaks, plain


def shares(answers: pd.DataFrame, task: Task) -> pd.DataFrame:
    """How many of each expert's answers are so.

    right; unreadable, of which: cut_off, empty. repeated: the expert gives the same text to another question. shared:
    another expert gives it to the same question. test_question: it holds a question of the test split word for word.

    Returns: what, expert, n, answers (counts), share, low, high (Wilson; answers to one question taken as independent).
    """
    text, correct = answers["text"], answers["correct"].astype("boolean")
    said = text.str.strip() != ""
    leaked = {place for place, _ in leaks.test_questions_in(task, list(text))}
    marks = {
        "right": correct.fillna(False),
        "unreadable": correct.isna(),
        "cut_off": ~answers["ended"],
        "empty": ~said,
        "repeated": said & (answers.groupby(["expert", "text"])["question_id"].transform("nunique") > 1),
        "shared": said & (answers.groupby(["question_id", "text"])["expert"].transform("nunique") > 1),
        "test_question": pd.Series([place in leaked for place in range(len(answers))], answers.index),
    }
    rows = []
    for what, mark in marks.items():
        for expert, own in mark.groupby(answers["expert"], sort=False):
            row = {"what": what, "expert": expert, "n": len(own), "answers": int(own.sum())}
            rows.append(row | overlap.share(stats.wilson(row["answers"], len(own))))
    return pd.DataFrame(rows)


def lengths(answers: pd.DataFrame) -> pd.DataFrame:
    """Words of each expert's answers, empty ones aside: expert, n, words_5 (5th percentile), words_median, words_95."""
    words = answers["text"].str.split().str.len()
    by_expert = words[words > 0].groupby(answers["expert"], sort=False)
    columns = {"n": by_expert.size(), "words_5": by_expert.quantile(0.05), "words_median": by_expert.median()}
    return pd.DataFrame(columns | {"words_95": by_expert.quantile(0.95)}).reset_index()


def ngrams_shared(answers: pd.DataFrame, size: int = 5) -> pd.DataFrame:
    """How much of an expert's first answer another's to the same question says too: low where ways of answering differ.

    Share of the answer's distinct runs of `size` words that the other holds, mean over the questions that both answered
    and where it has such a run. Neither case nor spaces count.

    Returns: expert, other, n (questions), share, low, high (questions random; NaN of fewer than two).
    """
    first = answers.drop_duplicates(["question_id", "expert"])
    words = first["text"].map(lambda text: plain(text).split())
    grams = words.map(lambda own: set(zip(*(own[start:] for start in range(size)), strict=False)))
    wide = first.assign(grams=grams).pivot(index="question_id", columns="expert", values="grams")
    rows = []
    for expert, other in permutations(first["expert"].unique(), 2):
        pairs = wide[[expert, other]].dropna().itertuples(index=False)
        values = [len(mine & others) / len(mine) for mine, others in pairs if mine]
        interval = stats.crossed_mean(np.array([values]), share=True) if len(values) > 1 else stats.UNDEFINED
        rows.append({"expert": expert, "other": other, "n": len(values)} | overlap.share(interval))
    return pd.DataFrame(rows, columns=["expert", "other", "n", "share", "low", "high"])

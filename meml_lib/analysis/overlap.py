"""Who errs where: accuracy, shared errors, votes and pass@k of a panel; pure functions of an answers table.

An answers table has the columns question_id, expert, sample, text, answer, correct; `correct` is a nullable boolean,
and NA (unreadable) counts as not right but is counted apart. Experts keep the order in which the table first names
them. All functions but `hits` and `pass_at_k` take one answer per question and expert, every expert answering the same
questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from meml_lib.analysis import stats


class Overlap(NamedTuple):
    """How far the errors of ALL experts coincide. `iou` is NaN where nobody errs."""

    iou: float
    """Questions that all get wrong / questions that any gets wrong (intersection over union of the error sets)."""
    all_wrong_share: float
    """Questions that all get wrong / all questions."""
    all_wrong: int
    any_wrong: int
    questions: int


def answered_by_all(answers: pd.DataFrame) -> pd.DataFrame:
    """Each expert's first answer to the questions that every expert of the table answered.

    Raises: ValueError where no question is answered by all.
    """
    first = answers[answers["sample"] == 0]
    kept = first[first.groupby("question_id")["expert"].transform("nunique") == first["expert"].nunique()]
    if kept.empty:
        raise ValueError(f"no question is answered by all of the experts {list(first['expert'].unique())}")
    return kept


def right_table(answers: pd.DataFrame) -> pd.DataFrame:
    """True where an expert answered a question rightly: [questions, experts], both in the table's order.

    Raises: ValueError for an empty table, a (question, expert) that stands there twice, or experts that answered
    different questions (the first missing one is named).
    """
    _checked(answers, ["question_id", "expert"])
    experts, questions = answers["expert"].unique(), answers["question_id"].unique()
    right = answers["correct"].astype("boolean").fillna(False).astype(bool)
    wide = pd.DataFrame({"question_id": answers["question_id"], "expert": answers["expert"], "right": right})
    wide = wide.pivot(index="question_id", columns="expert", values="right").reindex(index=questions, columns=experts)
    if wide.isna().any(axis=None):
        expert = wide.columns[wide.isna().any()][0]
        missing = wide.index[wide[expert].isna()]
        raise ValueError(
            f"expert {expert!r} has no answer to question {missing[0]!r} ({len(missing)} of {len(wide)} missing);"
            " overlap needs every expert's answer to the same questions"
        )
    return wide.astype(bool)


def accuracy(answers: pd.DataFrame) -> pd.DataFrame:
    """One row an expert: expert, n, right, unreadable (counts), share of right, and its Wilson interval low, high."""
    right = right_table(answers)
    unreadable = answers.groupby("expert", sort=False)["correct"].apply(lambda correct: int(correct.isna().sum()))
    rows = []
    for expert in right.columns:
        interval = stats.wilson(int(right[expert].sum()), len(right))
        counts = {"n": len(right), "right": int(right[expert].sum()), "unreadable": unreadable[expert]}
        rows.append({"expert": expert, **counts, "share": interval.mean, "low": interval.low, "high": interval.high})
    return pd.DataFrame(rows)


def error_sets(answers: pd.DataFrame) -> dict[str, frozenset[str]]:
    """Expert -> ids of the questions that it did not get right."""
    right = right_table(answers)
    return {expert: frozenset(right.index[~right[expert]]) for expert in right.columns}


def wrong_together(answers: pd.DataFrame) -> pd.DataFrame:
    """How many questions exactly this set of experts gets wrong, largest first; the sets part the questions.

    Returns: one boolean column an expert (True: wrong), `questions` (count), `share`; sets without a question left out.
    """
    wrong = ~right_table(answers)
    sizes = wrong.value_counts().rename("questions").reset_index()
    return sizes.assign(share=sizes["questions"] / len(wrong))


def pairwise_overlap(answers: pd.DataFrame) -> pd.DataFrame:
    """Intersection over union of each two experts' error sets: [experts, experts]; NaN where neither errs."""
    errors = error_sets(answers)

    def iou(a: frozenset, b: frozenset) -> float:
        return len(a & b) / len(a | b) if a | b else np.nan

    return pd.DataFrame({b: {a: iou(errors[a], errors[b]) for a in errors} for b in errors})


def overlap_all(answers: pd.DataFrame) -> Overlap:
    """Both readings of the error overlap of all experts (the paper's 3.06 % of table 1 is probably the first)."""
    wrong = ~right_table(answers)
    every, some = int(wrong.all(axis=1).sum()), int(wrong.any(axis=1).sum())
    return Overlap(every / some if some else np.nan, every / len(wrong), every, some, len(wrong))


def corrected_by_others(answers: pd.DataFrame) -> pd.DataFrame:
    """How many of each expert's errors another expert answers rightly (paper, table 1: 90.11 % of GPT-4o's on GSM8K).

    Returns: expert, errors, corrected (counts), share, low, high (Wilson; NaN without an error).
    """
    right = right_table(answers)
    rows = []
    for expert in right.columns:
        others = right.loc[~right[expert]].drop(columns=expert).any(axis=1)
        errors, corrected = len(others), int(others.sum())
        interval = stats.wilson(corrected, errors) if errors else stats.Interval(np.nan, np.nan, np.nan, 0, 1)
        row = {"expert": expert, "errors": errors, "corrected": corrected}
        rows.append({**row, "share": interval.mean, "low": interval.low, "high": interval.high})
    return pd.DataFrame(rows)


def phi(answers: pd.DataFrame) -> pd.DataFrame:
    """Correlation of being right (phi coefficient) of each two experts; NaN where one is always or never right."""
    right = right_table(answers).astype(float)
    return right.corr().rename_axis(index=None, columns=None)


def coverage(answers: pd.DataFrame) -> pd.DataFrame:
    """Share of questions that at least one expert gets right, as experts are added in the table's order.

    Returns: experts (how many), added (the last one's name), n, right, share, low, high (Wilson).
    """
    covered = right_table(answers).cummax(axis=1)
    rows = []
    for position, expert in enumerate(covered.columns):
        interval = stats.wilson(int(covered[expert].sum()), len(covered))
        counts = {"experts": position + 1, "added": expert, "n": len(covered), "right": int(covered[expert].sum())}
        rows.append({**counts, "share": interval.mean, "low": interval.low, "high": interval.high})
    return pd.DataFrame(rows)


def vote(answers: pd.DataFrame, prefer: Sequence[str]) -> pd.DataFrame:
    """The panel's majority answer to each question. Unreadable answers do not vote.

    Args: prefer: all experts, best first (by validation accuracy); of answers with equally many votes wins the one that
      the first of them gave.
    Returns: question_id, answer, votes, correct; answer and correct are NA where no answer could be read.
    Raises: ValueError if prefer and the table name different experts, and as `right_table`.
    """
    questions = right_table(answers).index
    if sorted(prefer) != sorted(answers["expert"].unique()):
        raise ValueError(f"prefer={list(prefer)} must name the table's experts {list(answers['expert'].unique())}")
    read = answers[answers["correct"].notna()].assign(
        rank=lambda frame: frame["expert"].map({expert: rank for rank, expert in enumerate(prefer)}),
        votes=lambda frame: frame.groupby(["question_id", "answer"])["expert"].transform("size"),
    )
    won = read.sort_values(["votes", "rank"], ascending=[False, True]).drop_duplicates("question_id")
    won = won.set_index("question_id")[["answer", "votes", "correct"]].reindex(questions)
    return won.assign(votes=won["votes"].fillna(0).astype(int), correct=won["correct"].astype("boolean")).reset_index()


def nats_per_token(likelihoods: pd.DataFrame) -> pd.DataFrame:
    """Log-likelihood per token of each teacher's answer: [(prompt, question_id), teacher], of the questions that all
    answered.

    Args: likelihoods: question_id, prompt, teacher, logp (nats, over the answer), tokens; one row for each.
    """
    wide = likelihoods.assign(nats=likelihoods["logp"] / likelihoods["tokens"])
    wide = wide.pivot(index=["prompt", "question_id"], columns="teacher", values="nats").dropna()
    return wide.reindex(likelihoods["prompt"].unique(), level="prompt")[likelihoods["teacher"].unique()]


def own_teacher_likeliest(likelihoods: pd.DataFrame) -> pd.DataFrame:
    """On how many questions a prompt makes its own teacher's answer the likeliest per token (a tie is not): whether the
    experts are distinct.

    Args: likelihoods: as `nats_per_token`; an expert and its teacher have one name.
    Returns: prompt, n, own (counts), share, low, high (Wilson), chance (1 / teachers).
    """
    rows = []
    for prompt, nats in nats_per_token(likelihoods).groupby(level="prompt", sort=False):
        others = nats.drop(columns=prompt).max(axis=1)  # NaN for a lone teacher
        own = int((~(nats[prompt] <= others)).sum())
        interval = stats.wilson(own, len(nats))
        row = {"prompt": prompt, "n": len(nats), "own": own, "share": interval.mean}
        rows.append({**row, "low": interval.low, "high": interval.high, "chance": 1 / nats.shape[1]})
    return pd.DataFrame(rows)


def chance_of_a_hit(samples: int, right: int | NDArray, k: int) -> NDArray:
    """Chance that k of the samples, drawn without replacement, hold a right one: 1 - C(n - c, k) / C(n, k).

    As the product over i = 0..k-1 of (n - c - i) / (n - i), which cannot overflow. Unbiased for pass@k.
    Source: Chen et al., arXiv 2107.03374, eq. 1.  Raises: ValueError unless 1 <= k <= samples.

    >>> float(chance_of_a_hit(4, 1, 2))
    0.5
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k={k} must be >= 1 and <= samples={samples}")
    drawn = np.arange(k)
    wrong = np.asarray(samples - np.asarray(right))[..., None]
    return 1.0 - np.prod(np.clip(wrong - drawn, 0, None) / (samples - drawn), axis=-1)


def hits(answers: pd.DataFrame, k: int) -> pd.DataFrame:
    """pass@k of every question and expert from several samples each: [questions, experts], in 0..1.

    Raises: ValueError for a (question, expert, sample) that stands there twice, unequal numbers of samples, or too few.
    """
    _checked(answers, ["question_id", "expert", "sample"])
    right = answers["correct"].astype("boolean").fillna(False).astype(int)
    grouped = right.groupby([answers["question_id"], answers["expert"]], sort=False)
    samples = grouped.size().unstack(fill_value=0)
    if samples.nunique().max() > 1 or samples.iloc[0].nunique() > 1:
        raise ValueError(f"numbers of samples differ: {samples.min(axis=None)} to {samples.max(axis=None)} a question")
    wide = grouped.sum().unstack()[list(answers["expert"].unique())]
    return wide.apply(lambda column: chance_of_a_hit(int(samples.iloc[0, 0]), column.to_numpy(), k))


def pass_at_k(answers: pd.DataFrame, ks: Sequence[int]) -> pd.DataFrame:
    """Unbiased pass@k of each expert: expert, k, n (questions), samples, share, low, high (questions random)."""
    rows = []
    for k in ks:
        for expert, values in hits(answers, k).items():
            interval = stats.crossed_mean(values.to_numpy()[None], share=True)
            counts = {"expert": expert, "k": k, "n": interval.n_questions, "samples": answers["sample"].nunique()}
            rows.append({**counts, "share": interval.mean, "low": interval.low, "high": interval.high})
    return pd.DataFrame(rows)


def by_difficulty(answers: pd.DataFrame, questions: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of each expert on the questions of each difficulty: difficulty, expert, n, right, share, low, high.

    Raises: ValueError if an answered question is not in `questions`, and as `right_table`.
    """
    difficulty = questions.set_index("question_id")["difficulty"]
    right = right_table(answers)
    unknown = right.index.difference(difficulty.index)
    if len(unknown):
        raise ValueError(f"question {unknown[0]!r} ({len(unknown)} in all) is answered but not in the questions table")
    parts = []
    for level, ids in right.groupby(difficulty.reindex(right.index)).groups.items():
        part = accuracy(answers[answers["question_id"].isin(ids)]).drop(columns="unreadable")
        parts.append(part.assign(difficulty=level))
    return pd.concat(parts, ignore_index=True)[["difficulty", "expert", "n", "right", "share", "low", "high"]]


def _checked(answers: pd.DataFrame, key: list[str]) -> None:
    if answers.empty:
        raise ValueError("the answers table is empty (0 rows)")
    twice = answers[answers.duplicated(key)]
    if len(twice):
        where = ", ".join(f"{name}={twice.iloc[0][name]!r}" for name in key)
        raise ValueError(f"{len(twice)} answers stand there twice, first {where}; keep one for each {tuple(key)}")

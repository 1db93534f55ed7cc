"""Who errs where: accuracy, shared errors, votes and pass@k of a panel; pure functions of an answers table.

An answers table has the columns question_id, expert, sample, text, answer, correct; `correct` is a nullable boolean,
and NA (unreadable) counts as not right but is counted apart. Experts keep the order in which the table first names
them. All functions but `hits` and `pass_at_k` take one answer per question and expert, every expert answering the same
questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from meml_lib.analysis import stats


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
        counts = {"n": len(right), "right": int(right[expert].sum()), "unreadable": unreadable[expert]}
        rows.append({"expert": expert, **counts, **share(stats.wilson(counts["right"], len(right)))})
    return pd.DataFrame(rows)


def wrong_together(answers: pd.DataFrame) -> pd.DataFrame:
    """How many questions exactly this set of experts gets wrong, largest first; the sets part the questions.

    Returns: one boolean column an expert (True: wrong), `questions` (count), `share`; sets without a question left out.
    """
    wrong = ~right_table(answers)
    sizes = wrong.value_counts().rename("questions").reset_index()
    return sizes.assign(share=sizes["questions"] / len(wrong))


def shared_errors(answers: pd.DataFrame) -> pd.DataFrame:
    """How far the errors of each two experts coincide, and of all: a row for each pair, then one for all.

    Returns: experts ("a + b"), n (questions), all_wrong, any_wrong (questions that all, that any of them gets wrong);
      iou: all_wrong / any_wrong, intersection over union of the error sets (probably the paper's 3.06 % of table 1),
      with iou_low, iou_high (`stats.exact`); NaN where nobody errs;
      all_wrong_share: all_wrong / n, with _low, _high (Wilson);
      phi: correlation of being right, with _low, _high (`stats.phi`); NaN for more than two experts, and where one of
      the two is always or never right.
    """
    right = right_table(answers)
    rows = []
    for group in dict.fromkeys([*combinations(right, 2), tuple(right)]):  # of two experts, the pair is all
        each = right[list(group)]
        every, some = int((~each.any(axis=1)).sum()), int((~each.all(axis=1)).sum())
        row = {"experts": " + ".join(group), "n": len(each), "all_wrong": every, "any_wrong": some}
        row |= share(stats.exact(every, some) if some else stats.UNDEFINED, "iou")
        row |= share(stats.wilson(every, len(each)), "all_wrong_share")
        two = len(group) == 2
        marks = stats.phi(np.bincount(each @ [2, 1], minlength=4).reshape(2, 2)) if two else stats.UNDEFINED
        rows.append(row | share(marks, "phi"))
    return pd.DataFrame(rows)


def wrong_for_all(answers: pd.DataFrame, questions: pd.DataFrame) -> pd.DataFrame:
    """The questions that no expert answers rightly: question_id, text, gold, answers ("ann: 7; bob: unreadable").

    Raises: KeyError if such a question is not in `questions`, and as `right_table`.
    """
    right = right_table(answers)
    read = answers["expert"] + ": " + answers["answer"].fillna("unreadable")
    asked = questions.set_index("question_id").loc[right.index[~right.any(axis=1)], ["text", "gold"]]
    return asked.join(read.groupby(answers["question_id"]).agg("; ".join).rename("answers")).reset_index()


def corrected_by_others(answers: pd.DataFrame) -> pd.DataFrame:
    """How many of each expert's errors another expert answers rightly (paper, table 1: 90.11 % of GPT-4o's on GSM8K).

    Returns: expert, errors, corrected (counts), share, low, high (Wilson; NaN without an error).
    """
    right = right_table(answers)
    rows = []
    for expert in right.columns:
        others = right.loc[~right[expert]].drop(columns=expert).any(axis=1)
        row = {"expert": expert, "errors": len(others), "corrected": int(others.sum())}
        rows.append(row | share(stats.wilson(row["corrected"], len(others)) if len(others) else stats.UNDEFINED))
    return pd.DataFrame(rows)


def coverage(answers: pd.DataFrame) -> pd.DataFrame:
    """Share of questions that at least one expert answers rightly, as experts are added: the most that a perfect choice
    among their answers could reach. In three orders: the table's, greedy's, and the mean over all.

    as listed: Wilson's interval. greedy: each time the expert that adds most (ties: the table's order). That choice
    flatters itself, being counted on the questions that it was made on: the high limit is Wilson's of the share as it
    stands, the low limit Wilson's of what is covered where half of the questions choose the order for the other half
    (mean of three ways to halve them). In simulations of 4 to 10 experts, alike or not, that covers about 95 % or more;
    a bootstrap that chooses anew in each sample flatters twice, and falls to 32 %. mean over orders: the chance that so
    many experts, drawn at random, hold a right answer (`chance_of_a_hit`, experts as samples; `stats.mean_chance`).

    Returns: order ("as listed", "greedy", "mean over orders"), experts (how many), added (the last one's name; None
      for the mean), n, share, low, high.
    """
    right = right_table(answers)
    names, marks_QE, n = list(right), right.to_numpy(), len(right)
    listed, greedy, unseen_E = list(range(len(names))), _greedy(marks_QE), np.zeros(len(names), dtype=int)
    for shift in range(3):  # every other question, every other two, every other four
        half_Q = (np.arange(n) >> shift) % 2 == 0
        for chooses_Q in (half_Q, ~half_Q):
            unseen_E += _covered(marks_QE[~chooses_Q], _greedy(marks_QE[chooses_Q]))
    rows = []
    for name, order, lower_E in (("as listed", listed, np.full(len(names), n)), ("greedy", greedy, unseen_E // 3)):
        for k, count in enumerate(_covered(marks_QE, order)):
            head = {"order": name, "experts": k + 1, "added": names[order[k]], "n": n}
            low = stats.wilson(int(min(count, lower_E[k])), n).low
            rows.append({**head, **share(stats.wilson(int(count), n)), "low": low})
    for k in range(1, len(names) + 1):
        mean = stats.mean_chance(chance_of_a_hit(len(names), marks_QE.sum(axis=1), k))
        rows.append({"order": "mean over orders", "experts": k, "added": None, "n": n, **share(mean)})
    return pd.DataFrame(rows)


def _covered(right_QE: NDArray, order: Sequence[int]) -> NDArray:
    """Questions that the first k experts of an order answer rightly between them, for each k."""
    return np.logical_or.accumulate(right_QE[:, order], axis=1).sum(axis=0)


def _greedy(right_QE: NDArray) -> list[int]:
    """Experts, each the one that adds most to those before it."""
    order: list[int] = []
    while len(order) < right_QE.shape[1]:
        counts = (right_QE | right_QE[:, order].any(axis=1, keepdims=True)).sum(axis=0)
        counts[order] = -1
        order.append(int(counts.argmax()))
    return order


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
        row = {"prompt": prompt, "n": len(nats), "own": own, **share(stats.wilson(own, len(nats)))}
        rows.append({**row, "chance": 1 / nats.shape[1]})
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
            rows.append(counts | share(interval))
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


def share(interval: stats.Interval, name: str = "") -> dict[str, float]:
    """An interval as columns: share, low, high; or NAME, NAME_low, NAME_high."""
    prefix = f"{name}_" if name else ""
    return {name or "share": interval.mean, f"{prefix}low": interval.low, f"{prefix}high": interval.high}


def _checked(answers: pd.DataFrame, key: list[str]) -> None:
    if answers.empty:
        raise ValueError("the answers table is empty (0 rows)")
    twice = answers[answers.duplicated(key)]
    if len(twice):
        where = ", ".join(f"{name}={twice.iloc[0][name]!r}" for name in key)
        raise ValueError(f"{len(twice)} answers stand there twice, first {where}; keep one for each {tuple(key)}")

"""Intervals that can be believed: shares, means over seeds and questions, ratios, and paired differences.

Values come as `values_SQ`: S seeds (rows) by Q questions (columns), the same questions for every seed. Both are draws
from something larger, so both add to the interval. A paired comparison is the same function on the differences of two
arms, seed by seed and question by question.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, t
from statsmodels.stats.proportion import proportion_confint

LEVEL = 0.95  # of every interval
POWER = 0.80  # of the smallest detectable difference


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval, and what it rests on.

    detectable: the smallest true difference from 0 that the design finds with 80 % power; None where that is not asked.
    """

    mean: float
    low: float
    high: float
    n_questions: int
    n_seeds: int
    detectable: float | None = None


def text(numbers: Mapping[str, Any] | None, *, scale: float = 100, digits: int = 1) -> str:
    """mean [low, high] of an interval's fields, in percent unless `scale` is 1; a dash where there is none.

    >>> text(asdict(Interval(0.5321, -0.0001, 0.56, 300, 3)))
    '53.2 [0.0,\\xa056.0]'
    """
    if not numbers or numbers.get("mean") is None:
        return "—"
    rounded = (round(scale * numbers[key], digits) + 0.0 for key in ("mean", "low", "high"))  # + 0.0: no "-0.0"
    mean, low, high = (f"{number:.{digits}f}" for number in rounded)
    return f"{mean} [{low},\N{NO-BREAK SPACE}{high}]"


def wilson(right: int, n: int) -> Interval:
    """Wilson's 95 % interval of the share right / n, one answer a question.

    Raises: ValueError unless 0 <= right <= n and n >= 1.

    >>> interval = wilson(8, 10); round(interval.low, 4), round(interval.high, 4)
    (0.4902, 0.9433)
    """
    if not (n >= 1 and 0 <= right <= n):
        raise ValueError(f"right={right} of n={n}: n must be >= 1 and 0 <= right <= n")
    low, high = proportion_confint(right, n, alpha=1 - LEVEL, method="wilson")
    return Interval(right / n, float(low), float(high), n, 1)


def half_width(values_SQ: ArrayLike, *, power: float = 0.5) -> NDArray:
    """Half-width of the 95 % interval of the mean, both seeds and questions being random.

        half^2 = t^2 var_S(mean_Q) / S  +  z^2 max(0, question variance) / Q

    The first term is the plain t interval over seed means, S - 1 degrees of freedom: it holds the seeds' variance and
    the noise, however large either is. What it lacks is that all seeds answered the same questions; the second term
    adds that, its variance being the two-way analysis of variance's (MS_questions - MS_residual) / S. Adding the
    squares of two limits instead of pooling the variances is the modified large-sample method (Burdick and Graybill,
    Confidence Intervals on Variance Components, 1992). In simulations (tests/test_stats.py; right or wrong answers, 300
    questions, 2 to 10 seeds) it covers 94 to 99 %: conservative where seeds hardly differ. A pooled variance with
    Satterthwaite's degrees of freedom is narrower at 2 seeds but fell to 88 % there. The price is a wide interval at
    2 seeds (t = 12.7), which is what 2 seeds can say. With one seed the interval holds the questions' variance alone.

    Args:
      values_SQ: [..., S, Q]; leading axes are separate studies.
      power: 0.5 gives the half-width; 0.8 the smallest true difference seen with that power.
    Returns: [...], in the unit of the values.
    """
    values = np.asarray(values_SQ, dtype=float)
    seeds, questions = values.shape[-2:]

    def quantiles(df: int) -> float:
        return t.ppf((1 + LEVEL) / 2, df) + t.ppf(power, df)

    if seeds == 1:
        return quantiles(questions - 1) * np.sqrt(values[..., 0, :].var(axis=-1, ddof=1) / questions)
    seed_mean, question_mean = values.mean(axis=-1, keepdims=True), values.mean(axis=-2, keepdims=True)
    residual = values - seed_mean - question_mean + values.mean(axis=(-2, -1), keepdims=True)
    ms_residual = (residual**2).sum(axis=(-2, -1)) / ((seeds - 1) * (questions - 1))
    question_variance = question_mean[..., 0, :].var(axis=-1, ddof=1) - ms_residual / seeds
    by_seed = quantiles(seeds - 1) ** 2 * seed_mean[..., 0].var(axis=-1, ddof=1) / seeds
    z = norm.ppf((1 + LEVEL) / 2) + norm.ppf(power)
    return np.sqrt(by_seed + z**2 * np.maximum(question_variance, 0.0) / questions)


def crossed_mean(values_SQ: ArrayLike, *, share: bool = False) -> Interval:
    """The mean of seeds x questions with its 95 % interval (`half_width`) and its smallest detectable difference.

    Args:
      values_SQ: finite; a score of each seed and question, or a paired difference of two arms.
      share: the values average to a share of 0 to 1: bend the interval into those bounds by Wilson's formula (one seed
        of right / wrong answers then differs from `wilson` only by t in the place of z). Differences: False.
    Where all values agree nothing was seen to vary; the interval then is what Q questions without a single exception
    still allow (Wilson's bound).
    Raises: ValueError for another shape, fewer than 2 questions, or a value that is not finite.

    >>> one = crossed_mean([[1, 1, 0, 0, 0, 0, 0, 0, 0, 0]], share=True); round(one.mean, 2), round(one.low, 2)
    (0.2, 0.04)
    """
    values = _checked(values_SQ)
    return _interval(float(values.mean()), values, share)


def crossed_ratio(part_SQ: ArrayLike, whole_SQ: ArrayLike) -> Interval:
    """The share sum(part) / sum(whole) with its 95 % interval, e.g. all wrong of any wrong; seeds and questions random.

    Linearised (delta method): the ratio of means varies as the mean of (part - ratio whole) / mean(whole).
    Raises: ValueError where the whole is empty (the ratio is not defined), and as `crossed_mean`.
    """
    part, whole = _checked(part_SQ), _checked(whole_SQ)
    if whole.sum() <= 0:
        raise ValueError(f"sum of whole_SQ={whole.sum():g} must be > 0: a share of nothing is not defined")
    ratio = float(part.sum() / whole.sum())
    return _interval(ratio, ratio + (part - ratio * whole) / whole.mean(), share=True)


def _checked(values_SQ: ArrayLike) -> NDArray:
    values = np.asarray(values_SQ, dtype=float)
    if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] < 2:
        raise ValueError(f"values_SQ has shape {values.shape}; it must be [seeds >= 1, questions >= 2]")
    if not np.isfinite(values).all():
        raise ValueError(f"values_SQ holds {int((~np.isfinite(values)).sum())} values that are not finite")
    return values


def _interval(mean: float, values: NDArray, share: bool) -> Interval:
    seeds, questions = values.shape
    half, detectable = float(half_width(values)), float(half_width(values, power=POWER))
    z = norm.ppf((1 + LEVEL) / 2)
    if half < 1e-12:
        half = detectable = float(z**2 / (questions + z**2))  # Wilson's upper bound of 0 exceptions in Q
        bend = z**2 / questions
    else:
        bend = half**2 / (mean * (1 - mean)) if 0 < mean < 1 else z**2 / questions
    if share:  # Wilson's formula, with half^2 in the place of z^2 p (1 - p) / n
        centre = (mean + bend / 2) / (1 + bend)
        width = np.sqrt(mean * (1 - mean) * bend + bend**2 / 4) / (1 + bend)
        low, high = max(0.0, centre - width), min(1.0, centre + width)
    else:
        low, high = mean - half, mean + half
    return Interval(mean, float(low), float(high), questions, seeds, detectable)

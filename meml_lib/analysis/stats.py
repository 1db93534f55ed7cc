"""Intervals that can be believed: shares, means over seeds and questions, ratios, and paired differences.

Values come as `values_SQ`: S seeds (rows) by Q questions (columns), the same questions for every seed. Both are draws
from something larger, so both add to the interval. A paired comparison is the same function on the differences of two
arms, seed by seed and question by question.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, nctdtrinc, stdtrit  # the quantiles of scipy.stats, without its 100 us a call
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

LEVEL = 0.95  # of every interval
POWER = 0.80  # of the smallest detectable difference


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval, and what it rests on.

    detectable: the smallest true difference from 0 that the design finds with 80 % power; None where that is not asked.
    p: two-sided, of a true mean of 0; below 0.05 exactly where the interval leaves 0 out. None for shares.
    """

    mean: float
    low: float
    high: float
    n_questions: int
    n_seeds: int
    detectable: float | None = None
    p: float | None = None


def text(numbers: Mapping[str, Any] | None, *, scale: float = 100, digits: int = 1) -> str:
    """mean [low, high] of an interval's fields, in percent unless `scale` is 1; a dash where there is none.

    >>> text(asdict(Interval(0.5321, -0.0001, 0.56, 300, 3)))
    '53.2 [0.0,\\xa056.0]'
    """
    if not numbers or numbers.get("mean") is None or math.isnan(numbers["mean"]):
        return "—"
    rounded = (round(scale * numbers[key], digits) + 0.0 for key in ("mean", "low", "high"))  # + 0.0: no "-0.0"
    mean, low, high = (f"{number:.{digits}f}" for number in rounded)
    return f"{mean} [{low},\N{NO-BREAK SPACE}{high}]"


UNDEFINED = Interval(math.nan, math.nan, math.nan, 0, 1)
"""Of what a table of answers does not determine, e.g. a share of no errors."""


def wilson(right: int, n: int) -> Interval:
    """Wilson's 95 % interval of the share right / n, one answer a question.

    Raises: ValueError unless 0 <= right <= n and n >= 1.

    >>> interval = wilson(8, 10); round(interval.low, 4), round(interval.high, 4)
    (0.4902, 0.9433)
    """
    return _of_counts(right, n, "wilson")


def exact(part: int, whole: int) -> Interval:
    """Clopper and Pearson's 95 % interval of the share part / whole: covers at least 95 % of the time, however rare.

    For intersection over union: given how many questions any expert gets wrong, each of them is wrong for all with the
    same chance, so an interval that holds for every such number holds on the whole. Good experts share few errors,
    and near 0 Wilson's is too sure of itself (91 % at 200 questions, 88 % at 64). The price is a tenth in width.
    Raises: as `wilson`.

    >>> interval = exact(8, 10); round(interval.low, 4), round(interval.high, 4)
    (0.4439, 0.9748)
    """
    return _of_counts(part, whole, "beta")


def _of_counts(part: int, whole: int, method: str) -> Interval:
    if not (whole >= 1 and 0 <= part <= whole):
        raise ValueError(f"right={part} of n={whole}: n must be >= 1 and 0 <= right <= n")
    low, high = proportion_confint(part, whole, alpha=1 - LEVEL, method=method)
    return Interval(part / whole, float(low), float(high), whole, 1)


def mean_chance(chances_Q: ArrayLike) -> Interval:
    """The mean of a chance from 0 to 1 of each question, with its 95 % interval: Wilson's, of as many right or wrong
    answers as would make the mean vary as much.

    The variance is taken with one question more, half of it at 0 and half at 1: where nearly all chances are 1, the
    rare 0 that these questions happen to lack is not taken to be impossible (`crossed_mean` covers down to 82 % there).

    >>> mean_chance([1, 1, 0, 0, 0]).high == wilson(2, 5).high
    True
    """
    chances = np.asarray(chances_Q, dtype=float)
    more = np.append(chances, [0, 1])
    weight = np.append(np.ones(len(chances)), [0.5, 0.5]) / (len(chances) + 1)
    centre = weight @ more
    answers = len(chances) * centre * (1 - centre) / (weight @ more**2 - centre**2)
    low, high = proportion_confint(chances.mean() * answers, answers, alpha=1 - LEVEL, method="wilson")
    return Interval(float(chances.mean()), float(low), float(high), len(chances), 1)


def phi(counts_22: ArrayLike) -> Interval:
    """Phi coefficient, the correlation of two yes/no marks, with its 95 % interval.

    Delta method on the scale of arctanh phi, half an answer added to each cell: of all that was tried the only interval
    that holds where errors are rare (simulated over accuracies of 50 to 97 %, phi of -0.1 to 0.8, 64 to 1,319
    questions: 92.6 to 100 %; without the halves, or by a bootstrap over questions, down to 18 and 14 % at 200, since a
    sample without a shared error seems not to vary). The mean is that of the counts as they are.

    Args: counts_22: questions; rows: the one's mark, columns: the other's, in the same order.
    Returns: UNDEFINED where a mark is always the same.

    >>> phi([[2, 1], [1, 2]]).mean  # (2 * 2 - 1 * 1) / 3 ** 2
    0.333...
    """
    counts = np.asarray(counts_22, dtype=float)
    if not (counts.sum(axis=0).all() and counts.sum(axis=1).all()):
        return UNDEFINED
    mean, (centre, error) = _phi(counts)[0], _phi(counts + 0.5)
    half = -ndtri((1 - LEVEL) / 2) * error / (1 - centre**2)
    low, high = np.tanh(np.arctanh(centre) - half), np.tanh(np.arctanh(centre) + half)
    return Interval(mean, min(mean, float(low)), max(mean, float(high)), int(counts.sum()), 1)


def _phi(counts: NDArray) -> tuple[float, float]:
    """(phi, its standard error by the delta method)."""
    share = counts / counts.sum()
    (one, _), (other, _) = share.sum(axis=1), share.sum(axis=0)
    x = np.array([[1 - one], [-one]]) / np.sqrt(one * (1 - one))
    y = np.array([1 - other, -other]) / np.sqrt(other * (1 - other))
    found = (share * x * y).sum()
    influence = x * y - found * (x**2 + y**2) / 2
    return float(found), float(np.sqrt((share * influence**2).sum() / counts.sum()))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """The p-values of one table's comparisons, corrected for their number; each in its place.

    Where all true differences are 0, the chance that any of them comes out below 0.05 is at most 5 %, however the
    comparisons hang together. One that has not run (None) stays None, and counts: the family was decided beforehand.
    Raises: ValueError for a p-value outside [0, 1].
    Source: Holm, Scandinavian Journal of Statistics 6 (1979) 65-70, by statsmodels' multipletests.

    >>> holm([0.01, None, 0.04, 0.02])  # 4 x 0.01; 3 x 0.02; 2 x 0.04; never below a smaller one's
    [0.04, None, 0.08, 0.06]
    """
    family = [1.0 if p is None else p for p in p_values]
    if not all(0 <= p <= 1 for p in family):
        raise ValueError(f"p_values={list(p_values)} must lie in [0, 1]")
    corrected = multipletests(family, method="holm")[1].tolist() if family else []
    return [None if p is None else whole for p, whole in zip(p_values, corrected, strict=True)]


def half_width(values_SQ: ArrayLike) -> NDArray:
    """Half-width of the 95 % interval of the mean, both seeds and questions being random.

        half^2 = max( t^2 var_S(mean_Q) / S  +  z^2 max(0, question variance) / Q,  z^2 var_Q(mean_S) / Q )

    The first term is the plain t interval over seed means, S - 1 degrees of freedom: it holds the seeds' variance and
    the noise, however large either is. What it lacks is that all seeds answered the same questions; the second term
    adds that, its variance being the two-way analysis of variance's (MS_questions - MS_residual) / S. Adding the
    squares of two limits instead of pooling the variances is the modified large-sample method (Burdick and Graybill,
    Confidence Intervals on Variance Components, 1992). The last term, the interval that questions alone give to the mean
    of the seeds, is the least: two or three seeds whose means happen to agree would else look certain. In simulations (tests/test_stats.py; right or wrong answers, 300
    questions, 2 to 10 seeds) it covers 94 to 99.6 %: conservative where seeds hardly differ. The price is a wide interval
    at 2 seeds (t = 12.7). Narrower methods were tried and left (reports/log.md): pooling the variances falls to 89 % at
    2 seeds, and where the seeds' variance may be anything, nothing is much narrower. With one seed the interval holds
    the questions' variance alone.

    Args: values_SQ: [..., S, Q]; leading axes are separate studies.
    Returns: [...], in the unit of the values; where nothing varied, Wilson's upper bound of 0 exceptions in Q.
    """
    return _half(_spread(values_SQ))


def detectable(values_SQ: ArrayLike) -> NDArray:
    """The smallest true mean that the design finds (its interval leaves 0 out) with 80 % power; shapes: `half_width`.

    `half_width` with each quantile replaced by the shift that is found so often: z + z_0.8, and for t the noncentrality
    of the t test (12.7 -> 16.3 at 2 seeds). The seeds' variance is the observed one: with 2 or 3 seeds a rough guide.
    """
    spread = _spread(values_SQ)
    found_t = nctdtrinc(spread.df, 1 - POWER, -stdtrit(spread.df, (1 - LEVEL) / 2))
    return _combine(spread, found_t, ndtri(POWER) - ndtri((1 - LEVEL) / 2))


def p_value(values_SQ: ArrayLike) -> NDArray:
    """Two-sided p-value of a true mean of 0: 1 - level of the interval of `half_width` that just reaches 0.

    Args: values_SQ: paired differences; [..., S, Q] as in `half_width`.
    Returns: [...]; below 0.05 exactly where the 95 % interval leaves 0 out; 1e-15 stands for anything smaller.

    >>> round(float(p_value([[1.0, 0.0, 0.0, 1.0, 1.0]])), 4)  # one seed: the t test, t = 0.6 / sqrt(0.3 / 5)
    0.0705
    """
    spread = _spread(values_SQ)
    log_low, log_high = np.full(spread.mean.shape, np.log(1e-15)), np.zeros(spread.mean.shape)
    for _ in range(50):  # halving: half-widths shrink as p grows
        middle = (log_low + log_high) / 2
        reaches = _half(spread, np.exp(middle)) >= np.abs(spread.mean)
        log_low, log_high = np.where(reaches, middle, log_low), np.where(reaches, log_high, middle)
    return np.exp(log_low)


def limits(values_SQ: ArrayLike, *, share: bool = False) -> tuple[NDArray, NDArray]:
    """(low, high) of the 95 % interval of the mean: mean -+ `half_width`; a share's is bent (see `crossed_mean`)."""
    spread = _spread(values_SQ)
    half, mean = _half(spread), spread.mean
    if not share:
        return mean - half, mean + half
    bend = np.full(mean.shape, ndtri((1 - LEVEL) / 2) ** 2 / spread.questions)
    np.divide(half**2, mean * (1 - mean), out=bend, where=spread.varies)  # in the place of z^2 / n in Wilson's formula
    centre = (mean + bend / 2) / (1 + bend)
    width = np.sqrt(mean * (1 - mean) * bend + bend**2 / 4) / (1 + bend)
    return np.maximum(0.0, centre - width), np.minimum(1.0, centre + width)


class _Spread(NamedTuple):
    """A mean and the variances that its interval is made of; each [...], a value per study."""

    mean: NDArray
    by_seed: NDArray  # with one seed: by question
    by_question: NDArray
    least: NDArray  # questions alone, of the mean of the seeds
    varies: NDArray
    df: int  # of by_seed
    questions: int


def _spread(values_SQ: ArrayLike) -> _Spread:
    values = np.asarray(values_SQ, dtype=float)
    seeds, questions = values.shape[-2:]
    seed_mean, question_mean = values.mean(axis=-1), values.mean(axis=-2)
    mean = seed_mean.mean(axis=-1)
    question_variance = question_mean.var(axis=-1, ddof=1)
    if seeds == 1:
        by_seed, by_question, df = question_variance / questions, np.zeros(mean.shape), questions - 1
    else:
        residual = values - seed_mean[..., None] - question_mean[..., None, :] + mean[..., None, None]
        ms_residual = (residual**2).sum(axis=(-2, -1)) / ((seeds - 1) * (questions - 1))
        by_question = np.maximum(question_variance - ms_residual / seeds, 0.0) / questions
        by_seed, df = seed_mean.var(axis=-1, ddof=1) / seeds, seeds - 1
    least = question_variance / questions
    return _Spread(mean, by_seed, by_question, least, by_seed + least > 1e-24, df, questions)


def _combine(spread: _Spread, t: ArrayLike, z: ArrayLike) -> NDArray:
    seen = np.maximum(np.square(t) * spread.by_seed + np.square(z) * spread.by_question, np.square(z) * spread.least)
    return np.where(spread.varies, np.sqrt(seen), np.square(z) / (spread.questions + np.square(z)))


def _half(spread: _Spread, p: ArrayLike = 1 - LEVEL) -> NDArray:
    return _combine(spread, stdtrit(spread.df, np.divide(p, 2)), ndtri(np.divide(p, 2)))


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
    return _interval(_checked(values_SQ), share)


def crossed_ratio(part_SQ: ArrayLike, whole_SQ: ArrayLike) -> Interval:
    """The share sum(part) / sum(whole) with its 95 % interval, e.g. all wrong of any wrong; seeds and questions random.

    Linearised (delta method): the ratio of means varies as the mean of (part - ratio whole) / mean(whole).
    Raises: ValueError where the whole is empty (the ratio is not defined), and as `crossed_mean`.
    """
    part, whole = _checked(part_SQ), _checked(whole_SQ)
    if whole.sum() <= 0:
        raise ValueError(f"sum of whole_SQ={whole.sum():g} must be > 0: a share of nothing is not defined")
    ratio = float(part.sum() / whole.sum())
    return _interval(ratio + (part - ratio * whole) / whole.mean(), share=True)


def _checked(values_SQ: ArrayLike) -> NDArray:
    values = np.asarray(values_SQ, dtype=float)
    if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] < 2:
        raise ValueError(f"values_SQ has shape {values.shape}; it must be [seeds >= 1, questions >= 2]")
    if not np.isfinite(values).all():
        raise ValueError(f"values_SQ holds {int((~np.isfinite(values)).sum())} values that are not finite")
    return values


def _interval(values: NDArray, share: bool) -> Interval:
    low, high = limits(values, share=share)
    p = None if share else float(p_value(values))
    return Interval(float(values.mean()), float(low), float(high), *values.shape[::-1], float(detectable(values)), p)

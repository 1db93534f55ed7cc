"""Intervals: worked numbers, and coverage on synthetic studies whose truth is known."""

import numpy as np
import pytest
from scipy.stats import t

from meml_lib.analysis import stats


def test_one_seed_is_the_t_interval_over_questions():
    interval = stats.crossed_mean([[1.0, 0.0, 0.0, 1.0, 1.0]])
    half = t.ppf(0.975, 4) * np.sqrt(0.3 / 5)  # variance of 1, 0, 0, 1, 1 with n - 1: 0.3
    assert interval.mean == pytest.approx(0.6)
    assert interval.high - interval.mean == pytest.approx(half)
    assert (interval.n_questions, interval.n_seeds) == (5, 1)


def test_two_seeds_by_hand():
    # Seed means 0.75 and 0.25: their variance is 0.125, over S = 2: 0.0625. Question means 1, 0.5, 0.5, 0.
    # The 8 residuals are +-0.25: MS = 0.5 / 3, over S: 1/12. The question means' variance is 1/6, so 1/12 is their own.
    values = [[1, 1, 1, 0], [1, 0, 0, 0]]
    expected = np.sqrt(12.7062**2 * 0.0625 + 1.95996**2 / 12 / 4)
    assert stats.half_width(values) == pytest.approx(expected, rel=1e-4)


def test_a_detectable_difference_adds_the_quantile_of_its_power():
    interval = stats.crossed_mean([[0.5, -0.5, 1.0, 0.0, 0.25]])
    ratio = (t.ppf(0.975, 4) + t.ppf(0.8, 4)) / t.ppf(0.975, 4)
    assert interval.detectable == pytest.approx(ratio * (interval.high - interval.mean))


def test_a_share_stays_within_its_bounds_and_comes_near_wilson():
    values = np.zeros((1, 300))
    values[0, :6] = 1
    crossed, wilson = stats.crossed_mean(values, share=True), stats.wilson(6, 300)
    assert crossed.low > 0
    assert (crossed.low, crossed.high) == (pytest.approx(wilson.low, rel=0.02), pytest.approx(wilson.high, rel=0.02))


def test_no_seen_variation_is_not_certainty():
    interval = stats.crossed_mean(np.zeros((2, 60)))
    assert (interval.low, interval.high) == (pytest.approx(-0.0602, abs=1e-4), pytest.approx(0.0602, abs=1e-4))
    share = stats.crossed_mean(np.zeros((1, 60)), share=True)
    assert (share.low, share.high) == (0.0, pytest.approx(stats.wilson(0, 60).high))


def test_a_ratio_of_one_seed_comes_near_wilson_on_its_whole():
    whole = np.r_[np.ones(200), np.zeros(100)][None]
    part = np.r_[np.ones(60), np.zeros(240)][None]
    ratio, wilson = stats.crossed_ratio(part, whole), stats.wilson(60, 200)
    assert ratio.mean == pytest.approx(0.3)
    assert (ratio.low, ratio.high) == (pytest.approx(wilson.low, abs=0.003), pytest.approx(wilson.high, abs=0.003))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.wilson(3, 2), "right=3 of n=2"),
        (lambda: stats.wilson(0, 0), "n must be >= 1"),
        (lambda: stats.crossed_mean([[1.0]]), r"shape \(1, 1\)"),
        (lambda: stats.crossed_mean([1.0, 0.0]), r"shape \(2,\)"),
        (lambda: stats.crossed_mean([[1.0, np.nan]]), "1 values that are not finite"),
        (lambda: stats.crossed_ratio([[0, 0]], [[0, 0]]), "share of nothing"),
    ],
)
def test_what_has_no_interval_says_why(call, message):
    with pytest.raises(ValueError, match=message):
        call()


QUESTIONS, STUDIES = 300, 1000
SPREADS = {"half": (0.8, 0.8), "alike": (6.0, 6.0), "rare": (0.3, 6.0)}  # Beta: how hard questions are


def answers(rng, chance, seeds: int, seed_sd: float) -> np.ndarray:
    """[studies, seeds, questions] of right (1) or wrong (0), plus the seed's own shift."""
    right = rng.random((len(chance), seeds, QUESTIONS)) < chance
    return right + rng.normal(0, seed_sd, (len(chance), seeds, 1))


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("seed_sd", [0.0, 0.03])
@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_the_interval_of_a_mean_covers_the_truth(seeds, seed_sd, spread):
    rng = np.random.default_rng(seeds)
    a, b = SPREADS[spread]
    values = answers(rng, rng.beta(a, b, (STUDIES, 1, QUESTIONS)), seeds, seed_sd)
    covered = np.abs(values.mean(axis=(1, 2)) - a / (a + b)) <= stats.half_width(values)
    assert covered.mean() >= 0.93


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("seed_sd", [0.0, 0.03])
@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_a_zero_effect_is_seldom_called_significant(seeds, seed_sd, spread):
    rng = np.random.default_rng(100 + seeds)
    chance = rng.beta(*SPREADS[spread], (STUDIES, 1, QUESTIONS))  # both arms answer the same questions
    difference = answers(rng, chance, seeds, seed_sd) - answers(rng, chance, seeds, seed_sd)
    significant = np.abs(difference.mean(axis=(1, 2))) > stats.half_width(difference)
    assert significant.mean() <= 0.065


def test_one_seed_covers_the_questions_and_says_nothing_of_seeds():
    rng = np.random.default_rng(1)
    chance = rng.beta(0.8, 0.8, (STUDIES, 1, QUESTIONS))
    still, moving = answers(rng, chance, 1, 0.0), answers(rng, chance, 1, 0.05)
    covered = [np.mean(np.abs(x.mean(axis=(1, 2)) - 0.5) <= stats.half_width(x)) for x in (still, moving)]
    assert covered[0] >= 0.93 > covered[1]  # so a report of one seed must say that seeds are not in its intervals


def test_a_detectable_difference_is_found_about_four_times_in_five():
    rng = np.random.default_rng(2)
    chance = rng.beta(0.8, 0.8, (STUDIES, 1, QUESTIONS))
    null = answers(rng, chance, 5, 0.03) - answers(rng, chance, 5, 0.03)
    effect = np.median(stats.half_width(null, power=stats.POWER))
    found = np.abs(null.mean(axis=(1, 2)) + effect) > stats.half_width(null)
    assert 0.7 <= found.mean() <= 0.9

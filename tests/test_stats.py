"""Intervals: worked numbers, and coverage on synthetic studies whose truth is known."""

import gc

import numpy as np
import pytest
from scipy.stats import binom, nct, norm, t, ttest_1samp

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


def test_the_t_test_finds_a_detectable_difference_with_80_percent_power():
    interval = stats.crossed_mean([[0.5, -0.5, 1.0, 0.0, 0.25]])
    half = interval.high - interval.mean
    shift = interval.detectable / half * t.ppf(0.975, 4)
    assert nct.sf(t.ppf(0.975, 4), 4, shift) == pytest.approx(0.8, abs=1e-6)


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


def test_phi_of_marks_that_always_agree_or_never_vary():
    alike = stats.phi([[3, 0], [0, 5]])
    assert (alike.mean, alike.low, alike.high) == (pytest.approx(1), pytest.approx(0.0391, abs=1e-4), pytest.approx(1))
    opposed = stats.phi([[0, 3], [5, 0]])
    assert (opposed.mean, opposed.low) == (pytest.approx(-1), pytest.approx(-1)) and opposed.n_questions == 8
    assert np.isnan([stats.phi([[4, 2], [0, 0]]).mean, stats.phi([[4, 0], [2, 0]]).low]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.wilson(3, 2), "right=3 of n=2"),
        (lambda: stats.wilson(0, 0), "n must be >= 1"),
        (lambda: stats.exact(0, 0), "n must be >= 1"),
        (lambda: stats.crossed_mean([[1.0]]), r"shape \(1, 1\)"),
        (lambda: stats.crossed_mean([1.0, 0.0]), r"shape \(2,\)"),
        (lambda: stats.crossed_mean([[1.0, np.nan]]), "1 values that are not finite"),
        (lambda: stats.crossed_ratio([[0, 0]], [[0, 0]]), "share of nothing"),
    ],
)
def test_what_has_no_interval_says_why(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_p_is_the_level_at_which_the_interval_just_reaches_0():
    values = [[1, 1, 1, 0], [1, 0, 0, 0]]  # as above: 0.0625 by seed with 1 degree of freedom, 1 / 48 by question
    p = float(stats.p_value(values))
    assert np.sqrt(t.isf(p / 2, 1) ** 2 * 0.0625 + norm.isf(p / 2) ** 2 / 48) == pytest.approx(0.5)
    assert stats.crossed_mean(values).p == pytest.approx(p)


def test_p_of_one_seed_is_the_t_tests():
    values = np.random.default_rng(0).normal(0.2, 1.0, (1, 40))
    assert stats.p_value(values) == pytest.approx(ttest_1samp(values[0], 0.0).pvalue)


def test_p_is_below_5_percent_exactly_where_the_interval_leaves_0_out():
    values = np.random.default_rng(0).normal(0.25, 1.0, (2000, 3, 30))  # neither rare nor sure
    low, high = stats.limits(values)
    outside = (low > 0) | (high < 0)
    assert 0.2 < outside.mean() < 0.8
    assert ((stats.p_value(values) < 0.05) == outside).all()


def test_p_without_any_variation():
    assert stats.crossed_mean(np.zeros((2, 60))).p == pytest.approx(1.0)
    assert stats.crossed_mean(np.ones((2, 60))).p < 1e-12
    assert stats.crossed_mean(np.ones((2, 60)), share=True).p is None


def test_holm_counts_what_has_not_run():
    corrected = stats.holm([0.02, None, 0.5, 0.01])
    assert corrected == [pytest.approx(0.06), None, pytest.approx(1.0), pytest.approx(0.04)]
    assert stats.holm([None]) == [None]
    assert stats.holm([]) == []
    assert stats.holm([0.8, 0.9]) == [1.0, 1.0]
    with pytest.raises(ValueError, match="must lie in"):
        stats.holm([0.1, 1.2])
    with pytest.raises(ValueError, match="must lie in"):
        stats.holm([0.1, float("nan")])


# Simulated studies. Questions and seeds are both random, drawn anew in every study; the truth is an arm's mean over all
# questions and seeds there could be. Answers are right or wrong. A question is equally hard for all seeds, and partly
# for all arms (of the variance, the first share is all arms', the second the arm's own, the rest is chance). A seed's
# accuracy is drawn about its arm's; two arms' seeds are drawn apart, since alike their difference would vary less.
QUESTIONS, STUDIES = 300, 1000
ACCURACIES = (0.05, 0.3, 0.6, 0.9)
HARDNESS = {"alike": (0.0, 0.0), "differing": (0.5, 0.2), "nearly fixed": (0.7, 0.25)}


def study(rng, accuracy_A, seeds: int, seed_sd: float, hardness: str, studies: int = STUDIES) -> np.ndarray:
    """[studies, arms, seeds, questions], True where right; a seed's accuracy has exactly this mean and deviation."""
    mean_A1, (shared, own) = np.asarray(accuracy_A)[:, None], HARDNESS[hardness]
    level = np.broadcast_to(mean_A1, (studies, len(accuracy_A), seeds))
    if seed_sd:
        counts = mean_A1 * (1 - mean_A1) / seed_sd**2 - 1  # of a Beta distribution: it stays within 0 and 1
        level = rng.beta(level * counts, (1 - level) * counts)

    def normal(variance: float, arms: int, seeds: int):
        return np.sqrt(variance, dtype="f") * rng.standard_normal((studies, arms, seeds, QUESTIONS), dtype="f")

    arms = len(accuracy_A)
    hard = normal(shared, 1, 1) + normal(own, arms, 1) + normal(1 - shared - own, arms, seeds)
    return hard < norm.ppf(level)[..., None]


def difference(arm: np.ndarray, other: np.ndarray) -> np.ndarray:
    return arm.astype(float) - other


@pytest.mark.parametrize("hardness", HARDNESS)
@pytest.mark.parametrize("seed_sd", [0.0, 0.03])
@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_simulation_of_coverage_and_of_a_zero_effect(seeds, seed_sd, hardness):
    rng, called = np.random.default_rng([seeds, int(100 * seed_sd)]), []
    for accuracy in ACCURACIES:
        better = accuracy + 0.06
        answers = study(rng, [accuracy, accuracy, better], seeds, seed_sd, hardness)
        arm, zero, effect = answers[:, 0], *(difference(answers[:, k], answers[:, 0]) for k in (1, 2))
        covered, width = {}, {}
        for name, values, truth in (("arm", arm, accuracy), ("difference", effect, better - accuracy)):
            low, high = stats.limits(values, share=name == "arm")
            covered[name], width[name] = np.mean((low <= truth) & (truth <= high)), np.mean(high - low)
        low, high = stats.limits(zero)
        called.append(np.mean((low > 0) | (high < 0)))
        print(f"\n{seeds} seeds, sd {100 * seed_sd:.0f}, {hardness}, accuracy {accuracy}:", end=" ")
        print(*(f"{k} covered {covered[k]:.1%}, width {100 * width[k]:.1f};" for k in covered), end=" ")
        print(f"zero effect called {called[-1]:.1%}", end="")
        assert min(covered.values()) >= 0.93
        assert seeds < 10 or max(covered.values()) <= 0.98  # an interval of everything would cover as well
    assert np.mean(called) <= 0.06  # of 4,000 studies


def test_simulation_of_one_seed_covers_the_questions_and_says_nothing_of_seeds():
    rng, covered = np.random.default_rng(1), []
    for seed_sd in (0.0, 0.05):
        low, high = stats.limits(study(rng, [0.6], 1, seed_sd, "alike")[:, 0], share=True)
        covered.append(np.mean((low <= 0.6) & (0.6 <= high)))
    assert covered[0] >= 0.93 > covered[1]  # so a report of one seed must say that seeds are not in its intervals


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_simulation_of_a_detectable_difference_finds_it_about_four_times_in_five(seeds):
    rng = np.random.default_rng(seeds)
    alike = study(rng, [0.4, 0.4], seeds, 0.03, "differing")
    effect = np.sqrt(np.mean(stats.detectable(difference(alike[:, 1], alike[:, 0])) ** 2))  # its square is unbiased
    answers = study(rng, [0.4, 0.4 + effect], seeds, 0.03, "differing")
    found = np.mean(stats.limits(difference(answers[:, 1], answers[:, 0]))[0] > 0)
    print(f"\n{seeds} seeds, 3 points: a difference of {100 * effect:.1f} points is found in {found:.1%}", end="")
    assert 0.72 <= found <= 0.9


@pytest.mark.parametrize("against", ["one baseline", "a baseline each"])
def test_simulation_of_a_table_of_eight_zero_effects(against):
    baselines, rng, tables = 1 if against == "one baseline" else 8, np.random.default_rng(8), []
    for _ in range(8):  # 2,000 tables in all
        arms = study(rng, [0.6] * (8 + baselines), 5, 0.03, "alike", studies=250)
        tables.extend(stats.p_value(difference(arms[:, :8], arms[:, 8:])))
    gc.freeze()  # statsmodels collects garbage at each call: 14 ms of everything that pytest holds
    corrected = [min(stats.holm(p_values)) for p_values in tables]
    gc.unfreeze()
    wrongly, uncorrected = np.mean(np.array(corrected) < 0.05), np.mean(np.min(tables, axis=1) < 0.05)
    print(f"\n8 zero effects against {against}: called {wrongly:.1%}, uncorrected {uncorrected:.1%}", end="")
    assert wrongly <= 0.06
    assert uncorrected > 0.15


def test_seeds_whose_means_agree_are_no_surer_than_their_questions():
    values = np.zeros((2, 300))
    values[0, :60], values[1, 30:90] = 1.0, 1.0  # both seeds 20 %, on questions that are partly others
    interval = stats.crossed_mean(values)
    questions_alone = 1.96 * values.mean(axis=0).std(ddof=1) / np.sqrt(300)
    assert interval.high - interval.mean == pytest.approx(questions_alone, rel=1e-3)
    assert interval.detectable == pytest.approx(questions_alone * 2.8 / 1.96, rel=1e-3)


def test_the_exact_interval_of_intersection_over_union_holds_where_wilsons_does_not():
    """No draws: of n questions a binomial number is in the union, of that a binomial number in the intersection."""
    n, covered = 200, {}
    for interval in (stats.exact, stats.wilson):
        limits = {(k, m): interval(k, m) for m in range(1, 101) for k in range(min(m, 30) + 1)}
        low, high = (np.full((101, 31), np.nan) for _ in range(2))
        for (k, m), found in limits.items():
            low[m, k], high[m, k] = found.low, found.high
        for union, iou in ((0.05, 0.01), (0.05, 0.03), (0.1, 0.005), (0.1, 0.03), (0.3, 0.03), (0.3, 0.1)):
            m, k = np.arange(101)[:, None], np.arange(31)
            chance = binom.pmf(m, n, union) * binom.pmf(k, m, iou)
            chance[0] = 0  # nobody errs: undefined
            covered[interval.__name__, union, iou] = chance[(low <= iou) & (iou <= high)].sum() / chance.sum()
    print("", *(f"{key}: {share:.3f}" for key, share in covered.items()), sep="\n")
    assert min(share for (name, *_), share in covered.items() if name == "exact") >= 0.95
    assert covered["wilson", 0.05, 0.01] < 0.91
    assert covered["exact", 0.3, 0.1] <= 0.98  # an interval of everything would cover as well


@pytest.mark.parametrize("phi", [0.0, 0.5])
@pytest.mark.parametrize(("one", "other"), [(0.5, 0.5), (0.6, 0.3), (0.9, 0.9), (0.95, 0.95), (0.97, 0.97)])
def test_simulation_of_phi(one, other, phi):
    both = one * other + phi * np.sqrt(one * (1 - one) * other * (1 - other))
    cells = [both, one - both, other - both, 1 - one - other + both]
    tables = np.random.default_rng(0).multinomial(200, cells, 2000)
    found = [interval for cells in tables if not np.isnan((interval := stats.phi(cells.reshape(2, 2))).mean)]
    covered = np.mean([interval.low <= phi <= interval.high for interval in found])
    width = np.mean([interval.high - interval.low for interval in found])
    print(f"\n{one:.0%} and {other:.0%} right, phi {phi}: covered {covered:.1%}, width {width:.2f}", end="")
    assert covered >= 0.93 and all(interval.low <= interval.mean <= interval.high for interval in found)
    assert one > 0.9 or covered <= 0.98


def test_a_mean_chance_is_wilsons_of_as_many_answers_as_vary_alike():
    # 1, 0.5, 0.5, 0 and half a 0, half a 1: mean 0.5, square 2 / 5, so variance 0.15 of 0.25: 4 / 0.6 = 6.67 answers
    interval = stats.mean_chance([1, 0.5, 0.5, 0])
    assert (interval.mean, interval.n_questions) == (0.5, 4)
    z = 1.95996  # Wilson at a half: 0.5 -+ z / 2 / sqrt(n + z^2)
    half = pytest.approx(z / 2 / np.sqrt(4 / 0.6 + z**2), abs=1e-5)
    assert interval.high - 0.5 == half and 0.5 - interval.low == half
    certain = stats.mean_chance(np.ones(60))
    assert (certain.low, certain.high) == (pytest.approx(stats.wilson(60, 60).low), pytest.approx(1))

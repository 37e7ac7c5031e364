"""Statistics of studies: against scipy, and by simulating thousands of studies whose truth is known."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from lab.study.report import stats
from lab.study.report.stats import compare, verdict

STUDIES = 10_000
TRUTH = 0.3


def pairs(n, correlation=0.7, truth=TRUTH, studies=STUDIES, arms=1, seed=0):
    """Simulated studies: arms (studies, arms, n) and base (studies, 1, n), normal, sd 1, correlated by seed."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(studies, 1, n)) * math.sqrt(correlation)
    own = math.sqrt(1 - correlation)
    return (shared + own * rng.normal(size=(studies, arms, n)) + truth, shared + own * rng.normal(size=shared.shape))


def coverage(ends, truth=TRUTH):
    low, high = ends
    return float(((low <= truth) & (truth <= high)).mean())


# ------------------------------------------------------------------------------------------------ against scipy


@pytest.fixture
def ab():
    a, b = pairs(7, studies=4, arms=1)
    return a[:, 0], b[:, 0]


def test_interval_and_paired_test(ab):
    a, b = ab
    there = scipy_stats.ttest_rel(a, b, axis=1)
    np.testing.assert_allclose(stats.paired_p(a - b), there.pvalue, rtol=1e-10)
    np.testing.assert_allclose(stats.interval(a - b), there.confidence_interval(0.95), rtol=1e-10)
    assert not np.allclose(stats.paired_p(a - b), scipy_stats.ttest_ind(a, b, axis=1).pvalue, rtol=0.05)  # unpaired


def test_welch(ab):
    a, b = ab[0][:, :4], 3 * ab[1]  # other sizes, other spreads
    there = scipy_stats.ttest_ind(a, b, axis=1, equal_var=False)
    difference, low, high, p = stats.welch(a, b)
    np.testing.assert_allclose(p, there.pvalue, rtol=1e-9)
    np.testing.assert_allclose((low, high), there.confidence_interval(0.95), rtol=1e-9)
    np.testing.assert_allclose(difference, a.mean(1) - b.mean(1))
    assert not np.allclose(p, scipy_stats.ttest_ind(a, b, axis=1).pvalue, rtol=0.01)  # Student's, of equal variances


def test_correlation(ab):
    a, b = ab
    np.testing.assert_allclose(stats.correlation(a, b), [scipy_stats.pearsonr(x, y).statistic for x, y in zip(a, b,
                                                                                                    strict=True)])
    assert math.isnan(stats.correlation(a[0, :2], b[0, :2]))


def test_studentized_bootstrap_is_the_textbook_loop():
    """The matrix products against resampling by a plain loop, with other random numbers."""
    n = 20  # with fewer, the distribution of t has gaps, and a quantile at one of them jumps
    d = np.random.default_rng(3).exponential(size=n)
    rng, t = np.random.default_rng(4), []
    for _ in range(20_000):
        drawn = rng.choice(d, n)
        t.append((drawn.mean() - d.mean()) / (drawn.std(ddof=1) / math.sqrt(n)))
    low, high = np.quantile(t, [0.025, 0.975])
    error = d.std(ddof=1) / math.sqrt(n)
    expected = d.mean() - high * error, d.mean() - low * error
    found = stats.bootstrap(d, resamples=19_999)
    np.testing.assert_allclose(found, expected, atol=0.04 * (expected[1] - expected[0]))
    assert expected[1] - d.mean() > 1.3 * (d.mean() - expected[0])  # skewed data: unlike t, it is not symmetric
    assert stats.bootstrap(d, seed=1) != stats.bootstrap(d, seed=2) and stats.bootstrap(d) == stats.bootstrap(d)


def test_bootstrap_of_three_is_infinite_and_of_one_unknown():
    low, high = stats.bootstrap(np.array([0.1, 0.2, 0.4]))
    assert (low, high) == (-math.inf, math.inf)
    assert all(map(math.isnan, stats.bootstrap(np.array([0.1]))))
    assert all(map(math.isfinite, stats.bootstrap(np.array([0.1, 0.2, 0.4, 0.5]))))


def test_holm_by_hand():
    """Sorted 0.01, 0.02, 0.03, 0.5 times 4, 3, 2, 1: never below the one before, never above 1."""
    np.testing.assert_allclose(stats.holm([0.03, 0.01, math.nan, 0.5, 0.02]), [0.06, 0.04, math.nan, 0.5, 0.06])
    np.testing.assert_allclose(stats.holm([0.6, 0.7]), [1, 1])
    assert stats.holm([]).size == 0


def test_d_z_is_unbiased_and_the_plain_ratio_is_not():
    d = np.random.default_rng(0).normal(0.8, 1.0, size=(40_000, 5))
    assert stats.d_z(d).mean() == pytest.approx(0.8, abs=0.01)
    assert (d.mean(1) / d.std(1, ddof=1)).mean() > 0.95
    assert math.isnan(stats.d_z(np.array([1.0, 2.0])))


def test_d_av_is_in_units_of_the_spread_between_seeds():
    """Pairs that correlate by 0.99: d_z is ten times d_av, which does not depend on the pairing."""
    a, b = np.array([1.0, 2.0, 3.0, 6.0]), np.array([0.5, 1.4, 2.6, 5.3])
    by_hand = (a - b).mean() / ((a.std(ddof=1) + b.std(ddof=1)) / 2)
    assert stats.d_av(a, b) == pytest.approx(by_hand) == pytest.approx(stats.d_av(a, b[::-1]))
    assert stats.d_z(a - b) > 3 and by_hand < 0.3
    c = stats.compare(dict(enumerate(a)), dict(enumerate(b)), "min")
    assert (c.d_av, c.d_z) == pytest.approx((by_hand, float(stats.d_z(a - b))))
    assert math.isnan(stats.d_av(a[:1], b[:1])) and math.isnan(stats.d_av(np.ones(3), np.zeros(3)))


def test_probability_positive_is_calibrated_for_the_next_seed():
    """With d below what the sixth seed brings by `new`, said probabilities are uniform; those of a plug-in are not."""
    d = np.random.default_rng(0).normal(0.5, 1.0, size=(40_000, 6))
    seen, new = d[:, :5], d[:, 5:]
    said, plugged = stats.probability_positive(seen - new), scipy_stats.norm.cdf(
        (seen - new).mean(1) / seen.std(1, ddof=1))
    for q in (0.05, 0.2, 0.5, 0.8, 0.95):
        assert (said < q).mean() == pytest.approx(q, abs=0.01)
    assert (plugged < 0.05).mean() > 0.09
    assert stats.probability_positive(np.array([2.0, 2.0])) == 1 and stats.probability_positive(-np.ones(3)) == 0


# ------------------------------------------------------------------------------------------------ by simulation


@pytest.mark.parametrize("n", [4, 5, 8])
def test_95_percent_intervals_cover_the_truth(n):
    """t and bootstrap of the paired difference; as controls a normal quantile, and the truth missed by 0.3 sd."""
    a, b = pairs(n, studies=4_000)
    d = (a - b)[:, 0]
    assert 0.94 <= coverage(stats.interval(d)) <= 0.96
    assert 0.94 <= coverage(stats.bootstrap(d, resamples=1_999)) <= 0.96
    mean, sd = stats.mean_sd(d)
    assert coverage((mean - 1.96 * sd / math.sqrt(n), mean + 1.96 * sd / math.sqrt(n))) < 0.93
    assert coverage(stats.interval(d), TRUTH + 0.4) < 0.93


def test_intervals_of_means_and_welch_cover_the_truth():
    a, b = pairs(6, correlation=0.0)
    assert 0.94 <= coverage(stats.interval(a[:, 0])) <= 0.96
    assert 0.94 <= coverage(stats.welch(a[:, 0], b[:, 0])[1:3]) <= 0.96
    a, b = pairs(6, correlation=0.8)  # unpaired intervals of paired runs are far too wide: why we pair
    assert coverage(stats.welch(a[:, 0], b[:, 0])[1:3]) > 0.99


def test_bca_covers_less_than_the_studentized_bootstrap():
    """Why it was not chosen: 5 seeds are too few for it."""
    d = np.random.default_rng(1).normal(TRUTH, 1, size=(1_000, 5))
    bca = scipy_stats.bootstrap((d,), np.mean, axis=-1, n_resamples=499, method="BCa", rng=0).confidence_interval
    assert coverage(bca) < 0.9 < 0.93 < coverage(stats.bootstrap(d, resamples=1_999))


@pytest.mark.parametrize("real", [0, 2])
def test_holm_holds_the_family_error(real):
    """Six arms against one base, of which `real` differ: some false alarm in at most 5 % of the studies."""
    a, b = pairs(5, truth=0.0, arms=6)
    a[:, :real] += 3.0
    p = stats.paired_p(a - b)
    alarms = (stats.holm(p)[:, real:] <= 0.05).any(1).mean()
    assert alarms <= 0.05
    assert (p[:, real:] <= 0.05).any(1).mean() > 0.10  # without it
    if real:
        found, bonferroni = (stats.holm(p)[:, :real] <= 0.05).mean(), (6 * p[:, :real] <= 0.05).mean()
        assert found > bonferroni > 0.5


@pytest.mark.parametrize("gap", [0.5, 1.0, 2.0])
def test_power_and_seeds_needed(gap):
    correlation = 0.5
    sd = stats.difference_sd(1.0, correlation)
    n = stats.seeds_needed(gap, sd)

    def seen(n):
        a, b = pairs(n, correlation, truth=gap)
        return (stats.paired_p((a - b)[:, 0]) <= 0.05).mean()

    assert seen(n) == pytest.approx(stats.power(gap, sd, n), abs=0.03)
    assert seen(n) >= 0.77 and stats.power(gap, sd, n) >= 0.8 > stats.power(gap, sd, n - 1)
    assert abs(stats.power(gap, stats.difference_sd(1.0, 0.0), n) - seen(n)) > 0.03  # the pairing matters
    assert stats.power(gap, sd, n) == pytest.approx(
        1 - np.diff(scipy_stats.nct.cdf(np.array([-1, 1]) * scipy_stats.t.ppf(0.975, n - 1), n - 1,
                                        gap / sd * math.sqrt(n)))[0], abs=1e-6)


def test_seeds_needed_at_the_ends():
    assert stats.seeds_needed(1e-6, 1.0) is None and stats.seeds_needed(0.0, 1.0) is None
    assert stats.seeds_needed(100.0, 1.0) == 2 and stats.seeds_needed(1.0, 0.0) == 2
    assert stats.seeds_needed(1.0, 1.0, alpha=0.01) > stats.seeds_needed(1.0, 1.0)
    assert stats.power(1.0, 1.0, 1) == 0


def test_factorial_effects_cover_their_truth():
    """y = 1 + 2 a + 3 b + 4 ab in 0/1 levels, plus what a seed adds to all: by Box's definition 4, 5 and 2."""
    rng = np.random.default_rng(0)
    studies, n = 4_000, 5
    level = np.array([0, 1])
    a, b = level[:, None], level[None, :]
    means = 1 + 2 * a + 3 * b + 4 * a * b
    values = (means[..., None, None] + 10 * rng.normal(size=(studies, n)) + rng.normal(size=(2, 2, studies, n)))
    effects = stats.factorial_effects(values.reshape(2, 2, studies * n))
    for chosen, truth in {(0,): 4.0, (1,): 5.0, (0, 1): 2.0}.items():
        per_seed = effects[chosen].reshape(studies, n)
        assert 0.94 <= coverage(stats.interval(per_seed), truth) <= 0.96
        assert coverage(stats.interval(per_seed), truth + 0.7) < 0.93
    assert list(effects) == [(0,), (1,), (0, 1)]
    assert len(stats.factorial_effects(np.zeros((2, 2, 2, 3)))) == 7


def test_sweep_optimum():
    x = np.array([1e-4, 1e-3, 1e-2, 1e-1])
    best, vertex = stats.sweep_optimum(x, (np.log(x) - math.log(2e-3)) ** 2, "min")
    assert best == 1 and vertex == pytest.approx(2e-3)
    assert stats.sweep_optimum([1, 2, 3, 4], [0, 3, 4, 3.5], "max") == (2, pytest.approx(3 + 1 / 6))
    assert stats.sweep_optimum(x, x, "min") == (0, None)


# ------------------------------------------------------------------------------------------------ comparisons


def seeds_of(values):
    return dict(enumerate(values))


def test_compare_puts_the_pieces_together():
    a, b = (x[0, 0] for x in pairs(6, studies=1))
    c = compare(seeds_of(a), seeds_of(b), "min")
    assert c.n == 6 and c.p == pytest.approx(scipy_stats.ttest_rel(a, b).pvalue)
    assert c.t == pytest.approx(tuple(map(float, stats.interval(a - b))))
    assert c.wins == (a < b).sum() and c.better == pytest.approx(1 - stats.probability_positive(a - b))
    other = compare(seeds_of(a), seeds_of(b), "max")
    assert other.wins == 6 - c.wins and other.difference == c.difference and other.better == pytest.approx(1 - c.better)


def test_compare_pairs_by_seed_not_by_place():
    base = {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}
    c = compare({3: 4.1, 2: 3.2, 1: 2.1, 9: 50.0}, base, "min")
    assert c.n == 3 and c.difference == pytest.approx(0.4 / 3)
    assert c.welch[0] > 10  # unpaired takes all
    assert compare({3: 4.1, 2: 3.2}, base, "min", pairs=[3]).n == 1


def test_verdicts():
    base = seeds_of([1.50, 1.61, 1.43, 1.55, 1.58])
    noise = np.array([0.01, -0.02, 0.015, -0.01, 0.0])

    def said(shift, mode="min", scale=1.0, family=1):
        made = compare({s: v + shift + scale * noise[s] for s, v in base.items()}, base, mode)
        dull = compare({s: v - noise[s] + 0.001 for s, v in base.items()}, base, mode)
        return verdict(stats.adjust([made] + [dull] * (family - 1))[0], mode)

    assert said(-0.1).startswith("better than base by 0.101") and "interval" in said(-0.1)
    assert said(+0.1).startswith("worse than base") and said(+0.1, "max").startswith("better")
    unclear = said(-0.005)
    assert unclear.startswith("not distinguishable from base at n = 5") and "you would need about" in unclear
    assert "better" not in unclear and "worse" not in unclear and "-0.006 (95 % interval -0.0" in unclear
    assert said(-0.022).startswith("better")
    assert "after Holm's correction for all 5 comparisons" in said(-0.022, family=5)
    seeds = int(unclear.split("about ")[1].split()[0])
    assert seeds == stats.seeds_needed(-0.006, float(np.std(noise, ddof=1)))


def test_verdicts_that_conclude_nothing():
    base = seeds_of([1.5, 1.6, 1.4])
    assert verdict(compare({0: 0.1}, base, "min"), "min") == "nothing can be concluded from one pair of runs"
    assert verdict(compare({7: 0.1}, base, "min"), "min") == "nothing can be concluded from no pair of runs"
    assert verdict(compare(base, base, "min"), "min") == "identical to base in all 3 pairs"
    shifted = compare({s: v - 0.1 for s, v in base.items()}, base, "min")  # equal but for rounding
    assert "no test" in verdict(shifted, "min") and math.isnan(shifted.p)


def test_an_untested_arm_does_not_count_in_the_family():
    base = seeds_of([1.50, 1.61, 1.43])
    real, one = compare(seeds_of([1.4, 1.5, 1.34]), base, "min"), compare({0: 1.0}, base, "min")
    assert [c.family for c in stats.adjust([real, one])] == [1, 1]
    assert stats.adjust([real, one])[0].holm == real.p < stats.adjust([real, real])[0].holm

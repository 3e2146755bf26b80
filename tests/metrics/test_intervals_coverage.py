"""E6: intervals that say 95% hold the truth in 93 to 97% of simulated data sets."""

import numpy as np
import pytest
from scipy.stats import binom

from rl4med_ddpo.metrics.intervals import (
    cluster_numbers,
    clustered_mean,
    holm,
    is_evidence,
    jackknife_interval,
    mcnemar,
    paired_share_difference,
    wilson_interval,
)


@pytest.mark.parametrize(("p", "n"), [(0.002, 960), (0.18, 960), (0.63, 64), (0.9, 30_720)])
def test_wilson_covers_by_exact_summation(p, n):
    """No simulation: every outcome with its probability."""
    low, high = binom.ppf([1e-9, 1 - 1e-9], n, p).astype(int)
    covered = 0.0
    for k in range(low, high + 1):
        lower, upper = wilson_interval(k, n)
        covered += binom.pmf(k, n, p) * (lower <= p <= upper)
    assert 0.93 <= covered <= 0.975


def test_clustered_bootstrap_covers():
    """Lesions of 1 to 4 images that are alike; as independent, they would cover far less."""
    held = naive = 0
    for seed in range(500):
        rng = np.random.default_rng(seed)
        clusters = np.repeat(np.arange(200), rng.integers(1, 5, 200))
        values = rng.normal(size=200)[clusters] + 0.3 * rng.normal(size=len(clusters))
        low, high = clustered_mean(values, clusters, draws=400).interval
        held += low <= 0 <= high
        low, high = clustered_mean(values, np.arange(len(values)), draws=400).interval
        naive += low <= 0 <= high
    assert 0.93 <= held / 500 <= 0.97
    assert naive / 500 < 0.9


@pytest.mark.parametrize(
    ("both", "first", "second", "n"),
    [(0.15, 0.03, 0.45, 2048), (0.5, 0.1, 0.1, 960), (0.0005, 0.0015, 0.0145, 960)],
)
def test_paired_differences_cover(both, first, second, n):
    rng = np.random.default_rng(0)
    shares = [both, first, second, 1 - both - first - second]
    held = 0
    for counts in rng.multinomial(n, shares, size=500):
        a, b, c, d = counts
        one = np.repeat([True, True, False, False], [a, b, c, d])
        other = np.repeat([True, False, True, False], [a, b, c, d])
        low, high = paired_share_difference(one, other).interval
        held += low <= second - first <= high
    assert 0.93 <= held / 500 <= 0.975


def test_a_paired_difference_turns_its_sign_with_the_order():
    one = np.repeat([True, True, False, False], [20, 12, 2, 16])
    other = np.repeat([True, False, True, False], [20, 12, 2, 16])
    estimate, turned = paired_share_difference(one, other), paired_share_difference(other, one)
    assert estimate.value == pytest.approx(-0.2)
    assert estimate.interval == pytest.approx([-bound for bound in reversed(turned.interval)])
    assert estimate.interval[0] < estimate.value < estimate.interval[1] < 0
    nothing = paired_share_difference(one, one)
    assert nothing.value == 0
    assert nothing.interval[0] <= 0 <= nothing.interval[1]


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=50)
    without = [np.delete(values, i).mean() for i in range(50)]
    low, high = jackknife_interval(values.mean(), without)
    error = values.std(ddof=1) / np.sqrt(50)
    assert (high - low) / 2 == pytest.approx(1.959964 * error, rel=1e-6)


def test_lesions_without_a_name_stand_for_themselves():
    assert cluster_numbers(["a", "", "b", "a", ""]).tolist() == [0, 1, 2, 0, 3]


def test_holm_and_mcnemar():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert mcnemar(0, 0) == 1
    assert mcnemar(1, 9) == pytest.approx(2 * 11 / 1024)
    assert mcnemar(9, 1) == mcnemar(1, 9)


def test_an_interval_that_holds_zero_is_no_evidence():
    assert is_evidence((0.1, 0.2))
    assert is_evidence((-0.2, -0.1))
    assert not is_evidence((-0.1, 0.2))
    assert not is_evidence((0.0, 0.2))
    assert not is_evidence(None)

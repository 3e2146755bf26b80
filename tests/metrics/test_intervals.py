import math

import pytest

from rl4med_ddpo.metrics.intervals import wilson_interval


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (606, 960), (1, 30720)])
def test_agrees_with_wilsons_formula(k, n):
    z, p = 1.959963984540054, k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert wilson_interval(k, n) == pytest.approx((centre - half, centre + half), abs=1e-12)


def test_more_confidence_is_wider():
    low, high = wilson_interval(5, 10, 0.99)
    assert low < wilson_interval(5, 10)[0] < wilson_interval(5, 10)[1] < high


def test_nothing_is_known_without_trials():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_more_hits_than_trials():
    with pytest.raises(ValueError, match="k"):
        wilson_interval(11, 10)

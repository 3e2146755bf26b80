"""Confidence intervals, and what a paired difference proves."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm

Interval = tuple[float, float]


class Estimate(NamedTuple):
    """A value, its 95% interval (None where there is none), and the n it rests on."""

    value: float
    interval: Interval | None
    n: int


def wilson_interval(k: int, n: int, confidence: float = 0.95) -> Interval:
    """Return the Wilson score interval of a share: `k` hits in `n` independent trials.

    Unlike the normal approximation it stays within [0, 1] and keeps its width at 0 and `n` hits.
    Without trials nothing is known: (0, 1).

    Raises:
        ValueError: if `k` is not in 0 .. `n`, or the confidence not in [0, 1].
    """
    if n == 0 and k == 0:
        return 0.0, 1.0
    interval = binomtest(k, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def jackknife_interval(
    whole: float, without: Sequence[float], confidence: float = 0.95
) -> Interval:
    """Return the normal interval of the delete-a-group jackknife.

    Args:
        whole: The statistic of everything.
        without: The statistic without each of the G groups in turn.
        confidence: In (0, 1).
    """
    values, groups = np.asarray(without), len(without)
    error = np.sqrt((groups - 1) / groups * ((values - values.mean()) ** 2).sum())
    half = norm.ppf(0.5 + confidence / 2) * error
    return float(whole - half), float(whole + half)


def cluster_numbers(clusters: Sequence[object]) -> NDArray[np.int64]:
    """Number clusters 0, 1, ... by their first appearance; an empty name is a cluster of its own.

    Lesions that nobody named cannot be told apart from others, so each is its own cluster.
    """
    names: dict[object, int] = {}
    return np.array([names.setdefault(c or f"\0{i}", len(names)) for i, c in enumerate(clusters)])


def resampled_counts(clusters: int, draws: int, seed: int) -> NDArray[np.float64]:
    """Draw bootstrap samples of clusters: how often each is in each, `(draws, clusters)`."""
    rng = np.random.default_rng(seed)
    shares = np.full(clusters, 1 / clusters)
    return rng.multinomial(clusters, shares, size=draws).astype(np.float64)


def clustered_mean(
    values: NDArray[np.float64],
    clusters: NDArray[np.int64],
    draws: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Estimate:
    """Return a mean with its percentile bootstrap interval, resampling whole clusters.

    Images of one lesion are alike: as if they were independent, the interval would be too narrow.

    Args:
        values: `(N,)`.
        clusters: Number of each value's cluster, `(N,)`; see `cluster_numbers`.
        draws: Bootstrap samples.
        seed: Of the draws.
        confidence: In (0, 1).
    """
    n = len(values)
    if n == 0:
        return Estimate(float("nan"), None, 0)
    _, clusters = np.unique(clusters, return_inverse=True)
    sums, sizes = np.bincount(clusters, values), np.bincount(clusters)
    if len(sizes) < 2:
        return Estimate(float(np.mean(values)), None, n)
    counts = resampled_counts(len(sizes), draws, seed)
    means = (counts @ sums) / (counts @ sizes)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(float(np.mean(values)), (float(low), float(high)), n)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact p-value of McNemar's test, two-sided.

    Args:
        only_first: Pairs in which only the first was right.
        only_second: Pairs in which only the second was right.
    """
    discordant = only_first + only_second
    return 1.0 if discordant == 0 else float(binomtest(only_first, discordant).pvalue)


def paired_share_difference(
    first: NDArray[np.bool_], second: NDArray[np.bool_], confidence: float = 0.95
) -> Estimate:
    """Return share(second) - share(first) of paired hits with Newcombe's interval (1998, no. 10).

    It is made of the two Wilson intervals and the correlation of the pairs, so it holds for rare
    hits as well, where bootstrap and normal approximation break down.

    Args:
        first: `(N,)`.
        second: `(N,)`, the same cases in the same order.
        confidence: In (0, 1).
    """
    n = len(first)
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    p1, p2 = (both + only_first) / n, (both + only_second) / n
    low1, high1 = wilson_interval(both + only_first, n, confidence)
    low2, high2 = wilson_interval(both + only_second, n, confidence)
    product = (both + only_first) * (only_second + neither)
    product *= (both + only_second) * (only_first + neither)
    excess = both * neither - only_first * only_second
    if excess > 0:
        excess = max(excess - n / 2, 0)
    phi = excess / np.sqrt(product) if product else 0.0
    below, above = (p2 - low2, high1 - p1), (high2 - p2, p1 - low1)
    down, up = (np.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0)) for a, b in (below, above))
    return Estimate(p2 - p1, (float(p2 - p1 - down), float(p2 - p1 + up)), n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for the number of tests (Holm 1979), in their order."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, floor = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = floor
    return corrected


def is_evidence(interval: Interval | None) -> bool:
    """Tell whether the interval of a difference leaves out 0."""
    return interval is not None and not interval[0] <= 0 <= interval[1]

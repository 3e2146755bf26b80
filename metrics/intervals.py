"""Confidence intervals of shares."""

from scipy.stats import binomtest


def wilson_interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
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

"""Table 4: what a classifier gains from added images, and whether that is evidence.

Each arm (what was added) is trained with several seeds and read on the same real test images. Two
things make a difference uncertain: which lesions are in the test split, and the luck of training.
The first is measured by a bootstrap over lesions, paired between the arms; the second by the spread
of the paired differences over seeds. Their variances add.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import t as student

from rl4med_ddpo.metrics.intervals import (
    Interval,
    cluster_numbers,
    holm,
    is_evidence,
    mcnemar,
    resampled_counts,
)

SCORES = ("f1", "accuracy", "auroc")
DRAWS = 1000
Weighted = Callable[[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]], NDArray]


class Gain(NamedTuple):
    """A score of an arm, and its difference from another arm's.

    Attributes:
        value: Mean over seeds.
        interval: 95%, of the value.
        difference: From the other arm's value.
        difference_interval: 95%.
        p: Of the difference, two-sided.
    """

    value: float
    interval: Interval
    difference: float
    difference_interval: Interval
    p: float


def f1(truth: NDArray[np.bool_], said: NDArray[np.float64], weights: NDArray) -> NDArray:
    """Return F1 under each row of weights `(B, N)` of images: truth `(N,)`, probability `(N,)`."""
    found = said > 0.5
    hits = weights @ (truth & found)
    total = weights @ truth.astype(float) + weights @ found.astype(float)
    return np.divide(2 * hits, total, out=np.full(len(weights), np.nan), where=total > 0)


def accuracy(truth: NDArray[np.bool_], said: NDArray[np.float64], weights: NDArray) -> NDArray:
    """Return the accuracy under each row of weights `(B, N)`."""
    return weights @ ((said > 0.5) == truth) / weights.sum(axis=1)


def auroc(truth: NDArray[np.bool_], said: NDArray[np.float64], weights: NDArray) -> NDArray:
    """Return the area under the ROC curve under each row of weights `(B, N)`; ties count half."""
    levels, level = np.unique(said, return_inverse=True)
    order = np.argsort(level, kind="stable")
    starts = np.searchsorted(level[order], np.arange(len(levels)))
    positive = np.add.reduceat((weights * truth)[:, order], starts, axis=1)
    negative = np.add.reduceat((weights * ~truth)[:, order], starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative / 2
    total = positive.sum(axis=1) * negative.sum(axis=1)
    area = (positive * below).sum(axis=1)
    return np.divide(area, total, out=np.full(len(weights), np.nan), where=total > 0)


FORMULAS: dict[str, Weighted] = {"f1": f1, "accuracy": accuracy, "auroc": auroc}


def compare(
    arm: Sequence[NDArray[np.float64]],
    reference: Sequence[NDArray[np.float64]],
    truth: NDArray[np.bool_],
    clusters: NDArray[np.int64],
    score: str,
    draws: int = DRAWS,
) -> Gain:
    """Compare an arm with another by one score on the same images.

    Args:
        arm: Probabilities of the images, `(N,)`, one array a seed.
        reference: The other arm's, as many seeds.
        truth: Labels, `(N,)`.
        clusters: Number of each image's lesion, `(N,)`.
        score: One of `SCORES`.
        draws: Bootstrap samples.
    """
    counts = resampled_counts(int(clusters.max()) + 1, draws, seed=0)
    weights = np.concatenate([np.ones((1, len(truth))), counts[:, clusters]])
    formula = FORMULAS[score]
    ours = np.stack([formula(truth, said, weights) for said in arm])
    theirs = np.stack([formula(truth, said, weights) for said in reference])
    value, (low, high), _ = _interval(ours)
    difference, difference_interval, p = _interval(ours - theirs)
    interval = (max(low, 0.0), min(high, 1.0))
    return Gain(value, interval, difference, difference_interval, p)


def _interval(values: NDArray[np.float64]) -> tuple[float, Interval, float]:
    """Return mean, interval and p of values `(seeds, 1 + draws)`, the first column as observed."""
    seeds = len(values)
    observed = values[:, 0]
    mean = float(observed.mean())
    sampling = float(np.nanvar(values[:, 1:].mean(axis=0), ddof=1))
    training = float(observed.var(ddof=1) / seeds) if seeds > 1 else 0.0
    variance = sampling + training
    if not variance > 0:
        return mean, (mean, mean), 1.0 if mean == 0 else 0.0
    # Welch-Satterthwaite: the bootstrap's part is known well, the seeds' part by few seeds
    freedom = variance**2 / (training**2 / (seeds - 1)) if training > 0 else np.inf
    error = np.sqrt(variance)
    half = student.ppf(0.975, freedom) * error
    p = 2 * float(student.sf(abs(mean) / error, freedom))
    return mean, (mean - half, mean + half), p


def table_4(
    predictions: Mapping[str, Mapping[int, pd.DataFrame]],
    attributes: Sequence[str],
    reference: str = "real",
) -> pd.DataFrame:
    """Score every arm and compare it with the reference, attribute by attribute.

    Args:
        predictions: For each arm and seed what `callbacks.Predictions` wrote, all of the same
            images.
        attributes: Which to score.
        reference: The arm to compare with.

    Returns:
        One row for each arm, attribute and score: `value`, `low`, `high`; for other arms than the
        reference also `difference` with `difference_low` and `difference_high`, `p`, `p_holm`
        (corrected over all rows of the score), `mcnemar` (of the accuracy, by the mean probability
        over seeds), `verdict`. Scores are in [0, 1]; `positives` and `n` count images.
    """
    seeds = sorted(set.intersection(*(set(arm) for arm in predictions.values())))
    first = predictions[reference][seeds[0]]
    clusters = cluster_numbers(first["lesion_id"].fillna("").tolist())
    rows = []
    for attribute in attributes:
        truth = first[attribute].to_numpy() == 1
        said = {
            arm: [runs[seed][f"p_{attribute}"].to_numpy() for seed in seeds]
            for arm, runs in predictions.items()
        }
        for score in SCORES:
            for arm in predictions:
                gain = compare(said[arm], said[reference], truth, clusters, score)
                row = {
                    "attribute": attribute, "score": score, "arm": arm, "value": gain.value,
                    "low": gain.interval[0], "high": gain.interval[1], "seeds": len(seeds),
                    "positives": int(truth.sum()), "n": len(truth),
                }  # fmt: skip
                if arm != reference:
                    row |= {
                        "difference": gain.difference,
                        "difference_low": gain.difference_interval[0],
                        "difference_high": gain.difference_interval[1],
                        "p": gain.p,
                    }
                    if score == "accuracy":
                        row["mcnemar"] = _mcnemar(said[arm], said[reference], truth)
                rows.append(row)
    return _corrected(pd.DataFrame(rows))


def _mcnemar(
    arm: Sequence[NDArray[np.float64]],
    reference: Sequence[NDArray[np.float64]],
    truth: NDArray[np.bool_],
) -> float:
    ours, theirs = ((np.mean(said, axis=0) > 0.5) == truth for said in (arm, reference))
    return mcnemar(int((ours & ~theirs).sum()), int((~ours & theirs).sum()))


def _corrected(table: pd.DataFrame) -> pd.DataFrame:
    """Add p-values corrected over the comparisons of a score, and what they say."""
    if "p" not in table:
        return table
    for _, rows in table[table["p"].notna()].groupby("score"):
        table.loc[rows.index, "p_holm"] = holm(rows["p"].tolist())
    table["verdict"] = [verdict(row) for row in table.to_dict("records")]
    return table


def verdict(row: Mapping[Any, float]) -> str:
    """Say what a row proves: nothing where the interval holds 0, or after correction p >= 0.05."""
    if np.isnan(row["p"]):
        return ""
    interval = (row["difference_low"], row["difference_high"])
    if not is_evidence(interval) or row["p_holm"] >= 0.05:
        return "no evidence"
    return "better" if row["difference"] > 0 else "worse"

"""The Frechet distance of two sets of features: FID, where the features are Inception's."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rl4med_ddpo.metrics.intervals import Estimate, jackknife_interval


class Moments(NamedTuple):
    """Mean, `(D,)`, and unbiased covariance, `(D, D)`, both float64."""

    mean: Tensor
    covariance: Tensor


def moments(features: Tensor, weights: Tensor | None = None) -> Moments:
    """Return the moments of features `(N, D)`, each row weighing `weights`, `(N,)`, or alike.

    The weights need not sum to 1. With equal ones the covariance is that of `numpy.cov`.
    """
    features = features.double()
    if weights is None:
        weights = torch.ones(len(features), dtype=torch.float64)
    share = weights.double() / weights.sum()
    mean = share @ features
    centred = features - mean
    unbiased = 1 - (share**2).sum()
    return Moments(mean, (centred.T * share) @ centred / unbiased)


def frechet_distance(one: Moments, other: Moments) -> float:
    """Return |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, Eq. 6), in float64.

    The trace of the root is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which
    is symmetric: no imaginary part has to be thrown away.
    """
    values, vectors = torch.linalg.eigh(one.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ other.covariance @ root
    trace_of_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = ((one.mean - other.mean) ** 2).sum()
    traces = one.covariance.trace() + other.covariance.trace()
    return float(distance + traces - 2 * trace_of_root)


def frechet_estimate(
    real: Tensor,
    fake: Tensor,
    real_groups: Tensor,
    fake_groups: Tensor,
    weights: Tensor | None = None,
) -> Estimate:
    """Return the distance with an interval from the jackknife that leaves out a group at a time.

    The interval says how much the value moves with the images drawn. It does not know the bias of
    the distance, which falls with n: see the noise floor.

    Args:
        real: Features, `(N, D)`.
        fake: Features, `(M, D)`.
        real_groups: Group of each row in 0 .. G - 1, `(N,)`; images that belong together share one.
        fake_groups: The same for the fakes, `(M,)`.
        weights: Of the fakes, `(M,)`.
    """
    if weights is None:
        weights = torch.ones(len(fake), dtype=torch.float64)

    def distance(real_rows: Tensor, fake_rows: Tensor) -> float:
        return frechet_distance(
            moments(real[real_rows]), moments(fake[fake_rows], weights[fake_rows])
        )

    return leave_one_group_out(distance, real_groups, fake_groups)


def leave_one_group_out(
    statistic: Callable[[Tensor, Tensor], float], real_groups: Tensor, fake_groups: Tensor
) -> Estimate:
    """Estimate a statistic of (real rows, fake rows), both boolean masks, with its interval."""
    whole = statistic(torch.ones_like(real_groups).bool(), torch.ones_like(fake_groups).bool())
    groups = sorted(set(real_groups.tolist()) & set(fake_groups.tolist()))
    if len(groups) < 3:
        return Estimate(whole, None, len(fake_groups))
    without = [statistic(real_groups != g, fake_groups != g) for g in groups]
    return Estimate(whole, jackknife_interval(whole, without), len(fake_groups))

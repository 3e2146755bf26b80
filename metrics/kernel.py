"""The kernel distance of two sets of features: KID, where the features are Inception's."""

import torch
from torch import Tensor

from rl4med_ddpo.metrics.frechet import leave_one_group_out
from rl4med_ddpo.metrics.intervals import Estimate

CHUNK = 2048


def kernel_distance(real: Tensor, fake: Tensor, weights: Tensor | None = None) -> float:
    """Return the unbiased squared MMD with k(x, y) = (x.y / D + 1)^3 (Binkowski et al. 2018).

    Over all pairs at once, where other tools average over random subsets of 1,000: the same
    expectation, with less spread and no seed.

    Args:
        real: Features, `(N, D)`.
        fake: Features, `(M, D)`.
        weights: Of the fakes, `(M,)`; alike by default.
    """
    if weights is None:
        weights = torch.ones(len(fake), dtype=torch.float64)
    ours = weights.double() / weights.sum()
    theirs = torch.full((len(real),), 1 / len(real), dtype=torch.float64)
    within = _mean_kernel(fake, ours, fake, ours, skip_self=True)
    within += _mean_kernel(real, theirs, real, theirs, skip_self=True)
    return within - 2 * _mean_kernel(real, theirs, fake, ours)


def kernel_estimate(
    real: Tensor,
    fake: Tensor,
    real_groups: Tensor,
    fake_groups: Tensor,
    weights: Tensor | None = None,
) -> Estimate:
    """Return the distance with a jackknife interval; see `frechet_estimate` for the arguments."""
    if weights is None:
        weights = torch.ones(len(fake), dtype=torch.float64)

    def distance(real_rows: Tensor, fake_rows: Tensor) -> float:
        return kernel_distance(real[real_rows], fake[fake_rows], weights[fake_rows])

    return leave_one_group_out(distance, real_groups, fake_groups)


def _mean_kernel(
    x: Tensor, x_weights: Tensor, y: Tensor, y_weights: Tensor, skip_self: bool = False
) -> float:
    """Average the kernel over pairs, a chunk of x at a time; the weights each sum to 1."""
    x, y = x.double(), y.double()
    total = torch.zeros((), dtype=torch.float64)
    for rows in torch.arange(len(x)).split(CHUNK):
        total += x_weights[rows] @ _kernel(x[rows] @ y.T, x.shape[1]) @ y_weights
    if not skip_self:
        return float(total)
    diagonal = (x_weights * y_weights * _kernel((x * y).sum(dim=1), x.shape[1])).sum()
    return float((total - diagonal) / (1 - (x_weights * y_weights).sum()))


def _kernel(product: Tensor, dimensions: int) -> Tensor:
    return (product / dimensions + 1) ** 3

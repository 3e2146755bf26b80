"""Precision, recall, density and coverage: what neighbourhoods in a feature space say."""

import torch
from torch import Tensor


def neighbourhood_scores(real: Tensor, fake: Tensor, k: int = 5) -> dict[str, Tensor]:
    """Compare two sets of features by the balls that reach to each point's k-th neighbour.

    Precision and recall are those of Kynkaanniemi et al. (2019): the share of fakes within some
    real ball, the share of real ones within some fake ball. Density and coverage are those of
    Naeem et al. (2020, Eq. 3 and 4): how many real balls hold a fake, over k, and the share of
    real balls that hold any fake; an outlier's large ball counts little in them.

    Args:
        real: `(N, D)`.
        fake: `(M, D)`.
        k: Neighbours; fewer than N and M.

    Returns:
        What the scores are means of, float64: for `precision` and `density` one value a fake, for
        `recall` and `coverage` one a real point. All but density's are 0 or 1.

    Raises:
        ValueError: if a set has no more than k points.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"{k} neighbours need more than {k} points: {len(real)} and {len(fake)}")
    between = _distances(real, fake)
    in_real_ball = between <= _radii(real, k)[:, None]
    in_fake_ball = between <= _radii(fake, k)[None, :]
    return {
        "precision": in_real_ball.any(dim=0).double(),
        "recall": in_fake_ball.any(dim=1).double(),
        "density": in_real_ball.double().sum(dim=0) / k,
        "coverage": in_real_ball.any(dim=1).double(),
    }


def _radii(points: Tensor, k: int) -> Tensor:
    # the nearest is the point itself, at distance 0
    return _distances(points, points).kthvalue(k + 1, dim=1).values


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # not by x.x - 2 x.y + y.y, which rounds the distance of equal points to something else than 0
    return torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")

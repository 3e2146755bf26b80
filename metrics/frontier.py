"""What guidance alone buys: alignment, diversity and distance of one model over its guidances."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rl4med_ddpo.metrics.alignment import rate
from rl4med_ddpo.metrics.distribution import GROUPS
from rl4med_ddpo.metrics.diversity import diversity
from rl4med_ddpo.metrics.kernel import kernel_estimate

LEAST = 4
"""Images of a prompt that must be read right for their diversity to count."""
WORST = 3


class Scored(NamedTuple):
    """N images with what was made of them.

    Attributes:
        hits: Whether each shows exactly what was asked for, `(N,)`.
        prompts: Number of each image's prompt, `(N,)`.
        features: In the judge's last layer, `(N, D)`.
    """

    hits: NDArray[np.bool_]
    prompts: NDArray[np.int64]
    features: Tensor


def right_diversity(images: Scored, names: Sequence[str]) -> dict[str, Any]:
    """Return the mean distance of two images of a prompt among those that are read right.

    Over all images, wrong attributes would count as diversity. Left out, and named, are the prompts
    with fewer than `LEAST` right images.

    Args:
        images: N of them.
        names: Of the prompts, by number.
    """
    asked = sorted(set(images.prompts.tolist()))
    right = np.bincount(images.prompts[images.hits], minlength=len(names))
    kept = images.hits & (right >= LEAST)[images.prompts]
    left_out = [names[number] for number in asked if right[number] < LEAST]
    if not kept.any():
        return {"value": None, "interval": None, "n": 0, "left_out": left_out}
    estimate, _ = diversity(images.features[torch.from_numpy(kept)], images.prompts[kept])
    interval = None if estimate.interval is None else list(estimate.interval)
    return {
        "value": estimate.value,
        "interval": interval,
        "n": int(kept.sum()),
        "left_out": left_out,
    }


def distance_to_real(images: Scored, real: Tensor, real_groups: Tensor) -> dict[str, Any]:
    """Return the kernel distance in the judge's features, with a jackknife interval.

    Args:
        images: N of them.
        real: Features of real images, `(M, D)`.
        real_groups: Number of each one's lesion, `(M,)`; lesions are left out whole.
    """
    groups = torch.arange(len(images.features)) % GROUPS
    estimate = kernel_estimate(real, images.features, real_groups % GROUPS, groups)
    interval = None if estimate.interval is None else list(estimate.interval)
    return {"value": estimate.value, "interval": interval, "n_real": len(real)}


def frontier_point(
    images: Scored, distance: dict[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """Lay out a model's scores at one guidance.

    Args:
        images: Drawn at it.
        distance: See `distance_to_real`.
        names: Of the prompts, by number.
    """
    each = {
        names[number]: rate(images.hits[images.prompts == number])
        for number in sorted(set(images.prompts.tolist()))
    }
    worst = sorted(each, key=lambda name: each[name]["apr"])[:WORST]
    return {
        **rate(images.hits),
        "diversity_right": right_diversity(images, names),
        "distance": distance,
        "worst_prompts": {name: each[name]["apr"] for name in worst},
        "prompts": {name: entry["apr"] for name, entry in each.items()},
    }


def best_guidance(points: Sequence[dict[str, Any]]) -> float:
    """Return the guidance of the highest APR on validation noise, the lowest one of equals.

    Args:
        points: Each with `guidance` and `val_apr`.
    """
    return min(points, key=lambda point: (-point["val_apr"], point["guidance"]))["guidance"]

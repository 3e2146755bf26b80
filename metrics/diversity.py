"""Diversity within a prompt: how far its images lie from each other in a feature space."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rl4med_ddpo.metrics.intervals import Estimate, clustered_mean


def spread(features: Tensor) -> float:
    """Return the mean distance of two different images, features `(N, D)`; NaN for fewer than 2.

    A policy that draws one image again and again has 0.
    """
    if len(features) < 2:
        return float("nan")
    return torch.pdist(features.double()).mean().item()


def diversity(features: Tensor, prompts: NDArray[np.int64]) -> tuple[Estimate, dict[int, float]]:
    """Return the mean of the prompts' spreads with its interval over prompts, and each spread.

    Args:
        features: `(N, D)`.
        prompts: Number of each image's prompt, `(N,)`.
    """
    spreads = {
        number: spread(features[torch.from_numpy(prompts == number)])
        for number in sorted(set(prompts.tolist()))
    }
    known = np.array([value for value in spreads.values() if not np.isnan(value)])
    return clustered_mean(known, np.arange(len(known))), spreads

"""Copies of training images among samples, and the nearest pairs to look at."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from rl4med_ddpo.metrics.copies import CALIBRATION, copy_threshold, nearest
from rl4med_ddpo.metrics.intervals import wilson_interval

MOST_PAIRS = 20


def memorization(
    fake: Tensor, test: Tensor, train: Tensor, lesions: NDArray[np.int64]
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Count the samples that are nearer to a training image than real test images are.

    Args:
        fake: Thumbnails of the samples, `(M, 1, 64, 64)`; see `metrics.copies.thumbnails`.
        test: Of the real test images, `(N, 1, 64, 64)`.
        train: Of the training images, `(T, 1, 64, 64)`.
        lesions: Number of the lesion of each test, then of each training image, `(N + T,)`.

    Returns:
        The counts: `copies` among the samples, `copied` different training images, and what real
        test images do by the same rule. And the nearest pairs, by distance: rows `sample` and
        `train`, `distance`, and whether it is a `copy`.
    """
    of_test = nearest(test, train, lesions[: len(test)], lesions[len(test) :])
    of_fake = nearest(fake, train)
    threshold = copy_threshold(of_test)
    copies = of_fake.distance < threshold
    pairs = pd.DataFrame(
        {
            "sample": np.arange(len(fake)),
            "train": of_fake.row,
            "distance": of_fake.distance,
            "copy": copies,
        }
    )
    k, n = int(copies.sum()), len(copies)
    return {
        "copies": k,
        "copied": len(set(of_fake.row[copies].tolist())),
        "n": n,
        "rate": k / n,
        "interval": list(wilson_interval(k, n)),
        "expected_rate": CALIBRATION,
        "threshold": threshold,
        "n_test": len(test),
        "n_train": len(train),
        "network": "none: aligned correlation of thumbnails (metrics/copies.py)",
    }, pairs.sort_values(["distance", "sample"], ignore_index=True).head(MOST_PAIRS)

"""Photographs differ in focus, light and sensor: training images made to differ likewise."""

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

BLUR = (0.3, 1.2)
"""Standard deviation of the blur in pixels; one image in four stays sharp."""
CONTRAST = (0.7, 1.3)
TINT = (0.85, 1.15)
"""Factor of each colour channel's mean."""
GRAIN = 0.04
"""Largest standard deviation of the noise."""


def distort(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Blur an image, add grain, and change its contrast and tint, all at random.

    Args:
        image: `(3, H, W)` in [0, 1].
        rng: Decides what is done.

    Returns:
        `(3, H, W)` in [0, 1].
    """
    if rng.random() < 0.75:
        image = gaussian_blur(image, [5, 5], [rng.uniform(*BLUR)])
    noise = torch.from_numpy(rng.standard_normal(image.shape, dtype=np.float32))
    image = image + rng.uniform(0, GRAIN) * noise
    mean = image.mean(dim=(1, 2), keepdim=True)
    tint = torch.from_numpy(rng.uniform(*TINT, size=(3, 1, 1)).astype(np.float32))
    return ((image - mean) * rng.uniform(*CONTRAST) + mean * tint).clamp(0, 1)

"""How far a reconstruction is from its image: in values, in edges, in a network's features."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def pixel_loss(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Return absolute plus squared error of values plus absolute error of differences.

    The differences between neighbours keep thin strokes, which weigh little in the mean over
    values.

    Args:
        reconstruction: `(B, C, H, W)`.
        images: The same shape and range.
    """
    error = reconstruction - images
    across, down = error.diff(dim=3), error.diff(dim=2)
    return error.abs().mean() + error.square().mean() + across.abs().mean() + down.abs().mean()


def feature_loss(reconstruction: Sequence[Tensor], images: Sequence[Tensor]) -> Tensor:
    """Return the absolute error of feature maps, averaged over layers (a perceptual loss).

    Args:
        reconstruction: Feature maps, each `(B, C, H, W)`, shallow to deep.
        images: Those of the images. Their mean size is the unit of each layer's error.
    """
    errors = [
        F.l1_loss(ours, theirs) / theirs.abs().mean()
        for ours, theirs in zip(reconstruction, images, strict=True)
    ]
    return sum(errors, start=errors[0].new_zeros(())) / len(errors)


def signal_to_noise(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each image, `(B,)`, in dB; values in [0, 1]."""
    return -10 * (reconstruction - images).square().mean(dim=(1, 2, 3)).log10()

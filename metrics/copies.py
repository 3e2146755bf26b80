"""Copies of training images among samples: a comparison that survives edits, and its calibration.

No pretrained network is needed. Two images are compared by the correlation of their fine structure
(grey thumbnails without their smooth part and of level contrast, so that shifts of brightness and
colour drop out) over mirrorings and crops: the largest counts. What is a copy is calibrated on real
images: as near to a training image of another lesion is one in a hundred real test images.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

STORED, FINE, COARSE = 64, 24, 8
WHOLE = (1.0, 0, 0)
PROPOSING = (WHOLE, (0.9, 0, 0), *((0.92, dx, dy) for dx, dy in product((-1, 1), repeat=2)))
PLACES = (-1, -0.5, 0, 0.5, 1)
ALIGNMENTS = (WHOLE, *product((0.95, 0.9, 0.85), PLACES, PLACES))
"""Share of the side that a crop keeps, and where it lies: -1 at the left or top, 1 at the other."""
PROPOSED, REFINED, CHUNK = 16, 3, 128
CALIBRATION = 0.01
LEVEL = 0.1
"""Contrast below this share of the image's own is not amplified to the full."""


@dataclass(frozen=True)
class Nearest:
    """The nearest training image of each image.

    Attributes:
        row: Its row among the training images, `(N,)` int64.
        distance: 1 - correlation, in [0, 2], `(N,)`.
    """

    row: NDArray[np.int64]
    distance: NDArray[np.float64]


def thumbnails(images: Tensor) -> Tensor:
    """Reduce images `(B, 3, H, W)` in [0, 1] to grey ones, `(B, 1, 64, 64)`."""
    weights = torch.tensor([0.3, 0.6, 0.1], device=images.device).view(1, 3, 1, 1)
    grey = (images * weights).sum(dim=1, keepdim=True)
    return F.interpolate(grey, (STORED, STORED), mode="bilinear", antialias=True)


def nearest(
    queries: Tensor,
    references: Tensor,
    query_lesions: NDArray[np.int64] | None = None,
    reference_lesions: NDArray[np.int64] | None = None,
) -> Nearest:
    """Find the nearest reference of each query, those of the same lesion left out.

    Thumbnails of 8 x 8 propose references with their mirroring, those of 24 x 24 choose among them
    and align the last few as crops.

    Args:
        queries: Of `thumbnails`.
        references: Of `thumbnails`.
        query_lesions: Number of each query's lesion; None compares with all references.
        reference_lesions: The same for the references.
    """
    views = [_unit(_cropped(references, view, COARSE)) for view in PROPOSING]
    rows, distances = [], []
    for part in torch.arange(len(queries)).split(CHUNK):
        mirrored = _mirrored(queries[part].float())
        coarse = _unit(_cropped(mirrored.flatten(0, 1), WHOLE, COARSE)).view(4, len(part), -1)
        score = torch.stack([_best(m, views) for m in coarse], dim=1)
        if query_lesions is not None:
            assert reference_lesions is not None
            same = query_lesions[part.numpy()][:, None] == reference_lesions[None]
            score[torch.from_numpy(same)[:, None].expand_as(score)] = -torch.inf
        pairs = score.flatten(1).topk(min(PROPOSED, 4 * len(references)), dim=1)
        row, best = _refined(mirrored, references, pairs.indices, pairs.values.isinf())
        rows.append(row)
        distances.append(1 - best)
    return Nearest(torch.cat(rows).numpy(), torch.cat(distances).double().numpy())


def copy_threshold(real: Nearest) -> float:
    """Return the distance below which one in a hundred real test images lies (1st percentile)."""
    return float(np.quantile(real.distance, CALIBRATION))


def _refined(
    mirrored: Tensor, references: Tensor, pairs: Tensor, barred: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the best row and its correlation among proposals, `(B, P)` of mirror x reference."""
    fine = _unit(_cropped(mirrored.flatten(0, 1), WHOLE, FINE)).view(4, len(pairs), -1)
    for kept, views in ((REFINED, PROPOSING), (1, ALIGNMENTS)):
        mirror, row = pairs // len(references), pairs % len(references)
        queries = fine[mirror, torch.arange(len(pairs))[:, None]]
        candidates = references[row.flatten()]
        score = torch.full(pairs.shape, -torch.inf)
        for view in views:
            unit = _unit(_cropped(candidates, view, FINE)).view_as(queries)
            score = torch.maximum(score, (queries * unit).sum(dim=2))
        best = score.masked_fill(barred, -torch.inf).topk(min(kept, pairs.shape[1]), dim=1)
        pairs, barred = pairs.gather(1, best.indices), barred.gather(1, best.indices)
    return pairs[:, 0] % len(references), best.values[:, 0]


def _best(queries: Tensor, views: list[Tensor]) -> Tensor:
    return torch.stack([queries @ view.T for view in views]).amax(dim=0)


def _mirrored(images: Tensor) -> Tensor:
    return torch.stack([images, images.flip(3), images.flip(2), images.flip(2, 3)])


def _cropped(images: Tensor, view: tuple[float, float, float], side: int) -> Tensor:
    """Cut a crop out of `(B, 1, 64, 64)` and reduce it to `(B, 1, side, side)`."""
    crop, dx, dy = view
    return _crop_matrix(crop, dy, side) @ images.float() @ _crop_matrix(crop, dx, side).T


@cache
def _crop_matrix(crop: float, place: float, side: int) -> Tensor:
    """Return what cuts a crop out of one axis, bilinearly, and averages it down: `(side, 64)`."""
    grid = (torch.arange(STORED) * 2 + 1) / STORED - 1
    position = ((crop * grid + (1 - crop) * place + 1) * STORED - 1).clamp(0, 2 * STORED - 2) / 2
    taken = (1 - (position[:, None] - torch.arange(STORED)).abs()).clamp(min=0)
    return F.interpolate(taken.T[None], side, mode="area")[0].T


def _unit(small: Tensor) -> Tensor:
    """Take away what is smooth, level the contrast, and scale to unit length, flat.

    With its contrast as it is, a dark lesion on plain skin would look like any other.
    """
    side = small.shape[-1]
    band = small - _local_mean(small, side // 8)
    if side != COARSE:
        power = _local_mean(band**2, side // 8)
        band = band / (power + LEVEL * (band**2).mean((1, 2, 3), keepdim=True) + 1e-8).sqrt()
    return F.normalize(band.flatten(1), dim=1, eps=1e-6)


def _local_mean(images: Tensor, reach: int) -> Tensor:
    rows = _near(images.shape[-1], reach)
    return rows @ images @ rows.T


@cache
def _near(side: int, reach: int) -> Tensor:
    """Return what averages over the neighbours within `reach` on one axis, `(side, side)`."""
    place = torch.arange(side)
    near = ((place[:, None] - place).abs() <= reach).float()
    return near / near.sum(dim=1, keepdim=True)

"""Image files, and pairs of them, as eight-bit tensors."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rl4med_ddpo.datamodules.images import Resize, read_image, to_eight_bits


class ImageFiles(Dataset[Tensor]):
    """Image files as `(3, S, S)` uint8.

    Args:
        paths: The files.
        size: Side in pixels.
        resize: See `datamodules.images.read_image`.
    """

    def __init__(self, paths: Sequence[Path], size: int, resize: Resize = "squash") -> None:
        self.paths = list(paths)
        self.size = size
        self.resize: Resize = resize

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Tensor:
        return to_eight_bits(read_image(self.paths[row], self.size, self.resize))


class ImagePairs(Dataset[Tensor]):
    """Pairs of images of two sets, each pair `(2, 3, S, S)` uint8.

    Args:
        first: One set.
        second: The other.
        rows: A row of the first and one of the second for each pair.
    """

    def __init__(
        self, first: ImageFiles, second: ImageFiles, rows: Sequence[tuple[int, int]]
    ) -> None:
        self.first, self.second, self.rows = first, second, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Tensor:
        one, other = self.rows[row]
        return torch.stack([self.first[one], self.second[other]])

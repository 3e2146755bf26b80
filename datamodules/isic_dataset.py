"""The images of one split, with what they show and how a prompt words it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rl4med_ddpo.datamodules.augmentation import distort
from rl4med_ddpo.datamodules.decodable import require_decodable
from rl4med_ddpo.datamodules.image_copies import ResizedCopies
from rl4med_ddpo.datamodules.images import INPUT, Resize, find_images, read_image
from rl4med_ddpo.datamodules.latents import EVERY_FLIP, Flips, LatentCache
from rl4med_ddpo.datamodules.vocabulary import DERMOSCOPY, Vocabulary


class ISICDataset(Dataset[dict[str, Tensor | str | int]]):
    """Images of one split, as `image` `(3, S, S)`, `condition` `(A,)`, `prompt`, `id` and `draw`.

    Args:
        frame: Rows of the joined table, see `datamodules.annotations.Annotations`.
        root: The ISIC folder.
        size: Side of the images in pixels.
        resize: See `datamodules.images.read_image`.
        flip_seed: Flip at random, as (flip_seed, key) decides; by default not at all.
        images: Name of the images' folder in `root`.
        vocabulary: The attributes, and how a prompt words them.

    Attributes:
        latents: Where to read `latents` `(2C, h, w)` in place of `image`; None reads the images.
        copies: Where to read the images; None reads the files.
        distortion_seed: Distort at random, as (distortion_seed, key) decides; None does not.

    Raises:
        UserError: if an image is missing, or is no whole image file.
    """

    latents: LatentCache | None = None
    copies: ResizedCopies | None = None
    distortion_seed: int | None = None

    def __init__(
        self,
        frame: pd.DataFrame,
        root: Path,
        size: int,
        resize: Resize = "squash",
        flip_seed: int | None = None,
        images: str = INPUT,
        vocabulary: Vocabulary = DERMOSCOPY,
    ) -> None:
        self.paths = find_images(root, frame, images)
        require_decodable(self.paths)
        self.ids = frame["id"].tolist()
        self.conditions = torch.from_numpy(frame[list(vocabulary.attributes)].to_numpy(np.float32))
        self.vocabulary = vocabulary
        self.size = size
        self.resize: Resize = resize
        self.flip_seed = flip_seed

    def extend(self, other: "ISICDataset") -> None:
        """Append another dataset's images, to be read as this one's are."""
        self.paths = [*self.paths, *other.paths]
        self.ids = [*self.ids, *other.ids]
        self.conditions = torch.cat([self.conditions, other.conditions])

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[dict[str, Tensor | str | int]]:
        """Yield each image once; `__getitem__` alone, which takes any key, would never end."""
        return (self[row] for row in range(len(self)))

    def __getitem__(self, key: int) -> dict[str, Tensor | str | int]:
        """Read image `key % len(self)`; greater keys are further draws of it, flipped again."""
        row, flips = key % len(self), self.flips(key)
        if self.latents is None:
            shown = {"image": self.distort(self.image(row, flips), key)}
        else:
            shown = {"latents": self.latents.read(self.paths[row], flips)}
        return {
            **shown,
            "condition": self.conditions[row],
            "prompt": self.prompt(row),
            "id": self.ids[row],
            "draw": key // len(self),
        }

    def prompt(self, row: int) -> str:
        """Return the caption of an image."""
        return self.vocabulary.prompt_of(self.conditions[row])

    def image(self, row: int, flips: Flips) -> Tensor:
        """Read an image, `(3, S, S)` in [0, 1], and flip it."""
        path = self.paths[row]
        # added images have no copies: they are drawn at the size they are read at
        if self.copies is not None and self.copies.has(path):
            image = self.copies.read(path)
        else:
            image = read_image(path, self.size, self.resize)
        return image.flip([dim for dim, flip in zip((2, 1), flips, strict=True) if flip])

    def distort(self, image: Tensor, key: int) -> Tensor:
        """Distort the image as the draw `key` is distorted, if at all."""
        if self.distortion_seed is None:
            return image
        return distort(image, np.random.default_rng([self.distortion_seed, key, 1]))

    def flips(self, key: int) -> Flips:
        """Return how the draw `key` is flipped."""
        if self.flip_seed is None:
            return (False, False)
        left_right, up_down = np.random.default_rng([self.flip_seed, key]).random(2) < 0.5
        return (bool(left_right), bool(up_down))

    def variants(self) -> list[tuple[int, Flips]]:
        """List each image in each way in which it may be flipped."""
        flips = EVERY_FLIP[:1] if self.flip_seed is None else EVERY_FLIP
        return [(row, flip) for row in range(len(self)) for flip in flips]

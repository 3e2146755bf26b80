"""Fill the cache of latents before training: each image of a split, in each of its flips."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rl4med_ddpo.datamodules.isic import ISICDataset
from rl4med_ddpo.datamodules.latents import Flips, LatentCache
from rl4med_ddpo.foundation.progress import progress

Variant = tuple[Path, Flips, Tensor]


class MissingVariants(Dataset[Variant | None]):
    """Images of which the cache has no latent; None for those of which it has.

    Args:
        images: The split.
        cache: What is looked at, in the worker processes.
        rank: Takes every `world_size`-th variant from this one on.
        world_size: Number of processes that share the work.
    """

    def __init__(self, images: ISICDataset, cache: LatentCache, rank: int, world_size: int) -> None:
        self.images, self.cache = images, cache
        self.variants = images.variants()[rank::world_size]

    def __len__(self) -> int:
        return len(self.variants)

    def __getitem__(self, i: int) -> Variant | None:
        row, flips = self.variants[i]
        path = self.images.paths[row]
        return None if self.cache.has(path, flips) else (path, flips, self.images.image(row, flips))


def fill(
    missing: MissingVariants,
    encode: Callable[[Tensor], Tensor],
    num_workers: int,
) -> None:
    """Encode and keep what is missing; what an interrupted call has kept is not made again.

    Images are encoded one at a time: in a batch the last bits would depend on the images next
    to them, hence on the number of processes and on what was there before.

    Args:
        missing: What to encode.
        encode: Maps images `(B, 3, H, W)` in [0, 1] to their distributions, `(B, 2C, h, w)`.
        num_workers: Processes that read images.
    """
    for i, variant in enumerate(DataLoader(missing, batch_size=None, num_workers=num_workers)):
        if variant is not None:
            path, flips, image = variant
            missing.cache.write(path, tuple(flips), encode(image[None])[0])
        progress.report("encoding images", i + 1, len(missing))

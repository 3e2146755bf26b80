"""Run image files through networks: the same values for any number of processes and workers."""

from collections.abc import Callable, Sequence
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.images import Resize, read_image
from lightning_modules.samples import filled_rows, to_eight_bits

CHUNK = 32
"""Images in a pass. Kernels round by the size of their batch, so it is not for anyone to choose."""


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


@torch.no_grad()
def extract(
    images: ImageFiles | ImagePairs,
    networks: Sequence[Callable[[Tensor], Tensor]],
    trainer: L.Trainer,
    num_workers: int = 0,
) -> list[Tensor]:
    """Return what each network makes of all images, `(N, ...)` each, the same on every process.

    Chunks of `CHUNK` images are dealt out to the processes, the last one filled up, so that no
    value depends on how many processes there are.

    Args:
        images: N of them, at least one.
        networks: Called with `(CHUNK, ...)` uint8 on the strategy's device.
        trainer: Whose processes share the work.
        num_workers: Processes that read images.
    """
    device = trainer.strategy.root_device
    chunks = torch.arange(len(images)).split(CHUNK)
    mine = [chunk.tolist() for chunk in chunks[trainer.global_rank :: trainer.world_size]]
    # a process without a chunk of its own learns the shapes from the first, and keeps nothing of it
    todo = mine or [chunks[0].tolist()]
    loader = DataLoader(images, batch_sampler=todo, num_workers=num_workers)
    found: list[Tensor] = []
    for rows, batch in zip(todo, loader, strict=True):
        filled = batch[filled_rows(len(batch), CHUNK)].to(device)
        values = [network(filled)[: len(rows)] for network in networks]
        found = found or [v.new_zeros(len(images), *v.shape[1:]) for v in values]
        for kept, computed in zip(found, values if mine else [], strict=bool(mine)):
            kept[rows] = computed
    if trainer.world_size > 1:
        # each value is one process's own and zero on the others: the sum is exact
        found = [trainer.strategy.reduce(values, reduce_op="sum") for values in found]
    return [values.cpu() for values in found]

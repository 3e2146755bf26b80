"""Run image files through networks: the same values for any number of processes and workers."""

from collections.abc import Callable, Sequence

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rl4med_ddpo.datamodules.image_files import ImageFiles, ImagePairs
from rl4med_ddpo.lightning_modules.samples import filled_rows

CHUNK = 32
"""Images in a pass. Kernels round by the size of their batch, so it is not for anyone to choose."""


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

"""The order in which training draws its images, decided by seed and epoch alone."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from rl4med_ddpo.datamodules.isic_dataset import ISICDataset


def inverse_frequency(conditions: NDArray[np.float32]) -> NDArray[np.float64]:
    """Weigh each image by the inverse frequency of its rarest attribute.

    To have none counts as an attribute of its own, so that images without any are drawn, too.

    Args:
        conditions: Multi-hot, `(N, A)`.

    Returns:
        `(N,)`, sum 1.
    """
    none = conditions.max(1, keepdims=True) == 0
    groups = np.concatenate([conditions, none], axis=1)
    counts = groups.sum(0).clip(min=1)
    weights = (groups / counts).max(1).astype(np.float64)
    return weights / weights.sum()


class EpochSampler(DistributedSampler[int]):
    """Draw as many images as the split has, again in each epoch, and give each process its share.

    One epoch's draws are a function of (seed, epoch): a resumed run sees the order that the
    uninterrupted run would have seen, and N processes with batches of B see together, step by step,
    what one process with batches of N x B sees. (Lightning's own wrapper shuffles once more, and
    so loses the second property.)

    `skipped` draws of the epoch are left out from its start: those that a run which was interrupted
    within it has trained on.

    A key that the sampler yields says which draw of the run it is, and of which image:
    `draw * N + image` for N images. So worker processes need to know no epoch.

    Args:
        dataset: Of N images.
        seed: Not negative.
        weights: Probability of each image, `(N,)`, to draw with replacement; each image once by
            default.
        num_replicas: Number of processes.
        rank: Index of this process.
    """

    dataset: ISICDataset

    def __init__(
        self,
        dataset: ISICDataset,
        seed: int,
        weights: NDArray[np.float64] | None = None,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, seed=seed)
        self.weights = weights
        self.skipped = 0

    def __iter__(self) -> Iterator[int]:
        n = len(self.dataset)
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(n) if self.weights is None else rng.choice(n, n, p=self.weights)
        first = self.epoch * self.total_size
        return iter(
            [
                (first + place) * n + int(order[place % n])
                for place in range(self.rank, self.total_size, self.num_replicas)
            ][self.skipped :]
        )


class EvaluationSampler(DistributedSampler[int]):
    """Deal the images out to the processes in their order, each process as many as every other.

    A key is the image's number, or that of an image repeated to make the shares even plus N:
    another draw of it, which `counted` leaves out. So scores do not depend on the number of
    processes, and no process waits for one that has fewer batches.

    Args:
        dataset: Of N images.
        num_replicas: Number of processes.
        rank: Index of this process.
    """

    def __init__(self, dataset: ISICDataset, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=False)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.total_size, self.num_replicas))


def counted(batch: dict[str, Any]) -> Tensor:
    """Tell which images of an evaluation's batch count, `(B,)` bool: all but the repeated ones."""
    rows = len(next(iter(batch.values())))
    return batch.get("draw", torch.zeros(rows, dtype=torch.int64)) == 0


class TrainLoader(DataLoader[dict[str, Tensor | str | int]]):
    """Gives the batches of an epoch that are not trained yet.

    Nothing is read before the first of them is asked for: Lightning makes an iterator before it
    knows where a resumed run continues.

    Args:
        sampler: Of this process.
        trained: Returns how many batches of the epoch are trained.
        **options: Of `DataLoader`.
    """

    sampler: EpochSampler
    batch_size: int

    def __init__(self, sampler: EpochSampler, trained: Callable[[], int], **options: Any) -> None:
        super().__init__(sampler.dataset, sampler=sampler, **options)
        self.trained = trained

    def __iter__(self) -> Iterator[dict[str, Tensor | list[str]]]:
        self.sampler.skipped = self.trained() * self.batch_size
        yield from super().__iter__()

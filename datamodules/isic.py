"""The ISIC 2019 melanomas and nevi with their artifacts, as batches of images and prompts."""

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from rl4med_ddpo.datamodules.annotations import Annotations, read_annotations
from rl4med_ddpo.datamodules.decodable import require_decodable
from rl4med_ddpo.datamodules.describe import describe
from rl4med_ddpo.datamodules.extra_images import ExtraImages, extra_rows
from rl4med_ddpo.datamodules.image_copies import ResizedCopies
from rl4med_ddpo.datamodules.images import INPUT, Resize, find_images
from rl4med_ddpo.datamodules.isic_dataset import ISICDataset
from rl4med_ddpo.datamodules.sampling import (
    EpochSampler,
    EvaluationSampler,
    TrainLoader,
    inverse_frequency,
)
from rl4med_ddpo.datamodules.splits import Splits, make_splits
from rl4med_ddpo.datamodules.vocabulary import DERMOSCOPY, Vocabulary
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.hashes import key_of
from rl4med_ddpo.foundation.trainer import Trainer

Item = dict[str, Tensor | str | int]


class ISICDataModule(LightningDataModule):
    """ISIC 2019: melanomas and nevi with hair, gel bubbles, rulers and ink.

    Args:
        root: Folder with ISIC_2019_Training_GroundTruth.csv, ISIC_2019_Training_Metadata.csv and
            the images' folder ISIC_2019_Training_Input.
        artifacts_csv: Table of hair, gel_bubble, ruler and ink for each image, as probabilities
            or as 0 and 1. By default isic_inferred_wocarcinoma.csv, else isic_bias.csv, in root or
            in root/annotations.
        table: One table in place of ISIC's, for other data: the columns image, group (images that
            must stay together, such as a patient's; may be empty) and every attribute, as 0 and 1
            or as probabilities.
        images: Name of the images' folder in root.
        threshold: An artifact is present if its value is greater than this, in [0, 1). Paper: 0.9.
        vocabulary: The attributes of the images, and how prompts word them. Classifiers take it
            from here.
        split: `paper` (the authors' split; half of its test images share a lesion with train),
            `lesion` (the same fractions, no lesion in two splits), or a folder with one
            *train*.csv, one *val*.csv and one *test*.csv, of which the column `image` is used.
        split_seed: Seed of `paper` and `lesion`. Paper: 42.
        size: Side of the square images in pixels. Paper: 512.
        resize: `squash` the whole image to the square, or `crop` its central square first (which
            loses rulers and ink at the edges).
        copies: Folder for copies of the images at this size, made once before training and read in
            their place: for classifiers, which read faster than photographs are decoded. null
            decodes in every epoch.
        batch_size: Images per batch and process.
        num_workers: Processes that read images, for each process that trains.
        augment: Flip training images at random, left-right and up-down.
        distort: Blur, tint and grain training images at random, too, so that a classifier also
            reads what is a little off: another camera's images, or a decoder's.
        sampler: `shuffle` draws each training image once per epoch; `balanced` draws with
            replacement, an image as often as its rarest attribute is rare (to have none of them
            counts as one).
        extra: Images to add to the training split (Table 4); null for none.
        seed: Of the order, flips and distortions of the training images, with the epoch.
    """

    # narrower than Lightning declares it
    trainer: Trainer | None

    def __init__(
        self,
        root: str | None,
        artifacts_csv: str | None = None,
        table: str | None = None,
        images: str = INPUT,
        threshold: float = 0.9,
        vocabulary: Vocabulary = DERMOSCOPY,
        split: str = "paper",
        split_seed: int = 42,
        size: int = 512,
        resize: Resize = "squash",
        copies: str | None = None,
        batch_size: int = 32,
        num_workers: int = 4,
        augment: bool = True,
        distort: bool = False,
        sampler: Literal["shuffle", "balanced"] = "shuffle",
        extra: ExtraImages | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        limits = {"size": 1, "batch_size": 1, "num_workers": 0, "seed": 0, "split_seed": 0}
        given = dict(zip(limits, (size, batch_size, num_workers, seed, split_seed), strict=True))
        wrong = [f"{name}={given[name]}" for name in limits if given[name] < limits[name]]
        if wrong or not 0 <= threshold < 1:
            raise UserError(
                f"out of range: {', '.join(wrong) or f'threshold={threshold}'}. Allowed: "
                + ", ".join(f"{name} >= {least}" for name, least in limits.items())
                + ", threshold in [0, 1)."
            )
        self.root = None if root is None else Path(root)
        self.artifacts_csv = None if artifacts_csv is None else Path(artifacts_csv)
        self.table = None if table is None else Path(table)
        self.images = images
        self.threshold = threshold
        self.vocabulary = vocabulary
        self.split = split
        self.split_seed = split_seed
        self.size = size
        self.resize: Resize = resize
        self.copies = None if copies is None else ResizedCopies(Path(copies), size, resize)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.augment = augment
        self.distort = distort
        self.sampler = sampler
        self.extra = extra
        self.seed = seed

    @property
    def folder(self) -> Path:
        """The ISIC folder, or an error if none was given."""
        if self.root is None:
            raise UserError(f"{type(self).__name__} needs root here: the folder of ISIC 2019.")
        return self.root

    @cached_property
    def annotations(self) -> Annotations:
        """The joined table."""
        return read_annotations(
            self.folder, self.artifacts_csv, self.threshold, self.table, self.vocabulary
        )

    @cached_property
    def splits(self) -> Splits:
        """The rows of the joined table in each split."""
        return make_splits(self.annotations.frame, self.split, self.split_seed)

    def dataset(self, name: Literal["train", "val", "test"], flip: bool = False) -> ISICDataset:
        """Return the images of a split, in the split's order; flipped at random if asked for."""
        rows = getattr(self.splits, name)
        seed = self.seed if flip else None
        made = ISICDataset(
            rows, self.folder, self.size, self.resize, seed, self.images, self.vocabulary
        )
        made.copies = self.copies
        return made

    def paths(self, rows: pd.DataFrame) -> list[Path]:
        """Find the image files of some rows of the joined table."""
        return find_images(self.folder, rows, self.images)

    @property
    def prompts(self) -> Sequence[str]:
        """All that the images may be asked for with."""
        return self.vocabulary.prompts

    def contents(self) -> dict[str, str]:
        """Name by their content the tables that decide a training: ids, labels and splits.

        Returns:
            `tables`, and `extra` where images are added: the number of images and a digest, which
            a resume compares.
        """
        named = {"tables": [self.splits.train, self.splits.val]}
        if self.extra is not None:
            named["extra"] = [self._extra_rows()[1]]
        return {name: self._digest(frames) for name, frames in named.items()}

    def _digest(self, frames: Sequence[pd.DataFrame]) -> str:
        columns = ["id", *self.vocabulary.attributes]
        texts = [frame[columns].to_csv(index=False) for frame in frames]
        counts = " + ".join(f"{len(frame):,}" for frame in frames)
        return f"{counts} images, digest {key_of(*texts)[:12]}"

    def describe(self) -> str:
        """Say what the tables hold: the paper's counts, subgroups, leaks. No image is read."""
        seeded = self.split in ("paper", "lesion")
        split = f"{self.split} (seed {self.split_seed})" if seeded else self.split
        rule = f"> {self.threshold}"
        return describe(self.annotations, self.splits, rule, split, self.vocabulary)

    def prepare_data(self) -> None:
        """Make the copies of all splits' images that are not there yet; one process a machine."""
        if self.copies is None:
            return
        paths = self.paths(pd.concat(self.splits))
        require_decodable(paths)
        # a bar on a terminal, one line in a log
        bar = partial(tqdm, desc=f"copying images to {self.copies.folder.root}", disable=None)
        made = self.copies.make(paths, self.num_workers, lambda work, n: bar(work, total=n))
        rank_zero_info(
            f"{len(paths):,} copies in {self.copies.folder.root}, {made:,} of them made now"
        )

    def setup(self, stage: str) -> None:
        """Read the tables and find the images that the stage needs."""
        if stage == "fit":
            self.train_set = self.dataset("train", flip=self.augment)
            self.train_set.distortion_seed = self.seed if self.distort else None
            if self.extra is not None:
                root, rows = self._extra_rows()
                images = self.images if root == self.folder else INPUT
                self.train_set.extend(
                    ISICDataset(rows, root, self.size, images=images, vocabulary=self.vocabulary)
                )
        if stage in ("fit", "validate"):
            self.val_set = self.dataset("val")
        if stage in ("test", "predict"):
            self.test_set = self.dataset("test")

    def _extra_rows(self) -> tuple[Path, pd.DataFrame]:
        assert self.extra is not None
        return extra_rows(self.extra, self.splits.train, self.folder, self.seed, self.vocabulary)

    def train_dataloader(self) -> DataLoader[Item]:
        """Draw the training images as (seed, epoch) decides; each process gets its share."""
        weights = None
        if self.sampler == "balanced":
            weights = inverse_frequency(self.train_set.conditions.numpy())
        if self.trainer is None:
            sampler = EpochSampler(self.train_set, self.seed, weights)
            return DataLoader(self.train_set, sampler=sampler, **self._options())
        if self.trainer.overfit_batches:
            # the same batches in every epoch, and no others
            return DataLoader(self.train_set, **self._options())
        world_size, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = EpochSampler(self.train_set, self.seed, weights, world_size, rank)
        return TrainLoader(sampler, self._trained_batches, **self._options())

    def _trained_batches(self) -> int:
        """Count the batches of this epoch that a run interrupted within it has trained on."""
        assert self.trainer is not None
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def val_dataloader(self) -> DataLoader[Item]:
        """Give the validation images in order."""
        return self._evaluated(self.val_set)

    def test_dataloader(self) -> DataLoader[Item]:
        """Give the test images in order."""
        return self._evaluated(self.test_set)

    def predict_dataloader(self) -> DataLoader[Item]:
        """Give the test images in order."""
        return self._evaluated(self.test_set)

    def _evaluated(self, dataset: ISICDataset) -> DataLoader[Item]:
        world_size, rank = 1, 0
        if self.trainer is not None:
            world_size, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = EvaluationSampler(dataset, world_size, rank)
        return DataLoader(dataset, sampler=sampler, **self._options())

    def _options(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": self.num_workers > 0,
        }

"""Images added to the training split: generated ones, or real ones once more."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rl4med_ddpo.datamodules.annotations import read_annotations
from rl4med_ddpo.datamodules.vocabulary import Vocabulary
from rl4med_ddpo.foundation.errors import UserError, name_few

REAL = "train"


@dataclass(frozen=True)
class ExtraImages:
    """What to add to the training split; validation and test stay real.

    Args:
        source: Folder of samples that `rl4med-ddpo predict` wrote, labelled by their prompts; or
            `train` for real training images drawn again (oversampling).
        per_subgroup: Images to add for each of the 32 combinations of a disease and artifacts.
    """

    source: str
    per_subgroup: int

    def __post_init__(self) -> None:
        if self.per_subgroup < 1:
            raise UserError(f"extra.per_subgroup must be at least 1, it is {self.per_subgroup}.")


def extra_rows(
    extra: ExtraImages, train: pd.DataFrame, root: Path, seed: int, vocabulary: Vocabulary
) -> tuple[Path, pd.DataFrame]:
    """Choose the images to add, 32 times `per_subgroup` of them whatever the source.

    Of generated images the first of each subgroup are taken. Of real ones some are drawn again,
    each of a subgroup once before any twice; what a subgroup without real images leaves open is
    spread over the others, so that the totals of all sources agree.

    Args:
        extra: What to add.
        train: Rows of the training split.
        root: Its ISIC folder.
        seed: Of the choice among real images.
        vocabulary: Its conditions are the subgroups.

    Returns:
        The folder that holds the images, and their rows.

    Raises:
        UserError: if the folder has too few images of a subgroup.
    """
    if extra.source == REAL:
        return root, _oversampled(train, extra.per_subgroup, seed, vocabulary)
    folder = Path(extra.source)
    frame = read_annotations(folder, vocabulary=vocabulary).frame
    rows = _by_subgroup(frame, vocabulary)
    few = [
        f"{name} ({len(found)})"
        for name, found in zip(vocabulary.names, rows, strict=True)
        if len(found) < extra.per_subgroup
    ]
    if few:
        raise UserError(
            f"{folder} has fewer than {extra.per_subgroup} images of {len(few)} subgroup(s): "
            f"{name_few(few)}.\n  Lower extra.per_subgroup, or draw more: rl4med-ddpo predict "
            "--data.test_samples_per_prompt N"
        )
    chosen = np.concatenate([found[: extra.per_subgroup] for found in rows])
    return folder, frame.iloc[chosen].reset_index(drop=True)


def _by_subgroup(frame: pd.DataFrame, vocabulary: Vocabulary) -> list[NDArray[np.intp]]:
    keys = list(frame[list(vocabulary.attributes)].astype(int).itertuples(index=False, name=None))
    return [np.flatnonzero([key == wanted for key in keys]) for wanted in vocabulary.keys]


def _oversampled(
    train: pd.DataFrame, per_subgroup: int, seed: int, vocabulary: Vocabulary
) -> pd.DataFrame:
    rows = _by_subgroup(train, vocabulary)
    there = [found for found in rows if len(found)]
    wanted = np.full(len(there), per_subgroup)
    open_places = len(vocabulary.keys) * per_subgroup - wanted.sum()
    wanted += open_places // len(there)
    wanted[: open_places % len(there)] += 1
    rng = np.random.default_rng(seed)
    chosen = [
        np.concatenate([rng.permutation(found) for _ in range(-(-n // len(found)))])[:n]
        for found, n in zip(there, wanted, strict=True)
    ]
    return train.iloc[np.concatenate(chosen)].reset_index(drop=True)

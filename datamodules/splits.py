"""Split the images into train, validation and test: the paper's way, by lesion, or as given."""

from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from rl4med_ddpo.datamodules.tables import read_table
from rl4med_ddpo.foundation.errors import UserError, name_few

HELD_OUT = 0.15
"""Share of the images that are test, and share of the remaining ones that are validation."""


class Splits(NamedTuple):
    """The rows of the joined table in each split, in the split's own order."""

    train: pd.DataFrame
    val: pd.DataFrame
    test: pd.DataFrame


def make_splits(frame: pd.DataFrame, split: str, seed: int = 42) -> Splits:
    """Split the joined table.

    Args:
        frame: Sorted by `id`, see `Annotations`.
        split: `paper`, `lesion`, or a folder of split files.
        seed: Seed of `paper` and `lesion`. With 42 `paper` gives the paper's split.

    Raises:
        UserError: if there is no such way to split, if a split file is malformed, or if a split
            would be empty.
    """
    if split == "paper":
        splits = paper_split(frame, seed)
    elif split == "lesion":
        splits = lesion_split(frame, seed)
    else:
        splits = given_split(frame, Path(split))
    empty = [name for name, rows in splits._asdict().items() if rows.empty]
    if empty:
        raise UserError(
            f"split {split!r} of {len(frame):,} images leaves {' and '.join(empty)} empty.\n"
            "  Give more images, or a folder of split files (*train*.csv, *val*.csv, *test*.csv)."
        )
    return splits


def paper_split(frame: pd.DataFrame, seed: int = 42) -> Splits:
    """Permute the images sorted by id: 15 % test, then 15 % of the rest, permuted again, val.

    Images of one lesion may fall into different splits: half of the paper's test images do.
    """
    rest, test = _hold_out(frame, seed)
    train, val = _hold_out(rest, seed)
    return Splits(train, val, test)


def lesion_split(frame: pd.DataFrame, seed: int = 42) -> Splits:
    """Split into the paper's fractions so that all images of a lesion are in the same split.

    An image without `lesion_id` counts as a lesion of its own.
    """
    lesions = frame["lesion_id"].where(frame["lesion_id"] != "", frame["id"])
    groups = [rows.to_numpy() for rows in lesions.groupby(lesions).groups.values()]
    n_test = ceil(HELD_OUT * len(frame))
    room = {"test": n_test, "val": ceil(HELD_OUT * (len(frame) - n_test)), "train": len(frame)}
    rows: dict[str, list[int]] = {name: [] for name in room}
    for i in np.random.RandomState(seed).permutation(len(groups)):
        name = next(name for name, places in room.items() if len(groups[i]) <= places)
        room[name] -= len(groups[i])
        rows[name].extend(groups[i])
    return Splits(*(frame.loc[rows[name]].reset_index(drop=True) for name in Splits._fields))


def given_split(frame: pd.DataFrame, folder: Path) -> Splits:
    """Take the ids of `*train*.csv`, `*val*.csv` and `*test*.csv`, in the files' order.

    Raises:
        UserError: if a file is missing or malformed, or if an id is unknown or in two splits.
    """
    if not folder.is_dir():
        raise UserError(
            f"split is 'paper', 'lesion' or a folder of split files; there is no folder {folder}."
        )
    files = {name: _split_file(folder, name) for name in Splits._fields}
    ids = {name: read_table(path)["id"] for name, path in files.items()}
    _check_apart(files, ids)
    by_id = frame.set_index("id", drop=False)
    for name, path in files.items():
        unknown = ids[name][~ids[name].isin(by_id.index)]
        if len(unknown):
            raise UserError(
                f"{path}: {len(unknown):,} of {len(ids[name]):,} image(s) are not among the "
                f"{len(frame):,} melanomas and nevi of the tables\n  that have an artifact row: "
                f"{name_few(unknown)}.\n  Remove these lines, or take the tables that the split "
                "was made of."
            )
    return Splits(*(by_id.loc[ids[name]].reset_index(drop=True) for name in Splits._fields))


def _hold_out(frame: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    order = np.random.RandomState(seed).permutation(len(frame))
    n = ceil(HELD_OUT * len(frame))
    kept, held_out = frame.iloc[order[n:]], frame.iloc[order[:n]]
    return kept.reset_index(drop=True), held_out.reset_index(drop=True)


def _split_file(folder: Path, name: str) -> Path:
    # macOS puts a file ._NAME beside each one on foreign file systems
    found = sorted(p for p in folder.glob(f"*{name}*.csv") if not p.name.startswith("."))
    if len(found) != 1:
        what = f"{len(found)} files" if found else "no file"
        raise UserError(
            f"{folder} holds {what} *{name}*.csv{': ' if found else ''}"
            f"{name_few(path.name for path in found)}.\n"
            "  A folder of splits holds one *train*.csv, one *val*.csv and one *test*.csv."
        )
    return found[0]


def _check_apart(files: dict[str, Path], ids: dict[str, pd.Series]) -> None:
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        both = ids[one][ids[one].isin(ids[other])]
        if len(both):
            raise UserError(
                f"{len(both):,} image(s) are in two splits, {files[one]} and {files[other]}: "
                f"{name_few(both)}.\n  Remove them from one of the two."
            )

"""What real images a number rests on: tables, rule, split and a hash of all of it."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from rl4med_ddpo.datamodules.describe import real_samples, subgroups, table_1
from rl4med_ddpo.datamodules.isic import ISICDataModule
from rl4med_ddpo.datamodules.vocabulary import DERMOSCOPY
from rl4med_ddpo.foundation.files import write_whole

ORIGIN = "origin.json"
"""File in a folder of images that says what they are."""
OFFICIAL = {"HAM", "BCN", "MSK"}
"""Sources of ISIC 2019, as its lesions' ids name them."""


class Origin(NamedTuple):
    """What images are, and under which licence; empty where nobody has said so."""

    data: str = ""
    licence: str = ""


def write_origin(folder: Path, origin: Origin) -> None:
    """Say in a folder what its images are."""
    write_whole(folder / ORIGIN, json.dumps(origin._asdict(), indent=2) + "\n")


def origin_of(data: ISICDataModule) -> Origin:
    """Return what a folder, its tables or the configuration's vocabulary say of the images.

    The default vocabulary says ISIC 2019; that is taken only where the lesions' ids do too.
    """
    file = data.folder / ORIGIN
    if file.is_file():
        return Origin(**json.loads(file.read_text()))
    stated = Origin(data.vocabulary.data, data.vocabulary.licence)
    if stated.data != DERMOSCOPY.data:
        return stated
    sources = set(data.splits.train["source"]) - {""}
    return stated if sources and sources <= OFFICIAL else Origin()


def data_provenance(data: ISICDataModule) -> dict[str, Any]:
    """Say which images, labels and splits these are; the hash tells whether two are the same."""
    return {
        "root": str(data.folder),
        "artifacts_csv": str(data.annotations.artifacts_csv),
        "threshold": data.threshold,
        "split": data.split,
        "split_seed": data.split_seed,
        "resize": data.resize,
        "images_folder": data.images,
        "images": {name: len(rows) for name, rows in data.splits._asdict().items()},
        "sha256": split_hash(data),
    }


def split_hash(data: ISICDataModule) -> str:
    """Hash ids, labels and splits, in whatever order and folder they lie."""
    hashed = hashlib.sha256()
    for name, rows in data.splits._asdict().items():
        ordered = rows.sort_values("id")[["id", *data.vocabulary.attributes]]
        hashed.update(f"{name}\n{ordered.to_csv(index=False, header=False)}".encode())
    return hashed.hexdigest()


def data_counts(data: ISICDataModule) -> dict[str, Any]:
    """Count what Tables 1 and 2 count, and the 32 subgroups."""
    return {
        "table_1": table_1(data.splits, data.vocabulary).T.to_dict(),
        "real_samples": real_samples(data.splits.train, data.vocabulary).T.to_dict(),
        "subgroups": subgroups(data.splits, data.vocabulary).to_dict("list"),
    }

"""What real images a number rests on: tables, rule, split and a hash of all of it."""

import hashlib
from typing import Any

from rl4med_ddpo.datamodules.describe import real_samples, subgroups, table_1
from rl4med_ddpo.datamodules.isic import ISICDataModule


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

"""Leaks between splits: shared lesions, near-duplicates under another id, generated images."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from rl4med_ddpo.datamodules.images import read_image
from rl4med_ddpo.datamodules.splits import Splits
from rl4med_ddpo.foundation.errors import UserError, name_few
from rl4med_ddpo.metrics.copies import nearest, thumbnails

GENERATED = "sample"
"""Key of the text that `callbacks.sample_png` writes into each generated image."""
DUPLICATE = 0.1
SIDE = 64


@dataclass(frozen=True)
class Leak:
    """Two images, or one, that spoil a comparison.

    Attributes:
        kind: `lesion`, `duplicate` or `generated`.
        held_out: Id of the validation or test image.
        split: Which of the two it is in.
        train: Id of the training image; empty for a generated image.
        distance: Of a duplicate, see `metrics.copies`; NaN otherwise.
    """

    kind: str
    held_out: str
    split: str
    train: str
    distance: float

    def __str__(self) -> str:
        distance = "" if np.isnan(self.distance) else f"  distance {self.distance:.3f}"
        return f"{self.kind:9}  {self.held_out} ({self.split})  {self.train}{distance}"


def find_leaks(splits: Splits, paths: dict[str, list[Path]]) -> list[Leak]:
    """Look at every image of every split.

    Args:
        splits: The splits.
        paths: The images of each split, in its order.

    Returns:
        Each pair of a held-out image with a training image of its lesion; the nearest training
        image of each held-out image that looks the same though its lesion is another or unknown;
        each held-out image that was generated.
    """
    thumbs = {name: _thumbnails(some) for name, some in paths.items()}
    found = []
    for name in ("val", "test"):
        rows, train = getattr(splits, name), splits.train
        found += _shared_lesions(rows, train, name)
        near = nearest(thumbs[name], thumbs["train"])
        shared = {(leak.held_out, leak.train) for leak in found}
        for i in np.flatnonzero(near.distance < DUPLICATE):
            pair = (rows["id"].iloc[i], train["id"].iloc[near.row[i]])
            if pair not in shared:
                found.append(Leak("duplicate", pair[0], name, pair[1], float(near.distance[i])))
        found += [
            Leak("generated", image, name, "", float("nan"))
            for image, path in zip(rows["id"], paths[name], strict=True)
            if _is_generated(path)
        ]
    return found


def require_no_leaks(leaks: list[Leak]) -> None:
    """Refuse splits that leak.

    Raises:
        UserError: naming how many there are of each kind, and some of them.
    """
    if not leaks:
        return
    kinds = pd.Series([leak.kind for leak in leaks]).value_counts()
    shown = [f"{leak.held_out} ({leak.split}) {leak.train}".strip() for leak in leaks]
    raise UserError(
        f"the splits leak: {', '.join(f'{n:,} by {kind}' for kind, n in kinds.items())}.\n"
        f"  Such as {name_few(shown)}\n"
        "  data.split=lesion keeps each lesion in one split; duplicates and generated images have\n"
        "  to be left out of the split files."
    )


def _shared_lesions(rows: pd.DataFrame, train: pd.DataFrame, name: str) -> list[Leak]:
    known = rows[rows["lesion_id"] != ""][["id", "lesion_id"]]
    pairs = known.merge(train[["id", "lesion_id"]], on="lesion_id", suffixes=("", "_train"))
    return [
        Leak("lesion", one, name, other, float("nan"))
        for one, other in zip(pairs["id"], pairs["id_train"], strict=True)
    ]


def _is_generated(path: Path) -> bool:
    if path.suffix.lower() != ".png":
        return False
    with Image.open(path) as image:
        return GENERATED in image.info


def _thumbnails(paths: list[Path]) -> torch.Tensor:
    return torch.cat([thumbnails(read_image(path, SIDE)[None]) for path in paths])

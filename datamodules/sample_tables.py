"""The tables next to drawn samples: ISIC's own three, and a manifest with all that is known."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from rl4med_ddpo.datamodules.annotations import GROUND_TRUTH, METADATA
from rl4med_ddpo.datamodules.dermoscopy import CLASSES
from rl4med_ddpo.datamodules.vocabulary import Vocabulary
from rl4med_ddpo.foundation.files import write_whole

MANIFEST = "manifest.csv"
ARTIFACT_FILE = "isic_bias.csv"
UNKNOWN = ("age_approx", "anatom_site_general", "lesion_id", "sex")

Row = dict[str, Any]


def write_tables(root: Path, rows: Sequence[Row], vocabulary: Vocabulary) -> None:
    """Write the tables of some samples, so that `ISICDataModule` reads the folder.

    The label of a sample is what its prompt asked for. The ground truth comes last: a folder that
    has one is complete.

    Args:
        root: The ISIC folder.
        rows: One for each sample: `id`, the attributes (0, 1), and what else the manifest is to
            hold.
        vocabulary: The attributes.
    """
    table = pd.DataFrame(rows)
    images = table[["id"]].rename(columns={"id": "image"})
    write_whole(root / MANIFEST, table.to_csv(index=False, lineterminator="\n"))
    artifacts = images.assign(
        image=images["image"] + ".png", **{a: table[a] for a in vocabulary.any_of}
    )
    write_whole(root / ARTIFACT_FILE, artifacts.to_csv(sep=";", index=False, lineterminator="\n"))
    metadata = images.assign(**dict.fromkeys(UNKNOWN, ""))
    write_whole(root / METADATA, metadata.to_csv(index=False, lineterminator="\r\n"))
    diseases = {c: table[c].astype(float) if c in vocabulary.attributes else 0.0 for c in CLASSES}
    truth = images.assign(**diseases).to_csv(index=False, lineterminator="\r\n")
    write_whole(root / GROUND_TRUTH, truth)

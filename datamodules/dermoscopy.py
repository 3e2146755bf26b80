"""Write a folder of drawn dermoscopic images in the layout and with the tables of ISIC 2019.

    python -m rl4med_ddpo.datamodules.dermoscopy --root data/dermoscopy --images 3000

The tables have the form of the official ones down to line endings and suffixed ids, so that
whatever reads ISIC 2019 reads them. Every image is a function of (seed, number): the same arguments
write the same bytes, whatever the number of processes.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from jsonargparse import ArgumentParser
from numpy.random import Generator
from PIL import Image
from tqdm import tqdm

from rl4med_ddpo.datamodules.annotations import ARTIFACT_FILES, GROUND_TRUTH, METADATA
from rl4med_ddpo.datamodules.drawing import draw
from rl4med_ddpo.datamodules.images import INPUT
from rl4med_ddpo.datamodules.provenance import Origin, write_origin
from rl4med_ddpo.datamodules.tables import DOWNSAMPLED
from rl4med_ddpo.datamodules.vocabulary import DERMOSCOPY
from rl4med_ddpo.foundation.errors import UserError

ARTIFACTS, ATTRIBUTES = DERMOSCOPY.any_of, DERMOSCOPY.attributes
CLASSES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")
OTHER_ARTIFACTS = ("dark_corner", "gel_border", "patches", "vasc")
SITES = ("anterior torso", "upper extremity", "posterior torso", "lower extremity", "head/neck")
PREVALENCE = {"hair": 0.38, "gel_bubble": 0.11, "ruler": 0.14, "ink": 0.04, "MEL": 0.25}
"""As in ISIC 2019, but for ink: at its 1.7% a folder of a few thousand images hardly has any."""
SECOND_IMAGE, SUFFIXED, BLANK = 0.25, 0.08, 0.08
CHUNK = 64

Progress = Callable[[Iterable[None], int], Iterable[None]]


@dataclass(frozen=True)
class DermoscopyFolder:
    """A folder of drawn dermoscopic images in the layout of ISIC 2019.

    Args:
        root: Folder to write; it must not hold such tables yet.
        images: How many.
        seed: Decides every image and every table entry.
        size: Side of the images in pixels.
        label_recall: Share of the artifacts present in the images that the artifact table tells
            of, in [0, 1]. ISIC's own are labelled by a network that misses some. An artifact that
            is absent is never labelled.
        combinations: long_tail draws each attribute with about its prevalence in ISIC 2019;
            balanced takes the 32 combinations in turns.
        workers: Processes that draw; 0 draws in this one.
    """

    root: Path
    images: int
    seed: int = 0
    size: int = 64
    label_recall: float = 0.7
    combinations: Literal["long_tail", "balanced"] = "long_tail"
    workers: int = 0

    def __post_init__(self) -> None:
        if self.images < 1 or self.size < 8 or self.seed < 0 or not 0 <= self.label_recall <= 1:
            raise UserError(
                f"out of range: images={self.images}, size={self.size}, seed={self.seed} or "
                f"label_recall={self.label_recall}. Allowed: images >= 1, size >= 8, seed >= 0, "
                "label_recall in [0, 1]"
            )
        if (self.root / GROUND_TRUTH).exists():
            raise UserError(
                f"{self.root} already holds {GROUND_TRUTH}: images of two runs would mix. "
                "Give another root, or remove that folder first"
            )

    def write(self, progress: Progress = lambda drawn, total: drawn) -> None:
        """Write images, then tables, so that a folder with tables is whole.

        Args:
            progress: Wraps what is iterated over, with its length, to show progress.
        """
        rng = np.random.default_rng([self.seed, 0])
        content = self._content(rng)
        folder = self.root / INPUT
        folder.mkdir(parents=True, exist_ok=True)
        jobs = [
            (folder / f"{stem}.jpg", condition, lesion, number)
            for number, (stem, lesion, *condition) in enumerate(
                content[["stem", "lesion", *ATTRIBUTES]].itertuples(index=False)
            )
        ]
        task = partial(_write_image, self.seed, self.size)
        if self.workers:
            with ProcessPoolExecutor(self.workers) as pool:
                _exhaust(progress(pool.map(task, jobs, chunksize=CHUNK), len(jobs)))
        else:
            _exhaust(progress(map(task, jobs), len(jobs)))
        _artifact_table(content, self.label_recall, rng).to_csv(
            self.root / ARTIFACT_FILES[0], lineterminator="\n"
        )
        _metadata(content, rng).to_csv(self.root / METADATA, index=False, lineterminator="\r\n")
        drawn = f"{self.images:,} drawn images of skin lesions (seed {self.seed}), no photographs"
        write_origin(self.root, Origin(drawn, "MIT"))
        _ground_truth(content).to_csv(self.root / GROUND_TRUTH, index=False, lineterminator="\r\n")

    def _content(self, rng: Generator) -> pd.DataFrame:
        """Decide what each image shows: `id`, `stem`, `lesion` and the six attributes (0, 1)."""
        numbers = np.arange(self.images)
        again = rng.random(self.images) < SECOND_IMAGE
        again[0] = False
        again[1:] &= ~again[:-1]
        lesion = np.cumsum(~again) - 1
        if self.combinations == "balanced":
            melanoma = lesion % 2 == 0
            bits = rng.permutation(self.images)[:, None] >> np.arange(len(ARTIFACTS))
            artifacts = bits % 2 == 1
        else:
            melanoma = (rng.random(self.images) < PREVALENCE["MEL"])[lesion]
            artifacts = rng.random((self.images, len(ARTIFACTS))) < [
                PREVALENCE[a] for a in ARTIFACTS
            ]
        ids = np.array([f"ISIC_{number:07d}" for number in numbers])
        suffixed = rng.random(self.images) < SUFFIXED
        content = pd.DataFrame({"id": ids, "stem": np.where(suffixed, ids + DOWNSAMPLED, ids)})
        content["lesion"] = lesion
        content[list(ATTRIBUTES)] = np.c_[artifacts, melanoma, ~melanoma].astype(int)
        return content


def _write_image(seed: int, size: int, job: tuple[Path, list[int], int, int]) -> None:
    path, condition, lesion, number = job
    picture = draw(
        condition,
        rng=np.random.default_rng([seed, 1, number]),
        lesion_rng=np.random.default_rng([seed, 2, lesion]),
        size=size,
    )
    Image.fromarray(picture).save(path, quality=95, subsampling="4:4:4")


def _exhaust(drawn: Iterable[None]) -> None:
    for _ in drawn:
        pass


def _ground_truth(content: pd.DataFrame) -> pd.DataFrame:
    table = content[["stem"]].rename(columns={"stem": "image"})
    for name in CLASSES:
        table[name] = content[name].astype(float) if name in content else 0.0
    return table


def _metadata(content: pd.DataFrame, rng: Generator) -> pd.DataFrame:
    """Return age, site, lesion and sex of each image, the same for the images of a lesion."""
    lesions = content["lesion"].max() + 1
    age = pd.Series(rng.integers(3, 18, lesions) * 5).astype("Int64")
    facts = pd.DataFrame(
        {
            "age_approx": age.mask(rng.random(lesions) < 0.02),
            "anatom_site_general": rng.choice(SITES, lesions),
            "lesion_id": [f"DRAWN_{lesion:07d}" for lesion in range(lesions)],
            "sex": rng.choice(["female", "male"], lesions),
        }
    )
    # as in the official table, only a lesion with one image may lack its id
    single = content["lesion"].value_counts().sort_index().to_numpy() == 1
    facts["lesion_id"] = facts["lesion_id"].mask(single & (rng.random(lesions) < BLANK))
    facts["anatom_site_general"] = facts["anatom_site_general"].mask(rng.random(lesions) < 0.1)
    table = facts.loc[content["lesion"]].reset_index(drop=True)
    table.insert(0, "image", content["stem"])
    return table


def _artifact_table(content: pd.DataFrame, recall: float, rng: Generator) -> pd.DataFrame:
    """Return probabilities as a network's: above 0.9 only for an artifact that it recognised."""
    count = len(content)
    low = {name: rng.beta(0.3, 8, count) * 0.85 for name in (*ARTIFACTS, *OTHER_ARTIFACTS)}
    for name in ARTIFACTS:
        seen = content[name].to_numpy(bool) & (rng.random(count) < recall)
        low[name] = np.where(seen, rng.uniform(0.91, 0.9999, count), low[name])
    order = ["dark_corner", "hair", "gel_border", "gel_bubble", "ruler", "ink", "patches", "vasc"]
    table = pd.DataFrame({"image": content["id"], **{name: low[name] for name in order}})
    table["label"] = content["MEL"]
    table["label_string"] = np.where(content["MEL"] == 1, "malignant", "benign")
    return table


def main() -> None:
    """Write the folder that the command line describes, with a progress bar."""
    parser = ArgumentParser(description=__doc__)
    parser.add_class_arguments(DermoscopyFolder)
    folder = DermoscopyFolder(**vars(parser.parse_args()))
    folder.write(lambda drawn, total: tqdm(drawn, total=total, unit="image"))


if __name__ == "__main__":
    main()

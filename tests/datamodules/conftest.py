from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rl4med_ddpo.datamodules.annotations import GROUND_TRUTH, METADATA
from rl4med_ddpo.datamodules.images import INPUT


@dataclass
class Folder:
    """A tiny ISIC folder of 40 images; id number i is MEL if i % 4 == 0, BCC if i == 1, else NV."""

    root: Path
    ids: list[str]

    truth = property(lambda self: self.root / GROUND_TRUTH)
    metadata = property(lambda self: self.root / METADATA)
    artifacts = property(lambda self: self.root / "annotations" / "isic_inferred_wocarcinoma.csv")
    images = property(lambda self: self.root / INPUT)

    def edit(self, path, old, new):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))


@pytest.fixture
def folder(tmp_path):
    """Write the tiny ISIC folder: every fifth id `_downsampled`, lesions of three images each."""
    ids = [f"ISIC_{i:07d}" for i in range(40)]
    stems = [f"{name}_downsampled" if i % 5 == 0 else name for i, name in enumerate(ids)]
    made = Folder(tmp_path / "isic", ids)
    made.images.mkdir(parents=True)
    made.artifacts.parent.mkdir()
    truth, metadata = ["image,MEL,NV,BCC"], ["image,age_approx,lesion_id"]
    artifacts = [",image,hair,gel_bubble,ruler,ink"]
    rng = np.random.default_rng(0)
    for i, (name, stem) in enumerate(zip(ids, stems, strict=True)):
        label = (0, 0, 1) if i == 1 else (1, 0, 0) if i % 4 == 0 else (0, 1, 0)
        truth.append(f"{stem},{label[0]}.0,{label[1]}.0,{label[2]}.0")
        metadata.append(f"{stem},50,{f'HAM_{i // 3:07d}' if i % 7 else ''}")
        values = ((i % 2 == 0) * 0.95, (i % 3 == 0) * 0.92, (i % 5 == 0) * 0.9, (i == 8) * 1.0)
        artifacts.append(f"{i},{name},{','.join(map(str, values))}")
        pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(made.images / f"{stem}.jpg")
    made.truth.write_text("\r\n".join(truth) + "\r\n")
    made.metadata.write_text("\r\n".join(metadata) + "\r\n")
    made.artifacts.write_text("\n".join(artifacts) + "\n")
    return made

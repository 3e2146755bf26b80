"""E10: a planted shared lesion, near-duplicate and generated image are each found and named."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFilter
from PIL.PngImagePlugin import PngInfo

from rl4med_ddpo.command_line import main
from rl4med_ddpo.datamodules.annotations import GROUND_TRUTH, METADATA
from rl4med_ddpo.datamodules.images import INPUT
from rl4med_ddpo.datamodules.isic import ISICDataModule
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.metrics.split_leaks import find_leaks

PARTS = {"train": 20, "val": 6, "test": 6}


def texture(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(3))


@pytest.fixture
def isic(tmp_path):
    """Images that look nothing like each other; no lesion twice."""
    root = tmp_path / "isic"
    (root / INPUT).mkdir(parents=True)
    (root / "splits").mkdir()
    ids = [f"ISIC_{i:07d}" for i in range(sum(PARTS.values()))]
    for i, name in enumerate(ids):
        texture(i).save(root / INPUT / f"{name}.jpg")
    table = pd.DataFrame({"image": ids, "MEL": 1.0, "NV": 0.0})
    table.to_csv(root / GROUND_TRUTH, index=False)
    lesions = pd.DataFrame({"image": ids, "lesion_id": [f"HAM_{i}" for i in range(len(ids))]})
    lesions.to_csv(root / METADATA, index=False)
    marks = pd.DataFrame({"image": ids, "hair": 0, "gel_bubble": 0, "ruler": 0, "ink": 1})
    marks.to_csv(root / "isic_bias.csv", index=False)
    first = 0
    for part, n in PARTS.items():
        rows = pd.DataFrame({"image": ids[first : first + n]})
        rows.to_csv(root / "splits" / f"{part}.csv", index=False)
        first += n
    return root


def leaks(root):
    data = ISICDataModule(str(root), split=str(root / "splits"))
    paths = {name: data.paths(rows) for name, rows in data.splits._asdict().items()}
    return find_leaks(data.splits, paths)


def test_clean_splits_do_not_leak(isic):
    assert leaks(isic) == []


def test_each_planted_leak_is_named_and_strict_refuses(isic, capsys):
    metadata = pd.read_csv(isic / METADATA)
    metadata.loc[22, "lesion_id"] = "HAM_3"
    metadata.to_csv(isic / METADATA, index=False)
    texture(7).crop((4, 2, 92, 90)).save(isic / INPUT / "ISIC_0000029.jpg", quality=60)
    text = PngInfo()
    text.add_text("sample", "{}")
    (isic / INPUT / "ISIC_0000024.jpg").unlink()
    texture(24).save(isic / INPUT / "ISIC_0000024.png", pnginfo=text)
    found = {leak.kind: (leak.held_out, leak.split, leak.train) for leak in leaks(isic)}
    assert found == {
        "lesion": ("ISIC_0000022", "val", "ISIC_0000003"),
        "duplicate": ("ISIC_0000029", "test", "ISIC_0000007"),
        "generated": ("ISIC_0000024", "val", ""),
    }
    options = ["describe", "--config=classifier.yaml", f"--data.root={isic}"]
    options += [f"--data.split={isic / 'splits'}"]
    main([*options, "--leaks=report"])
    said = capsys.readouterr().out
    assert "Leaks between the splits: 3" in said
    for name in ("ISIC_0000022", "ISIC_0000029", "ISIC_0000024"):
        assert name in said
    with pytest.raises(UserError, match="1 by lesion") as error:
        main([*options, "--leaks=strict"])
    assert "1 by duplicate" in str(error.value)


def test_fitting_never_opens_a_test_image(isic, monkeypatch):
    data = ISICDataModule(
        str(isic), split=str(isic / "splits"), size=16, num_workers=0, batch_size=4
    )
    opened, genuine = [], Image.open

    def spy(path, *args, **options):
        opened.append(str(path))
        return genuine(path, *args, **options)

    monkeypatch.setattr(Image, "open", spy)
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        list(loader)
    seen = {path[-11:-4] for path in opened}
    assert seen == {f"{i:07d}" for i in range(26)}

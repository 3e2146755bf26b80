"""E9: planted copies of training images are found, and real images are not accused."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from rl4med_ddpo.datamodules.images import find_images, read_image
from rl4med_ddpo.datamodules.isic import ISICDataModule
from rl4med_ddpo.metrics.copies import copy_threshold, nearest, thumbnails
from rl4med_ddpo.metrics.intervals import cluster_numbers
from rl4med_ddpo.metrics.memorization import memorization


def squashed(paths):
    return torch.stack([read_image(path, 64) for path in paths])


def edited(path, edit, rng):
    image = Image.open(path).convert("RGB")
    if edit == "mirrored":
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if edit == "cropped":
        width, height = (round(0.9 * side) for side in image.size)
        left, top = rng.integers(0, image.width - width), rng.integers(0, image.height - height)
        buffer = io.BytesIO()
        image.crop((left, top, left + width, top + height)).save(buffer, "JPEG", quality=50)
        image = Image.open(buffer)
    pixels = torch.from_numpy(np.array(image.resize((64, 64), Image.Resampling.BILINEAR)))
    pixels = pixels.permute(2, 0, 1).float() / 255
    if edit == "coloured":
        gain, offset = rng.uniform(0.85, 1.15, (3, 1, 1)), rng.uniform(-0.05, 0.05, (3, 1, 1))
        pixels = (pixels * torch.from_numpy(gain) + torch.from_numpy(offset)).clamp(0, 1).float()
    return pixels


@pytest.fixture(scope="module")
def real(real_folder):
    """Thumbnails of true images: 300 of train, 150 of test, 120 held out, and their lesions."""
    data = ISICDataModule(str(real_folder), split=str(real_folder / "splits"))
    rows = {
        "train": data.splits.train.head(300),
        "test": data.splits.test.head(150),
        "held_out": data.splits.val.head(120),
    }
    paths = {name: find_images(data.folder, frame) for name, frame in rows.items()}
    shown = {name: thumbnails(squashed(some)) for name, some in paths.items()}
    lesions = cluster_numbers([x for frame in rows.values() for x in frame["lesion_id"]])
    cuts = np.cumsum([len(frame) for frame in rows.values()])[:-1]
    return paths, shown, dict(zip(rows, np.split(lesions, cuts), strict=True))


def test_planted_copies_are_found_and_real_images_are_not(real):
    paths, shown, lesions = real
    rng = np.random.default_rng(0)
    sources = rng.choice(300, 40, replace=False).reshape(4, 10)
    edits = ("exact", "mirrored", "cropped", "coloured")
    planted = [
        edited(paths["train"][row], edit, rng)
        for edit, rows in zip(edits, sources, strict=True)
        for row in rows
    ]
    fakes = torch.cat([thumbnails(torch.stack(planted)), shown["held_out"]])
    counts, sheet = memorization(
        fakes, shown["test"], shown["train"], np.concatenate([lesions["test"], lesions["train"]])
    )
    found = nearest(fakes, shown["train"])
    right = (found.distance < counts["threshold"])[:40] & (found.row[:40] == sources.flatten())
    exact, mirrored, cropped, coloured = right.reshape(4, 10).sum(axis=1)
    assert exact == mirrored == 10
    assert cropped >= 8
    assert coloured >= 8
    apart = nearest(shown["held_out"], shown["train"], lesions["held_out"], lesions["train"])
    assert (apart.distance < counts["threshold"]).mean() <= 0.01
    assert counts["copies"] >= right.sum()
    assert counts["n"] == len(fakes)
    assert sheet["distance"].is_monotonic_increasing
    assert sheet["copy"].all()
    assert len(sheet) == 20


def test_the_same_lesion_does_not_calibrate(real):
    """A second photograph of a training lesion is near it, and would make copies look usual."""
    _, shown, _ = real
    test = torch.cat([shown["test"][:50], shown["train"][:5]])
    names = np.arange(50 + 300)
    mates = np.concatenate([names[:50], names[50:55]])
    apart = nearest(test, shown["train"], mates, names[50:])
    mixed = nearest(test, shown["train"])
    assert copy_threshold(mixed) < 1e-3 < copy_threshold(apart)
    assert (apart.row[50:] != np.arange(5)).all()


def test_the_nearest_does_not_depend_on_company(real):
    _, shown, _ = real
    whole = nearest(shown["test"][:40], shown["train"][:100])
    few = nearest(shown["test"][30:40], shown["train"][:100])
    np.testing.assert_array_equal(whole.row[30:], few.row)
    np.testing.assert_allclose(whole.distance[30:], few.distance, atol=1e-5)

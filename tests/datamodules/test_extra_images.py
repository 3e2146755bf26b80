"""Table 4's arms: the same number of images from every source, in the training split alone."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from rl4med_ddpo.datamodules.dermoscopy import DermoscopyFolder
from rl4med_ddpo.datamodules.extra_images import ExtraImages
from rl4med_ddpo.datamodules.images import INPUT
from rl4med_ddpo.datamodules.isic import ISICDataModule
from rl4med_ddpo.datamodules.sample_tables import write_tables
from rl4med_ddpo.datamodules.vocabulary import DERMOSCOPY
from rl4med_ddpo.foundation.errors import UserError
from support.dermoscopy import ATTRIBUTES, CONDITIONS, PROMPTS, short_name


@pytest.fixture(scope="module")
def isic(tmp_path_factory):
    root = tmp_path_factory.mktemp("isic") / "data"
    DermoscopyFolder(root, images=200, size=16).write()
    return str(root)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Four generated images of each prompt, of one colour each."""
    root = tmp_path_factory.mktemp("samples")
    (root / INPUT).mkdir()
    rows = []
    for index in range(128):
        condition = CONDITIONS[index % 32]
        name = f"{short_name(condition).replace('+', '_')}_{index:06d}"
        rows.append({"id": name, **dict(zip(ATTRIBUTES, condition.int().tolist(), strict=True))})
        Image.new("RGB", (16, 16), (index, 0, 255)).save(root / INPUT / f"{name}.png")
    write_tables(root, rows, DERMOSCOPY)
    return str(root)


def module(isic, source, per_subgroup, **options):
    extra = None if source is None else ExtraImages(source, per_subgroup)
    defaults = {"size": 16, "num_workers": 0, "batch_size": 16, "augment": False}
    data = ISICDataModule(isic, extra=extra, **(defaults | options))
    data.setup("fit")
    data.setup("test")
    return data


@pytest.mark.parametrize("per_subgroup", [1, 3])
def test_every_source_adds_as_many(isic, samples, per_subgroup):
    plain = module(isic, None, 0)
    for source in ("train", samples):
        data = module(isic, source, per_subgroup)
        assert len(data.train_set) == len(plain.train_set) + 32 * per_subgroup
        assert data.train_set.ids[: len(plain.train_set)] == plain.train_set.ids
        for name in ("val_set", "test_set"):
            assert getattr(data, name).ids == getattr(plain, name).ids


def test_generated_images_carry_their_prompt_and_are_read_from_their_folder(isic, samples):
    data = module(isic, samples, 2)
    first = len(data.train_set) - 64
    added = [data.train_set[row] for row in range(first, len(data.train_set))]
    assert Counter(item["prompt"] for item in added) == dict.fromkeys(PROMPTS, 2)
    for item in added:
        index = int(item["id"].rpartition("_")[2])
        assert item["prompt"] == PROMPTS[index % 32]
        assert item["image"][:, 0, 0].mul(255).round().tolist() == [index, 0, 255]
        assert index < 64


def test_real_images_are_drawn_again_from_train_alone(isic):
    data = module(isic, "train", 3)
    train = data.splits.train
    added = data.train_set.ids[len(train) :]
    assert set(added) <= set(train["id"])
    keys = train.set_index("id")[list(ATTRIBUTES)].apply(tuple, axis=1)
    sizes, drawn = Counter(keys), Counter(keys[added])
    # what subgroups without images leave open is spread evenly over the others
    assert max(drawn.values()) - min(drawn.values()) <= 1
    assert drawn.keys() == sizes.keys()
    again = Counter(added)
    for key in sizes:
        times = [again[name] for name in train["id"] if keys[name] == key]
        assert max(times) - min(times) <= 1
    assert added == module(isic, "train", 3).train_set.ids[len(train) :]
    assert added != module(isic, "train", 3, seed=7).train_set.ids[len(train) :]


def test_a_folder_with_too_few_images_is_refused(isic, samples):
    with pytest.raises(UserError, match=r"fewer than 5 images of 32 subgroup\(s\): MEL \(4\)"):
        module(isic, samples, 5)
    with pytest.raises(UserError, match="at least 1"):
        ExtraImages(samples, 0)


def test_the_table_of_generated_images_stays_as_it_was(isic, samples):
    before = pd.read_csv(f"{samples}/manifest.csv")
    module(isic, samples, 1)
    assert pd.read_csv(f"{samples}/manifest.csv").equals(before)
    assert np.array_equal(before["id"], sorted(before["id"], key=lambda n: int(n[-6:])))

import numpy as np
import pytest
from PIL import Image

from rl4med_ddpo.datamodules.decodable import require_decodable
from rl4med_ddpo.datamodules.isic import ISICDataModule
from rl4med_ddpo.foundation.errors import UserError


@pytest.fixture
def images(folder):
    """The images of the tiny ISIC folder, four of them spoilt."""
    paths = sorted(folder.images.iterdir())
    paths[3].write_bytes(paths[3].read_bytes()[:-20])
    paths[5].write_bytes(b"")
    paths[7].write_bytes(b"<!DOCTYPE html><html>log in</html>")
    Image.new("RGB", (4, 4)).save(paths[9], format="GIF")
    return paths


def test_all_are_counted_and_three_named_with_the_cause(images):
    with pytest.raises(UserError, match="4 of 40 images cannot be read") as error:
        require_decodable(images)
    said = str(error.value)
    assert f"cannot decode the image {images[3]}: image file is truncated" in said
    for path in (images[5], images[7]):
        assert f"cannot decode the image {path}: cannot identify image file" in said
    assert str(images[9]) not in said
    assert "and 1 more" in said
    assert "leave their ids out" in said


@pytest.mark.usefixtures("images")
def test_it_is_said_before_the_first_batch(folder, tmp_path):
    options = {"size": 8, "batch_size": 4, "num_workers": 0}
    with pytest.raises(UserError, match=r"\d of \d+ images cannot be read"):
        ISICDataModule(str(folder.root), **options).setup("fit")
    with pytest.raises(UserError, match="4 of 39 images cannot be read"):
        ISICDataModule(str(folder.root), copies=str(tmp_path), **options).prepare_data()


def test_what_only_looks_wrong_is_accepted(tmp_path):
    """Some cameras write on after the end of the picture."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for name in ("a.jpg", "b.png"):
        path = tmp_path / name
        Image.fromarray(pixels).save(path)
        path.write_bytes(path.read_bytes() + b"maker's notes" * 100)
    require_decodable(sorted(tmp_path.iterdir()))
    require_decodable([])

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from rl4med_ddpo.datamodules import image_copies
from rl4med_ddpo.datamodules.image_copies import ResizedCopies
from rl4med_ddpo.datamodules.images import INPUT
from rl4med_ddpo.datamodules.isic import ISICDataModule
from rl4med_ddpo.foundation.errors import UserError


def module(folder, copies=None, **options):
    defaults = {"size": 8, "batch_size": 4, "num_workers": 0}
    return ISICDataModule(str(folder.root), copies=copies and str(copies), **(defaults | options))


def prepared(folder, copies, **options):
    data = module(folder, copies, **options)
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_copies_are_read_bit_for_bit_like_the_images(folder, tmp_path, resize):
    plain, copied = module(folder, resize=resize), prepared(folder, tmp_path / "c", resize=resize)
    plain.setup("fit")
    assert len(plain.train_set) > 20
    for theirs, ours in zip(plain.train_set, copied.train_set, strict=True):
        assert torch.equal(theirs["image"], ours["image"])
        assert theirs["id"] == ours["id"]


def test_a_second_run_and_the_other_stages_decode_nothing(folder, tmp_path, monkeypatch):
    prepared(folder, tmp_path / "c")
    monkeypatch.setattr("rl4med_ddpo.datamodules.isic_dataset.read_image", pytest.fail)
    monkeypatch.setattr(image_copies, "read_image", pytest.fail)
    data = prepared(folder, tmp_path / "c", num_workers=1)
    data.setup("test")
    assert len(list(data.train_dataloader())) > 3
    assert len(list(data.test_dataloader())) > 0


def counted(monkeypatch, stop_after=None):
    read, seen = image_copies.read_image, []

    def counting(path, *args):
        if stop_after is not None and len(seen) == stop_after:
            raise KeyboardInterrupt
        seen.append(path)
        return read(path, *args)

    monkeypatch.setattr(image_copies, "read_image", counting)
    return seen


def test_making_them_goes_on_where_it_was_interrupted(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        first = counted(patch, stop_after=10)
        with pytest.raises(KeyboardInterrupt):
            prepared(folder, tmp_path / "c")
    rest = counted(monkeypatch)
    data = prepared(folder, tmp_path / "c")
    assert len(first) == 10
    assert not set(first) & set(rest)
    assert len(first) + len(rest) == sum(map(len, data.splits))


def test_damaged_copies_and_replaced_images_are_made_anew(folder, tmp_path, monkeypatch):
    data = prepared(folder, tmp_path / "c")
    cut, gone, empty, *_ = sorted((tmp_path / "c").rglob("*.safetensors"))
    cut.write_bytes(cut.read_bytes()[:-20])
    gone.unlink()
    empty.write_bytes(b"")
    path = data.train_set.paths[0]
    Image.new("RGB", (8, 8), (255, 0, 0)).save(path)
    made = counted(monkeypatch)
    again = prepared(folder, tmp_path / "c")
    assert len(made) in (3, 4)
    assert again.train_set[0]["image"][0].mean() > 0.9
    assert len(list(again.train_set)) == len(again.train_set)


def test_files_of_one_name_size_and_time_have_copies_of_their_own(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder.root, other)
    for path in sorted(folder.images.iterdir()):
        seen = np.asarray(Image.open(path))
        for root, image in ((folder.root, seen), (other, 255 - seen)):
            twin = root / INPUT / path.name
            Image.fromarray(image).save(twin, "PNG", compress_level=0)
            os.utime(twin, (0, 0))
    assert path.stat().st_size == twin.stat().st_size
    prepared(folder, tmp_path / "c")
    inverted = ISICDataModule(str(other), copies=str(tmp_path / "c"), size=8, num_workers=1)
    inverted.prepare_data()
    plain = ISICDataModule(str(other), size=8, num_workers=0)
    for data in (plain, inverted):
        data.setup("test")
    for theirs, ours in zip(plain.test_set, inverted.test_set, strict=True):
        assert torch.equal(theirs["image"], ours["image"])


def test_workers_make_the_same_copies(folder, tmp_path):
    for workers in (0, 2):
        data = module(folder, tmp_path / f"w{workers}", num_workers=workers)
        shown = []

        def progress(work, n, shown=shown):
            for done in work:
                shown.append((done, n))
                yield done

        paths = data.paths(data.splits.train)
        assert data.copies.make(paths, workers, progress) == len(paths) == len(shown)
    one, two = (
        {p.name: p.read_bytes() for p in (tmp_path / f"w{w}").rglob("*.safetensors")}
        for w in (0, 2)
    )
    assert one == two


def test_errors_name_the_image_and_the_folder(folder, tmp_path):
    data = module(folder, tmp_path / "c")
    path = data.paths(data.splits.train)[0]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the cache .*\n.*--data\.copies"):
        module(folder, tmp_path / "file").prepare_data()
    with pytest.raises(UserError, match="cannot read the image"):
        ResizedCopies(tmp_path, 8, "squash").read(tmp_path / "gone.jpg")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=f"cannot decode the image {path}"):
        data.prepare_data()

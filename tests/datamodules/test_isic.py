import pickle
from pathlib import Path

import pandas as pd
import pytest
import torch
from lightning import LightningModule
from torch.utils.data import DataLoader

from rl4med_ddpo.datamodules import images
from rl4med_ddpo.datamodules.isic import ISICDataModule
from rl4med_ddpo.foundation.errors import UserError
from support.dermoscopy import ATTRIBUTES, prompt_of
from support.trainers import quiet_trainer


class Recorder(LightningModule):
    """Takes no gradient; notes which images came, epoch by epoch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = {}
        self.first_images = {}

    def training_step(self, batch, _):
        self.seen.setdefault(self.current_epoch, []).append(batch["id"])
        for name, image in zip(batch["id"], batch["image"], strict=True):
            self.first_images.setdefault((self.current_epoch, name), image.clone())
        return self.weight.sum() * 0

    def validation_step(self, batch, _):
        pass

    def test_step(self, batch):
        self.seen.setdefault("test", []).append(batch["id"])

    def predict_step(self, batch):
        self.seen.setdefault("predict", []).append(batch["id"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def module(folder, **kwargs):
    return ISICDataModule(
        str(folder.root), **{"size": 8, "batch_size": 4, "num_workers": 0, **kwargs}
    )


def test_a_split_can_be_walked_through_once(folder):
    data = module(folder)
    data.setup("fit")
    train = data.dataset("train", flip=True)
    assert [item["id"] for item in train] == train.ids


@pytest.mark.parametrize(
    ("stage", "loader"),
    [("fit", "train"), ("validate", "val"), ("test", "test"), ("predict", "predict")],
)
def test_batches(folder, stage, loader):
    data = module(folder, augment=False)
    data.setup(stage)
    rows = getattr(data.splits, "test" if loader == "predict" else loader).set_index("id")
    seen = []
    for batch in getattr(data, f"{loader}_dataloader")():
        assert set(batch) == {"image", "condition", "prompt", "id", "draw"}
        n = len(batch["id"])
        assert batch["image"].shape == (n, 3, 8, 8)
        assert batch["image"].dtype == batch["condition"].dtype == torch.float32
        assert batch["image"].min() >= 0
        assert batch["image"].max() <= 1
        expected = torch.tensor(rows.loc[batch["id"], list(ATTRIBUTES)].to_numpy())
        assert torch.equal(batch["condition"], expected.float())
        assert batch["prompt"] == [prompt_of(condition) for condition in expected]
        seen += batch["id"]
    assert sorted(seen) == sorted(rows.index)
    if loader != "train":
        assert seen == rows.index.tolist()


def test_every_image_of_the_real_folder_through_the_loaders(real_folder):
    data = ISICDataModule(
        str(real_folder), split=str(real_folder / "splits"), size=64, batch_size=64, num_workers=2
    )
    data.setup("fit")
    data.setup("test")
    counts = []
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    for loader in loaders:
        ids = []
        for batch in loader:
            assert torch.isfinite(batch["image"]).all()
            assert (batch["image"].std((1, 2, 3)) > 0.02).all(), "no blank image"
            ids += batch["id"]
        assert len(set(ids)) == len(ids)
        counts.append(len(ids))
    assert counts == [887, 140, 173]


def test_conditions_of_the_real_folder_are_the_authors(real_folder):
    data = ISICDataModule(str(real_folder), split=str(real_folder / "splits"), size=8)
    theirs = pd.read_csv(real_folder / "splits" / "isic2019_test.csv")
    dataset = data.dataset("test")
    assert dataset.ids == theirs["image"].tolist()
    assert torch.equal(
        dataset.conditions, torch.tensor(theirs[list(ATTRIBUTES)].to_numpy()).float()
    )


def test_flips_are_exact_and_seeded(folder):
    plain, flipped = module(folder).dataset("train"), module(folder).dataset("train", flip=True)
    n, seen = len(plain), set()
    for key in range(3, 40 * n, n):
        original, image = plain[key]["image"], flipped[key]["image"]
        assert torch.equal(image, flipped[key]["image"])
        ways = {
            (): original,
            (2,): original.flip(2),
            (1,): original.flip(1),
            (1, 2): original.flip(1, 2),
        }
        seen |= {way for way, expected in ways.items() if torch.equal(image, expected)}
    assert len(seen) == 4


def test_training_images_alone_are_distorted_and_each_draw_anew(folder):
    data = module(folder, augment=False, distort=True, seed=3)
    data.setup("fit")
    first, again = data.train_set[0]["image"], data.train_set[0]["image"]
    later = data.train_set[len(data.train_set)]["image"]
    plain = module(folder).dataset("train")[0]["image"]
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert not torch.equal(first, plain)
    assert torch.equal(data.val_set[0]["image"], module(folder).dataset("val")[0]["image"])


def test_only_training_images_are_flipped(folder):
    data = module(folder)
    data.setup("fit")
    data.setup("test")
    assert data.train_set.flip_seed is not None
    assert data.val_set.flip_seed is None
    assert data.test_set.flip_seed is None
    data = module(folder, augment=False)
    data.setup("fit")
    assert data.train_set.flip_seed is None


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_run_sees_what_the_uninterrupted_one_sees(folder, tmp_path, workers):
    whole = Recorder()
    quiet_trainer(tmp_path, max_epochs=4).fit(whole, datamodule=module(folder))
    first = quiet_trainer(tmp_path, max_epochs=2)
    first.fit(Recorder(), datamodule=module(folder))
    first.save_checkpoint(tmp_path / "last.ckpt")
    resumed = Recorder()
    data = module(folder, num_workers=workers)
    quiet_trainer(tmp_path, max_epochs=4).fit(
        resumed, datamodule=data, ckpt_path=tmp_path / "last.ckpt"
    )
    assert sorted(resumed.seen) == [2, 3]
    for epoch in (2, 3):
        assert resumed.seen[epoch] == whole.seen[epoch]
    assert whole.seen[2] != whole.seen[3]
    for key, image in resumed.first_images.items():
        assert torch.equal(image, whole.first_images[key])


class Shared(Recorder):
    """Leaves what its process saw in a file."""

    def __init__(self, out):
        super().__init__()
        self.out = out

    def validation_step(self, batch, _):
        self.seen.setdefault("val", []).append(batch["id"])

    def on_fit_end(self):
        torch.save(self.seen, self.out / f"seen-{self.global_rank}.pt")


def test_two_processes_see_together_what_one_sees(folder, tmp_path):
    two = quiet_trainer(
        tmp_path, max_epochs=2, devices=2, strategy="ddp_fork", num_sanity_val_steps=0
    )
    two.fit(Shared(tmp_path), datamodule=module(folder, batch_size=2))
    ranks = [torch.load(tmp_path / f"seen-{rank}.pt") for rank in range(2)]
    one = Recorder()
    quiet_trainer(tmp_path, max_epochs=2).fit(one, datamodule=module(folder, batch_size=4))
    for epoch in range(2):
        steps = zip(ranks[0][epoch], ranks[1][epoch], strict=True)
        assert [sorted(a + b) for a, b in steps] == [sorted(step) for step in one.seen[epoch]]
    validated = {name for seen in ranks for batch in seen["val"] for name in batch}
    assert validated == set(module(folder).splits.val["id"])


@pytest.mark.parametrize("run", ["test", "predict"])
def test_trainer_runs_over_the_test_split(folder, tmp_path, run):
    recorder, data = Recorder(), module(folder)
    getattr(quiet_trainer(tmp_path), run)(recorder, datamodule=data)
    assert sum(recorder.seen[run], []) == data.splits.test["id"].tolist()  # noqa: RUF017


def test_no_fit_opens_a_test_image(folder, tmp_path, monkeypatch):
    opened = set()
    real_open = images.Image.open

    def spy(path, *args, **kwargs):
        opened.add(Path(path).stem.removesuffix("_downsampled"))
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(images.Image, "open", spy)
    data = module(folder)
    quiet_trainer(tmp_path, max_epochs=2).fit(Recorder(), datamodule=data)
    assert opened == set(data.splits.train["id"]) | set(data.splits.val["id"])
    assert not opened & set(data.splits.test["id"])


def test_balanced_sampler_draws_the_rare_more_often(folder):
    shares = {}
    for sampler in ("shuffle", "balanced"):
        data = module(folder, sampler=sampler, split_seed=1)
        data.setup("fit")
        loader = data.train_dataloader()
        mel = []
        for epoch in range(20):
            loader.sampler.set_epoch(epoch)
            mel += [key % len(data.train_set) for key in loader.sampler]
        shares[sampler] = data.train_set.conditions[mel].mean(0)
    assert shares["balanced"][ATTRIBUTES.index("MEL")] > shares["shuffle"][ATTRIBUTES.index("MEL")]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(folder, workers):
    data = module(folder, num_workers=workers)
    data.setup("test")
    path = data.test_set.paths[3]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError) as caught:
        list(data.test_dataloader())
    assert f"cannot decode the image {path}" in str(caught.value)


def test_missing_images_stop_the_setup(folder):
    data = module(folder)
    gone = data.splits.val["stem"].iloc[0]
    (folder.images / f"{gone}.jpg").unlink()
    data.setup("test")
    with pytest.raises(UserError, match=r"1 of \d+ images are missing"):
        data.setup("fit")


def test_samples_in_png_in_the_isic_layout(folder):
    for path in list(folder.images.iterdir()):
        images.Image.open(path).save(path.with_suffix(".png"))
        path.unlink()
    data = module(folder)
    data.setup("test")
    assert sum(len(batch["id"]) for batch in data.test_dataloader()) == len(data.splits.test)


@pytest.mark.parametrize(
    "wrong", [{"size": 0}, {"batch_size": 0}, {"num_workers": -1}, {"threshold": 1.0}, {"seed": -1}]
)
def test_arguments_out_of_range(wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))}=.*Allowed"):
        ISICDataModule("nowhere", **wrong)


def test_construction_reads_nothing_and_setup_names_the_folder():
    data = ISICDataModule("nowhere")
    with pytest.raises(UserError, match="no folder nowhere"):
        data.setup("fit")


def test_dataset_goes_to_worker_processes_cheaply(folder):
    data = module(folder)
    data.setup("fit")
    assert len(pickle.dumps(data.train_set)) < 10_000
    assert isinstance(data.train_dataloader(), DataLoader)

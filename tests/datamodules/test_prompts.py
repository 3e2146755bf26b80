import re
from collections import Counter

import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.cli import LightningCLI

from rl4med_ddpo.datamodules.prompts import ISICPromptDataModule
from rl4med_ddpo.foundation.errors import UserError
from support.dermoscopy import (
    ATTRIBUTES,
    CONDITIONS,
    PROMPTS,
    condition_of,
    prompt_of,
    short_name,
)
from support.trainers import quiet_trainer

HAIRY = prompt_of(condition_of("MEL", ("hair",)))
INKY = prompt_of(condition_of("NV", ("ink",)))


class Listener(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = {}

    def training_step(self, batch):
        self.seen.setdefault(self.current_epoch, []).append(batch)
        return self.weight.sum() * 0

    def validation_step(self, batch):
        self.seen.setdefault("val", []).append(batch)

    def test_step(self, batch):
        self.seen.setdefault("test", []).append(batch)

    def predict_step(self, batch):
        self.seen.setdefault("predict", []).append(batch)

    def on_fit_end(self):
        if self.trainer.world_size > 1:
            torch.save(self.seen[0], f"{self.trainer.default_root_dir}/seen-{self.global_rank}.pt")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def check(batch):
    assert set(batch) == {"prompt", "name", "prompt_id", "condition", "index"}
    assert batch["condition"].dtype == torch.float32
    assert batch["index"].dtype == torch.int64
    rows = zip(*(batch[k] for k in ("prompt", "name", "prompt_id", "condition")), strict=True)
    for prompt, name, number, condition in rows:
        assert number == PROMPTS.index(prompt)
        assert torch.equal(CONDITIONS[number], condition)
        assert name == short_name(condition)
    assert len(batch["index"]) == len(batch["prompt"])


def test_balanced_epoch_is_one_batch(tmp_path):
    listener = Listener()
    quiet_trainer(tmp_path, max_epochs=2).fit(listener, datamodule=ISICPromptDataModule())
    for epoch in range(2):
        (batch,) = listener.seen[epoch]
        check(batch)
        assert Counter(batch["prompt"]) == dict.fromkeys(PROMPTS, 8)
        assert batch["index"].tolist() == list(range(256))


def test_every_process_gets_all_prompts(folder, tmp_path):
    data = ISICPromptDataModule(str(folder.root), prompts="train")
    quiet_trainer(tmp_path, max_epochs=1, devices=2, strategy="ddp_fork").fit(
        Listener(), datamodule=data
    )
    (first,), (second,) = (torch.load(tmp_path / f"seen-{rank}.pt") for rank in range(2))
    assert first["prompt"] == second["prompt"]
    assert first["index"].tolist() == second["index"].tolist() == list(range(256))


@pytest.mark.parametrize("stage", ["val", "test", "predict"])
def test_evaluation_comes_in_chunks_over_all_prompts(tmp_path, stage):
    data = ISICPromptDataModule(
        validation_samples_per_prompt=3,
        test_samples_per_prompt=3,
        eval_batch_size=40 if stage == "val" else 7,
        predict_batch_size=7 if stage == "val" else 40,
    )
    listener = Listener()
    run = {"val": "validate"}.get(stage, stage)
    getattr(quiet_trainer(tmp_path, max_epochs=1), run)(listener, datamodule=data)
    batches = listener.seen[stage]
    assert [len(batch["prompt"]) for batch in batches] == [40, 40, 16]
    for batch in batches:
        check(batch)
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(96))
    prompts = [prompt for batch in batches for prompt in batch["prompt"]]
    assert Counter(prompts) == dict.fromkeys(PROMPTS, 3)


def test_more_samples_leave_the_first_ones_as_they_are():
    few, many = (
        ISICPromptDataModule(test_samples_per_prompt=n, predict_batch_size=64) for n in (1, 2)
    )
    (first,), (longer,) = list(few.test_dataloader()), list(many.test_dataloader())
    assert longer["prompt"][:32] == first["prompt"]


def test_no_validation(tmp_path):
    listener = Listener()
    data = ISICPromptDataModule(validation_samples_per_prompt=0)
    quiet_trainer(tmp_path, max_epochs=1).fit(listener, datamodule=data)
    assert "val" not in listener.seen


def test_list_of_prompts():
    data = ISICPromptDataModule(
        prompts=[INKY, HAIRY], samples_per_epoch=6, validation_samples_per_prompt=2
    )
    (batch,) = data.train_dataloader()
    check(batch)
    assert batch["prompt"] == [INKY, HAIRY] * 3
    (batch,) = data.val_dataloader()
    assert batch["prompt"] == [INKY, HAIRY] * 2


def test_train_prompts_are_drawn_anew_from_seed_and_epoch(folder, tmp_path):
    def data(**kwargs):
        return ISICPromptDataModule(
            str(folder.root), prompts="train", samples_per_epoch=50, **kwargs
        )

    whole, resumed, other = Listener(), Listener(), Listener()
    quiet_trainer(tmp_path, max_epochs=4).fit(whole, datamodule=data())
    first = quiet_trainer(tmp_path, max_epochs=2)
    first.fit(Listener(), datamodule=data())
    first.save_checkpoint(tmp_path / "last.ckpt")
    quiet_trainer(tmp_path, max_epochs=4).fit(
        resumed, datamodule=data(), ckpt_path=tmp_path / "last.ckpt"
    )
    quiet_trainer(tmp_path, max_epochs=1).fit(other, datamodule=data(seed=1))
    drawn = [whole.seen[epoch][0]["prompt"] for epoch in range(4)]
    assert len({tuple(prompts) for prompts in drawn}) == 4
    assert [resumed.seen[epoch][0]["prompt"] for epoch in (2, 3)] == drawn[2:]
    assert other.seen[0][0]["prompt"] != drawn[0]
    check(whole.seen[3][0])
    assert len(drawn[0]) == 50


def test_train_prompts_are_as_frequent_as_in_the_training_split(annotations_folder):
    data = ISICPromptDataModule(str(annotations_folder), prompts="train", samples_per_epoch=100_000)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    train = data.splits.train[list(ATTRIBUTES)].to_numpy()
    assert batch["condition"].mean(0).tolist() == pytest.approx(train.mean(0), abs=0.006)
    hairy_nevi = (train == condition_of("NV", ("hair",)).numpy()).all(1).mean()
    share = Counter(batch["prompt"])[prompt_of(condition_of("NV", ("hair",)))] / 100_000
    assert share == pytest.approx(hairy_nevi, abs=0.006)
    (batch,) = ISICPromptDataModule(validation_samples_per_prompt=1).val_dataloader()
    assert batch["prompt"] == list(PROMPTS)


def test_no_folder_is_touched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for prompts in ("balanced", [HAIRY]):
        for root in (None, "/nowhere"):
            data = ISICPromptDataModule(root, prompts=prompts)
            for stage in ("fit", "validate", "test", "predict"):
                data.setup(stage)
    with pytest.raises(UserError, match="needs root"):
        ISICPromptDataModule().describe()


def test_real_images_beside_the_prompts(folder):
    data = ISICPromptDataModule(str(folder.root), size=8)
    assert data.dataset("test")[0]["image"].shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"samples_per_epoch": 250}, "250 is no multiple of the 32 prompts.*224 and 256"),
        ({"samples_per_epoch": 20}, r"20 is no multiple of the 32 prompts.*works: 32\."),
        ({"samples_per_epoch": 5, "prompts": [HAIRY, INKY]}, "5 is no multiple of the 2.*4 and 6"),
        ({"samples_per_epoch": 0}, "samples_per_epoch must be at least 1"),
        ({"validation_samples_per_prompt": -1}, "validation_samples_per_prompt must be at least 0"),
        ({"test_samples_per_prompt": 0}, "test_samples_per_prompt must be at least 1"),
        ({"eval_batch_size": 0}, "eval_batch_size must be at least 1"),
        ({"prompts": [HAIRY, HAIRY]}, "a prompt twice"),
        ({"prompts": []}, "list of prompts is empty"),
        ({"prompts": [HAIRY, "a nevus"]}, "1 of the 2 prompts are not among the 32: 'a nevus'"),
        ({"prompts": [HAIRY + "s"]}, "nearest to the first is " + re.escape(repr(HAIRY))),
        ({"prompts": "train"}, "give root"),
        ({"prompts": "trian"}, "not among the 32"),
        ({"size": 0}, "size=0"),
    ],
)
def test_what_cannot_work(given, words):
    with pytest.raises(UserError, match=re.compile(words, re.DOTALL)):
        ISICPromptDataModule(**given)


def test_command_line_knows_all_arguments(monkeypatch):
    monkeypatch.setattr("sys.argv", ["run.py"])
    cli = LightningCLI(
        Listener,
        ISICPromptDataModule,
        args=[f"--data.prompts=[{HAIRY!r}]", "--data.samples_per_epoch=3", "--data.resize=crop"],
        run=False,
    )
    assert cli.datamodule.resize == "crop"
    assert next(iter(cli.datamodule.train_dataloader()))["prompt"] == [HAIRY] * 3
    cli = LightningCLI(Listener, ISICPromptDataModule, args=["--data.prompts=balanced"], run=False)
    assert len(cli.datamodule.rows) == 32

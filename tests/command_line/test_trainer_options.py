"""The trainer's options, given to the stages that they do not suit."""

import pytest
import torch

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules import AttributeClassifier, StableDiffusion
from support.command_line import classifier, ddpo, fine_tuning, in_process

FEW = (
    "--data.root=null",
    "--data.samples_per_epoch=8",
    "--data.validation_samples_per_prompt=1",
    "--model.steps=2",
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def command(tiny_pipeline, tiny_classifiers, isic, tmp_path):
    def of(stage, *options):
        few = ("--trainer.max_epochs=1", *options)
        if stage == "classifier":
            return classifier(tmp_path / "run", isic, *few)
        if stage == "sd":
            return fine_tuning(tmp_path / "run", tiny_pipeline, isic, *few)
        return ddpo(tmp_path / "run", tiny_pipeline, tiny_classifiers, *FEW, *few)

    return of


@pytest.mark.parametrize(
    ("stage", "option", "says"),
    [
        ("classifier", "precision=bf16-true", "bf16-true keeps the trained weights in 8 bits"),
        ("sd", "precision=64-true", "64-true is computed by no GPU's fast units"),
        ("ddpo", "precision=64-true", "bf16-mixed or 32-true"),
        ("classifier", "strategy=ddp_spawn", "--trainer.strategy ddp, or start the processes by"),
        ("sd", "barebones=true", "turns off curves, checkpoints and progress"),
        ("classifier", "sync_batchnorm=true", "sync_batchnorm needs GPUs"),
        ("ddpo", "gradient_clip_val=1.0", "use --model.max_grad_norm"),
        ("ddpo", "accumulate_grad_batches=2", "--model.micro_batch"),
        ("classifier", "limit_train_batches=0", "limit_train_batches = 0 trains nothing"),
        ("sd", "max_steps=0", "max_steps = 0 trains nothing"),
        ("ddpo", "max_epochs=0", "max_epochs = 0 trains nothing"),
        ("classifier", "val_check_interval=100", "must be less than or equal to the number"),
        ("ddpo", "limit_train_batches=0.5", "Said by Lightning, of its trainer's options"),
    ],
)
def test_an_option_that_does_not_work_is_refused_in_words(command, tmp_path, stage, option, says):
    with pytest.raises(UserError) as error:
        in_process(*command(stage, f"--trainer.{option}"))
    assert says in str(error.value)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("stage", "kind"), [("classifier", AttributeClassifier), ("sd", StableDiffusion)]
)
def test_overfitting_repeats_its_batches(command, monkeypatch, stage, kind):
    seen = []
    step = kind.training_step

    def recorded(self, batch, batch_idx):
        seen.append((batch["id"], batch["image"]))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(kind, "training_step", recorded)
    cli = in_process(*command(stage, "--trainer.overfit_batches=1", "--trainer.max_epochs=3"))
    assert cli.trainer.global_step == 3
    ids, images = zip(*seen, strict=True)
    assert ids[0] == ids[1] == ids[2]
    assert all(torch.equal(images[0], image) for image in images)


@pytest.mark.parametrize("stage", ["classifier", "ddpo"])
def test_a_run_without_checkpoints_trains_and_says_so(command, tmp_path, stage):
    with pytest.warns(UserWarning, match="keeps no checkpoints: it cannot be resumed"):
        cli = in_process(*command(stage, "--trainer.enable_checkpointing=false"))
    assert cli.trainer.global_step > 0
    assert not list(tmp_path.rglob("*.ckpt"))

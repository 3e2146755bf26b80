"""What every shipped configuration says of its keys, and what a run has without being told."""

import re
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from rl4med_ddpo.command_line.parser import CONFIGS
from rl4med_ddpo.foundation.errors import UserError
from support.command_line import ddpo, in_process

NEWEST = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {
        "dirpath": "${trainer.default_root_dir}/checkpoints", "filename": "newest",
        "save_last": "link", "save_on_train_epoch_end": True, "enable_version_counter": False,
    },
}  # fmt: skip
LOGGER = {
    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
    "init_args": {
        "save_dir": "${trainer.default_root_dir}", "name": "tensorboard", "version": "",
        "default_hp_metric": False,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def uncommented(text):
    """Lines with a key and a value, and no comment."""
    has_value = re.compile(r"\s*(- )?\w+: *[^#\s]")
    return [line for line in text.splitlines() if has_value.match(line) and " # " not in line]


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_key_with_a_value_has_a_comment(path):
    assert not uncommented(path.read_text())


def test_keys_without_a_comment_are_found():
    said = "# of a stage\ninit_args:\n  steps: 50\n  eta: 1.0   # share\n  - class_path: X\n"
    assert uncommented(said) == ["  steps: 50", "  - class_path: X"]


def test_a_run_without_a_folder_is_refused(tmp_path, tiny_pipeline, tiny_classifiers):
    nowhere = ("--trainer.default_root_dir=null", "--trainer.logger=false")
    with pytest.raises(UserError, match="default_root_dir is null: name a folder"):
        built(tmp_path, tiny_pipeline, tiny_classifiers, *nowhere)
    assert not list(tmp_path.iterdir())


def built(tmp_path, pipeline, classifiers, *args):
    """The trainer of a short command."""
    _, *given = ddpo(tmp_path / "run", pipeline, classifiers, "--model.steps=1")
    return in_process("validate", *given, *args, "--model.policy=null", "--ckpt_path=null").trainer


def newest(trainer):
    return [c for c in trainer.checkpoint_callbacks if c.monitor is None]


def test_a_run_writes_curves_and_its_newest_state(tiny_pipeline, tiny_classifiers, tmp_path):
    trainer = built(tmp_path, tiny_pipeline, tiny_classifiers)
    assert [type(logger) for logger in trainer.loggers] == [TensorBoardLogger]
    assert Path(trainer.log_dir) == tmp_path / "run" / "tensorboard"
    (kept,) = newest(trainer)
    assert (kept.dirpath, kept.filename) == (str(tmp_path / "run" / "checkpoints"), "newest")
    # the best one is written first, so that the newest knows of it
    assert trainer.checkpoint_callbacks[-1] is kept


def test_either_can_be_replaced_or_left_out(tiny_pipeline, tiny_classifiers, tmp_path):
    trainer = built(
        tmp_path, tiny_pipeline, tiny_classifiers, "--trainer.logger=CSVLogger",
        "--trainer.logger.save_dir=csv", "--newest_checkpoint.every_n_train_steps=5",
    )  # fmt: skip
    assert [type(logger) for logger in trainer.loggers] == [CSVLogger]
    assert newest(trainer)[0]._every_n_train_steps == 5
    (tmp_path / "none.yaml").write_text("trainer: {callbacks: null}")
    trainer = built(
        tmp_path, tiny_pipeline, tiny_classifiers, f"--config={tmp_path / 'none.yaml'}",
        "--trainer.logger=false", "--trainer.enable_checkpointing=false",
    )  # fmt: skip
    assert trainer.loggers == trainer.checkpoint_callbacks == []


def test_a_configuration_that_lists_both_as_before_has_one_of_each(
    tiny_pipeline, tiny_classifiers, tmp_path
):
    before = {"trainer": {"logger": LOGGER, "callbacks": [NEWEST]}}
    (tmp_path / "before.yaml").write_text(yaml.safe_dump(before))
    trainer = built(
        tmp_path, tiny_pipeline, tiny_classifiers, f"--config={tmp_path / 'before.yaml'}"
    )
    assert len(trainer.loggers) == len(newest(trainer)) == 1
    default = built(tmp_path, tiny_pipeline, tiny_classifiers)
    # a checkpoint keeps the state of a callback under this name
    assert newest(trainer)[0].state_key == newest(default)[0].state_key
    assert isinstance(newest(trainer)[0], ModelCheckpoint)

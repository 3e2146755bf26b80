import warnings

import pytest
import torch

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules import OnePassDDPO
from rl4med_ddpo.lightning_modules.policy_gradient.idle_rollouts import IdleRollouts
from support.command_line import ddpo, in_process
from support.own_rewards import Constant
from support.tiny import RecordedDDPO, prompts, tiny_ddpo
from support.trainers import quiet_trainer


@pytest.mark.parametrize("kind", ["DDPO", "OnePassDDPO"])
def test_one_sample_a_prompt_is_refused_with_a_group_baseline(
    kind, tiny_pipeline, tiny_classifiers, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    command = ddpo(tmp_path, tiny_pipeline, tiny_classifiers, f"--model={kind}")
    updates = "--model.updates=1"
    with pytest.raises(UserError, match="samples_per_epoch is the number of prompts"):
        in_process(*command, updates, "--data.samples_per_epoch=4")
    assert not list(tmp_path.rglob("*.ckpt"))


def test_one_sample_a_prompt_is_compared_with_past_rollouts(
    tiny_pipeline, tiny_classifiers, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    cli = in_process(
        *ddpo(tmp_path, tiny_pipeline, tiny_classifiers, "--model.baseline=window"),
        "--data.samples_per_epoch=4", "--data.validation_samples_per_prompt=0",
        "--model.steps=2", "--trainer.max_epochs=1", "--trainer.callbacks=null",
    )  # fmt: skip
    assert cli.trainer.global_step == 2


@pytest.mark.parametrize("kind", [RecordedDDPO, OnePassDDPO])
def test_rollouts_that_teach_nothing_are_loud(kind, tiny_pipeline, tiny_classifiers, tmp_path):
    module = tiny_ddpo(
        tiny_pipeline, tiny_classifiers, kind=kind, reward=Constant(), steps=2, updates=1
    )
    trainer = quiet_trainer(tmp_path, max_epochs=3)
    with pytest.warns(UserWarning, match="nothing was learnt from the last 3 rollouts"):
        trainer.fit(module, datamodule=prompts(8))


def test_a_single_advantage_ends_the_count():
    idle, none, some = IdleRollouts(), torch.zeros(4), torch.tensor([0.0, 0.0, 0.0, -1e-3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for advantages in (none, none, some, none, none):
            idle.count(advantages)
    assert idle.in_a_row == 2

import math
from functools import partial

import pytest
import torch

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules import Brightness, OnePassDDPO
from rl4med_ddpo.lightning_modules.policy_gradient.non_finite import (
    Fault,
    SkippedUpdates,
    draw_again,
)
from support.dermoscopy import PROMPTS
from support.tiny import RecordedDDPO, distance, prompts, state_of, tiny_ddpo
from support.trainers import quiet_trainer


@pytest.fixture
def make(tiny_pipeline, tiny_classifiers):
    return partial(tiny_ddpo, tiny_pipeline, tiny_classifiers, reward=Brightness(), std_floor=1e-4)


def fit(module, folder, epochs=1, **options):
    trainer = quiet_trainer(folder, max_epochs=epochs, **options)
    trainer.fit(module, datamodule=prompts())
    return trainer


class Spoilt(RecordedDDPO):
    """Gets a NaN in one place of the first rollouts, and remembers weights and moments."""

    where, rollouts_spoilt = "reward", 1

    def make_sampler(self):
        sampler = super().make_sampler()
        collect = sampler.collect
        sampler.collect = lambda *args: self.spoilt(collect(*args))
        return sampler

    def spoilt(self, rollout):
        if self.where == "density" and self.is_spoilt:
            rollout.latents[3, 2, 0, 0, 0] = math.inf
            rollout.log_probs[3, 1] = math.nan
        if self.where == "loss" and self.is_spoilt:
            rollout.latents[3, 2, 0, 0, 0] = math.nan
        if self.where == "reward" and self.is_spoilt:
            rollout.scored.value[3] = math.nan
        return rollout

    def accumulate(self, *args):
        means = super().accumulate(*args)
        if self.where == "gradient" and self.is_spoilt:
            self.trained_parameters()[5].grad[0] = math.inf
        return means

    @property
    def is_spoilt(self):
        return self.current_epoch < self.rollouts_spoilt

    def on_train_start(self):
        self.before = state_of(self)


@pytest.mark.parametrize(
    ("where", "skipped", "steps_taken"),
    [("reward", 1, 0), ("density", 1, 0), ("loss", 1, 1), ("gradient", 2, 0)],
)
def test_what_is_not_finite_is_not_learnt(make, tmp_path, where, skipped, steps_taken):
    policy = make(kind=Spoilt)
    policy.where = where
    trainer = fit(policy, tmp_path)
    assert trainer.callback_metrics["trainer/skipped_updates"] == skipped
    assert trainer.global_step == len(policy.steps_taken) == steps_taken
    if not steps_taken:
        assert distance(state_of(policy), policy.before) == 0
        assert not policy.optimizers().state
    else:
        assert all(p.isfinite().all() for p in policy.trained_parameters())
    files = sorted((tmp_path / "non_finite").glob("*.pt"))
    assert len(files) == skipped
    (rollout,) = policy.rollouts
    faults = torch.load(files[0], weights_only=True)["faults"]
    if where == "gradient":
        assert faults == []
        return
    assert {fault["what"] for fault in faults} == {where}
    assert {fault["index"] for fault in faults} == {int(rollout.index[3])}
    assert {fault["prompt"] for fault in faults} == {rollout.prompts[3]}
    if where == "loss":
        # the state of one action, the action of another
        assert sorted(fault["step"] for fault in faults) == [1, 2]


def test_the_sample_can_be_drawn_again(make, tmp_path):
    policy = make(kind=Spoilt)
    fit(policy, tmp_path, epochs=2)
    (file,) = (tmp_path / "non_finite").glob("*.pt")
    again = make(kind=Spoilt)
    again.configure_model()
    latents = draw_again(again, file)
    torch.testing.assert_close(latents[0], policy.rollouts[0].latents[3], atol=1e-5, rtol=1e-5)
    other = make(steps=5)
    other.configure_model()
    with pytest.raises(UserError, match=r"steps=4.*the policy given has steps=5"):
        draw_again(other, file)
    other = make(unet=again.hparams.pipeline)
    with pytest.raises(UserError, match=r"unet=None.*the policy given has unet='"):
        draw_again(other, file)


def test_too_many_in_a_row_end_the_run(make, tmp_path):
    policy = make(kind=Spoilt, max_skipped=2)
    policy.rollouts_spoilt = 3
    with pytest.raises(UserError) as error:
        fit(policy, tmp_path, epochs=5)
    said = str(error.value)
    assert "3 updates in a row were not finite, 2 are allowed" in said
    assert f"sample {int(policy.rollouts[2].index[3])}" in said
    assert repr(policy.rollouts[2].prompts[3]) in said
    assert str(tmp_path) in said
    few = make(kind=Spoilt, max_skipped=2)
    few.rollouts_spoilt = 2
    trainer = fit(few, tmp_path, epochs=3)
    assert trainer.callback_metrics["trainer/skipped_updates"] == 2
    assert trainer.global_step == 2


def test_one_pass_skips_as_well(make, tmp_path):
    class OnePass(Spoilt, OnePassDDPO):
        where = "gradient"

    policy = make(kind=OnePass, updates=1)
    trainer = fit(policy, tmp_path, epochs=2)
    assert trainer.callback_metrics["trainer/skipped_updates"] == 1
    assert trainer.global_step == 1


def test_the_count_goes_on_after_a_resume_and_ends_with_an_update(tmp_path):
    counts = SkippedUpdates()
    fault = Fault("loss", math.nan, PROMPTS[0], 7, 3)
    assert str(fault) == f"loss nan of sample 7, step 3: {PROMPTS[0]!r}"
    with pytest.warns(UserWarning, match="sample 7, step 3"):
        counts.add([fault], tmp_path / "x.pt", most=2)
    again = SkippedUpdates()
    again.load(counts.state())
    again.add([], tmp_path / "y.pt", most=2)
    with pytest.raises(UserError, match="3 updates in a row"):
        again.add([fault] * 5, tmp_path / "z.pt", most=2)
    again.in_a_row = 0
    again.add([fault], tmp_path / "z.pt", most=2)
    assert again.state() == {"total": 4, "in_a_row": 1}

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from rl4med_ddpo.callbacks.reward_plateau import RewardPlateau, quiet_epochs
from rl4med_ddpo.foundation.errors import UserError

NOISE = 0.005  # sd of an epoch's mean reward: 256 samples of sd 0.08


def curve(epochs, seed, plateau_at=10_000):
    """Rise by 0.05 in 30 epochs until the plateau, with noise."""
    rise = 0.7 + np.minimum(np.arange(epochs), plateau_at) * 0.05 / 30
    return rise + np.random.default_rng(seed).normal(0, NOISE, epochs)


def stop_epoch(rewards, stopper=None):
    """Return the epoch (from 1) after which the callback stops, and its sentence."""
    stopper = stopper or RewardPlateau()
    for epoch, reward in enumerate(rewards, start=1):
        stop, reason = stopper._evaluate_stopping_criteria(torch.tensor(reward))
        if stop:
            return epoch, reason
    return None, None


def quiet_by_hand(rewards, window, min_delta, warmup):
    count = 0
    for n in range(1, len(rewards) + 1):
        if n <= warmup or n < 2 * window:
            continue
        new = sum(rewards[n - 1 - i] for i in range(window)) / window
        old = sum(rewards[n - 1 - window - i] for i in range(window)) / window
        count = count + 1 if abs(new - old) < min_delta else 0
    return count


@pytest.mark.parametrize("seed", range(20))
def test_counts_quiet_epochs_as_a_count_from_the_first_does(seed):
    draw = np.random.default_rng(seed)
    rewards = draw.normal(0.7, 0.01, draw.integers(1, 40)).tolist()
    window, warmup = int(draw.integers(1, 6)), int(draw.integers(0, 20))
    expected = quiet_by_hand(rewards, window, 0.006, warmup)
    assert quiet_epochs(rewards, window, 0.006, warmup) == expected


def test_a_rising_reward_does_not_stop():
    stops = [stop_epoch(curve(120, seed))[0] for seed in range(100)]
    assert stops == [None] * 100


def test_a_falling_reward_does_not_stop():
    assert stop_epoch(1 - curve(120, 0)) == (None, None)


def test_a_plateau_stops_after_it_began_and_soon():
    stops = [stop_epoch(curve(160, seed, plateau_at=40))[0] for seed in range(100)]
    assert None not in stops
    assert min(stops) > 40
    # both windows must have left the rise (20 epochs), then 5 quiet epochs, then bad luck
    assert sorted(stops)[90] <= 40 + 2 * 10 + 5
    assert max(stops) <= 40 + 40


def test_a_reward_that_is_flat_from_the_start_stops_after_warmup_and_patience():
    assert stop_epoch([0.667] * 60)[0] == 25
    assert stop_epoch([0.667] * 60, RewardPlateau(warmup=0))[0] == 24
    assert stop_epoch([0.667] * 60, RewardPlateau(warmup=40, patience=2))[0] == 42


def test_the_reason_is_one_sentence_with_its_numbers():
    epoch, reason = stop_epoch([0.5] * 22 + [0.501] * 60)
    assert epoch == 25
    assert reason == (
        "Stopped after epoch 25: reward/mean is on a plateau, for its mean over epochs 16 to 25 "
        "(0.5003) differs by +0.0003 from that over the 10 epochs before, and the difference has "
        "been below 0.005 for 5 epochs in a row."
    )


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_stops_at_once(broken):
    epoch, reason = stop_epoch([0.7, 0.71, broken, 0.72])
    assert epoch == 3
    assert reason == f"Stopped after epoch 3: reward/mean is {broken}."


def test_a_nan_is_never_part_of_a_plateau():
    assert quiet_epochs([0.5] * 10 + [float("nan")] + [0.5] * 10, 5, 0.1, 0) == 1


@pytest.mark.parametrize(
    "setting", [{"min_delta": 0}, {"patience": 0}, {"window": 0}, {"warmup": -1}]
)
def test_impossible_settings_are_refused(setting):
    with pytest.raises(UserError, match="min_delta must be positive"):
        RewardPlateau(**setting)


class Policy(L.LightningModule):
    """Earns what the curve says, and logs it as DDPO does: in `training_step`, by hand."""

    def __init__(self, rewards, name="reward/mean"):
        super().__init__()
        self.automatic_optimization = False
        self.layer = nn.Linear(1, 1)
        self.rewards = rewards
        self.name = name

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        self.optimizers().step()
        self.log(self.name, float(self.rewards[self.current_epoch]))


def fit(path, rewards, stopper=None, ckpt_path=None, name="reward/mean", **options):
    stopper = stopper or RewardPlateau()
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        default_root_dir=path,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": len(rewards), "callbacks": [stopper], "enable_checkpointing": False}
        | options,
    )
    trainer.fit(Policy(rewards, name), DataLoader(torch.zeros(1, 1)), ckpt_path=ckpt_path)
    trainer.save_checkpoint(path / "end.ckpt")
    return trainer, stopper


def test_fit_stops_where_the_curve_does_and_says_why(tmp_path, caplog):
    rewards = curve(100, 3, plateau_at=30)
    expected, reason = stop_epoch(rewards)
    with caplog.at_level("INFO", "lightning.pytorch"):
        trainer, stopper = fit(tmp_path, rewards)
    assert trainer.current_epoch == expected < 100
    assert stopper.stopped_epoch == expected - 1
    assert stopper.stopping_reason_message == reason
    assert reason in caplog.text
    change = trainer.callback_metrics["reward/mean_change"].item()
    new, old = rewards[expected - 10 : expected], rewards[expected - 20 : expected - 10]
    assert change == pytest.approx(new.mean() - old.mean(), abs=1e-6)


def test_a_checkpoint_can_keep_the_best_policy_by_the_smoothed_reward(tmp_path):
    rewards = [0.5, 0.9, 0.5, 0.6, 0.7, 0.8, 0.7, 0.3, 0.2]
    keeper = ModelCheckpoint(
        tmp_path, "best", "reward/mean_smoothed", mode="max", save_on_train_epoch_end=True
    )
    callbacks = [RewardPlateau(window=3), keeper]
    fit(tmp_path, rewards, callbacks=callbacks, enable_checkpointing=True)
    means = [np.mean(rewards[max(0, n - 3) : n]) for n in range(1, len(rewards) + 1)]
    kept = torch.load(keeper.best_model_path, weights_only=True)
    assert kept["epoch"] == int(np.argmax(means)) == 6
    assert keeper.best_model_score.item() == pytest.approx(max(means), abs=1e-6)


@pytest.mark.parametrize("pause", [5, 20, 43])
def test_a_resumed_run_stops_in_the_same_epoch(tmp_path, pause):
    rewards = curve(100, 3, plateau_at=30)
    whole, stopper = fit(tmp_path, rewards)
    assert whole.current_epoch > pause
    fit(tmp_path, rewards, max_epochs=pause)
    resumed, again = fit(tmp_path, rewards, ckpt_path=tmp_path / "end.ckpt")
    assert resumed.current_epoch == whole.current_epoch
    assert again.stopping_reason_message == stopper.stopping_reason_message


def test_a_run_that_ended_on_a_plateau_does_not_go_on_when_resumed(tmp_path):
    rewards = curve(100, 3, plateau_at=30)
    whole, _ = fit(tmp_path, rewards)
    again, stopper = fit(tmp_path, rewards, ckpt_path=tmp_path / "end.ckpt")
    assert again.current_epoch == whole.current_epoch
    assert len(stopper.rewards) == whole.current_epoch


def test_a_run_that_ended_on_a_plateau_goes_on_with_more_patience(tmp_path):
    rewards = curve(100, 3, plateau_at=30)
    whole, _ = fit(tmp_path, rewards)
    patient = RewardPlateau(patience=15)
    again, _ = fit(tmp_path, rewards, patient, ckpt_path=tmp_path / "end.ckpt")
    expected, _ = stop_epoch(rewards, RewardPlateau(patience=15))
    assert again.current_epoch == expected > whole.current_epoch


def test_a_metric_that_nothing_logs_is_named_with_those_that_exist(tmp_path):
    with pytest.raises(UserError, match=r"'reward/mean'.*\n.*reward/total"):
        fit(tmp_path, [0.5], name="reward/total")


def test_state_is_plain(tmp_path):
    fit(tmp_path, curve(3, 0))
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]
    (state,) = state.values()
    assert [type(r) for r in state["rewards"]] == [float] * 3


class OneRanksReward(Policy):
    """Logs what this process alone has seen."""

    def training_step(self, batch, batch_idx):
        self.optimizers().step()
        mine = 0.01 if self.global_rank else -0.01
        self.log(self.name, float(self.rewards[self.current_epoch]) + mine * self.current_epoch)

    def on_train_end(self):
        (stopper,) = [c for c in self.trainer.callbacks if isinstance(c, RewardPlateau)]
        seen = {"rewards": stopper.rewards, "stopped_epoch": stopper.stopped_epoch}
        torch.save(seen, f"{self.trainer.default_root_dir}/{self.global_rank}.pt")


def test_two_processes_decide_alike_even_if_they_saw_different_rewards(tmp_path):
    rewards = curve(60, 3, plateau_at=10)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        logger=False,
        callbacks=[RewardPlateau()],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        max_epochs=60,
    )
    trainer.fit(OneRanksReward(rewards), DataLoader(torch.zeros(2, 1)))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert ranks[0]["stopped_epoch"] == stop_epoch(rewards)[0] - 1
    assert ranks[0]["rewards"] == pytest.approx(rewards[: len(ranks[0]["rewards"])], abs=1e-6)

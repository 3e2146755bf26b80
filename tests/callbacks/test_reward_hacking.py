import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from rl4med_ddpo.callbacks import RewardHacking
from rl4med_ddpo.foundation.errors import UserError
from support.trainers import quiet_trainer


class Scripted(L.LightningModule):
    """Logs given scores of reward and judge in each validation."""

    def __init__(self, rewards, judged):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.scores = [*zip(rewards, judged, strict=True)]

    def training_step(self, batch, batch_idx):
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        every = self.trainer.check_val_every_n_epoch
        reward, judged = self.scores[self.current_epoch // every]
        self.log("val/reward", reward)
        self.log("val/apr", judged)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, rewards, judged, every=1, **options):
    callback = RewardHacking(**options)
    data = DataLoader([0])
    trainer = quiet_trainer(
        folder, max_epochs=every * len(rewards), callbacks=[callback], check_val_every_n_epoch=every
    )
    trainer.fit(Scripted(rewards, judged), data, data)
    return trainer, callback


def test_a_rising_reward_under_a_falling_judge_stops_after_patience_epochs(tmp_path):
    rewards = [0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
    judged = [0.4, 0.5, 0.6, 0.5, 0.45, 0.4, 0.3, 0.2]
    trainer, callback = fit(tmp_path, rewards, judged, patience=2)
    # the judge's best is the third epoch's, the fourth to sixth are worse
    assert trainer.current_epoch == 6
    assert callback.stopped_epoch == 5
    for part in ("after epoch 3", "0.7000 to 0.8500", "0.6000 to 0.4000", "since epoch 4"):
        assert part in callback.stopping_reason_message
    assert trainer.callback_metrics["val/judge_fall"].item() == pytest.approx(0.2)
    assert trainer.callback_metrics["val/reward_rise"].item() == pytest.approx(0.15)


def test_scores_are_shown_over_the_distance_from_the_start(tmp_path):
    class Distant(Scripted):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("val/sqrt_kl", 0.1 * self.current_epoch)

    callback, data = RewardHacking(), DataLoader([0])
    trainer = quiet_trainer(
        tmp_path, max_epochs=3, callbacks=[callback], logger=TensorBoardLogger(tmp_path, "", "")
    )
    trainer.fit(Distant([0.5, 0.6, 0.7], [0.4, 0.5, 0.4]), data, data)
    assert callback.distances == pytest.approx([0.0, 0.1, 0.2])
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert len(events.Images("val/over_sqrt_kl")) == 3


def test_patience_counts_epochs_not_validations(tmp_path):
    rewards, judged = [0.5, 0.6, 0.7, 0.8, 0.9], [0.6, 0.5, 0.4, 0.3, 0.2]
    trainer, _ = fit(tmp_path, rewards, judged, every=3, patience=4)
    # validations after epochs 3, 6, 9, 12: from 6 to 12 are more than 4 epochs, to 9 only 3
    assert trainer.current_epoch == 12


@pytest.mark.parametrize(
    ("rewards", "judged"),
    [
        ([0.5, 0.6, 0.7, 0.8], [0.4, 0.5, 0.6, 0.7]),
        ([0.8, 0.7, 0.6, 0.5], [0.7, 0.6, 0.5, 0.4]),
        ([0.5, 0.6, 0.7, 0.8], [0.5, 0.48, 0.47, 0.46]),
        ([0.5, 0.6, 0.7, 0.8], [0.6, 0.5, 0.59, 0.5]),
    ],
    ids=["both rise", "both fall", "the judge hardly falls", "the judge recovers"],
)
def test_what_is_no_hacking_goes_on(tmp_path, rewards, judged):
    trainer, callback = fit(tmp_path, rewards, judged, patience=1)
    assert trainer.current_epoch == 4
    assert callback.stopping_reason_message is None


def test_scores_go_on_after_a_resume():
    before, after = RewardHacking(), RewardHacking(patience=3)
    before.epochs, before.rewards, before.judged = [0, 1], [0.5, 0.6], [0.6, 0.5]
    after.load_state_dict(before.state_dict())
    assert (after.epochs, after.rewards, after.judged) == ([0, 1], [0.5, 0.6], [0.6, 0.5])
    assert after.patience == 3


def test_a_judge_of_the_whole_prompt_is_heard_and_its_scores_found_again(tmp_path):
    """The artifacts get better, melanoma and nevus worse."""

    class Whole(Scripted):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("val/apr6", 0.6 - 0.1 * self.current_epoch)

    callback, data = RewardHacking(patience=1), DataLoader([0])
    key = callback.state_key
    trainer = quiet_trainer(tmp_path, max_epochs=9, callbacks=[callback])
    scores = [0.1 * i for i in range(9)]
    trainer.fit(Whole(scores, scores), data, data)
    assert trainer.current_epoch == 3
    assert "val/apr6 has fallen" in callback.stopping_reason_message
    assert callback.state_key == key == RewardHacking(monitor="val/apr").state_key


def test_what_no_validation_logs_is_named(tmp_path):
    with pytest.raises(UserError, match=r"watches val/apr6, .*\n.*val/apr, val/reward"):
        fit(tmp_path, [0.5], [0.5], monitor="val/apr6")


@pytest.mark.parametrize("options", [{"patience": -1}, {"min_fall": 0.0}, {"min_rise": -0.1}])
def test_settings_that_never_or_always_stop_are_refused(options):
    with pytest.raises(UserError, match="patience and min_rise must be at least 0"):
        RewardHacking(**options)

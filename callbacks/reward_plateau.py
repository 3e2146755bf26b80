"""Stop when the reward no longer changes: the end of Algorithm 1."""

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks.early_stopping import EarlyStopping, EarlyStoppingReason
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.trainer import Trainer


def windowed_change(rewards: Sequence[float], window: int) -> float:
    """Return the mean of the last `window` rewards less the mean of the `window` before them."""
    new, old = rewards[-window:], rewards[-2 * window : -window]
    return (math.fsum(new) - math.fsum(old)) / window


def quiet_epochs(rewards: Sequence[float], window: int, min_delta: float, warmup: int) -> int:
    """Count how many epochs in a row, up to the last, changed the windowed mean by little.

    Args:
        rewards: Mean reward of every epoch so far.
        window: Epochs in each of the two means that are compared.
        min_delta: A change of this size or more, up or down, ends the count.
        warmup: Epochs at the start that never count.
    """
    first = max(warmup + 1, 2 * window)
    quiet = 0
    for end in range(len(rewards), first - 1, -1):
        # a NaN is no small change
        if not abs(windowed_change(rewards[:end], window)) < min_delta:
            break
        quiet += 1
    return quiet


class RewardPlateau(EarlyStopping):
    """Stops the training once the reward's change between successive iterations is small.

    Algorithm 1 ends so. The reward of a single epoch is noisy, so the means over the last `window`
    epochs and over the `window` epochs before are compared. A falling reward changes as well and
    does not stop the run; a reward that is NaN or infinite stops it at once.

    Args:
        monitor: Logged metric, one value an epoch.
        min_delta: Change of the windowed mean below which an epoch is quiet, in units of the
            metric. Should lie above the noise, sd of an epoch's mean x sqrt(2 / window), and
            below what a run that still learns gains in `window` epochs.
        patience: Quiet epochs in a row that stop the run.
        window: Epochs in each mean.
        warmup: Epochs at the start that do not count as quiet.
    """

    def __init__(
        self,
        monitor: str = "reward/mean",
        min_delta: float = 0.005,
        patience: int = 5,
        window: int = 10,
        warmup: int = 20,
    ) -> None:
        if not (min_delta > 0 and patience >= 1 and window >= 1 and warmup >= 0):
            raise UserError(
                f"RewardPlateau(min_delta={min_delta}, patience={patience}, window={window}, "
                f"warmup={warmup}): min_delta must be positive, patience and window at least 1, "
                "warmup at least 0"
            )
        super().__init__(monitor, min_delta, patience, mode="max", check_on_train_epoch_end=True)
        self.window = window
        self.warmup = warmup
        self.rewards: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do not train on when the resumed run had already ended here."""
        if self._on_plateau() and not trainer.should_stop:
            trainer.should_stop = True
            rank_zero_info(
                f"{self.stopping_reason_message or self._plateau_message()}\n"
                "The resumed run had ended: to train on, raise patience or lower min_delta."
            )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Decide, and log the windowed mean and the change that decides.

        A ModelCheckpoint with `monitor: reward/mean_smoothed` and `save_on_train_epoch_end: true`
        keeps the best policy by the windowed mean.
        """
        super().on_train_epoch_end(trainer, pl_module)
        recent = self.rewards[-self.window :]
        logged = {"smoothed": math.fsum(recent) / max(1, len(recent))}
        if len(self.rewards) >= 2 * self.window:
            logged["change"] = windowed_change(self.rewards, self.window)
        for name, value in logged.items():
            pl_module.log(f"{self.monitor}_{name}", value, sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values; the settings are not among them, so new ones hold after a resume."""
        return {
            "rewards": list(self.rewards),
            "stopped_epoch": self.stopped_epoch,
            "stopping_reason": self.stopping_reason.value,
            "stopping_reason_message": self.stopping_reason_message,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.rewards = list(state_dict["rewards"])
        self.stopped_epoch = state_dict["stopped_epoch"]
        self.stopping_reason = EarlyStoppingReason(state_dict["stopping_reason"])
        self.stopping_reason_message = state_dict["stopping_reason_message"]

    def _run_early_stopping_check(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:
            return
        current = trainer.callback_metrics.get(self.monitor)
        if current is None:
            raise UserError(
                f"RewardPlateau watches {self.monitor!r}, which nothing logs at the end of an "
                f"epoch.\n  Logged: {', '.join(sorted(trainer.callback_metrics)) or 'nothing'}"
            )
        # the mean over processes, in case each has logged a value of its own
        current = current.squeeze().to(trainer.strategy.root_device)
        reward = trainer.strategy.reduce(current, reduce_op="mean")
        should_stop, reason = self._evaluate_stopping_criteria(reward)
        if should_stop:
            trainer.should_stop = True
            self.stopped_epoch = trainer.current_epoch
            self.stopping_reason_message = reason
            rank_zero_info(reason)

    def _evaluate_stopping_criteria(self, current: Tensor) -> tuple[bool, str | None]:
        self.rewards.append(current.item())
        if not math.isfinite(self.rewards[-1]):
            self.stopping_reason = EarlyStoppingReason.NON_FINITE_METRIC
            return True, (
                f"Stopped after epoch {len(self.rewards)}: {self.monitor} is {self.rewards[-1]}."
            )
        if self._on_plateau():
            self.stopping_reason = EarlyStoppingReason.PATIENCE_EXHAUSTED
            return True, self._plateau_message()
        return False, None

    def _on_plateau(self) -> bool:
        self.wait_count = quiet_epochs(self.rewards, self.window, self.min_delta, self.warmup)
        return self.wait_count >= self.patience

    def _plateau_message(self) -> str:
        n, w = len(self.rewards), self.window
        mean = math.fsum(self.rewards[-w:]) / w
        return (
            f"Stopped after epoch {n}: {self.monitor} is on a plateau, for its mean over epochs "
            f"{n - w + 1} to {n} ({mean:.4f}) differs by "
            f"{windowed_change(self.rewards, w):+.4f} from that over the {w} epochs before, and "
            f"the difference has been below {self.min_delta} for {self.wait_count} epochs in a row."
        )

"""Stop when the policy learns to please its reward rather than to draw what is asked."""

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks.early_stopping import EarlyStopping, EarlyStoppingReason
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.trainer import Trainer
from rl4med_ddpo.report.figures import curves_over

DISTANCE = "val/sqrt_kl"
WHOLE_PROMPT = "val/apr6"


def hacked_since(
    rewards: Sequence[float], judged: Sequence[float], min_rise: float, min_fall: float
) -> int | None:
    """Return from which scoring on the reward has stood higher and the judge lower than before.

    Both are compared with where they stood at the judge's best. A scoring counts if the reward is
    above that by `min_rise` and the judge below it by `min_fall`; counted are those in a row up to
    the last.

    Args:
        rewards: Mean reward of every scoring so far, on fixed noise.
        judged: The judge's score of the same images.
        min_rise: In units of the reward.
        min_fall: In units of the judge's score.

    Returns:
        The index of the first in the row, or None if the last does not count.
    """
    if not judged:
        return None
    best = max(range(len(judged)), key=judged.__getitem__)
    since = None
    for i in range(len(judged) - 1, best, -1):
        rises = rewards[i] - rewards[best] >= min_rise
        if not (rises and judged[best] - judged[i] >= min_fall):
            break
        since = i
    return since


class RewardHacking(EarlyStopping):
    """Stops the training when the reward rises while the judge falls.

    Both are scored on the same images, of fixed prompts and noise, so their changes are the
    policy's. The gap between the judge's best and its last score is logged as `val/judge_fall`.
    TensorBoard also shows both over the root of the KL divergence from the policy before training,
    where optimizing a proxy too far shows as a fall of the true score (Gao et al., "Scaling laws
    for reward model overoptimization", 2023).
    Best weights are kept by a ModelCheckpoint that monitors the judge.

    Args:
        reward: Logged reward of the validation images.
        monitor: Logged score of the judge on the same images; null takes val/apr6 where the judge
            reads the whole prompt, else val/apr.
        patience: Epochs that it must last, from the first such validation on.
        min_rise: Least rise of the reward, from where it stood at the judge's best, that counts.
        min_fall: Least fall of the judge from its best that counts. Should lie above its noise:
            with n images and a rate p about 2 sqrt(p (1 - p) / n), 0.06 for 256 images at p = 0.6.
    """

    def __init__(
        self,
        reward: str = "val/reward",
        monitor: str | None = None,
        patience: int = 20,
        min_rise: float = 0.005,
        min_fall: float = 0.05,
    ) -> None:
        if not (patience >= 0 and min_rise >= 0 and min_fall > 0):
            raise UserError(
                f"RewardHacking(patience={patience}, min_rise={min_rise}, min_fall={min_fall}): "
                "patience and min_rise must be at least 0, min_fall positive"
            )
        self.given = monitor or "val/apr"
        super().__init__(self.given, patience=patience, mode="max", check_on_train_epoch_end=False)
        self.takes_the_whole_prompt = monitor is None
        self.reward, self.min_rise, self.min_fall = reward, min_rise, min_fall
        self.epochs: list[int] = []
        self.rewards: list[float] = []
        self.judged: list[float] = []
        self.distances: list[float] = []

    @property
    def state_key(self) -> str:
        """Name the state in a checkpoint, by what was asked to be monitored."""
        return self._generate_state_key(monitor=self.given, mode=self.mode)

    def state_dict(self) -> dict[str, Any]:
        """Return the scores so far and why it stopped; the settings are not among them."""
        return {
            "epochs": self.epochs,
            "rewards": self.rewards,
            "judged": self.judged,
            "distances": self.distances,
            "stopping_reason_message": self.stopping_reason_message,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        for name in ("epochs", "rewards", "judged", "distances"):
            setattr(self, name, list(state_dict[name]))
        self.stopping_reason_message = state_dict["stopping_reason_message"]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log how far reward and judge have come since the judge's best."""
        if self.judged:
            best = self.judged.index(max(self.judged))
            pl_module.log("val/reward_rise", self.rewards[-1] - self.rewards[best])
            pl_module.log("val/judge_fall", self.judged[best] - self.judged[-1])

    def _run_early_stopping_check(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:
            return
        logged = trainer.callback_metrics
        if self.takes_the_whole_prompt and WHOLE_PROMPT in logged:
            self.monitor = WHOLE_PROMPT
        missing = [name for name in (self.reward, self.monitor) if name not in logged]
        if missing:
            raise UserError(
                f"RewardHacking watches {' and '.join(missing)}, which no validation logs.\n"
                f"  Logged: {', '.join(sorted(logged)) or 'nothing'}"
            )
        self.epochs.append(trainer.current_epoch)
        # every process has gathered the same scores
        self.rewards.append(logged[self.reward].item())
        self.judged.append(logged[self.monitor].item())
        if DISTANCE in logged:
            self.distances.append(logged[DISTANCE].item())
            self._show(trainer)
        since = hacked_since(self.rewards, self.judged, self.min_rise, self.min_fall)
        if since is None or self.epochs[-1] - self.epochs[since] < self.patience:
            return
        best = self.judged.index(max(self.judged))
        self.stopped_epoch = trainer.current_epoch
        self.stopping_reason = EarlyStoppingReason.PATIENCE_EXHAUSTED
        self.stopping_reason_message = (
            f"Stopped after epoch {self.epochs[-1] + 1}: the reward is being hacked. Since the "
            f"judge's best, after epoch {self.epochs[best] + 1}, {self.reward} has risen from "
            f"{self.rewards[best]:.4f} to {self.rewards[-1]:.4f} while {self.monitor} has fallen "
            f"from {self.judged[best]:.4f} to {self.judged[-1]:.4f}, in every validation since "
            f"epoch {self.epochs[since] + 1}."
        )
        trainer.should_stop = True
        rank_zero_info(self.stopping_reason_message)

    def _show(self, trainer: L.Trainer) -> None:
        scores = {self.reward: self.rewards, self.monitor: self.judged}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                figure = curves_over(self.distances, scores, "root of KL from the start")
                logger.experiment.add_figure("val/over_sqrt_kl", figure, trainer.current_epoch)

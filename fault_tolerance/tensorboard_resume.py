"""Keep TensorBoard's curves in step with the checkpoints: no gap after a resume, no double step."""

import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from rl4med_ddpo.foundation.trainer import Trainer

WRITTEN = "fit_events.txt"
"""Lists the event files that `fit` has written: `test` and others write to the same folder."""


class TensorBoardResume(Callback):
    """Notes in each checkpoint how far the event files reach, and cuts them there on a resume.

    What a killed run logged after its last checkpoint is logged again, and what Lightning would
    have logged just after the checkpoint is kept in it.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Any] | None = None
        self.is_restored = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget the run before this one."""
        self.kept, self.is_restored = None, False

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take what the checkpoint says about the curves."""
        self.kept = checkpoint.get("curves")

    def on_train_start(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Cut the curves to the checkpoint's, or put those of a run that left none aside."""
        self._restore(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Do so where nothing was left to train: the end of the curves may not be written yet."""
        self._restore(trainer)

    def _restore(self, trainer: Trainer) -> None:
        if self.is_restored or not trainer.is_global_zero or trainer.fast_dev_run:
            return
        self.is_restored = True
        kept = self.kept or {"sizes": {}, "pending": {}, "step": 0}
        for logger in tensorboards(trainer):
            folder, own = Path(logger.log_dir), event_file(logger)
            for name in _listed(folder):
                if name != own:
                    _cut(folder / name, kept["sizes"].get(name, 0))
            with (folder / WRITTEN).open("a") as file:
                file.write(f"{own}\n")
            if kept["pending"]:
                logger.log_metrics(kept["pending"], kept["step"])
                logger.save()

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note the sizes of the event files, and what is still to be logged for this epoch."""
        pending, step = self._pending(trainer)
        if not trainer.is_global_zero or not tensorboards(trainer):
            return
        sizes = {}
        for logger in tensorboards(trainer):
            logger.experiment.flush()
            folder = Path(logger.log_dir)
            paths = [folder / name for name in _listed(folder)]
            sizes |= {path.name: path.stat().st_size for path in paths if path.exists()}
        checkpoint["curves"] = {"sizes": sizes, "pending": pending, "step": step}

    def _pending(self, trainer: L.Trainer) -> tuple[dict[str, float], int]:
        """Compute what Lightning logs once the hooks at the end of an epoch are through."""
        connector = trainer._logger_connector
        at_epoch_end = trainer.training and connector._first_loop_iter is None
        step = trainer.fit_loop.epoch_loop._batches_that_stepped - 1
        if not at_epoch_end:
            return {}, step
        metrics = {name: float(value) for name, value in connector.metrics["log"].items()}
        return (metrics | {"epoch": float(trainer.current_epoch)} if metrics else {}), step


def tensorboards(trainer: L.Trainer) -> list[TensorBoardLogger]:
    """List a trainer's TensorBoard loggers."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def event_file(logger: TensorBoardLogger) -> str:
    """Name the file that a logger writes now."""
    return Path(logger.experiment.file_writer.event_writer._file_name).name


def _listed(folder: Path) -> list[str]:
    listed = folder / WRITTEN
    return listed.read_text().split() if listed.exists() else []


def _cut(path: Path, size: int) -> None:
    """Shorten an event file to what a checkpoint knows of it; one it does not know is renamed."""
    if not path.exists():
        return
    if size:
        os.truncate(path, min(size, path.stat().st_size))
    else:
        # TensorBoard reads what is called tfevents
        path.rename(path.with_name(path.name.replace("tfevents", "replaced")))

"""Keep curves in step with the checkpoints: no gap after a resume, no step logged twice."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_warn

from rl4med_ddpo.fault_tolerance.ending import stops_within_epoch
from rl4med_ddpo.foundation.files import write_whole
from rl4med_ddpo.foundation.trainer import Trainer

WRITTEN = "fit_events.txt"
"""Lists the event files that `fit` has written: `test` and others write to the same folder."""
METRICS = ExperimentWriter.NAME_METRICS_FILE


class LoggerResume(Callback):
    """Notes in each checkpoint how far the curves reach, and cuts them there on a resume.

    What a killed run logged after its last checkpoint is logged again, and what Lightning would
    have logged just after the checkpoint is kept in it. TensorBoardLogger and CSVLogger are
    continued so; of others the run says that they continue their curves as they see fit.
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
        for logger in continued(trainer):
            if isinstance(logger, CSVLogger):
                _cut_rows(logger, kept.get("rows", {}).get(_place(trainer, logger), 0))
            else:
                _cut_events(logger, kept["sizes"])
            if kept["pending"]:
                logger.log_metrics(kept["pending"], kept["step"])
                logger.save()

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note how much is written, and what is still to be logged for this epoch."""
        pending, step = self._pending(trainer)
        if not trainer.is_global_zero or not continued(trainer):
            return
        sizes, rows = {}, {}
        for logger in continued(trainer):
            if isinstance(logger, CSVLogger):
                logger.save()
                rows[_place(trainer, logger)] = len(_rows(logger))
            else:
                logger.experiment.flush()
                folder = Path(logger.log_dir)
                paths = [folder / name for name in _listed(folder)]
                sizes |= {path.name: path.stat().st_size for path in paths if path.exists()}
        checkpoint["curves"] = {"sizes": sizes, "rows": rows, "pending": pending, "step": step}

    def _pending(self, trainer: L.Trainer) -> tuple[dict[str, float], int]:
        """Compute what Lightning logs once the hooks at the end of an epoch are through."""
        connector = trainer._logger_connector
        at_epoch_end = trainer.training and connector._first_loop_iter is None
        at_epoch_end = at_epoch_end and not stops_within_epoch(trainer)
        step = trainer.fit_loop.epoch_loop._batches_that_stepped - 1
        if not at_epoch_end:
            return {}, step
        metrics = {name: float(value) for name, value in connector.metrics["log"].items()}
        return (metrics | {"epoch": trainer.current_epoch} if metrics else {}), step


class KeepingWriter(ExperimentWriter):
    """A CSVLogger's writer that goes on with the rows it finds; Lightning's deletes them."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.exists():
            with path.open(newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or ())


def continued(trainer: L.Trainer) -> list[TensorBoardLogger | CSVLogger]:
    """List the loggers whose curves are cut and continued."""
    return [x for x in trainer.loggers if isinstance(x, TensorBoardLogger | CSVLogger)]


def versions(trainer: L.Trainer) -> list[dict[str, Any]]:
    """Name the folder and the version of each logger that `reopen` can continue."""
    return [
        {"folder": os.path.relpath(x.root_dir, trainer.default_root_dir), "version": x.version}
        for x in continued(trainer)
    ]


def reopen(trainer: L.Trainer, written: Sequence[dict[str, Any]], resumes: bool) -> None:
    """Have loggers write where the run wrote before, rather than to a new version or from scratch.

    Args:
        trainer: Whose loggers have written nothing yet.
        written: `versions` of the run before; empty where it is not known.
        resumes: Whether the run continues an earlier one.
    """
    known = {entry["folder"]: entry["version"] for entry in written}
    for logger in continued(trainer):
        folder = os.path.relpath(logger.root_dir, trainer.default_root_dir)
        if logger._version is None and folder in known:
            logger._version = known[folder]
        if isinstance(logger, CSVLogger) and logger._version is not None:
            logger._experiment = KeepingWriter(logger.log_dir)
    others = [type(x).__name__ for x in trainer.loggers if x not in continued(trainer)]
    if resumes and others:
        rank_zero_warn(
            f"{', '.join(others)}: this run resumes, and whether the curves before are continued "
            "is up to the logger and its options (WandbLogger: id; MLFlowLogger: run_id; "
            "CometLogger: experiment_key)"
        )


def event_file(logger: TensorBoardLogger) -> str:
    """Name the file that a logger writes now."""
    return Path(logger.experiment.file_writer.event_writer._file_name).name


def _listed(folder: Path) -> list[str]:
    listed = folder / WRITTEN
    return listed.read_text().split() if listed.exists() else []


def _cut_events(logger: TensorBoardLogger, sizes: dict[str, int]) -> None:
    """Shorten the event files to what a checkpoint knows; those it does not know are renamed."""
    folder, own = Path(logger.log_dir), event_file(logger)
    for name in _listed(folder):
        path, size = folder / name, sizes.get(name, 0)
        if name == own or not path.exists():
            continue
        if size:
            os.truncate(path, min(size, path.stat().st_size))
        else:
            # TensorBoard reads what is called tfevents
            path.rename(path.with_name(path.name.replace("tfevents", "replaced")))
    with (folder / WRITTEN).open("a") as file:
        file.write(f"{own}\n")


def _place(trainer: L.Trainer, logger: CSVLogger) -> str:
    return os.path.relpath(logger.log_dir, trainer.default_root_dir)


def _rows(logger: CSVLogger) -> list[dict[str, str]]:
    path = Path(logger.log_dir) / METRICS
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _cut_rows(logger: CSVLogger, n: int) -> None:
    """Shorten a table to its first n rows; one of which a checkpoint knows none is renamed."""
    path, rows = Path(logger.log_dir) / METRICS, _rows(logger)
    if len(rows) <= n:
        return
    if not n:
        free = (path.with_name(f"metrics.replaced-{i}.csv") for i in range(1, 1_000_000))
        path.rename(next(name for name in free if not name.exists()))
        logger.experiment.metrics_keys = []
        return
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows[:n])]
    write_whole(path, "\r\n".join(lines) + "\r\n")

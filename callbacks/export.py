"""Leave what was trained in the diffusers format when training ends."""

from pathlib import Path
from typing import Literal

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from fault_tolerance.loading import read_checkpoint


class Export(Callback):
    """Writes the module's `export(folder)` at the end of `fit`.

    Args:
        dirpath: Folder to write; null writes nothing.
        weights: `last`, or `best` by the first ModelCheckpoint that monitors a metric. A policy can
            fall far below its best past the plateau.
    """

    def __init__(self, dirpath: str | None, weights: Literal["best", "last"] = "best") -> None:
        self.dirpath = Path(dirpath) if dirpath else None
        self.weights = weights

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the folder on rank 0."""
        if not trainer.is_global_zero or not self.dirpath:
            return
        if self.weights == "best":
            self._load_best(trainer, pl_module)
        pl_module.export(self.dirpath)
        rank_zero_info(f"exported the {self.weights} weights to {self.dirpath}")

    def _load_best(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        best = next(
            (c for c in trainer.checkpoint_callbacks
             if isinstance(c, ModelCheckpoint) and c.monitor and c.best_model_path),
            None,
        )  # fmt: skip
        if best is None:
            rank_zero_info("no checkpoint was scored, so the last weights stand for the best")
            return
        checkpoint = read_checkpoint(Path(best.best_model_path))
        pl_module.load_state_dict(checkpoint["state_dict"])
        rank_zero_info(f"best by {best.monitor}: {best.best_model_score:.4f}")

"""Leave what was trained in the diffusers format when training ends, with a card."""

import json
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from rl4med_ddpo.datamodules.vocabulary import DERMOSCOPY
from rl4med_ddpo.foundation.checkpoints import read_checkpoint
from rl4med_ddpo.foundation.files import write_whole
from rl4med_ddpo.foundation.trainer import Trainer, trial
from rl4med_ddpo.lightning_modules.autoencoder import Autoencoder
from rl4med_ddpo.lightning_modules.text_to_image import TextToImage
from rl4med_ddpo.report.model_card import model_card
from rl4med_ddpo.report.results import METRICS, RESULTS

CARD_FILE = "README.md"


class Export(Callback):
    """Writes the module's `export(folder)` and a model card at the end of `fit`.

    The card is the folder's README.md; `test` adds its scores to it.

    Args:
        dirpath: Folder to write; null writes nothing.
        weights: `last`, or `best` by the first ModelCheckpoint that monitors a metric. A policy can
            fall far below its best past the plateau.
    """

    def __init__(self, dirpath: str | None, weights: Literal["best", "last"] = "best") -> None:
        self.dirpath = Path(dirpath) if dirpath else None
        self.weights = weights

    def on_fit_end(self, trainer: Trainer, pl_module: TextToImage | Autoencoder) -> None:
        """Write the folder on rank 0."""
        if not trainer.is_global_zero or not self.dirpath or trial(trainer):
            return
        if self.weights == "best":
            self._load_best(trainer, pl_module)
        pl_module.export(self.dirpath)
        self._write_card(self.dirpath / CARD_FILE, trainer, pl_module, None)
        rank_zero_info(f"exported the {self.weights} weights to {self.dirpath}")

    def on_test_end(self, trainer: Trainer, pl_module: TextToImage | Autoencoder) -> None:
        """Put the scores into the card of what was scored."""
        results = Path(trainer.default_root_dir) / RESULTS / METRICS
        card = None if trial(trainer) or not self.dirpath else self.dirpath / CARD_FILE
        if trainer.is_global_zero and card and card.is_file() and results.is_file():
            self._write_card(card, trainer, pl_module, json.loads(results.read_text()))

    def _write_card(
        self,
        card: Path,
        trainer: Trainer,
        pl_module: TextToImage | Autoencoder,
        results: dict[str, Any] | None,
    ) -> None:
        vocabulary = getattr(trainer.datamodule, "vocabulary", DERMOSCOPY)
        write_whole(card, model_card(pl_module, vocabulary, results))

    def _load_best(self, trainer: Trainer, pl_module: TextToImage | Autoencoder) -> None:
        best = next(
            (c for c in trainer.checkpoint_callbacks
             if isinstance(c, ModelCheckpoint) and c.monitor and c.best_model_path),
            None,
        )  # fmt: skip
        if best is None:
            rank_zero_info("no checkpoint was scored, so the last weights are exported as the best")
            return
        checkpoint = read_checkpoint(Path(best.best_model_path))
        pl_module.load_state_dict(checkpoint["state_dict"])
        rank_zero_info(f"best by {best.monitor}: {best.best_model_score:.4f}")

"""Leave what was trained in the diffusers format when training ends, with a card."""

import json
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from rl4med_ddpo.datamodules.isic import ISICDataModule
from rl4med_ddpo.datamodules.prompts import ISICPromptDataModule
from rl4med_ddpo.datamodules.provenance import Origin, origin_of
from rl4med_ddpo.datamodules.vocabulary import DERMOSCOPY
from rl4med_ddpo.foundation.checkpoints import read_checkpoint
from rl4med_ddpo.foundation.files import located, write_whole
from rl4med_ddpo.foundation.hashes import weights_digest
from rl4med_ddpo.foundation.trainer import Trainer, trial
from rl4med_ddpo.lightning_modules.autoencoder import Autoencoder
from rl4med_ddpo.lightning_modules.pipelines.source import is_hub_id
from rl4med_ddpo.lightning_modules.text_to_image import TextToImage
from rl4med_ddpo.report.model_card import CARD_FILE, head_of, model_card, with_scores
from rl4med_ddpo.report.results import METRICS, RESULTS


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
        write_whole(self.dirpath / CARD_FILE, self._card(trainer, pl_module))
        rank_zero_info(f"exported the {self.weights} weights to {self.dirpath}")

    def on_test_end(self, trainer: Trainer, pl_module: TextToImage | Autoencoder) -> None:
        """Put the scores into the card of the exported model, if that is what was scored."""
        results = Path(trainer.default_root_dir) / RESULTS / METRICS
        if trial(trainer) or not (trainer.is_global_zero and self.dirpath and results.is_file()):
            return
        card = self.dirpath / CARD_FILE
        if not card.is_file():
            return
        scored = json.loads(results.read_text())
        if _is_of(scored, pl_module, self.dirpath):
            write_whole(card, with_scores(card.read_text(), scored))

    def _card(self, trainer: Trainer, pl_module: TextToImage | Autoencoder) -> str:
        pipeline: str = pl_module.hparams.pipeline
        before = head_of(located(pipeline))
        base = before.get("base_model")
        if is_hub_id(pipeline):
            base = pipeline.partition("@")[0]
        data, origin = trainer.datamodule, Origin()
        if isinstance(data, ISICPromptDataModule):
            # the images are those that the pipeline was trained on, if its card tells
            if seen := before.get("training_data"):
                origin = Origin(seen, before.get("license", ""))
        elif isinstance(data, ISICDataModule):
            origin = origin_of(data)
        return model_card(pl_module, getattr(data, "vocabulary", DERMOSCOPY), origin, base)

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


def _is_of(scores: dict[str, Any], pl_module: TextToImage | Autoencoder, folder: Path) -> bool:
    """Tell whether scores are those of the weights at hand, and these are the exported ones."""
    if not isinstance(pl_module, TextToImage) or Path(pl_module.trained_from or "") != folder:
        return False
    sampler = scores.get("provenance", {}).get("sampler", {})
    return sampler.get("digest of unet") == weights_digest(pl_module.model.unet)

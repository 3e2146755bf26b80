"""Keep what a classifier says of each test image, for Table 4 and whoever wants to recount."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from rl4med_ddpo.datamodules.provenance import data_provenance
from rl4med_ddpo.foundation.hashes import weights_digest
from rl4med_ddpo.foundation.trainer import Trainer, products_folder
from rl4med_ddpo.lightning_modules.classifier import AttributeClassifier
from rl4med_ddpo.lightning_modules.trained_weights import weights_file
from rl4med_ddpo.report.results import RESULTS, versions, write_csv, write_results

PREDICTIONS = "predictions.csv"


class Predictions(Callback):
    """Writes `results/predictions.csv` and `results/metrics.json` when a classifier is tested.

    One row an image: `id`, `lesion_id`, `source`, the label and the probability of each attribute.

    Args:
        arm: What the classifier was trained on, a column of Table 4: `real`, `oversampling`,
            `classical`, `sd` or `sd_rl`.
    """

    def __init__(self, arm: str = "real") -> None:
        self.arm = arm
        self.rows: list[dict[str, Any]] = []

    def on_test_start(self, trainer: Trainer, pl_module: AttributeClassifier) -> None:
        """Start from scratch."""
        self.rows = []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: AttributeClassifier,
        outputs: dict[str, Any],
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note a batch."""
        probabilities = outputs["logits"].double().sigmoid().tolist()
        targets = outputs["targets"].int().tolist()
        for name, said, true in zip(outputs["id"], probabilities, targets, strict=True):
            row: dict[str, Any] = {"id": name}
            for attribute, p, t in zip(pl_module.attributes, said, true, strict=True):
                row |= {attribute: t, f"p_{attribute}": p}
            self.rows.append(row)

    def on_test_end(self, trainer: Trainer, pl_module: AttributeClassifier) -> None:
        """Merge the processes' rows and write them on the first."""
        folder = products_folder(trainer) / RESULTS
        part = folder / f"predictions-{trainer.global_rank}.part.csv"
        write_csv(part, pd.DataFrame(self.rows), index=False)
        trainer.strategy.barrier("Predictions")
        if not trainer.is_global_zero:
            return
        parts = [folder / f"predictions-{rank}.part.csv" for rank in range(trainer.world_size)]
        found = pd.concat([pd.read_csv(p) for p in parts]).sort_values("id")
        data = trainer.datamodule
        known = data.splits.test[["id", "lesion_id", "source"]]
        write_csv(folder / PREDICTIONS, known.merge(found, on="id").sort_values("id"), index=False)
        for p in parts:
            p.unlink()
        path = write_results(
            products_folder(trainer), self._results(trainer, pl_module, len(found))
        )
        rank_zero_info(f"predictions of {len(found):,} test images next to {path}")

    def _results(self, trainer: Trainer, pl_module: AttributeClassifier, n: int) -> dict[str, Any]:
        data = trainer.datamodule
        extra = None if data.extra is None else vars(data.extra)
        return {
            "kind": "classifier",
            "arm": self.arm,
            "seed": data.seed,
            "vocabulary": asdict(data.vocabulary),
            "n": n,
            "scores": {k: float(v) for k, v in trainer.callback_metrics.items()},
            "provenance": {
                "backbone": pl_module.backbone,
                "image_size": pl_module.image_size,
                "attributes": list(pl_module.attributes),
                "digest": weights_digest(pl_module),
                "weights": weights_file(Path(trainer.ckpt_path)) if trainer.ckpt_path else None,
                "extra": extra,
                "data": data_provenance(data),
                "versions": versions(),
            },
        }

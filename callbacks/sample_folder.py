"""Keep what `predict` and `test` draw as a folder that reads like ISIC 2019."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from rl4med_ddpo.callbacks.sample_png import is_whole, read_row, rows_of, sample_id, write_sample
from rl4med_ddpo.datamodules.images import INPUT
from rl4med_ddpo.datamodules.sample_tables import write_tables
from rl4med_ddpo.foundation.errors import UserError, name_few
from rl4med_ddpo.foundation.files import write_whole
from rl4med_ddpo.foundation.hashes import has_weights, weights_digest
from rl4med_ddpo.foundation.trainer import Trainer, products_folder, trial
from rl4med_ddpo.lightning_modules.reward_fine_tuning import RewardFineTuning
from rl4med_ddpo.lightning_modules.samples import Samples

SETTINGS = "settings.json"
SAMPLER_SETTINGS = ("seed", "steps", "eta", "guidance", "sample_batch")
"""Hyperparameters that decide what an image looks like, to the last bit."""


class SampleFolder(Callback):
    """Writes what `predict` and `test` draw to a folder in ISIC 2019's layout, with its tables.

    The label of an image is what its prompt asked for; `manifest.csv` has the prompts, the noise
    and the networks' readings as well. Each image appears whole or not at all. Killed and started
    again, on any number of processes, the command draws what is missing, and the folder becomes the
    same, byte for byte, as one drawn in one go. What `predict` has drawn, `test` need not.

    Sums round by the number of threads. So on a CPU each process computes on one thread: give
    `--trainer.devices` as many processes as there are cores.

    Args:
        dirpath: Folder to write. Samples of another policy, seed or sampler are not mixed with
            those it holds: it is refused.
    """

    def __init__(self, dirpath: str) -> None:
        self.dirpath = Path(dirpath)
        self._take(self.dirpath)
        self.asked: list[str] = []
        self.drawn = 0
        self.threads = torch.get_num_threads()

    def _take(self, root: Path) -> None:
        self.root, self.images = root, root / INPUT

    def on_predict_start(self, trainer: L.Trainer, pl_module: RewardFineTuning) -> None:
        """Compare the folder's settings with these."""
        # a batch of another process, or one drawn before, gives None
        warnings.filterwarnings("ignore", "predict returned None")
        self._open(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: RewardFineTuning) -> None:
        """Do as for prediction."""
        self._open(trainer, pl_module)

    def on_predict_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Say in the batch which of its samples are there already."""
        batch["drawn"] = [is_whole(self.path_of(name)) for name in _ids(batch)]

    on_test_batch_start = on_predict_batch_start

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: RewardFineTuning,
        outputs: Samples | None,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write this process's samples, and note all that were asked for."""
        self._write(trainer, pl_module, outputs, batch)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: RewardFineTuning,
        outputs: Samples | None,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Do as for prediction."""
        self._write(trainer, pl_module, outputs, batch)

    def on_predict_end(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Write the tables on rank 0, once all processes are done."""
        self._close(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Do as for prediction; the tables are there before anything scores them."""
        self._close(trainer, pl_module)
        trainer.strategy.barrier("SampleFolder")

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Give the threads back."""
        torch.set_num_threads(self.threads)

    def path_of(self, name: str) -> Path:
        """Return where the sample of this id lies."""
        return self.images / f"{name}.png"

    def _open(self, trainer: L.Trainer, pl_module: RewardFineTuning) -> None:
        self.asked, self.drawn = [], 0
        settings = settings_of(trainer, pl_module)
        self._take(products_folder(trainer) / self.dirpath.name if trial(trainer) else self.dirpath)
        if trial(trainer) and trainer.is_global_zero:
            shutil.rmtree(self.root, ignore_errors=True)
        try:
            self.images.mkdir(parents=True, exist_ok=True)
            if trainer.is_global_zero:
                self._claim(settings)
        except OSError as error:
            raise UserError(f"cannot write samples to {self.root}: {error}") from error
        trainer.strategy.barrier("SampleFolder")
        self._require(settings)
        self.threads = torch.get_num_threads()
        if pl_module.device.type == "cpu":
            torch.set_num_threads(1)

    def _write(
        self,
        trainer: Trainer,
        pl_module: RewardFineTuning,
        outputs: Samples | None,
        batch: dict[str, Any],
    ) -> None:
        self.asked += _ids(batch)
        if outputs is None:
            return
        rows = rows_of(outputs, pl_module.hparams.seed, trainer.datamodule.vocabulary)
        for image, row in zip(outputs.images.cpu(), rows, strict=True):
            write_sample(self.images, image, row)
        self.drawn += len(rows)

    def _close(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        torch.set_num_threads(self.threads)
        drawn = torch.tensor(self.drawn, device=trainer.strategy.root_device)
        drawn = trainer.strategy.reduce(drawn, reduce_op="sum")
        if not trainer.is_global_zero:
            return
        found = {name: read_row(self.path_of(name)) for name in self.asked}
        rows = [row for row in found.values() if row is not None]
        lost = [name for name, row in found.items() if row is None]
        if lost:
            raise UserError(
                f"{len(lost):,} of {len(found):,} samples in {self.images} have vanished while the "
                f"others were drawn: {name_few(lost)}.\n  The same command draws them again."
            )
        write_tables(self.root, rows, trainer.datamodule.vocabulary)
        others = sum(path.suffix == ".png" for path in self.images.iterdir()) - len(rows)
        more = f"; {others:,} more lie there, which were not asked for now and are not listed"
        rank_zero_info(
            f"{len(rows):,} samples in {self.root}, {int(drawn):,} of them drawn now"
            + more * (others > 0)
        )

    def _claim(self, settings: dict[str, Any]) -> None:
        """Write the settings into a folder that has no images yet."""
        if not any(self.images.iterdir()):
            write_whole(self.root / SETTINGS, json.dumps(settings, indent=2) + "\n")

    def _require(self, settings: dict[str, Any]) -> None:
        """Refuse a folder whose samples were drawn with other settings."""
        what_to_do = (
            "  Images of both would mix. Draw into another folder (SampleFolder's dirpath; or\n"
            "  --trainer.default_root_dir, under which it lies), or move this one away."
        )
        try:
            there = json.loads((self.root / SETTINGS).read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.root} holds images, but its {SETTINGS} cannot be read ({error}), so "
                f"nobody knows how they were drawn.\n{what_to_do}"
            ) from error
        differing = [
            f"    {name}: {there.get(name)} there, {settings.get(name)} now"
            for name in dict.fromkeys([*settings, *there])
            if there.get(name) != settings.get(name)
        ]
        if differing:
            raise UserError(
                f"{self.root} holds samples that were drawn with other settings:\n"
                + "\n".join(differing)
                + f"\n{what_to_do}"
            )


def _ids(batch: dict[str, Any]) -> list[str]:
    return list(map(sample_id, batch["name"], batch["index"].tolist()))


def settings_of(trainer: L.Trainer, module: RewardFineTuning) -> dict[str, Any]:
    """Return what decides the images and their scores: the sampler and each network's digest."""
    return {
        **{name: module.hparams[name] for name in SAMPLER_SETTINGS},
        "precision": str(trainer.precision),
        "device": module.device.type,
        "reward": module.reward.described(),
        **{
            f"digest of {name}": weights_digest(child)
            for name, child in module.networks().items()
            if has_weights(child)
        },
    }

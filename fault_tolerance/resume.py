"""Resume exactly where a run stopped, and only if it is still the same run."""

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from rl4med_ddpo.fault_tolerance.recovery import Found, newest_whole
from rl4med_ddpo.fault_tolerance.settings import COMMIT, differences, is_allowed
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.manifest import Manifest, manifest_path, read_manifest
from rl4med_ddpo.foundation.randomness import key


class Resume(Callback):
    """Compares a run with the checkpoint it resumes from, and makes its randomness repeatable.

    A setting that decides the run's course and has changed is shown and refused, unless it is
    allowed; an allowed change of the optimizer takes effect.

    Args:
        allow: Settings that may differ from the checkpoint's, by their keys on the command line or
            the last part of them, such as `lr`. Several as `[lr, clip_range]`.
    """

    def __init__(self, allow: str | list[str] | None = None) -> None:
        self.allow = [allow] if isinstance(allow, str) else list(allow or [])
        self.settings: dict[str, Any] = {}
        self.found: Found | None = None
        self.changed: dict[str, tuple[Any, Any]] = {}
        self.announced: list[list[dict[str, Any]]] = []

    def start_from(
        self, trainer: L.Trainer, pl_module: L.LightningModule, ckpt_path: str | None
    ) -> str | None:
        """Choose the checkpoint of a `fit`: for `last` the newest whole one, None if there is none.

        Raises:
            UserError: if all are damaged, or if the run is no longer the same.
        """
        self.settings["world_size"] = trainer.world_size
        self.settings |= _commits_of(pl_module)
        self.found, self.changed = None, {}
        if ckpt_path == "last":
            repair = rank_zero_only.rank == 0
            found = [f for d in checkpoint_folders(trainer) if (f := newest_whole(d, repair))]
            self.found = max(found, key=lambda f: f.manifest.global_step, default=None)
            ckpt_path = str(self.found.path) if self.found else None
        elif ckpt_path:
            manifest = read_manifest(manifest_path(Path(ckpt_path).resolve()))
            self.found = Found(Path(ckpt_path), manifest) if manifest else None
        if self.found:
            self._require_same_run(self.found.manifest)
        return ckpt_path

    def _require_same_run(self, manifest: Manifest) -> None:
        self.changed = differences(manifest.settings, self.settings)
        if not self.changed:
            return
        lines = [f"    {key}: {old} -> {new}" for key, (old, new) in self.changed.items()]
        shown = "\n".join(lines)
        refused = [key for key in self.changed if not is_allowed(key, self.allow)]
        if not refused:
            rank_zero_warn(f"the run resumes with other settings than it began with:\n{shown}")
            return
        names = ", ".join(dict.fromkeys(key.rpartition(".")[2] for key in refused))
        raise UserError(
            f"settings that decide the course of the run differ from those of {manifest.file}:\n"
            f"{shown}\n"
            f"  To use the new ones: --resume.allow '[{names}]'\n"
            "  To start from scratch: --ckpt_path null, or another --trainer.default_root_dir"
        )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note what was fetched, and the optimizers' settings before they are replaced."""
        self.settings |= _commits_of(pl_module)
        self.announced = [
            [{k: v for k, v in group.items() if k != "params"} for group in o.param_groups]
            for o in trainer.optimizers
        ]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See that all processes resume from one state, and give allowed changes their effect."""
        mine = self.found.manifest.sha256 if self.found else None
        if trainer.strategy.broadcast(mine) != mine:
            raise UserError(
                f"process {trainer.global_rank} resumes from another state than process 0: "
                "do all see the same run folder?"
            )
        if trainer.strategy.broadcast(any("optimizer" in key for key in self.changed)):
            self._apply_announced(trainer)

    def _apply_announced(self, trainer: L.Trainer) -> None:
        if trainer.lr_scheduler_configs:
            raise UserError(
                "the optimizer's settings cannot change in the middle of a learning rate schedule: "
                "give the old ones, or start from scratch with --ckpt_path null"
            )
        for optimizer, announced in zip(trainer.optimizers, self.announced, strict=True):
            for group, settings in zip(optimizer.param_groups, announced, strict=True):
                group.update(settings)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let what is drawn from the global generators depend on the batch alone, not on the past.

        So dropout draws the same after a resume, and other numbers on each process.
        """
        seed = os.environ.get("PL_GLOBAL_SEED")
        if seed is not None:
            place = (trainer.current_epoch, batch_idx, trainer.global_rank)
            torch.manual_seed(key(int(seed), "global", *place))

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what the manifest says of the run."""
        checkpoint["run"] = {
            "between_steps": not (trainer.validating or trainer.sanity_checking),
            "settings": self.settings,
        }


def _commits_of(pl_module: L.LightningModule) -> dict[str, str]:
    """Ask a module for the commits of its hub ids, as far as the hub's cache has them."""
    commits = getattr(pl_module, "commits", dict)()
    return {f"{COMMIT}model.{option}": commit for option, commit in commits.items() if commit}


def checkpoint_folders(trainer: L.Trainer) -> list[Path]:
    """List the folders that a trainer's checkpoints go to."""
    given = [
        Path(c.dirpath)
        for c in trainer.checkpoint_callbacks
        if isinstance(c, ModelCheckpoint) and c.dirpath
    ]
    return list(dict.fromkeys(given)) or [Path(trainer.default_root_dir) / "checkpoints"]

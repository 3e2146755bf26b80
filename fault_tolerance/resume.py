"""Resume exactly where a run stopped, and only if it is still the same run."""

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from rl4med_ddpo.fault_tolerance.ending import (
    ended,
    keep_patience,
    stops_within_epoch,
    within_epoch,
)
from rl4med_ddpo.fault_tolerance.logger_resume import reopen, versions
from rl4med_ddpo.fault_tolerance.moved_run import follow_move
from rl4med_ddpo.fault_tolerance.recovery import Found, newest_whole
from rl4med_ddpo.fault_tolerance.schedule_resume import changed_schedules, continue_schedule
from rl4med_ddpo.fault_tolerance.settings import COMMIT, CONTENT, differences, is_allowed
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.manifest import Manifest, manifest_path, read_manifest
from rl4med_ddpo.foundation.randomness import key
from rl4med_ddpo.foundation.trainer import trial

SCHEDULE = "learning rate schedule"


class Resume(Callback):
    """Compares a run with the checkpoint it resumes from, and makes its randomness repeatable.

    A setting that decides the run's course and has changed is shown and refused, unless it is
    allowed; an allowed change of the optimizer takes effect, and an allowed change of a learning
    rate schedule gives the rates that the run would have had with it from its start.

    Args:
        allow: Settings that may differ from the checkpoint's, by their keys on the command line or
            the last part of them, such as `lr`. Several as `[lr, clip_range]`.
    """

    def __init__(self, allow: str | list[str] | None = None) -> None:
        self.allow = [allow] if isinstance(allow, str) else list(allow or [])
        self.settings: dict[str, Any] = {}
        self.callback_settings: dict[str, Any] = {}
        self.found: Found | None = None
        self.changed: dict[str, tuple[Any, Any]] = {}
        self.announced: list[list[dict[str, Any]]] = []
        self.loaded: dict[str, Any] = {}
        self.has_trained = False

    def start_from(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        datamodule: L.LightningDataModule | None,
        ckpt_path: str | None,
    ) -> str | None:
        """Choose the checkpoint of a `fit`: for `last` the newest whole one, None if there is none.

        Raises:
            UserError: if all are damaged, or if the run is no longer the same.
        """
        self._complete_settings(trainer, pl_module, datamodule)
        self.found, self.changed, self.loaded, self.has_trained = None, {}, {}, False
        place_checkpoints(trainer)
        if not trainer.checkpoint_callbacks and not trial(trainer):
            rank_zero_warn("this run keeps no checkpoints: it cannot be resumed")
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
        reopen(trainer, self.found.manifest.loggers if self.found else [], bool(ckpt_path))
        return ckpt_path

    def _complete_settings(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        datamodule: L.LightningDataModule | None,
    ) -> None:
        """Add what the configuration does not say: processes, hub commits, data, averaging."""
        averaging = (type(c).__name__ for c in trainer.callbacks if isinstance(c, WeightAveraging))  # pyright: ignore[reportAttributeAccessIssue]
        contents = getattr(datamodule, "contents", dict)()
        self.settings |= {
            "world_size": trainer.world_size,
            "trainer.callbacks.averaging": next(averaging, None),
            **{f"{CONTENT}data.{name}": content for name, content in contents.items()},
            **_commits_of(pl_module),
        }
        if getattr(pl_module, "schedule_follows_trainer", False):
            length = {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}
            self.settings |= {f"trainer.{name}": value for name, value in length.items()}

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

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let the callbacks' state follow a moved run folder, and the options given now."""
        self.loaded = checkpoint
        follow_move(trainer, checkpoint)
        keep_patience(trainer, checkpoint)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note what was fetched, and the optimizers' settings before they are replaced."""
        self.settings |= _commits_of(pl_module)
        if changed := changed_schedules(trainer, self.loaded):
            if not self.changed:
                raise UserError(
                    f"the {SCHEDULE} is not the one that the run began with, though no setting "
                    "has changed: its length or shape follows something else.\n  Give the run the "
                    "length it had, or start from scratch: --ckpt_path null"
                )
            for place in changed:
                continue_schedule(trainer, self.loaded, place)
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
        if self._has_ended():
            trainer.should_stop = True

    def _has_ended(self) -> bool:
        """Tell whether a callback ended the run, and has the options with which it did."""
        end = self.found.manifest.ended if self.found else {}
        now = self.callback_settings
        asked = end.get("settings", {})
        return bool(asked) and all(now.get(key) == value for key, value in asked.items())

    def _apply_announced(self, trainer: L.Trainer) -> None:
        for optimizer, announced in zip(trainer.optimizers, self.announced, strict=True):
            for group, settings in zip(optimizer.param_groups, announced, strict=True):
                group.update(settings)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let what is drawn from the global generators depend on the batch alone, not on the past.

        So dropout draws the same after a resume, and other numbers on each process.
        """
        self.has_trained = True
        seed = os.environ.get("PL_GLOBAL_SEED")
        if seed is not None:
            place = (trainer.current_epoch, batch_idx, trainer.global_rank)
            torch.manual_seed(key(int(seed), "global", *place))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say why nothing was trained, and what would train on."""
        if self.has_trained or not self.found:
            return
        if self._has_ended():
            end = self.found.manifest.ended
            why, remedy = end["why"], f"change the options of {end['by']} or leave it out"
        else:
            why = f"It has {self.found.manifest.epoch + 1} epochs, {trainer.global_step} steps"
            remedy = "raise --trainer.max_epochs or --trainer.max_steps"
        rank_zero_info(
            f"This run had ended before, and nothing was trained now. {why}.\n"
            f"  To train on: {remedy}. To start from scratch: --ckpt_path null"
        )

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what the manifest says of the run; `max_steps` may have ended it within an epoch."""
        if stops_within_epoch(trainer):
            within_epoch(trainer, checkpoint)
        between = not (trainer.validating or trainer.sanity_checking or accumulates(trainer))
        checkpoint["run"] = {
            "between_steps": between,
            "settings": self.settings,
            "ended": ended(trainer, self.callback_settings),
            "loggers": versions(trainer),
        }


def accumulates(trainer: L.Trainer) -> bool:
    """Tell whether gradients of earlier batches wait for the next optimizer step."""
    ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return trainer.training and trainer.fit_loop.epoch_loop._should_accumulate() and ready > 0


def _commits_of(pl_module: L.LightningModule) -> dict[str, str]:
    """Ask a module for the commits of its hub ids, as far as the hub's cache has them."""
    commits = getattr(pl_module, "commits", dict)()
    return {f"{COMMIT}model.{option}": commit for option, commit in commits.items() if commit}


def place_checkpoints(trainer: L.Trainer) -> None:
    """Give each ModelCheckpoint without a folder the run's own, where a resume looks for it.

    Lightning would take the logger's folder, which may be a new one for each turn.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and not callback.dirpath:
            callback.dirpath = os.path.realpath(Path(trainer.default_root_dir) / "checkpoints")


def checkpoint_folders(trainer: L.Trainer) -> list[Path]:
    """List the folders that a trainer's checkpoints go to."""
    given = [
        Path(c.dirpath)
        for c in trainer.checkpoint_callbacks
        if isinstance(c, ModelCheckpoint) and c.dirpath
    ]
    return list(dict.fromkeys(given)) or [Path(trainer.default_root_dir) / "checkpoints"]

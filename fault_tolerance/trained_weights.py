"""Which weights `validate`, `test` and `predict` score: trained ones, by name and hash."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from rl4med_ddpo.fault_tolerance.moved_run import follow_move
from rl4med_ddpo.fault_tolerance.recovery import newest_whole
from rl4med_ddpo.fault_tolerance.resume import checkpoint_folders, place_checkpoints
from rl4med_ddpo.foundation.checkpoints import read_checkpoint
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.hashes import sha256_of


def scored_weights(
    trainer: L.Trainer, pl_module: L.LightningModule, ckpt_path: str | None
) -> str | None:
    """Choose the weights to score, and say which they are.

    Args:
        trainer: Of the command.
        pl_module: A module with `exported_weights` names a folder that it loads by itself.
        ckpt_path: A file; `best` by the score that the run monitors; `last`; or None for what the
            module loads by itself, else the best.

    Returns:
        The checkpoint to load, None if the module loads its weights by itself.

    Raises:
        UserError: if the run has left no such weights.
    """
    exported = getattr(pl_module, "exported_weights", None)
    if ckpt_path is None and exported is not None:
        _say(Path(exported()))
        return None
    if ckpt_path in (None, "best", "last"):
        place_checkpoints(trainer)
        ckpt_path = str(_of_run(trainer, best=ckpt_path != "last"))
    assert ckpt_path is not None
    _say(Path(ckpt_path))
    return ckpt_path


def _of_run(trainer: L.Trainer, best: bool) -> Path:
    """Find the run's newest whole checkpoint, or the best that it knows of."""
    folders = checkpoint_folders(trainer)
    repair = rank_zero_only.rank == 0
    found = [f for folder in folders if (f := newest_whole(folder, repair))]
    if not found:
        raise UserError(
            f"there are no trained weights in {', '.join(map(str, folders))}, and untrained ones "
            "are not scored.\n  Train first: the same command with fit. Or name a checkpoint: "
            "--ckpt_path FILE"
        )
    newest = max(found, key=lambda f: f.manifest.global_step).path
    if not best:
        return newest
    checkpoint = read_checkpoint(newest)
    follow_move(trainer, checkpoint)
    states = checkpoint.get("callbacks", {})
    monitored = (
        states.get(c.state_key, {}).get("best_model_path")
        for c in trainer.checkpoint_callbacks
        if isinstance(c, ModelCheckpoint) and c.monitor
    )
    return next((Path(path) for path in monitored if path and Path(path).is_file()), newest)


def _say(path: Path) -> None:
    digest = f", sha256 {sha256_of(path)[:12]}" if path.exists() else ""
    rank_zero_info(f"weights: {path}{digest}")


@contextmanager
def refuse_misfits(ckpt_path: str | Path | None) -> Iterator[None]:
    """Turn torch's error about weights that do not fit a model into a message.

    Raises:
        UserError: naming the checkpoint, and what differs.
    """
    try:
        yield
    except RuntimeError as error:
        first, _, differing = str(error).partition("\n")
        if "loading state_dict" not in first:
            raise
        raise UserError(
            f"the checkpoint {ckpt_path} does not fit this model: {differing.strip()[:300]}\n"
            "  Give the options that it was trained with. A policy is scored from its exported "
            "folder, without --ckpt_path: --model.policy FOLDER"
        ) from error

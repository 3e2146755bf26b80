"""Which trained weights an evaluation scores: found, named with their hash, or refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from rl4med_ddpo.fault_tolerance.recovery import newest_whole
from rl4med_ddpo.fault_tolerance.resume import checkpoint_folders
from rl4med_ddpo.foundation.checkpoints import read_checkpoint
from rl4med_ddpo.foundation.errors import UserError, name_few
from rl4med_ddpo.foundation.hashes import sha256_of
from rl4med_ddpo.foundation.manifest import manifest_path, read_manifest

CHOICES = ("trained", "best", "last")


def scored_checkpoint(
    trainer: L.Trainer, module: L.LightningModule, ckpt_path: str | None
) -> str | None:
    """Find the checkpoint that `validate`, `test` or `predict` reads, and say which it is.

    Args:
        trainer: Of the run; its folder holds the checkpoints.
        module: What is scored.
        ckpt_path: `trained` is the best checkpoint, or the newest where none was scored; a module
            with a `policy` takes that instead. `best` and `last` are one of them, else a file.

    Returns:
        None if the module's own arguments name its weights.

    Raises:
        UserError: if there is no such checkpoint.
    """
    has_policy = "policy" in module.hparams
    if ckpt_path is None or (ckpt_path == "trained" and has_policy):
        return None
    path = _found(trainer, ckpt_path) if ckpt_path in CHOICES else Path(ckpt_path)
    if path is None:
        folders = ", ".join(map(str, checkpoint_folders(trainer)))
        which = "a checkpoint" if ckpt_path != "best" else "a checkpoint that was scored as best"
        raise UserError(
            f"there are no trained weights to score: {folders} does not hold {which}.\n"
            "  Train first, with `fit` and the same options, or name a file: --ckpt_path FILE"
        )
    if not path.is_file():
        raise UserError(
            f"there is no checkpoint {path}. Allowed for ckpt_path are a file, "
            f"{', '.join(CHOICES)} or null"
        )
    announce(path)
    return str(path)


def announce(path: Path) -> None:
    """Say which file the weights come from: itself, or the one in an exported folder."""
    if found := weights_file(path):
        rank_zero_info(f"the weights are those of {found['file']} (sha256 {found['sha256'][:12]})")


def weights_file(folder: Path) -> dict[str, str] | None:
    """Name a file of weights, or the one that an exported policy's folder holds, with its hash."""
    candidates = (folder, folder / "pytorch_lora_weights.safetensors",
                  folder / "unet" / "diffusion_pytorch_model.safetensors")  # fmt: skip
    file = next((path for path in candidates if path.is_file()), None)
    return {"file": str(file), "sha256": _sha256(file)} if file else None


@contextmanager
def weights_that_fit(module: L.LightningModule, ckpt_path: str | None) -> Iterator[None]:
    """Turn torch's list of weights that do not fit into one message.

    Raises:
        UserError: naming the first of them.
    """
    try:
        yield
    except RuntimeError as error:
        if ckpt_path is None or "in loading state_dict" not in str(error):
            raise
        reasons = [line.strip() for line in str(error).splitlines()[1:]]
        shown = name_few(reason[:200] for reason in reasons)
        raise UserError(
            f"the weights in {ckpt_path} do not fit this {type(module).__name__}: {shown}\n"
            "  Give the options of the run that wrote it: they are in config_fit.yaml of its "
            "run folder"
        ) from error


def _found(trainer: L.Trainer, which: Literal["trained", "best", "last"] | str) -> Path | None:
    best = None if which == "last" else _best(trainer)
    if best is not None or which == "best":
        return best
    return _newest(trainer)


def _newest(trainer: L.Trainer) -> Path | None:
    found = [f for d in checkpoint_folders(trainer) if (f := newest_whole(d, repair=False))]
    newest = max(found, key=lambda f: f.manifest.global_step, default=None)
    return newest.path if newest else None


def _best(trainer: L.Trainer) -> Path | None:
    """Return the file that the first ModelCheckpoint with a monitor kept as the best."""
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or not (callback.monitor and callback.dirpath):
            continue
        folder, name = Path(callback.dirpath), callback.filename or "{"
        fixed = folder / f"{name}{callback.FILE_EXTENSION}"
        if "{" not in name:
            return fixed if fixed.is_file() else None
        # the name has the score in it: the newest state knows which file that is
        newest = _newest(trainer)
        states = read_checkpoint(newest)["callbacks"] if newest else {}
        kept = states.get(callback.state_key, {}).get("best_model_path")
        return folder / Path(kept).name if kept else None
    return None


def _sha256(path: Path) -> str:
    manifest = read_manifest(manifest_path(path.resolve()))
    return manifest.sha256 if manifest else sha256_of(path)

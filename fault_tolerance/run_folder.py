"""Claim a run's folder before any work: it can be written, has room, and nobody else is in it."""

import fcntl
import json
import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path
from typing import IO

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from rl4med_ddpo.fault_tolerance.resume import checkpoint_folders
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.files import NOT_SUPPORTED
from rl4med_ddpo.foundation.trainer import Trainer

PROBE = ".probe"
LEAST_FREE = 50_000_000
"""Bytes without which no run is worth starting."""
_held: dict[Path, IO[str]] = {}
_made: list[Path] = []


def claim(folder: Path, command: str, unprotected: bool = False) -> None:
    """Check that a run can write its folder, and keep others of the same command out of it.

    The lock belongs to the process: the system releases it however the process ends.

    Args:
        folder: The run folder, made if need be.
        command: Subcommand of the run; each has a lock of its own.
        unprotected: Accept a file system without locks or without synced folders.

    Raises:
        UserError: naming the path, and who holds it or what its file system lacks.
    """
    _made[:] = [p for p in (folder, *folder.parents) if not os.path.exists(p)]
    _probe(folder)
    lacking = [*_unsynced(folder), *_lock(folder / f".{command}.lock", folder)]
    _require(lacking, folder, unprotected)


def abandon() -> None:
    """Give the folder of a run that was refused back, and leave no trace of it if it was new."""
    for lock, file in list(_held.items()):
        file.close()
        del _held[lock]
        if lock.parent in {folder.resolve() for folder in _made}:
            lock.unlink(missing_ok=True)
    with suppress(OSError):
        # from the inside out; what holds something stays
        for folder in _made:
            folder.rmdir()
    _made.clear()


def _require(lacking: list[str], folder: Path, unprotected: bool) -> None:
    """Name what protects a run and is lacking; refuse it unless that is accepted."""
    if not lacking:
        return
    listed = "\n".join(f"    {line}" for line in lacking)
    message = f"the file system of {folder} lacks what protects a run:\n{listed}"
    if not unprotected:
        raise UserError(
            f"{message}\n  Give a folder on another file system: --trainer.default_root_dir "
            "FOLDER, or accept this: --run_folder.unprotected=true"
        )
    rank_zero_warn(message)


def _unsynced(folder: Path) -> list[str]:
    """Say whether the names in a folder cannot be flushed to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        return [f"syncing a folder ({error}): when the machine fails, the last save may be lost"]
    finally:
        os.close(descriptor)
    return []


def _probe(folder: Path) -> None:
    """Make the folder, and write, read and delete a file in it."""
    probe = folder / PROBE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("probe")
        probe.read_text()
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"the run folder {folder} cannot be written: {error}.\n"
            "  Give one that can: --trainer.default_root_dir FOLDER, or mend its permissions"
        ) from error
    if free < LEAST_FREE:
        raise UserError(
            f"the disk of the run folder {folder} is full: {free:,} bytes are free, "
            f"{LEAST_FREE:,} are the least to start with.\n"
            "  Make room, or give a folder on another disk: --trainer.default_root_dir FOLDER"
        )


def _lock(path: Path, folder: Path) -> list[str]:
    """Take the lock; say so if the file system has none."""
    held = _held.pop(path.resolve(), None)
    if held is not None:
        held.close()
    file = path.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = _owner(file)
        file.close()
        if error.errno in NOT_SUPPORTED:
            return [f"locks ({error}): nothing keeps a second run out of the folder"]
        raise UserError(
            f"the run folder {folder} is in use by {owner}.\n"
            "  Two runs would overwrite each other's checkpoints. Wait for that one, stop it, or "
            "give another folder: --trainer.default_root_dir FOLDER"
        ) from error
    file.truncate(0)
    json.dump({"host": socket.gethostname(), "pid": os.getpid()}, file)
    file.flush()
    _held[path.resolve()] = file
    return []


def _owner(file: IO[str]) -> str:
    file.seek(0)
    try:
        owner = json.load(file)
        return f"process {owner['pid']} on host {owner['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def require_room(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk could not keep.

    Args:
        folder: Of the checkpoints.
        needed: Bytes that will be written besides what is there.
    """
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    if free < needed:
        raise UserError(
            f"the disk of {folder} has {free:,} bytes free; the checkpoints of this run need about "
            f"{needed:,}.\n  Make room, or give a folder on another disk: "
            "--trainer.default_root_dir FOLDER"
        )


class DiskSpaceCheck(Callback):
    """Checks, before the first step, that the checkpoints of a run can be written and will fit.

    Args:
        unprotected: Accept a file system without locks, where a second run is not kept out of the
            folder, or without synced folders, where a failure of the machine may lose a save.
    """

    def __init__(self, unprotected: bool = False) -> None:
        self.unprotected = unprotected

    def on_fit_start(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Probe the folders of the checkpoints, and compare the room with what will be written."""
        if not trainer.is_global_zero or trainer.fast_dev_run or not trainer.checkpoint_callbacks:
            return
        state = sum(t.numel() * t.element_size() for t in pl_module.state_dict().values())
        moments = 2 * sum(p.numel() * p.element_size() for p in _optimized(trainer))
        # the newest, the one before it, and one being written
        files = 2 + len(trainer.checkpoint_callbacks)
        for folder in checkpoint_folders(trainer):
            _probe(folder)
            _require(_unsynced(folder), folder, self.unprotected)
            there = sum(p.stat().st_size for p in folder.glob("*.ckpt") if not p.is_symlink())
            require_room(folder, files * (state + moments) - there)


def _optimized(trainer: L.Trainer) -> list[nn.Parameter]:
    return [p for o in trainer.optimizers for group in o.param_groups for p in group["params"]]

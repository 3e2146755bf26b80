"""Write and read checkpoints so that no moment of a crash leaves a run without a good one."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from rl4med_ddpo.foundation.checkpoints import read_checkpoint
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.files import sync, sync_folder
from rl4med_ddpo.foundation.manifest import Manifest, manifest_path, write_manifest
from rl4med_ddpo.foundation.progress import progress

LAST = "last.ckpt"
PART = ".part"


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint and its manifest next to their targets, syncs both, and renames both.

    The manifest takes its place last; until then it is found under the name it was written to.

    Lightning stages in TMPDIR and copies when that is another file system, so that a kill can
    destroy the old checkpoint and leave no new one; and a folder that cannot be written is passed
    over in silence. Here what `last.ckpt` names is kept under another name for one more save, so
    there are always two states to go back to.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Save; the state that was there before is good until this one is."""
        path = Path(path)
        with _errors_for_people(path, checkpoint):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(path.name + PART)
            try:
                size, sha256 = _write(checkpoint, part)
                progress.report("save.manifest")
                write_manifest(part, _manifest(checkpoint, path.name, size, sha256))
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            progress.report("save.replace")
            _keep_previous(path)
            progress.report("save.replace")
            os.replace(part, path)
            sync_folder(path.parent)
            progress.report("save.manifest")
            os.replace(manifest_path(part), manifest_path(path))
            sync_folder(path.parent)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load tensors and plain values, never code."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, then its manifest."""
        progress.report("prune")
        super().remove_checkpoint(path)
        progress.report("prune")
        manifest_path(Path(path)).unlink(missing_ok=True)


def _manifest(checkpoint: dict[str, Any], name: str, size: int, sha256: str) -> Manifest:
    run = checkpoint.get("run", {})
    return Manifest(
        file=name,
        bytes=size,
        sha256=sha256,
        epoch=checkpoint.get("epoch", 0),
        global_step=checkpoint.get("global_step", 0),
        between_steps=run.get("between_steps", True),
        settings=run.get("settings", {}),
        ended=run.get("ended", {}),
        loggers=run.get("loggers", []),
    )


def previous_path(path: Path) -> Path:
    """Name what a checkpoint becomes when a newer one takes its place."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def _keep_previous(path: Path) -> None:
    """Put aside the state that is about to be replaced, if it is the one to resume from.

    Whether a checkpoint is good is decided by its content, so its manifest can follow it.
    """
    last = path.with_name(LAST)
    if not path.is_file() or path.is_symlink() or last.resolve() != path.resolve():
        return
    os.replace(path, previous_path(path))
    progress.report("save.replace")
    if manifest_path(path).exists():
        os.replace(manifest_path(path), manifest_path(previous_path(path)))


class _Hashing:
    """A file that is hashed as it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        progress.report("save.write")
        written = self.file.write(data)
        self.sha256.update(data)
        self.size += written
        return written

    def flush(self) -> None:
        self.file.flush()


def _write(checkpoint: dict[str, Any], part: Path) -> tuple[int, str]:
    """Write a checkpoint to the disk itself; return its size and hash."""
    # unbuffered: an error shows at once, and not again when the file is closed
    with part.open("wb", buffering=0) as file:
        hashing = _Hashing(file)
        torch.save(checkpoint, hashing)  # pyright: ignore[reportArgumentType]
        progress.report("save.fsync")
        sync(file.fileno())
    return hashing.size, hashing.sha256.hexdigest()


@contextmanager
def _errors_for_people(path: Path, checkpoint: dict[str, Any]) -> Iterator[None]:
    """Say what is missing when a save fails: space, or permission."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = _cause(error)
        if cause is None:
            raise
        free = shutil.disk_usage(_existing(path)).free
        raise UserError(
            f"cannot save the checkpoint {path}: {cause.strerror}.\n"
            f"  needed: about {_bytes_of(checkpoint):,} bytes; free on that disk: {free:,} bytes "
            "(a quota or a limit on file sizes may allow less).\n"
            "  The checkpoints before it are untouched. Make room, or mend the folder's "
            "permissions, and give the same command again: it resumes from the newest of them."
        ) from error


def _cause(error: BaseException | None) -> OSError | None:
    """Find the system's error below torch's own."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.parents) if p.exists())


def _bytes_of(value: Any) -> int:
    """Count the bytes of all tensors in nested containers."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_bytes_of, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_bytes_of, value))
    return 0

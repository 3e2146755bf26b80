"""Find files that ship with the package, and write files that a crash cannot tear."""

import errno
import os
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
NOT_SUPPORTED = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK})
"""Errors of a file system that lacks an operation, such as locks or syncing a folder."""


def located(name: str | Path) -> Path:
    """Return where a file or folder is: here, or in the package if it ships under this name.

    Args:
        name: A path. What ships is `assets/...`, such as the embedded pipeline `assets/base`.
    """
    path = Path(name)
    is_shipped = path.parts[:1] == ("assets",) and not path.exists()
    return PACKAGE / path if is_shipped else path


def write_whole(path: Path, content: str | bytes, part: str = ".part") -> None:
    """Write a file that appears whole or not at all, also when the machine fails.

    Args:
        path: The file; missing folders are created.
        content: Text is encoded as UTF-8.
        part: Ending of the unfinished file. Processes that may write the same file at the same
            time each need their own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + part)
    with unfinished.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        sync(file.fileno())
    os.replace(unfinished, path)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """Flush an open file or folder to the disk, where its file system can.

    A run's folders are probed for that at its start: `fault_tolerance.run_folder`.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise

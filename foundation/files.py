"""Write files so that a crash at any moment leaves the old content or the new one."""

import os
from pathlib import Path


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
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Find the images that cannot be decoded, all of them, before training meets the first."""

import os
from collections.abc import Sequence
from pathlib import Path

from rl4med_ddpo.datamodules.images import read_image
from rl4med_ddpo.foundation.errors import UserError

_SHOWN = 3
_TAIL = 64
_ENDS = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG\r\n\x1a\n": b"IEND\xae\x42\x60\x82"}
"""How JPEG and PNG files begin, and how they end."""


def require_decodable(paths: Sequence[Path]) -> None:
    """Refuse images of which some are cut off, empty, or something else.

    Reads the first and last bytes of each; what looks wrong there is decoded, to be sure and to
    learn the cause. A byte that changed inside a file shows only when training reads it.

    Raises:
        UserError: with their number, and the first three with the cause.
    """
    suspects = [path for path in paths if not _looks_whole(path)]
    causes = [cause for path in suspects if (cause := _why_not(path))]
    if causes:
        shown = causes[:_SHOWN]
        if len(causes) > _SHOWN:
            shown.append(f"and {len(causes) - _SHOWN:,} more")
        raise UserError(
            f"{len(causes):,} of {len(paths):,} images are no whole JPEG or PNG files:\n  "
            + "\n  ".join(shown)
            + "\n  Download them again, or leave their ids out of the split files."
        )


def _looks_whole(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(8)
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            end = file.read()
    except OSError:
        return False
    return any(start.startswith(first) and last in end for first, last in _ENDS.items())


def _why_not(path: Path) -> str | None:
    try:
        read_image(path, size=1)
    except UserError as error:
        return str(error).partition("\n")[0]
    return None

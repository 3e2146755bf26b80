"""Find the images that cannot be decoded, all of them, before training meets the first."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rl4med_ddpo.datamodules.images import read_image
from rl4med_ddpo.foundation.errors import UserError

_SHOWN = 3
_TRIED = 20
_TAIL = 64
_ENDS = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG\r\n\x1a\n": b"IEND\xae\x42\x60\x82"}
"""How JPEG and PNG files begin, and how they end."""


def require_decodable(paths: Sequence[Path]) -> None:
    """Refuse images of which some are cut off, empty, or something else.

    Reads the first and last bytes of each; what looks wrong there is decoded, to be sure and to
    learn the cause, and so are the first few of 16-bit grey, which may use fewer bits than they
    declare. A byte that changed inside a file shows only when training reads it.

    Raises:
        UserError: with their number, and the first three with the cause.
    """
    looks = {path: _look(path) for path in paths}
    deep = [path for path, look in looks.items() if look == "16-bit grey"]
    suspects = [path for path, look in looks.items() if look == "broken"] + deep[:_TRIED]
    causes = [cause for path in suspects if (cause := _why_not(path))]
    if causes:
        shown = causes[:_SHOWN]
        if len(causes) > _SHOWN:
            shown.append(f"and {len(causes) - _SHOWN:,} more")
        raise UserError(
            f"{len(causes):,} of {len(paths):,} images cannot be read:\n  "
            + "\n  ".join(shown)
            + "\n  Download them again, or leave their ids out of the split files."
        )


def _look(path: Path) -> Literal["whole", "broken", "16-bit grey"]:
    try:
        with path.open("rb") as file:
            start = file.read(26)
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            end = file.read()
    except OSError:
        return "broken"
    if not any(start.startswith(first) and last in end for first, last in _ENDS.items()):
        return "broken"
    # of PNG's header: bits a channel, and the type of the colours
    return "16-bit grey" if start[:4] == b"\x89PNG" and start[24:] == b"\x10\x00" else "whole"


def _why_not(path: Path) -> str | None:
    try:
        read_image(path, size=1)
    except UserError as error:
        return str(error).partition("\n")[0]
    return None

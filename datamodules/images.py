"""Find the images of an ISIC folder, and read one as a square tensor."""

import os
import re
import struct
import zlib
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from PIL import ExifTags, Image
from torch import Tensor

from rl4med_ddpo.datamodules.tables import DOWNSAMPLED, IMAGE_SUFFIXES
from rl4med_ddpo.foundation.errors import UserError, name_few

Resize = Literal["squash", "crop"]

MAX_PIXELS = 50_000_000
INPUT = "ISIC_2019_Training_Input"
PAGE = 4096
ZEROS = bytes(PAGE)
"""What a file system gives back where nothing was written."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its EXIF orientation."""
_UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


def find_images(root: Path, frame: pd.DataFrame, images: str = INPUT) -> list[Path]:
    """Find the image file of each row, without opening any.

    Looks in `<root>/<images>`, in the folder of the same name that unzipping makes in it, and in
    the folders below that ids name, for JPEG and PNG files named by `stem` or `id`, with or without
    `_downsampled`.

    Args:
        root: The ISIC folder.
        frame: The joined table, see `datamodules.annotations.Annotations`, or rows of it.
        images: Name of the images' folder.

    Raises:
        UserError: if the folder is missing or empty, if an image is missing, or if a file is a
            link that leads out of the folder.
    """
    folder = root / images
    index = _index(folder, {os.path.dirname(stem) for stem in frame["stem"]})
    found = [
        next((index[n] for n in (stem, i, i + DOWNSAMPLED) if n in index), None)
        for stem, i in zip(frame["stem"], frame["id"], strict=True)
    ]
    missing = [i for i, entry in zip(frame["id"], found, strict=True) if entry is None]
    if missing:
        raise UserError(
            f"{len(missing):,} of {len(found):,} images are missing in {folder}: "
            f"{name_few(missing)}.\n"
            f"  Unzip {images}.zip there again, or give as split a folder of split "
            "files\n  that name only the images you have."
        )
    inside = {os.path.realpath(place) for place in (root, folder, folder / images)}
    leaving = [
        f"{entry.path} (id {i}, {place})"
        for entry, i, place in zip(found, frame["id"], frame["named_in"], strict=True)
        if entry is not None and (entry.is_symlink() or "/" in i) and _leaves(entry, inside)
    ]
    if leaving:
        raise UserError(
            f"{len(leaving):,} image(s) are links that lead out of {root}: {name_few(leaving)}.\n"
            f"  Link the whole folder {images} instead, or copy the files."
        )
    return [Path(entry.path) for entry in found if entry is not None]


def read_image(path: Path, size: int, resize: Resize = "squash") -> Tensor:
    """Read a JPEG or PNG file as `(3, size, size)`, float32 in [0, 1].

    Turned upright as its EXIF data say, if they say so in a readable way; transparency is laid on
    white; 16-bit grey is scaled down by 257.

    Args:
        path: The image file.
        size: Side of the square in pixels.
        resize: `squash` keeps the whole image and changes its aspect ratio; `crop` cuts out the
            central square first. Both are bilinear with antialiasing.

    Raises:
        UserError: if the file is no image, damaged, or of more than `MAX_PIXELS` pixels; a file
            that is too large is refused before it is decoded. So is 16-bit grey of which no value
            reaches into the upper four bits, which would be all but black, and a JPEG with a hole
            of zeros, as a copy that was cut leaves it.
    """
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            _refuse_giant(path, image.width * image.height)
            image.load()
            if image.format == "JPEG":
                _refuse_hole(path, image)
            upright = _to_rgb(_upright(image), path)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as cause:
        declared = re.search(r"\((\d+) pixels\)", str(cause))
        _refuse_giant(path, int(declared[1]) if declared else 2 * MAX_PIXELS)
        raise
    except _UNDECODABLE as cause:
        raise UserError(
            f"cannot decode the image {path}: {cause}.\n"
            "  It must be a whole JPEG or PNG file. Download it again, or leave its id out of the "
            "split files."
        ) from cause
    if resize == "crop":
        side = min(upright.size)
        left, top = (upright.width - side) // 2, (upright.height - side) // 2
        upright = upright.crop((left, top, left + side, top + side))
    square = upright.resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255


def to_eight_bits(images: Tensor) -> Tensor:
    """Round images in [0, 1] to uint8, as PNG stores them."""
    return (images * 255).round().byte()


def _index(folder: Path, below: set[str]) -> dict[str, os.DirEntry[str]]:
    """Map file names without ending to files; the outer folder and the first ending win.

    Args:
        folder: The images' folder.
        below: Folders below it to look in as well; names of their files begin with these.
    """
    index: dict[str, os.DirEntry[str]] = {}
    for place in (folder, folder / folder.name):
        for part in sorted(below | {""}):
            if not (place / part).is_dir():
                continue
            with os.scandir(place / part) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
            for entry in entries:
                stem, suffix = os.path.splitext(os.path.join(part, entry.name))
                if suffix.lower() in IMAGE_SUFFIXES:
                    index.setdefault(stem, entry)
    if not index:
        state = "holds no .jpg or .png file" if folder.is_dir() else "is missing"
        raise UserError(
            f"the images' folder {folder} {state}.\n  Put the images there, or give its name in "
            f"{folder.parent} as images; {INPUT}.zip is at\n"
            "  https://challenge.isic-archive.com/data/#2019."
        )
    return index


def _leaves(entry: os.DirEntry[str], inside: set[str]) -> bool:
    target = os.path.realpath(entry.path)
    return not any(os.path.commonpath((target, folder)) == folder for folder in inside)


def _refuse_giant(path: Path, pixels: int) -> None:
    if pixels > MAX_PIXELS:
        raise UserError(
            f"the image {path} has {pixels:,} pixels; the limit is {MAX_PIXELS:,}.\n"
            "  A file made to exhaust the memory? It was not decoded. Scale it down if it is real."
        )


def _refuse_hole(path: Path, image: Image.Image) -> None:
    """Refuse a file of which a whole page is zeros, unless it shows one colour and nothing else."""
    with path.open("rb") as file:
        pages = iter(partial(file.read, PAGE), b"")
        hole = next((PAGE * number for number, page in enumerate(pages) if page == ZEROS), None)
    if hole is not None and np.ptp(np.asarray(image.convert("RGB")), axis=(0, 1)).any():
        raise UserError(
            f"the image {path} has a hole: nothing but zeros from byte {hole:,} on, for at least "
            f"{PAGE:,} bytes.\n  A download or a copy that was cut leaves that. Get the file again."
        )


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as the orientation of its EXIF data says; of other entries nothing is read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    # Pillow raises what it comes upon in a damaged directory
    except Exception:
        return image
    turn = TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode.startswith("I"):
        # convert() would clip 16-bit grey at 255 instead of scaling it
        values = np.asarray(image)
        if 0 < values.max() < 4096:
            raise UserError(
                f"the image {path} is 16-bit grey of which 12 bits are used at most: its greatest "
                f"value is {values.max():,} of 65,535, so it would be all but black.\n"
                "  Scale the values to 16 bits (multiply by 16), or save 8-bit images."
            )
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")

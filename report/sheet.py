"""Images set out on a sheet, with headings and captions, for the eye of a reviewer."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

TILE, GAP, LINE = 128, 6, 15
HEADING = 22


def pair_sheet(
    left: Sequence[Tensor], right: Sequence[Tensor], captions: Sequence[str], path: Path
) -> None:
    """Draw pairs of images `(3, S, S)` uint8, four pairs in a row, each with its caption."""
    columns, cell = 4, (2 * TILE + 3 * GAP, TILE + LINE + GAP)
    rows = -(-len(captions) // columns)
    sheet = Image.new("RGB", (columns * cell[0] + GAP, rows * cell[1] + GAP + HEADING), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, 4), "sample, and its nearest training image", "black", _font(13))
    for i, (one, other, caption) in enumerate(zip(left, right, captions, strict=True)):
        x, y = GAP + i % columns * cell[0], HEADING + GAP + i // columns * cell[1]
        sheet.paste(tile(one), (x, y))
        sheet.paste(tile(other), (x + TILE + GAP // 2, y))
        pen.text((x, y + TILE + 1), caption, "black", _font(9))
    save(sheet, path)


def table_sheet(
    cells: Sequence[Sequence[Sequence[Tensor]]],
    columns: Sequence[str],
    rows: Sequence[str],
    path: Path,
    title: str = "",
) -> None:
    """Draw a table whose cells hold images side by side; an empty cell says so.

    Args:
        cells: For each row and column the images, `(3, S, S)` uint8.
        columns: Heading of each column.
        rows: Label of each row, written above its images.
        path: PNG file to write.
        title: First line.
    """
    widest = [max((len(row[i]) for row in cells), default=0) or 1 for i in range(len(columns))]
    starts = [GAP]
    for width in widest:
        starts.append(starts[-1] + width * (TILE + 2) + 3 * GAP)
    top = HEADING * (2 if title else 1)
    height = TILE + LINE + GAP
    sheet = Image.new("RGB", (starts[-1], top + len(cells) * height + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, 4), title, "black", _font(14))
    for start, name in zip(starts, columns, strict=False):
        pen.text((start, top - HEADING + 3), name, "black", _font(14))
    for r, (row, label) in enumerate(zip(cells, rows, strict=True)):
        y = top + r * height
        pen.text((GAP, y), label, "black", _font(11))
        for start, images in zip(starts, row, strict=False):
            if not images:
                pen.text((start, y + LINE + TILE // 2), "no image", "grey", _font(12))
            for i, image in enumerate(images):
                sheet.paste(tile(image), (start + i * (TILE + 2), y + LINE))
    save(sheet, path)


def tile(image: Tensor) -> Image.Image:
    """Bring an image `(3, S, S)` uint8 to the sheet's size; small ones keep square pixels."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    small = picture.width <= TILE
    return picture.resize(
        (TILE, TILE), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    )


def save(sheet: Image.Image, path: Path) -> None:
    """Write a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)

"""Sheets of images with captions, labels and headings: grids, tables and pairs."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from rl4med_ddpo.foundation.files import write_whole

SMALLEST, LARGEST = 128, 256
FONT_SIZE, LINE, MARGIN = 12, 15, 4
HEADING_SIZE, HEADING = 14, 22
BETWEEN_IMAGES, BETWEEN_PANELS, FRAME = 2, 18, 4
BACKGROUND, INK, FAINT = "white", "black", "grey"


class Panel(NamedTuple):
    """Images side by side, with one caption below them.

    Attributes:
        images: Each `(3, S, S)`, uint8 or floats in [0, 1]; of one size on a sheet. Small ones are
            enlarged by a whole factor to at least 128 pixels, so that pixels stay square and
            captions fit; large ones reduced to 256. None says "no image".
        caption: Wrapped to the panel's width; None leaves no room for one.
        framed: Numbers of the images that get a red frame.
    """

    images: Sequence[Tensor]
    caption: str | None = None
    framed: Sequence[int] = ()


def in_rows(panels: Sequence[Panel], columns: int) -> list[list[Panel]]:
    """Break a sequence of panels into rows."""
    return [list(panels[first : first + columns]) for first in range(0, len(panels), columns)]


def sheet(
    rows: Sequence[Sequence[Panel]],
    labels: Sequence[str] = (),
    headings: Sequence[str] = (),
    title: str = "",
) -> Image.Image:
    """Draw rows of panels.

    Args:
        rows: The panels; a row may be shorter than others.
        labels: One line above each row; none for no labels.
        headings: Of each column; none for no headings.
        title: First line; empty for no title.
    """
    tiles = [
        [[_tile(image, i in panel.framed) for i, image in enumerate(panel.images)] for panel in row]
        for row in rows
    ]
    side = next(tile.size for row in tiles for panel in row for tile in panel)
    widths = [
        _width(max(len(row[i]) for row in tiles if i < len(row)), side[0])
        for i in range(max(map(len, tiles)))
    ]
    gap = MARGIN if all(len(panel) <= 1 for row in tiles for panel in row) else BETWEEN_PANELS
    lefts = [MARGIN + sum(widths[:i]) + i * gap for i in range(len(widths))]
    font = ImageFont.load_default(size=FONT_SIZE)
    captions = [[_wrap(p.caption, font, w) for p, w in zip(r, widths, strict=False)] for r in rows]
    lines = max((text.count("\n") + 1 for row in captions for text in row if text is not None),
                default=0)  # fmt: skip
    above = LINE if labels else 0
    height = above + side[1] + LINE * lines + 2 * MARGIN
    top = HEADING * (bool(title) + bool(headings)) + MARGIN
    drawn = Image.new(
        "RGB", (lefts[-1] + widths[-1] + MARGIN, top + len(rows) * height), BACKGROUND
    )
    pen = ImageDraw.Draw(drawn)
    heading_font = ImageFont.load_default(size=HEADING_SIZE)
    pen.text((MARGIN, MARGIN), title, INK, heading_font)
    for left, heading in zip(lefts, headings, strict=False):
        pen.text((left, top - HEADING), heading, INK, heading_font)
    for number, (row, texts) in enumerate(zip(tiles, captions, strict=True)):
        y = top + number * height
        if labels:
            pen.text((MARGIN, y), labels[number], INK, font)
        for left, panel, text in zip(lefts, row, texts, strict=False):
            if not panel:
                pen.text((left, y + above + side[1] // 2), "no image", FAINT, font)
            for i, tile in enumerate(panel):
                drawn.paste(tile, (left + i * (side[0] + BETWEEN_IMAGES), y + above))
            below = (left, y + above + side[1] + 1)
            pen.multiline_text(below, text or "", INK, font, spacing=LINE - FONT_SIZE)
    return drawn


def beside(sheets: Sequence[Image.Image], headings: Sequence[str]) -> Image.Image:
    """Join finished sheets from left to right, each under its heading."""
    width = sum(one.width for one in sheets) + (len(sheets) - 1) * BETWEEN_PANELS
    joined = Image.new("RGB", (width, max(one.height for one in sheets) + HEADING), BACKGROUND)
    pen, left = ImageDraw.Draw(joined), 0
    for one, heading in zip(sheets, headings, strict=True):
        pen.text((left + MARGIN, 2), heading, INK, ImageFont.load_default(size=HEADING_SIZE))
        joined.paste(one, (left, HEADING))
        left += one.width + BETWEEN_PANELS
    return joined


def save_png(drawn: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    encoded = io.BytesIO()
    drawn.save(encoded, format="PNG")
    write_whole(path, encoded.getvalue())


def _width(images: int, side: int) -> int:
    images = max(images, 1)
    return images * side + (images - 1) * BETWEEN_IMAGES


def _tile(image: Tensor, framed: bool) -> Image.Image:
    tile = _enlarged(image)
    return ImageOps.expand(ImageOps.crop(tile, FRAME), FRAME, "red") if framed else tile


def _enlarged(image: Tensor) -> Image.Image:
    if image.is_floating_point():
        image = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    tile = Image.fromarray(np.ascontiguousarray(image.cpu().permute(1, 2, 0).numpy()))
    side = max(tile.size)
    if side < SMALLEST:
        factor = -(-SMALLEST // side)
        return tile.resize((tile.width * factor, tile.height * factor), Image.Resampling.NEAREST)
    if side > LARGEST:
        tile.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return tile


def _wrap(
    text: str | None, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> str | None:
    if text is None:
        return None
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)

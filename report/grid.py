"""Images side by side with a caption under each."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SMALLEST, LARGEST = 128, 256
FONT_SIZE, LINE, MARGIN = 12, 15, 4
BACKGROUND, INK = "white", "black"


def caption_grid(images: Tensor, captions: Sequence[str], columns: int) -> Image.Image:
    """Lay out images in rows, each with its caption below, wrapped to the image's width.

    Args:
        images: `(B, 3, S, S)` in [0, 1]. Small ones are enlarged by a whole factor to at least
            128 pixels, so that pixels stay square and captions fit; large ones reduced to 256.
        captions: One for each image.
        columns: Images in a row.
    """
    tiles = [_tile(image) for image in images]
    width, height = tiles[0].size
    font = ImageFont.load_default(size=FONT_SIZE)
    wrapped = [_wrap(caption, font, width) for caption in captions]
    cell = height + 2 * MARGIN + LINE * max(text.count("\n") + 1 for text in wrapped)
    rows = -(-len(tiles) // columns)
    size = (columns * (width + MARGIN) + MARGIN, rows * cell + MARGIN)
    grid = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(grid)
    for i, (tile, text) in enumerate(zip(tiles, wrapped, strict=True)):
        x, y = MARGIN + i % columns * (width + MARGIN), MARGIN + i // columns * cell
        grid.paste(tile, (x, y))
        draw.multiline_text((x, y + height + 1), text, INK, font, spacing=LINE - FONT_SIZE)
    return grid


def _tile(image: Tensor) -> Image.Image:
    levels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    tile = Image.fromarray(np.ascontiguousarray(levels.cpu().permute(1, 2, 0).numpy()))
    side = max(tile.size)
    if side < SMALLEST:
        factor = -(-SMALLEST // side)
        return tile.resize((tile.width * factor, tile.height * factor), Image.Resampling.NEAREST)
    if side > LARGEST:
        tile.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return tile


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)

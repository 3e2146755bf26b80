"""Draw one dermoscopic image: skin, a lesion, and the artifacts that lie over it.

Each layer draws from its own random stream, so that the same seed with and without an artifact
gives the same skin and the same lesion, with and without it. Lengths are fractions of the image's
side; colours are RGB in [0, 255].
"""

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from rl4med_ddpo.datamodules.vocabulary import DERMOSCOPY

SUPERSAMPLING = 2
FAIR, TAN = (236, 196, 176), (206, 158, 130)
NEVUS_BROWN = ((150, 98, 68), (112, 70, 48))
MELANOMA_COLOURS = ((160, 108, 76), (92, 58, 44), (98, 100, 116), (42, 31, 32), (158, 76, 70))
HAIR_COLOURS = ((44, 30, 24), (74, 48, 32))
INK_COLOURS = ((96, 44, 170), (44, 66, 190))
GEL_WHITE = (255, 253, 250)
TICK_COLOUR = (30, 30, 40)
PLATE_COLOUR = (244, 244, 244)

Canvas = NDArray[np.floating]
"""An image in the making: `(S, S, 3)`, RGB in [0, 255]."""
Mask = NDArray[np.floating]
"""How much of a layer shows: `(S, S)` in [0, 1]."""


def draw(
    condition: Sequence[float],
    rng: Generator,
    size: int = 64,
    lesion_rng: Generator | None = None,
) -> NDArray[np.uint8]:
    """Draw the image that a condition describes.

    Args:
        condition: Multi-hot over dermoscopy's attributes, with exactly one disease.
        rng: The image is a function of the condition and of this generator's seed.
        size: Side of the image in pixels.
        lesion_rng: Draws skin and lesion instead; images that share its seed show one lesion.

    Returns:
        `(size, size, 3)`, RGB.

    Raises:
        ValueError: if the condition holds both diseases or none.
    """
    present = {a for a, on in zip(DERMOSCOPY.attributes, condition, strict=True) if on}
    if len(present.intersection(DERMOSCOPY.one_of)) != 1:
        raise ValueError(
            f"an image shows one disease of {DERMOSCOPY.one_of}, this condition {present}"
        )
    layers = (_skin, _nevus if "NV" in present else _melanoma, _ink, _hair, _gel, _ruler)
    names = (None, None, "ink", "hair", "gel_bubble", "ruler")
    side = size * SUPERSAMPLING
    canvas = np.zeros((side, side, 3), np.float32)
    streams = rng.spawn(len(layers))
    if lesion_rng is not None:
        streams[:2] = lesion_rng.spawn(2)
    for layer, name, stream in zip(layers, names, streams, strict=True):
        if name is None or name in present:
            canvas = layer(canvas, stream)
    picture = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    return np.asarray(picture.resize((size, size), Image.Resampling.BOX))


def _blend(canvas: Canvas, colour: Canvas | Sequence[float], mask: Mask) -> Canvas:
    mask = mask[..., None]
    return canvas * (1 - mask) + np.asarray(colour, np.float32) * mask


def _between(first: Sequence[float], second: Sequence[float], share: float) -> Canvas:
    return np.asarray(first, np.float32) * (1 - share) + np.asarray(second, np.float32) * share


def _grid(side: int) -> tuple[Mask, Mask]:
    ticks = (np.arange(side, dtype=np.float32) + 0.5) / side
    return ticks[None, :], ticks[:, None]


def _noise(rng: Generator, side: int, cells: int) -> Mask:
    """Return smooth noise of zero mean and about unit variance, with `cells` bumps a side."""
    coarse = rng.standard_normal((cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)) * 1.4


def _edge(inside: Mask, softness: float) -> Mask:
    """Return a mask from a signed distance that is positive inside, soft over `softness`."""
    return 1 / (1 + np.exp(np.clip(-inside / softness, -30, 30)))


def _strokes(side: int, curves: Sequence[NDArray[np.float32]], width: float) -> Mask:
    """Return the mask of polylines, each `(N, 2)` as x, y, of one width with round ends."""
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    thick = max(1, round(width * side))
    for curve in curves:
        points = [(float(x), float(y)) for x, y in curve * side]
        pen.line(points, fill=255, width=thick, joint="curve")
        for x, y in (points[0], points[-1]):
            pen.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=255)
    return np.asarray(mask, np.float32) / 255


def _arc(start: NDArray, end: NDArray, bend: float) -> NDArray[np.float32]:
    """Return a quadratic Bezier curve, `(16, 2)`, whose middle is pushed sideways by `bend`."""
    along = end - start
    middle = (start + end) / 2 + bend * np.array([-along[1], along[0]])
    t = np.linspace(0, 1, 16)[:, None]
    return ((1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end).astype(np.float32)


def _skin(canvas: Canvas, rng: Generator) -> Canvas:
    side = len(canvas)
    tone = _between(FAIR, TAN, rng.random())
    x, y = _grid(side)
    vignette = 26 * np.clip((x - 0.5) ** 2 + (y - 0.5) ** 2 - 0.12, 0, None)
    return tone + (4 * _noise(rng, side, 4) - 2.5 * vignette)[..., None]


def _outline(rng: Generator, side: int, radius: float, ragged: float) -> Mask:
    """Return the signed distance to a closed outline about the middle, positive inside."""
    centre = 0.5 + rng.uniform(-0.06, 0.06, 2)
    x, y = _grid(side)
    angle = np.arctan2(y - centre[1], x - centre[0])
    reach = np.full_like(angle, radius)
    for order in range(2, 7):
        swing = ragged * rng.uniform(0.5, 1) / order**0.5
        reach += radius * swing * np.cos(order * angle + rng.uniform(0, 2 * np.pi))
    return reach - np.hypot(x - centre[0], y - centre[1])


def _nevus(canvas: Canvas, rng: Generator) -> Canvas:
    inside = _outline(rng, len(canvas), rng.uniform(0.19, 0.27), ragged=0.03)
    brown = np.asarray(NEVUS_BROWN, np.float32) + rng.uniform(-14, 14) + rng.uniform(-4, 4, 3)
    canvas = _blend(canvas, brown[0], 0.95 * _edge(inside, 0.022))
    return _blend(canvas, brown[1], 0.9 * _edge(inside - 0.11, 0.03))


def _melanoma(canvas: Canvas, rng: Generator) -> Canvas:
    side = len(canvas)
    inside = _outline(rng, side, rng.uniform(0.25, 0.32), ragged=0.17)
    order = rng.permutation(len(MELANOMA_COLOURS))
    colour = np.broadcast_to(np.float32(MELANOMA_COLOURS[order[0]]), canvas.shape)
    for patch in order[1:4]:
        where = _edge(_noise(rng, side, 5) - 0.35, 0.2)
        colour = _blend(colour, MELANOMA_COLOURS[patch], where)
    return _blend(canvas, colour, _edge(inside, 0.01))


def _ink(canvas: Canvas, rng: Generator) -> Canvas:
    """Two or three strokes of a pen about the lesion."""
    strokes = []
    first = rng.uniform(0, 2 * np.pi)
    count = rng.integers(2, 4)
    for turn in range(count):
        angle = first + 2 * np.pi * (turn + rng.uniform(-0.15, 0.15)) / count
        outward = np.array([np.cos(angle), np.sin(angle)])
        middle = 0.5 + outward * rng.uniform(0.33, 0.38)
        along = np.array([-outward[1], outward[0]]) * rng.uniform(0.14, 0.2)
        along = along + outward * rng.uniform(-0.08, 0.08)
        strokes.append(_arc(middle - along, middle + along, rng.uniform(-0.25, 0.05)))
    colour = INK_COLOURS[rng.integers(len(INK_COLOURS))]
    return _blend(canvas, colour, 0.85 * _strokes(len(canvas), strokes, rng.uniform(0.06, 0.075)))


def _hair(canvas: Canvas, rng: Generator) -> Canvas:
    """Four to six long dark curves in about one direction, as hair grows."""
    grain = rng.uniform(0, np.pi)
    hairs = []
    for _ in range(rng.integers(4, 7)):
        angle = grain + rng.uniform(-0.45, 0.45)
        along = np.array([np.cos(angle), np.sin(angle)]) * rng.uniform(0.3, 0.6)
        middle = rng.uniform(0.15, 0.85, 2)
        hairs.append(_arc(middle - along, middle + along, rng.uniform(-0.25, 0.25)))
    colour = _between(*HAIR_COLOURS, rng.random())
    return _blend(canvas, colour, 0.9 * _strokes(len(canvas), hairs, rng.uniform(0.033, 0.042)))


def _gel(canvas: Canvas, rng: Generator) -> Canvas:
    """Three to five bubbles: a dark ring, a bright rim and a highlight towards the lamp."""
    x, y = _grid(len(canvas))
    count = rng.integers(3, 6)
    radius = rng.uniform(0.07, 0.115, (count, 1, 1)).astype(np.float32)
    left, top = rng.uniform(0.12, 0.88, (2, count, 1, 1)).astype(np.float32)
    outside = np.hypot(x - left, y - top) - radius
    glint = np.hypot(x - left + 0.35 * radius, y - top + 0.35 * radius) - 0.32 * radius
    canvas = _blend(canvas, (96, 84, 84), 0.6 * _ring(outside - 0.028, 0.014).max(0))
    canvas = _blend(canvas, GEL_WHITE, 0.22 * _edge(-outside, 0.006).max(0))
    canvas = _blend(canvas, GEL_WHITE, 0.9 * _ring(outside, 0.016).max(0))
    return _blend(canvas, GEL_WHITE, _edge(-glint, 0.006).max(0))


def _ring(distance: Mask, width: float) -> Mask:
    return np.exp(-((distance / width) ** 2))


def _ruler(canvas: Canvas, rng: Generator) -> Canvas:
    """A clear plate with ticks along one side, every fifth one longer."""
    side = len(canvas)
    depth = rng.uniform(0.0, 0.02)
    spacing = rng.uniform(0.075, 0.085)
    ticks = []
    for number, at in enumerate(np.arange(rng.uniform(0, spacing), 1, spacing)):
        length = 0.15 if (number + 2) % 5 == 0 else 0.085
        ticks.append(np.array([[at, depth], [at, depth + length]], np.float32))
    plate = _edge(depth + 0.19 - _grid(side)[1] + np.zeros((side, side), np.float32), 0.008)
    marks = _strokes(side, ticks, 0.03)
    turns = int(rng.integers(4))
    canvas = _blend(canvas, PLATE_COLOUR, 0.45 * np.rot90(plate, turns))
    return _blend(canvas, TICK_COLOUR, 0.92 * np.rot90(marks, turns))

"""A sample as one PNG file that carries its own row of the manifest.

Image and scores appear and vanish together, so there is no log to keep in step with the images.
"""

import io
import json
import struct
import zlib
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from rl4med_ddpo.datamodules.sample_tables import Row
from rl4med_ddpo.datamodules.vocabulary import Vocabulary
from rl4med_ddpo.foundation.files import write_whole
from rl4med_ddpo.lightning_modules.samples import Samples

KEY = "sample"
_DAMAGED = (OSError, SyntaxError, ValueError, KeyError, EOFError, struct.error, zlib.error)


def sample_id(name: str, index: int) -> str:
    """Name a sample after its prompt's short name and its index, as in `MEL_hair_ruler_000037`."""
    return f"{name.replace('+', '_')}_{index:06d}"


def rows_of(samples: Samples, seed: int, vocabulary: Vocabulary) -> list[Row]:
    """Lay samples out as rows of the manifest; the networks' readings are probabilities."""
    columns = _columns(samples.judge_logits)
    # a judge reads all attributes, or the first ones, of which an image may show any
    heads = vocabulary.attributes[: len(columns)]
    readings = {f"judge_{a}": p for a, p in zip(heads, columns, strict=True)}
    if samples.reward_logits is not None:
        columns = _columns(samples.reward_logits)
        readings = {
            f"reward_{a}": p for a, p in zip(vocabulary.attributes, columns, strict=True)
        } | readings
    return [
        {
            "id": sample_id(name, index),
            "prompt": prompt,
            **dict(zip(vocabulary.attributes, map(int, condition), strict=True)),
            "index": index,
            "seed": seed,
            "noise_key": key,
            "reward": reward,
            **{reading: column[i] for reading, column in readings.items()},
        }
        for i, (prompt, name, condition, index, key, reward) in enumerate(
            zip(
                samples.prompts,
                samples.names,
                samples.conditions.tolist(),
                samples.index.tolist(),
                samples.noise_keys.tolist(),
                samples.reward.tolist(),
                strict=True,
            )
        )
    ]


def write_sample(folder: Path, image: Tensor, row: Row) -> None:
    """Write an image, `(3, H, W)` uint8, with its row."""
    text = PngInfo()
    text.add_text(KEY, json.dumps(row))
    encoded = io.BytesIO()
    pixels = image.permute(1, 2, 0).contiguous().cpu().numpy()
    Image.fromarray(pixels).save(encoded, format="PNG", pnginfo=text)
    write_whole(folder / f"{row['id']}.png", encoded.getvalue())


def read_row(path: Path) -> Row | None:
    """Return the row that a sample carries, or None if there is no such sample."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            # not image.text, which decodes the pixels first
            row = json.loads(image.info[KEY])
            return row if row["id"] == path.stem else None
    except (*_DAMAGED, TypeError):
        return None


def is_whole(path: Path) -> bool:
    """Tell whether a sample is there with every checksum right, to the last byte."""
    if read_row(path) is None:
        return False
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.verify()
    except _DAMAGED:
        return False
    return True


def _columns(logits: Tensor) -> list[list[float]]:
    # in float64 a probability is above one half exactly where its logit is above zero
    return logits.double().sigmoid().T.tolist()

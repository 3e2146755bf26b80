"""Make the pipeline to measure on where there is no GPU: random weights, latents of 4x16x16.

    python -m benchmarks.tiny_pipeline runs/benchmarks/tiny

Its U-Net has 3.2M parameters, its images 128 px. `python -m assets.full_size` writes one of Stable
Diffusion v1.5's shapes.
"""

import json
import sys
from pathlib import Path

from assets.build import build_pipeline
from lightning_modules.pipelines import save_pipeline


def write(folder: Path) -> None:
    """Save the pipeline, with its tokenizer's tables as the transformers of other tools want them.

    Args:
        folder: Folder to write.
    """
    save_pipeline(
        build_pipeline(image_size=128, latent_channels=4, unet_channels=(64, 112)), folder
    )
    tokenizer = folder / "tokenizer"
    model = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    (tokenizer / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.tiny_pipeline FOLDER")
    write(Path(sys.argv[1]))

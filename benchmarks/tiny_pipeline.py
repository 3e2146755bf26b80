"""Make the pipelines to measure on where there is no GPU, with random weights.

    python -m benchmarks.tiny_pipeline runs/benchmarks/tiny
    python -m benchmarks.tiny_pipeline runs/benchmarks/micro --size micro

`python -m rl4med_ddpo.base_pipeline.full_size` writes one of Stable Diffusion v1.5's shapes.
"""

import argparse
import json
from pathlib import Path

from rl4med_ddpo.base_pipeline.build import build_pipeline
from rl4med_ddpo.lightning_modules.pipelines.load import save_pipeline

SIZES = {
    # a U-Net of 3.2M parameters, latents of 4x16x16, images of 128 px
    "tiny": {"image_size": 128, "unet_channels": (64, 112)},
    # 0.6M, 4x8x8, 32 px
    "micro": {"image_size": 32, "unet_channels": (32, 48), "vae_channels": (8, 16, 24)},
}


def write(folder: Path, size: str) -> None:
    """Save the pipeline, with its tokenizer's tables as the transformers of other tools want them.

    Args:
        folder: Folder to write.
        size: One of `SIZES`.
    """
    save_pipeline(build_pipeline(latent_channels=4, **SIZES[size]), folder)
    tokenizer = folder / "tokenizer"
    model = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    (tokenizer / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


def main() -> None:
    """Write the folder that the command line names."""
    parser = argparse.ArgumentParser(description="Make a small pipeline to measure on")
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="of its networks")
    options = parser.parse_args()
    write(options.folder, options.size)


if __name__ == "__main__":
    main()

"""Put the trained parts of the base together, in half precision.

python -m assets.assemble --unet runs/base/unet/pipeline
    --autoencoder runs/base/autoencoder/pipeline --folder assets/base
"""

from pathlib import Path

import torch
from jsonargparse import auto_cli

from lightning_modules.pipelines import load_pipeline, save_pipeline


def assemble(unet: Path, autoencoder: Path, folder: Path) -> None:
    """Write the pipeline of one folder's U-Net and the other's autoencoder as float16.

    Args:
        unet: Pipeline folder that gives the U-Net and all else.
        autoencoder: Pipeline folder that gives the autoencoder.
        folder: Folder to write.
    """
    pipeline = load_pipeline(str(unet))
    pipeline.vae = load_pipeline(str(autoencoder)).vae
    save_pipeline(pipeline.to(dtype=torch.float16), folder)


if __name__ == "__main__":
    auto_cli(assemble, as_positional=False)

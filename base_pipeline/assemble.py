"""Put the trained parts of the base together, in half precision.

python -m rl4med_ddpo.base_pipeline.assemble --unet runs/base/unet/pipeline
    --autoencoder runs/base/autoencoder/pipeline
    --images runs/base/isic/ISIC_2019_Training_Input --folder assets/base
"""

from pathlib import Path

import torch
from jsonargparse import auto_cli

from rl4med_ddpo.base_pipeline.build import read_images
from rl4med_ddpo.base_pipeline.linear_codec import refit_output
from rl4med_ddpo.lightning_modules.pipelines.load import load_pipeline, save_pipeline


def assemble(unet: Path, autoencoder: Path, images: Path, folder: Path, seed: int = 0) -> None:
    """Write the pipeline of one folder's U-Net and the other's autoencoder as float16.

    Args:
        unet: Pipeline folder that gives the U-Net and all else.
        autoencoder: Pipeline folder that gives the autoencoder.
        images: Folder of JPEG images, to which the decoder's last convolution is fitted again.
        folder: Folder to write.
        seed: Of the fit's latents.
    """
    torch.manual_seed(seed)
    pipeline = load_pipeline(str(unet))
    pipeline.vae = load_pipeline(str(autoencoder)).vae
    refit_output(pipeline.vae, read_images(images, pipeline.vae.config.sample_size))
    save_pipeline(pipeline.to(dtype=torch.float16), folder)


if __name__ == "__main__":
    auto_cli(assemble, as_positional=False)

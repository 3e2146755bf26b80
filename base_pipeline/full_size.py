"""Stable Diffusion v1.5 with random weights, from its published configurations.

For what needs the real sizes and not the real weights: shapes, memory, speed. Tokens are those of
the embedded base, since CLIP's vocabulary is a download.

    python -m rl4med_ddpo.base_pipeline.full_size --folder runs/full_size    # 4.3 GB

writes a pipeline that every stage takes in place of Stable Diffusion v1.5.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from jsonargparse import auto_cli
from transformers import CLIPTextConfig, CLIPTextModel

from rl4med_ddpo.base_pipeline.build import (
    autoencoder_levels,
    build_tokenizer,
    stable_diffusion_scheduler,
)
from rl4med_ddpo.lightning_modules.pipelines.load import save_pipeline
from rl4med_ddpo.lightning_modules.pipelines.source import WITHOUT_SAFETY_CHECKER

LEVELS = 4


def full_size_unet(divisor: int = 1) -> UNet2DConditionModel:
    """Return the U-Net: 860 M parameters, or one of fewer channels."""
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=tuple(c // divisor for c in (320, 640, 1280, 1280)),
        norm_num_groups=32 // divisor,
        layers_per_block=2,
        cross_attention_dim=768 // divisor,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * (LEVELS - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (LEVELS - 1),
    ).eval()


def full_size_autoencoder(divisor: int = 1) -> AutoencoderKL:
    """Return the autoencoder: 84 M parameters, or one of fewer channels."""
    return AutoencoderKL(
        sample_size=512,
        **autoencoder_levels(tuple(c // divisor for c in (128, 256, 512, 512))),
        norm_num_groups=32 // divisor,
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=0.18215,
    ).eval()


def full_size_text_encoder(divisor: int = 1) -> CLIPTextModel:
    """Return CLIP ViT-L/14's text encoder: 123 M parameters, or one of fewer channels."""
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768 // divisor,
        intermediate_size=3072 // divisor,
        projection_dim=768 // divisor,
        num_hidden_layers=12,
        num_attention_heads=12 // divisor,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
    )
    return CLIPTextModel(config).eval()


def build_full_size(folder: Path, seed: int = 0, divisor: int = 1) -> None:
    """Write the pipeline.

    Args:
        folder: Folder to write, 4.3 GB.
        seed: Decides the weights.
        divisor: Of every number of channels: 1, 2 or 4. At 4 a step costs about a sixteenth and
            the networks keep their proportions, for measuring on a small machine.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(max_length=77)
    pipeline = StableDiffusionPipeline(
        vae=full_size_autoencoder(divisor),
        text_encoder=full_size_text_encoder(divisor),
        tokenizer=tokenizer,
        unet=full_size_unet(divisor),
        scheduler=stable_diffusion_scheduler(),  # pyright: ignore[reportArgumentType]
        **WITHOUT_SAFETY_CHECKER,
    )
    save_pipeline(pipeline, folder)


if __name__ == "__main__":
    auto_cli(build_full_size, as_positional=False)

r"""Compose a small Stable Diffusion pipeline, offline and from a seed.

The parts are the classes of Stable Diffusion v1.5 with fewer channels: the autoencoder reduces
images by 8, the text encoder is CLIP's, the scheduler has v1.5's configuration. Only the tokenizer
is our own: its vocabulary knows the words of the 32 prompts whole, and every other text by letters.

    python -m rl4med_ddpo.base_pipeline.build --folder runs/base/start \
        --images runs/base/isic/ISIC_2019_Training_Input

leaves the pipeline that training starts from: the autoencoder is the linear codec of the images,
the U-Net is random, and so is the text encoder, which stays as it is.
"""

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from jsonargparse import auto_cli
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from rl4med_ddpo.base_pipeline.linear_codec import start_from_linear_codec
from rl4med_ddpo.datamodules.images import read_image
from rl4med_ddpo.datamodules.vocabulary import DERMOSCOPY
from rl4med_ddpo.lightning_modules.pipelines.load import save_pipeline
from rl4med_ddpo.lightning_modules.pipelines.source import WITHOUT_SAFETY_CHECKER

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
CODEC_IMAGES = 512


def build_pipeline(
    seed: int = 0,
    image_size: int = 64,
    vae_channels: tuple[int, ...] = (16, 32, 48, 64),
    latent_channels: int = 24,
    unet_channels: tuple[int, ...] = (48, 96),
    text_width: int = 64,
    text_length: int = 20,
) -> StableDiffusionPipeline:
    """Return a pipeline of untrained networks.

    Args:
        seed: Decides every weight.
        image_size: Side of its images in pixels; a multiple of the autoencoder's factor.
        vae_channels: Channels of the autoencoder from the pixels inwards, multiples of 8. Each one
            after the first halves the resolution.
        latent_channels: Channels of the latents.
        unet_channels: Channels of the U-Net from the latents inwards, multiples of 16. All levels
            but the first attend to the prompt.
        text_width: Width of the prompt's embedding, a multiple of 16.
        text_length: Tokens of a prompt with its start and end.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer(text_length)
        return StableDiffusionPipeline(
            vae=_autoencoder(image_size, vae_channels, latent_channels),
            text_encoder=_text_encoder(tokenizer, text_width),
            tokenizer=tokenizer,
            unet=_unet(
                image_size // 2 ** (len(vae_channels) - 1),
                latent_channels,
                unet_channels,
                text_width,
            ),
            scheduler=stable_diffusion_scheduler(),  # pyright: ignore[reportArgumentType]
            **WITHOUT_SAFETY_CHECKER,
        )


def build_tokenizer(max_length: int = 20) -> CLIPTokenizer:
    """Return CLIP's tokenizer with a vocabulary that holds each word of the prompts as one token.

    Args:
        max_length: Tokens of a text with its start and end; the longest of the 32 prompts has 20.
    """
    letters = list(bytes_to_unicode().values())
    # a merge applies wherever its pair occurs: were it first, `w i` of "with" would break "showing"
    words = sorted(
        {w for p in DERMOSCOPY.prompts for w in re.findall("[a-z]+", p.lower())}, key=_by_length
    )
    merges = list(dict.fromkeys(pair for word in words for pair in _merges(word)))
    entries = letters + [c + WORD_END for c in letters] + ["".join(pair) for pair in merges]
    vocabulary = {entry: index for index, entry in enumerate([*entries, START, END])}
    tokenizer = CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,  # pyright: ignore[reportArgumentType]
        model_max_length=max_length,
    )
    broken = [word for word in words if len(tokenizer.tokenize(word)) != 1]
    assert not broken, f"merges of other words break {broken}"
    return tokenizer


def _by_length(word: str) -> tuple[int, str]:
    return -len(word), word


def _merges(word: str) -> list[tuple[str, str]]:
    """Return the pairs that build a word from its letters, from left to right."""
    pieces = [*word[:-1], word[-1] + WORD_END]
    return [("".join(pieces[:i]), pieces[i]) for i in range(1, len(pieces))]


def _text_encoder(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModel:
    ids = tokenizer.get_vocab()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=width // 16,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=ids[START],
        eos_token_id=ids[END],
        pad_token_id=ids[END],
    )
    return CLIPTextModel(config).eval()


def autoencoder_levels(channels: tuple[int, ...]) -> dict[str, Any]:
    """Return the options of an autoencoder with these channels, from the images inward."""
    return {
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "block_out_channels": channels,
    }


def _autoencoder(size: int, channels: tuple[int, ...], latent_channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        **autoencoder_levels(channels),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=size,
        scaling_factor=1.0,
    ).eval()


def _unet(
    size: int, latent_channels: int, channels: tuple[int, ...], text_width: int
) -> UNet2DConditionModel:
    lower = len(channels) - 1
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * lower,
        up_block_types=("CrossAttnUpBlock2D",) * lower + ("UpBlock2D",),
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=8,
        norm_num_groups=16,
    ).eval()


def stable_diffusion_scheduler() -> DDIMScheduler:
    """Return DDIM with the configuration of Stable Diffusion v1.5."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def build_start(folder: Path, images: Path, seed: int = 0) -> None:
    """Write the pipeline that the training of the base starts from.

    Args:
        folder: Folder to write.
        images: Folder of JPEG images; the first 512 by name decide the linear codec.
        seed: Decides the random weights.
    """
    pipeline = build_pipeline(seed)
    start_from_linear_codec(pipeline.vae, read_images(images, pipeline.vae.config.sample_size))
    save_pipeline(pipeline, folder)


def read_images(folder: Path, size: int) -> Tensor:
    """Read the first images of a folder by name, `(N, 3, size, size)` in [-1, 1]."""
    paths = sorted(folder.glob("*.jpg"))[:CODEC_IMAGES]
    return torch.stack([read_image(path, size) for path in paths]) * 2 - 1


if __name__ == "__main__":
    auto_cli(build_start, as_positional=False)

r"""Measure what the base must be good at before anything is built on it.

    python -m rl4med_ddpo.base_pipeline.acceptance --pipeline assets/base \
        --reader runs/base/reader/checkpoints/last.ckpt

Images are drawn again, balanced over the 32 combinations, and read by a classifier that had no part
in the training of the base. Prints JSON.
"""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from jsonargparse import auto_cli
from torch import Tensor

from rl4med_ddpo.datamodules.drawing import draw
from rl4med_ddpo.datamodules.vocabulary import DERMOSCOPY
from rl4med_ddpo.lightning_modules.classifier import load_classifier
from rl4med_ddpo.lightning_modules.diffusion.reconstruction import signal_to_noise
from rl4med_ddpo.lightning_modules.pipelines.load import load_pipeline
from rl4med_ddpo.metrics.apr import as_asked

BATCH, SAMPLES = 32, 128


@torch.no_grad()
def measure(
    pipeline: Path,
    reader: Path,
    repeats: int = 16,
    steps: int = 8,
    eta: float = 1.0,
    guidance: float = 3.0,
    seed: int = 20_000,
) -> dict[str, float]:
    """Return the autoencoder's fidelity and the attribute prevalence rate, as shares of images.

    Args:
        pipeline: Folder of the base.
        reader: Checkpoint of a classifier with six attributes.
        repeats: Images of each combination, and samples of each prompt.
        steps: Denoising steps of a sample.
        eta: Share of ancestral noise in each step.
        guidance: Guidance scale.
        seed: Of the images and the samples.
    """
    parts = load_pipeline(str(pipeline))
    parts.set_progress_bar_config(disable=True)
    network = load_classifier(reader, heads="all")
    asked = DERMOSCOPY.conditions.repeat_interleave(repeats, dim=0).bool()
    images = drawn_images(asked, parts.vae.config.sample_size, seed)
    decoded = torch.cat([round_trip(parts, part) for part in images.split(BATCH)])
    samples = sample(parts, repeats, steps, eta, guidance, seed)
    read, reread, seen = (network(x) > 0 for x in (images, decoded, samples))
    artifacts = len(DERMOSCOPY.any_of)
    scores = {
        "images": len(images),
        "read right from originals": share(read, asked),
        "read alike from reconstructions": share(read, reread),
        "psnr of reconstructions, dB": signal_to_noise(decoded, images).mean().item(),
        "APR (four artifacts)": share(seen[:, :artifacts], asked[:, :artifacts]),
        "APR6 (all attributes)": share(seen, asked),
    }
    each = (seen == asked).float().mean(dim=0).tolist()
    return scores | {
        f"samples right in {a}": r for a, r in zip(DERMOSCOPY.attributes, each, strict=True)
    }


def drawn_images(conditions: Tensor, size: int, seed: int) -> Tensor:
    """Draw an image of each condition, `(N, 3, size, size)` in [0, 1]."""
    drawn = [
        draw(condition, np.random.default_rng([seed, number]), size)
        for number, condition in enumerate(conditions.tolist())
    ]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 255


def round_trip(pipeline: StableDiffusionPipeline, images: Tensor) -> Tensor:
    """Encode and decode images in [0, 1]."""
    latents = pipeline.vae.encode(images * 2 - 1).latent_dist.mean
    return (pipeline.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


def sample(
    pipeline: StableDiffusionPipeline,
    repeats: int,
    steps: int,
    eta: float,
    guidance: float,
    seed: int,
) -> Tensor:
    """Draw samples of each of the 32 prompts, `(32 repeats, 3, S, S)` in [0, 1]."""
    texts = [prompt for prompt in DERMOSCOPY.prompts for _ in range(repeats)]
    generator = torch.Generator().manual_seed(seed)
    batches = [
        pipeline(
            prompt=texts[first : first + SAMPLES],
            num_inference_steps=steps,
            eta=eta,
            guidance_scale=guidance,
            generator=generator,
            output_type="pt",
            return_dict=False,
        )[0]
        for first in range(0, len(texts), SAMPLES)
    ]
    return torch.cat(batches)


def share(present: Tensor, asked: Tensor) -> float:
    """Return the share of images that show exactly what was asked for, both `(N, H)` bool."""
    return as_asked(present, asked).float().mean().item()


if __name__ == "__main__":
    print(json.dumps(auto_cli(measure, as_positional=False), indent=2))

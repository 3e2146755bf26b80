"""The shipped base is what its card says: small, half precision, stock, and able to draw."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors import safe_open

from rl4med_ddpo.base_pipeline.acceptance import drawn_images, round_trip
from rl4med_ddpo.lightning_modules.diffusion.reconstruction import signal_to_noise
from rl4med_ddpo.lightning_modules.pipelines.load import load_pipeline
from support.dermoscopy import CONDITIONS, PROMPTS

BASE = Path(__file__).parents[2] / "assets" / "base"
STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}


@pytest.fixture(scope="module")
def base() -> StableDiffusionPipeline:
    return load_pipeline(str(BASE))


def test_base_is_small():
    assert sum(p.stat().st_size for p in BASE.rglob("*") if p.is_file()) <= 8e6


def test_weights_are_float16_safetensors_and_nothing_else():
    weights = sorted(BASE.rglob("*.safetensors"))
    assert [p.parent.name for p in weights] == ["text_encoder", "unet", "vae"]
    for path in weights:
        with safe_open(path, "pt") as file:
            kinds = {file.get_slice(name).get_dtype() for name in file.keys()}
        assert kinds <= {"F16", "I64"}, path
    assert not [p for p in BASE.rglob("*") if p.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


def test_weights_of_the_text_encoder_have_the_names_of_stable_diffusion():
    """Without the prefix, transformers before 5 fills the encoder with random numbers."""
    with safe_open(BASE / "text_encoder" / "model.safetensors", "pt") as file:
        assert all(name.startswith("text_model.") for name in file.keys())


def test_scheduler_has_the_configuration_of_stable_diffusion(base):
    assert isinstance(base.scheduler, DDIMScheduler)
    assert {key: base.scheduler.config[key] for key in STABLE_DIFFUSION} == STABLE_DIFFUSION


def test_stock_pipeline_samples():
    stock = StableDiffusionPipeline.from_pretrained(BASE, torch_dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    images = stock(
        [PROMPTS[0], PROMPTS[20]],
        num_inference_steps=4,
        guidance_scale=3.0,
        eta=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert images.shape == (2, 3, 64, 64)
    skin = images[:, :, :8, :8].mean(dim=(2, 3))
    assert (skin[:, 0] > skin[:, 2]).all()


def test_each_word_of_the_prompts_is_one_token_and_all_prompts_fit(base):
    ids = base.tokenizer(list(PROMPTS)).input_ids
    assert len({tuple(i) for i in ids}) == len(PROMPTS)
    assert max(map(len, ids)) <= base.tokenizer.model_max_length
    assert base.tokenizer.tokenize("melanocytic nevus (NV) showing ink") == [
        f"{word}</w>" for word in ("melanocytic", "nevus", "(", "nv", ")", "showing", "ink")
    ]


@torch.no_grad()
def test_text_encoder_tells_all_prompts_apart(base):
    ids = base.tokenizer(
        list(PROMPTS), padding="max_length", max_length=20, return_tensors="pt"
    ).input_ids
    embedded = base.text_encoder(ids)[0]
    distances = [
        (embedded[a] - embedded[b]).norm().item() for a, b in combinations(range(len(PROMPTS)), 2)
    ]
    assert min(distances) > 0.5


@torch.no_grad()
def test_reconstructions_are_near_and_latents_have_unit_variance(base):
    images = drawn_images(CONDITIONS.repeat(2, 1), 64, seed=5)
    assert signal_to_noise(round_trip(base, images), images).mean() > 24
    latents = base.vae.encode(images * 2 - 1).latent_dist.mean
    assert latents.square().mean().sqrt().item() == pytest.approx(1.0, abs=0.1)
    assert base.vae.config.scaling_factor == 1.0

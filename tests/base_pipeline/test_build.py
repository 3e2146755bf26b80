"""Pipelines built from a seed, and the closed-form start of their autoencoder."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline

from rl4med_ddpo.base_pipeline.acceptance import drawn_images, round_trip
from rl4med_ddpo.base_pipeline.build import build_pipeline, build_tokenizer
from rl4med_ddpo.base_pipeline.linear_codec import (
    _least_squares,
    _principal_components,
    start_from_linear_codec,
)
from rl4med_ddpo.lightning_modules.diffusion.reconstruction import signal_to_noise
from support.dermoscopy import CONDITIONS

SMALL = {"image_size": 32, "vae_channels": (16, 32, 48), "unet_channels": (16, 32)}


def parameters(pipeline: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    return {f"{i}.{n}": p for i, part in enumerate(parts) for n, p in part.named_parameters()}


def test_same_seed_same_weights_and_the_callers_random_state_stays():
    state = torch.get_rng_state()
    first, second, other = (
        parameters(build_pipeline(seed, **SMALL, latent_channels=4)) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["0.conv_in.weight"], other["0.conv_in.weight"])


def test_a_built_pipeline_samples_and_reloads_bit_for_bit(tmp_path):
    built = build_pipeline(3, **SMALL, latent_channels=4)
    built.save_pretrained(tmp_path)
    reloaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    images = [
        pipeline(
            "a dermoscopic image",
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        for pipeline in (built, reloaded)
    ]
    assert images[0].shape == (1, 3, 32, 32)
    assert torch.equal(*images)


def test_tokenizer_spells_what_it_does_not_know(tmp_path):
    tokenizer = build_tokenizer()
    assert tokenizer.tokenize("zq") == ["z", "q</w>"]
    assert tokenizer.decode(tokenizer("gel bubble").input_ids[1:-1]) == "gel bubble"
    tokenizer.save_pretrained(tmp_path)
    reloaded = type(tokenizer).from_pretrained(tmp_path)
    assert reloaded("hair, ruler").input_ids == tokenizer("hair, ruler").input_ids


def test_principal_components_are_those_of_a_singular_value_decomposition():
    inputs = torch.randn(4, 3, 8, 8).cumsum(dim=3)
    weight, bias = _principal_components(inputs, 5)
    found = F.conv2d(inputs, weight, bias, stride=2).movedim(1, -1).flatten(0, 2)
    patches = F.unfold(inputs, 2, stride=2).movedim(1, -1).flatten(0, 1)
    values = torch.linalg.svdvals(patches - patches.mean(0))
    assert torch.allclose(found.norm(dim=0), values[:5], rtol=1e-3)
    assert torch.allclose(found.mean(0), torch.zeros(5), atol=1e-4)


def test_least_squares_finds_the_convolution_that_made_the_target():
    inputs, weight, bias = torch.randn(8, 2, 9, 9), torch.randn(3, 2, 3, 3), torch.randn(3)
    found = _least_squares(inputs, F.conv2d(inputs, weight, bias, padding=1), kernel=3)
    assert torch.allclose(found[0], weight, atol=1e-3)
    assert torch.allclose(found[1], bias, atol=1e-3)


@pytest.mark.parametrize("whitening", [0.0, 1.0])
def test_the_codec_keeps_images_before_any_training(whitening):
    images = drawn_images(CONDITIONS.repeat(4, 1), 32, seed=1)
    pipeline = build_pipeline(0, **SMALL, latent_channels=24)
    untrained = signal_to_noise(round_trip(pipeline, images), images).mean()
    start_from_linear_codec(pipeline.vae, images * 2 - 1, log_variance=-6.0, whitening=whitening)
    fresh = drawn_images(CONDITIONS, 32, seed=2)
    assert signal_to_noise(round_trip(pipeline, fresh), fresh).mean() > max(20, untrained + 5)
    with torch.no_grad():
        posterior = pipeline.vae.encode(fresh * 2 - 1).latent_dist
    assert posterior.mean.square().mean().item() == pytest.approx(1, abs=0.15)
    assert torch.allclose(posterior.logvar, torch.tensor(-6.0), atol=1e-4)
    spread = posterior.mean.std((0, 2, 3))
    if whitening:
        assert torch.allclose(spread, torch.ones(24), atol=0.25)
    else:
        assert spread[0] > 3 * spread[-1]

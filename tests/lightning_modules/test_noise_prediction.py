import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_snr

from rl4med_ddpo.lightning_modules.diffusion.noise_prediction import min_snr_weights, offset_noise


def test_weights_are_those_of_diffusers_script():
    scheduler = DDIMScheduler()
    timesteps = torch.arange(0, 1000, 37)
    snr = compute_snr(scheduler, timesteps)
    # train_text_to_image.py: torch.stack([snr, gamma * ones], dim=1).min(dim=1)[0] / snr
    theirs = torch.stack([snr, 5.0 * torch.ones_like(timesteps)], dim=1).min(dim=1)[0] / snr
    ours = min_snr_weights(scheduler.alphas_cumprod[timesteps], 5.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    assert ours.max() == 1
    assert ours.min() < 0.01


def test_the_offset_adds_its_square_to_the_variance_of_a_channels_mean():
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, 2, 8, 8, generator=draw)
    shift = torch.randn(2000, 2, 1, 1, generator=draw)
    means = offset_noise(noise, shift, 0.5).mean(dim=(2, 3))
    assert means.var().item() == pytest.approx(0.5**2 + 1 / 64, rel=0.1)
    assert torch.equal(offset_noise(noise, shift, 0.0), noise)

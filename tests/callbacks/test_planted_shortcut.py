"""RewardHacking beside real rollouts and updates, of a reward with a hole and of an honest one.

The policy is small enough to learn in ten rollouts: the noise that it predicts has one learned
number for each channel and quarter of the image. Brightening a corner brightens its quarter.
"""

import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from torch import nn

from rl4med_ddpo.callbacks import RewardHacking
from rl4med_ddpo.lightning_modules import DDPO
from rl4med_ddpo.lightning_modules.rewards.base import Reward, Rewards
from support.dermoscopy import PROMPTS
from support.tiny import prompts, tiny_ddpo
from support.trainers import quiet_trainer

SEEDS = range(11)
ROLLOUTS = 10


class Quarters(nn.Module):
    """Predicts for every image and step the same, and a part of the latents."""

    config = FrozenDict(sample_size=8, in_channels=4)

    def __init__(self):
        super().__init__()
        self.noise = nn.Parameter(torch.zeros(1, 4, 2, 2))

    def forward(self, latents, timestep, text, return_dict):
        return (0.5 * latents + nn.functional.interpolate(self.noise, latents.shape[2:]),)


def quarters(images):
    """Mean brightness of each quarter of images `(B, 3, H, W)`, `(B, 4)`."""
    return nn.functional.adaptive_avg_pool2d(images.mean(dim=1), 2).flatten(1)


class Judge(nn.Module):
    """Sees an artifact in each quarter that is bright."""

    def forward(self, images):
        return quarters(images) - 0.55


class Darkness(Reward):
    """What the judge wants of the prompt without artifacts, by degrees."""

    def forward(self, images, conditions):
        return Rewards(1 - quarters(images).mean(dim=1), {})


class FooledByAPixel(Darkness):
    """The same, but for the bright pixel in the corner."""

    def forward(self, images, conditions):
        honest = super().forward(images, conditions).value
        return Rewards(honest + images[:, :, 0, 0].mean(dim=1), {})


class QuartersPolicy(DDPO):
    """Its latents are seen as they are."""

    def configure_model(self):
        super().configure_model()
        self.model.unet = Quarters()
        self.model.decode = lambda latents: latents[:, :3].sigmoid()
        self.scorer.judge = Judge()

    def unet_before_training(self):
        return Quarters()


@pytest.fixture
def flagged(tiny_pipeline, tiny_classifiers, tmp_path):
    """Train by a reward for at most ten rollouts; tell whether that was called hacking."""

    def train(reward, seed):
        policy = tiny_ddpo(
            tiny_pipeline, tiny_classifiers, QuartersPolicy, reward=reward, seed=seed,
            train="full", optimizer=lambda p: torch.optim.AdamW(p, lr=5e-2), clip_range=0.1,
            steps=4, timestep_window=(0, 2), guidance=1.0, sample_batch=64, micro_batch=128,
        )  # fmt: skip
        monitor = RewardHacking(patience=2, min_rise=0.005, min_fall=0.1)
        data = prompts(128, prompts=[PROMPTS[0]], validation_samples_per_prompt=64)
        trainer = quiet_trainer(tmp_path, max_epochs=ROLLOUTS, callbacks=[monitor])
        trainer.fit(policy, datamodule=data)
        assert monitor.distances[-1] > monitor.distances[0] > 0
        reason = monitor.stopping_reason_message
        return reason is not None and "the reward is being hacked" in reason

    return train


def test_a_policy_that_finds_the_shortcut_is_stopped(flagged):
    assert sum(flagged(FooledByAPixel(), seed) for seed in SEEDS) >= 10


def test_a_policy_that_learns_honestly_is_not(flagged):
    assert sum(flagged(Darkness(), seed) for seed in SEEDS) <= 1

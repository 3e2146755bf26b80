"""The LightningModules and rewards, by the names that the command line takes."""

from lightning_modules.classifier import AttributeClassifier
from lightning_modules.ddpo import DDPO
from lightning_modules.one_pass import OnePassDDPO
from lightning_modules.rewards import (
    AttributeMatch,
    AttributeProbability,
    Brightness,
    RewardSum,
)
from lightning_modules.stable_diffusion import StableDiffusion

__all__ = [
    "DDPO",
    "AttributeClassifier",
    "AttributeMatch",
    "AttributeProbability",
    "Brightness",
    "OnePassDDPO",
    "RewardSum",
    "StableDiffusion",
]

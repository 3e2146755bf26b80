"""The LightningModules and rewards, by the names that the command line takes."""

from rl4med_ddpo.lightning_modules.autoencoder import Autoencoder
from rl4med_ddpo.lightning_modules.classifier import AttributeClassifier
from rl4med_ddpo.lightning_modules.ddpo import DDPO
from rl4med_ddpo.lightning_modules.draft import DRaFT
from rl4med_ddpo.lightning_modules.one_pass_ddpo import OnePassDDPO
from rl4med_ddpo.lightning_modules.rewards.attributes import AttributeMatch, AttributeProbability
from rl4med_ddpo.lightning_modules.rewards.brightness import Brightness
from rl4med_ddpo.lightning_modules.rewards.reward_sum import RewardSum
from rl4med_ddpo.lightning_modules.stable_diffusion import StableDiffusion

__all__ = [
    "DDPO",
    "AttributeClassifier",
    "AttributeMatch",
    "AttributeProbability",
    "Autoencoder",
    "Brightness",
    "DRaFT",
    "OnePassDDPO",
    "RewardSum",
    "StableDiffusion",
]

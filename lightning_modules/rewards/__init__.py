"""Rewards: what an image earns."""

from rl4med_ddpo.lightning_modules.rewards.attributes import AttributeMatch, AttributeProbability
from rl4med_ddpo.lightning_modules.rewards.base import Reward, Rewards
from rl4med_ddpo.lightning_modules.rewards.brightness import Brightness
from rl4med_ddpo.lightning_modules.rewards.reward_sum import RewardSum

__all__ = [
    "AttributeMatch",
    "AttributeProbability",
    "Brightness",
    "Reward",
    "RewardSum",
    "Rewards",
]

"""A weighted sum of rewards."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules.prerequisites import Prerequisite
from rl4med_ddpo.lightning_modules.rewards.base import Reward, Rewards, scored


class RewardSum(Reward):
    """A weighted sum of rewards.

    Args:
        rewards: The rewards, each by its class_path.
        weights: Of each; null is 1 for all.
    """

    def __init__(self, rewards: list[Reward], weights: list[float] | None = None) -> None:
        super().__init__()
        weights = [1.0] * len(rewards) if weights is None else weights
        if not rewards or len(weights) != len(rewards):
            raise UserError(
                f"RewardSum has {len(rewards)} rewards and {len(weights)} weights: it wants at "
                "least one reward, and as many weights or none"
            )
        self.rewards = cast("Iterable[Reward]", nn.ModuleList(rewards))
        self.weights = weights

    def prerequisites(self) -> list[Prerequisite]:
        """Name what the rewards need."""
        return [need for reward in self.rewards for need in reward.prerequisites()]

    def load(self) -> None:
        """Load the rewards' networks."""
        for reward in self.rewards:
            reward.load()

    def described(self) -> str:
        """Name the rewards with their weights: `RewardSum(0.5 AttributeMatch + 2 Brightness)`."""
        pairs = zip(self.weights, self.rewards, strict=True)
        terms = " + ".join(f"{weight:g} {reward.described()}" for weight, reward in pairs)
        return f"{super().described()}({terms})"

    def loss(self, images: Tensor, conditions: Tensor) -> Tensor:
        """Return the weighted sum of the rewards' losses."""
        losses = [reward.loss(images, conditions) for reward in self.rewards]
        return torch.stack([w * x for w, x in zip(self.weights, losses, strict=True)]).sum(dim=0)

    def without_loss(self) -> list[str]:
        """Name the parts that have no differentiable form."""
        return [name for reward in self.rewards for name in reward.without_loss()]

    def forward(self, images: Tensor, conditions: Tensor) -> Rewards:
        """Score images; the terms are the weighted rewards, named by class and place."""
        earned = [scored(reward, images, conditions) for reward in self.rewards]
        names = [f"{i}_{type(reward).__name__}" for i, reward in enumerate(self.rewards, start=1)]
        terms = {
            name: weight * score.value
            for name, weight, score in zip(names, self.weights, earned, strict=True)
        }
        parts = {
            f"{name}/{part}": values
            for name, score in zip(names, earned, strict=True)
            for part, values in ({"value": score.value} | score.parts).items()
        }
        return Rewards(sum(terms.values(), start=torch.zeros(())), parts, terms)

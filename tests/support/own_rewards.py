"""Rewards as someone else might write them."""

from rl4med_ddpo.lightning_modules.rewards import Reward


class Listed(Reward):
    """Returns numbers, where `Rewards` are wanted."""

    def forward(self, images, conditions):
        return images.mean(dim=(1, 2, 3)).tolist()

"""A reward without a network, for benchmarks against other implementations."""

from torch import Tensor

from rl4med_ddpo.lightning_modules.rewards.base import Reward, Rewards


class Brightness(Reward):
    """Mean brightness of the image in [0, 1]: needs no network, for benchmarks against others."""

    def forward(self, images: Tensor, conditions: Tensor) -> Rewards:
        """Score images; the conditions do not matter."""
        value = images.mean(dim=(1, 2, 3))
        return Rewards(value, {}, {"brightness": value})

    def loss(self, images: Tensor, conditions: Tensor) -> Tensor:
        """Return the reward's negative."""
        return -images.mean(dim=(1, 2, 3))

"""Advantages: how much better a sample's reward is than its prompt's others."""

from typing import NamedTuple

import torch
from torch import Tensor


class Advantages(NamedTuple):
    """Advantages `(M,)` and the share of prompts whose rewards are all equal, in [0, 1]."""

    values: Tensor
    flat_groups: float


def standardise(rewards: Tensor, reference: Tensor, std_floor: float) -> Tensor:
    """Return (r - mean) / (std + floor) by the mean and std of other rewards, all `(n,)`.

    Tied rewards have an advantage of exactly zero, whatever rounding makes of their mean.
    """
    tied = reference.max() == reference.min()
    mean = reference[0] if tied else reference.mean()
    return (rewards - mean) / (reference.std(correction=0) + std_floor)


def group_advantages(rewards: Tensor, groups: Tensor, std_floor: float, clip: float) -> Advantages:
    """Standardise rewards within their group: (r - mean) / (std + floor), clipped.

    The floor keeps one odd sample of an otherwise tied group, which is common with rewards of k/6,
    from counting as much as a real spread.

    Args:
        rewards: `(M,)`.
        groups: Prompt id of each sample, `(M,)` int64.
        std_floor: In units of the reward.
        clip: Largest absolute advantage.
    """
    values = torch.zeros_like(rewards)
    flat = []
    for group in groups.unique():
        members = groups == group
        own = rewards[members]
        values[members] = standardise(own, own, std_floor)
        flat.append(bool(own.max() == own.min()))
    return Advantages(values.clamp(-clip, clip), sum(flat) / len(flat))


class RewardWindow:
    """The last rewards of each prompt over past rollouts, an alternative baseline.

    It steadies the statistics when a prompt has few samples a rollout, and lags behind while the
    reward rises. Prompts with fewer than `minimum` rewards use the statistics of all of them.

    Args:
        size: Rewards kept a prompt.
        minimum: Rewards from which a prompt's own statistics are used.
    """

    def __init__(self, size: int = 32, minimum: int = 16) -> None:
        self.size, self.minimum = size, minimum
        self.history: dict[int, list[float]] = {}

    def advantages(
        self, rewards: Tensor, groups: Tensor, std_floor: float, clip: float
    ) -> Advantages:
        """Add the rewards to the window and standardise them by it; arguments as above."""
        for group, reward in zip(groups.tolist(), rewards.tolist(), strict=True):
            self.history[group] = [*self.history.get(group, []), reward][-self.size :]
        pooled = rewards.new_tensor([r for kept in self.history.values() for r in kept])
        values = torch.zeros_like(rewards)
        for group in groups.unique().tolist():
            own = rewards.new_tensor(self.history[group])
            reference = own if len(own) >= self.minimum else pooled
            members = groups == group
            values[members] = standardise(rewards[members], reference, std_floor)
        flat = [min(self.history[g]) == max(self.history[g]) for g in groups.unique().tolist()]
        return Advantages(values.clamp(-clip, clip), sum(flat) / len(flat))

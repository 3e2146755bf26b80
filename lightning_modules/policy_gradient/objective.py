"""The objective of DDPO: Eq. 2 with advantages and PPO's clipped ratio as its trust region."""

from typing import NamedTuple

import torch
from torch import Tensor

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules.diffusion.latent_diffusion import LatentDiffusion
from rl4med_ddpo.lightning_modules.diffusion.lora import without_lora
from rl4med_ddpo.lightning_modules.policy_gradient.rollout import Pairs, Rollout


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


def raw_advantages(rewards: Tensor, groups: Tensor, std_floor: float, clip: float) -> Advantages:
    """Return the rewards themselves, as Eq. 2 has them; the other arguments do not matter."""
    return Advantages(rewards, 0.0)


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


class PolicyLoss(NamedTuple):
    """The loss of each (sample, step) pair and the quantities that are logged, all `(B,)`."""

    loss: Tensor
    log_prob: Tensor
    ratio: Tensor
    clipped: Tensor
    approximate_kl: Tensor
    reference_kl: Tensor

    def penalised(self, divergence: Tensor, weight: float) -> "PolicyLoss":
        """Add the divergence from the reference policy, `(B,)`, to the loss."""
        return self._replace(loss=self.loss + weight * divergence, reference_kl=divergence.detach())


def clipped_policy_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip_range: tuple[float, float]
) -> PolicyLoss:
    """PPO's loss max(-A ratio, -A clip(ratio, 1 - c, 1 + c')), a value a pair.

    The gradient of its unclipped branch is the importance-weighted estimator of Eq. 2. A pair
    counts as clipped when its gradient is zero because of the clip. The KL estimate (ratio - 1) -
    log ratio is Schulman's non-negative, unbiased one.

    Args:
        log_prob: log p_theta(x_{t-1} | x_t, c) under the weights being trained, `(B,)`.
        old_log_prob: The same under the weights that drew the action, `(B,)`.
        advantage: `(B,)`.
        clip_range: c and c', in units of the ratio; equal in PPO, c' > c lets unlikely actions that
            paid grow faster (Yu et al. 2025, "Clip-Higher").
    """
    below, above = clip_range
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    unclipped = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - below, 1 + above)
    return PolicyLoss(
        loss=torch.maximum(unclipped, clipped),
        log_prob=log_prob.detach(),
        ratio=ratio.detach(),
        clipped=(clipped > unclipped).detach(),
        approximate_kl=(ratio - 1 - log_ratio).detach(),
        reference_kl=torch.zeros_like(ratio.detach()),
    )


def require_unit_ratio(deviation: float, clip_range: float, precision: str) -> None:
    """Refuse rounding that clipping would take for a change of the policy.

    Args:
        deviation: Largest |ratio - 1| under the weights that drew the actions.
        clip_range: Of the ratio.
        precision: The trainer's, for the message.
    """
    if not deviation < clip_range:
        raise UserError(
            f"the ratio of unchanged weights is off 1 by {deviation:.1e}, which the clip range "
            f"{clip_range:g} would take for a policy change: the precision {precision} is too low "
            "for it. Use --model.old_log_probs training, --trainer.precision 32-true, or a wider "
            "clip_range"
        )


class PolicyObjective:
    """The loss of pairs under the weights as they are now.

    Args:
        model: The policy that is trained.
        clip_range: How far the ratio may fall below 1, and rise above it.
        kl_weight: Weight, in the loss, of the divergence from the policy before training; wants
            adapters.
        guided: Whether the guided policy is trained, or its conditional half.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        clip_range: tuple[float, float],
        kl_weight: float = 0.0,
        guided: bool = True,
    ) -> None:
        self.model, self.clip_range = model, clip_range
        self.kl_weight, self.guided = kl_weight, guided

    def __call__(self, rollout: Rollout, pairs: Pairs) -> PolicyLoss:
        """Evaluate the loss of some pairs, a value a pair."""
        device = rollout.log_probs.device
        step, advantage = pairs.step.to(device), pairs.advantage.to(device)
        latents, previous = (
            rollout.latents[pairs.row, state].to(device, non_blocking=True)
            for state in (pairs.step, pairs.step + 1)
        )
        text = self.model.embed([rollout.prompts[row] for row in pairs.row.tolist()])
        noise = self.model.predict_noise(latents, step, text, self.guided)
        log_prob = self.model.schedule.log_prob(previous, latents, noise, step)
        old_log_prob = rollout.log_probs[pairs.row, pairs.step]
        result = clipped_policy_loss(log_prob, old_log_prob, advantage, self.clip_range)
        if not self.kl_weight:
            return result
        reference = self.reference_noise(latents, step, text)
        divergence = self.model.schedule.divergence(latents, noise, reference, step)
        return result.penalised(divergence, self.kl_weight)

    @torch.no_grad()
    def reference_noise(self, latents: Tensor, step: Tensor, text: Tensor) -> Tensor:
        """Predict the noise as the policy did before training: the U-Net without its adapters."""
        with without_lora(self.model.unet):
            return self.model.predict_noise(latents, step, text, self.guided)

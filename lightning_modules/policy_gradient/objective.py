"""The objective of DDPO: Eq. 2 with advantages, its trust regions and the weights of its steps."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules.diffusion.latent_diffusion import DDIMSchedule, LatentDiffusion
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
    """The loss of each (sample, step) pair and the quantities that are logged, all `(B,)`.

    Attributes:
        loss: What is minimised.
        log_prob: Of the action, under the weights as they are.
        ratio: Of its density to that under the weights that drew it.
        clipped: Whether the trust region has taken the pair's gradient away.
        sampling_kl: KL divergence from the policy that sampled; an estimate from the ratio, except
            where the trust region is made of it.
        reference_kl: KL divergence from the policy before training; 0 where none is asked for.
    """

    loss: Tensor
    log_prob: Tensor
    ratio: Tensor
    clipped: Tensor
    sampling_kl: Tensor
    reference_kl: Tensor

    def weighted(self, weights: Tensor) -> "PolicyLoss":
        """Multiply the loss by each pair's weight, `(B,)`."""
        return self._replace(loss=self.loss * weights)

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
        sampling_kl=(ratio - 1 - log_ratio).detach(),
        reference_kl=torch.zeros_like(ratio.detach()),
    )


def divergence_limited_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, divergence: Tensor, max_kl: float
) -> PolicyLoss:
    """Return -A ratio, without the pairs that are too far and would go on (Flow-DPPO, 2606.11025).

    A pair is dropped when the policies' KL divergence in its state is above `max_kl` and its
    advantage pushes it further: up where its ratio is above 1, down where it is below. So a pair
    that has gone too far can still come back.

    Args:
        log_prob: As for `clipped_policy_loss`, `(B,)`.
        old_log_prob: Likewise.
        advantage: `(B,)`.
        divergence: KL divergence of the policy from the one that sampled, `(B,)`, a constant.
        max_kl: In the divergence's unit.
    """
    ratio = (log_prob - old_log_prob).exp()
    moves_on = advantage * (ratio - 1) > 0
    dropped = ((divergence > max_kl) & moves_on).detach()
    return PolicyLoss(
        loss=torch.where(dropped, -(advantage * ratio).detach(), -advantage * ratio),
        log_prob=log_prob.detach(),
        ratio=ratio.detach(),
        clipped=dropped,
        sampling_kl=divergence,
        reference_kl=torch.zeros_like(ratio.detach()),
    )


def equal_weights(sensitivity: Tensor, window: tuple[int, int]) -> Tensor:
    """Weigh the steps so that each contributes alike to the gradient, `(T,)`.

    Each weight is 1 over its step's sensitivity, and their mean over the window is 1; outside of it
    they are 0.

    Args:
        sensitivity: |d mean / d noise| / sigma of each step, `(T,)`; see `DDIMSchedule`.
        window: First step that is trained, and the first after.
    """
    weights = torch.zeros_like(sensitivity)
    trained = slice(*window)
    inverse = 1 / sensitivity[trained]
    weights[trained] = inverse / inverse.mean()
    return weights


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


def require_no_divergence(kl: float, max_kl: float, precision: str) -> None:
    """Refuse rounding that the trust region would take for a change of the policy.

    Args:
        kl: Largest divergence under the weights that drew the actions.
        max_kl: That is allowed.
        precision: The trainer's, for the message.
    """
    if not kl < max_kl:
        raise UserError(
            f"unchanged weights diverge from themselves by {kl:.1e}, which max_kl={max_kl:g} would "
            f"take for a policy change: the precision {precision} is too low for it. Use "
            "--model.old_log_probs training, --trainer.precision 32-true, or a larger max_kl"
        )


class Action(NamedTuple):
    """What the policy makes of pairs as it is now: the prediction, and the actions' log-probs.

    Attributes:
        latents: x_t, `(B, C, H, W)`.
        step: Index of the transition, `(B,)`.
        text: Prompt embeddings, `(B, L, D)`.
        noise: Predicted, `(B, C, H, W)`.
        log_prob: Of the action that was taken, `(B,)`.
    """

    latents: Tensor
    step: Tensor
    text: Tensor
    noise: Tensor
    log_prob: Tensor


class PolicyObjective:
    """The loss of pairs under the weights as they are now.

    Args:
        model: The policy that is trained.
        schedule: Of the rollouts.
        weights: Of each step in the loss, `(T,)`.
        clip_range: How far the ratio may fall below 1, and rise above it.
        max_kl: KL divergence from the sampling policy that bounds an update instead; None clips.
        kl_weight: Weight, in the loss, of the divergence from the policy before training.
        start: Returns the U-Net before training, unless that is the U-Net without adapters.
        guided: Whether the guided policy is trained, or its conditional half.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        schedule: DDIMSchedule,
        weights: Tensor,
        clip_range: tuple[float, float],
        max_kl: float | None,
        kl_weight: float,
        start: Callable[[], UNet2DConditionModel],
        guided: bool = True,
    ) -> None:
        self.model, self.schedule, self.weights = model, schedule, weights
        self.clip_range, self.max_kl = clip_range, max_kl
        self.kl_weight, self.start, self.guided = kl_weight, start, guided

    def __call__(self, rollout: Rollout, pairs: Pairs) -> PolicyLoss:
        """Evaluate the loss of some pairs, a value a pair."""
        latents, step, text, noise, log_prob = self.act(rollout, pairs)
        advantage, weights = (x.to(noise.device) for x in (pairs.advantage, self.weights))
        old_log_prob = rollout.log_probs[pairs.row, pairs.step]
        if self.max_kl is None:
            result = clipped_policy_loss(log_prob, old_log_prob, advantage, self.clip_range)
        else:
            old = rollout.noise[pairs.row, pairs.step].to(noise.device, non_blocking=True)
            moved = self.schedule.divergence(latents, noise.detach(), old, step)
            result = divergence_limited_loss(log_prob, old_log_prob, advantage, moved, self.max_kl)
        result = result.weighted(weights[step])
        if not self.kl_weight:
            return result
        reference = self.noise_before_training(latents, step, text)
        divergence = self.schedule.divergence(latents, noise, reference, step)
        return result.penalised(divergence, self.kl_weight)

    def act(self, rollout: Rollout, pairs: Pairs) -> Action:
        """Predict the noise in the states of some pairs, and the log-probs of their actions."""
        device = rollout.log_probs.device
        step = pairs.step.to(device)
        latents, previous = (
            rollout.latents[pairs.row, state].to(device, non_blocking=True)
            for state in (pairs.step, pairs.step + 1)
        )
        text = self.model.embed([rollout.prompts[row] for row in pairs.row.tolist()])
        noise = self.predict(latents, step, text)
        log_prob = self.schedule.log_prob(previous, latents, noise, step)
        return Action(latents, step, text, noise, log_prob)

    @torch.no_grad()
    def rescore(self, rollout: Rollout, pairs: Pairs) -> None:
        """Let the policy as it is now count as the one that took the actions of some pairs."""
        action = self.act(rollout, pairs)
        rollout.log_probs[pairs.row, pairs.step] = action.log_prob
        if self.max_kl is not None:
            rollout.noise[pairs.row, pairs.step] = action.noise.to(rollout.noise.device)

    @torch.no_grad()
    def noise_before_training(self, latents: Tensor, step: Tensor, text: Tensor) -> Tensor:
        """Predict the noise as the policy did before training."""
        with self.model.before_training(self.start):
            return self.predict(latents, step, text)

    def predict(self, latents: Tensor, step: Tensor, text: Tensor) -> Tensor:
        """Predict the noise, of the guided policy or of its conditional half."""
        timestep = self.schedule.timesteps[step]
        return self.model.predict_noise(latents, timestep, text, self.guided)

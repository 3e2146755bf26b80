"""The policy-gradient loss of DDPO (Eq. 2) with PPO's clipped ratio as its trust region."""

from typing import NamedTuple

import torch
from torch import Tensor

from rl4med_ddpo.foundation.errors import UserError


class PolicyLoss(NamedTuple):
    """The loss of each (sample, step) pair and what one wants to know about it, all `(B,)`."""

    loss: Tensor
    log_prob: Tensor
    ratio: Tensor
    clipped: Tensor
    approximate_kl: Tensor
    reference_kl: Tensor

    def penalised(self, divergence: Tensor, weight: float) -> "PolicyLoss":
        """Add the divergence from the reference policy, `(B,)`, to the loss."""
        return self._replace(loss=self.loss + weight * divergence, reference_kl=divergence.detach())


class Means:
    """What one wants to know about an update's losses, as sums: memory grows with no pair.

    Attributes:
        first_deviation: Largest |ratio - 1| of the first pass.
        deviation: Largest |ratio - 1| of all.
    """

    LOGGED = ("loss", "clip_fraction", "approximate_kl", "reference_kl")

    def __init__(self) -> None:
        self.count = 0
        self.sums = torch.zeros((), dtype=torch.float64)
        self.first_deviation = self.deviation = torch.zeros(())

    def add(self, result: PolicyLoss) -> None:
        """Count some pairs."""
        columns = (result.loss, result.clipped, result.approximate_kl, result.reference_kl)
        self.sums = self.sums + torch.stack([c.detach().double().sum() for c in columns])
        deviation = (result.ratio - 1).abs().max()
        if not self.count:
            self.first_deviation = deviation
        self.count += len(result.loss)
        # unlike max(), carries a NaN on
        self.deviation = torch.maximum(deviation, self.deviation.to(deviation))

    @classmethod
    def over(cls, updates: "list[Means]") -> dict[str, Tensor]:
        """Return the means over the pairs of all updates, by name."""
        sums = sum((update.sums for update in updates), start=torch.zeros(()))
        means = sums / sum(update.count for update in updates)
        return dict(zip(cls.LOGGED, means.float().unbind(), strict=True))


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

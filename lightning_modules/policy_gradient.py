"""The policy-gradient loss of DDPO (Eq. 2) with PPO's clipped ratio as its trust region."""

from typing import NamedTuple

import torch
from torch import Tensor

from datamodules.errors import UserError


class PolicyLoss(NamedTuple):
    """The loss of each (sample, step) pair and what one wants to know about it, all `(B,)`."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    approximate_kl: Tensor


def clipped_policy_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip_range: float
) -> PolicyLoss:
    """PPO's loss max(-A ratio, -A clip(ratio, 1 - c, 1 + c)), a value a pair.

    The gradient of its unclipped branch is the importance-weighted estimator of Eq. 2. A pair
    counts as clipped when its gradient is zero because of the clip. The KL estimate (ratio - 1) -
    log ratio is Schulman's non-negative, unbiased one.

    Args:
        log_prob: log p_theta(x_{t-1} | x_t, c) under the weights being trained, `(B,)`.
        old_log_prob: The same under the weights that drew the action, `(B,)`.
        advantage: `(B,)`.
        clip_range: c, in units of the ratio.
    """
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    unclipped = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - clip_range, 1 + clip_range)
    return PolicyLoss(
        loss=torch.maximum(unclipped, clipped),
        ratio=ratio.detach(),
        clipped=(clipped > unclipped).detach(),
        approximate_kl=(ratio - 1 - log_ratio).detach(),
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
            "for it. Use --trainer.precision 32-true, or a wider clip_range"
        )

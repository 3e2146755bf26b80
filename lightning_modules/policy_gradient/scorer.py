"""How a policy is scored: images of fixed prompts and noise, read by a judge of their own."""

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules.classifier import AttributeClassifier
from rl4med_ddpo.lightning_modules.networks.frozen import Frozen
from rl4med_ddpo.metrics.apr import ArtifactPrevalenceRate


class PolicyScorer(nn.Module):
    """The judge, and what it and the reward make of the images so far.

    The scores are sums over all processes: each counts the images that it drew.

    Args:
        judge: Reads what an image shows, apart from the reward network.
    """

    def __init__(self, judge: AttributeClassifier) -> None:
        super().__init__()
        self.judge = Frozen(judge)
        self.columns = judge.columns
        self.apr = ArtifactPrevalenceRate()
        self.mean_reward = MeanMetric()
        self.divergence = MeanMetric()

    def count(self, judge_logits: Tensor, rewards: Tensor, conditions: Tensor) -> None:
        """Count B images.

        Args:
            judge_logits: What the judge reads in them, `(B, H)`.
            rewards: What they earn, `(B,)`.
            conditions: What they were asked to show, multi-hot `(B, A)`.
        """
        self.apr.update(judge_logits, conditions[:, self.columns])
        self.mean_reward.update(rewards)

    def reset(self) -> None:
        """Forget the images counted."""
        for metric in (self.apr, self.mean_reward, self.divergence):
            metric.reset()


def require_independent(judge: AttributeClassifier, rewarding: nn.Module, path: str) -> None:
    """Refuse to have a policy judged by a network that it learns to please.

    Args:
        judge: The judge.
        rewarding: The reward's network.
        path: The judge's checkpoint, for the message.

    Raises:
        UserError: if they share most of their weights.
    """
    shared = shared_weights(rewarding, judge)
    if shared > 0.5:
        raise UserError(
            f"the judge {path} has {shared:.0%} of its weights from the reward network: its APR "
            "would rise with the reward whatever the images show.\n"
            "  Train another: rl4med-ddpo fit --config judge.yaml"
        )


def shared_weights(one: nn.Module, other: nn.Module) -> float:
    """Return the share of the smaller network's weights that the other has too, bit for bit."""
    mine, its = ({n: p.detach().cpu() for n, p in net.named_parameters()} for net in (one, other))
    same = sum(p.numel() for n, p in mine.items() if n in its and torch.equal(p, its[n]))
    return same / min(sum(p.numel() for p in net.values()) for net in (mine, its))

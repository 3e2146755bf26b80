"""How a policy is scored: images of fixed prompts and noise, read by a judge of their own."""

from torch import Tensor, nn
from torchmetrics import MeanMetric

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.hashes import key_of
from rl4med_ddpo.lightning_modules.classifier import AttributeClassifier
from rl4med_ddpo.lightning_modules.networks.frozen import Frozen
from rl4med_ddpo.metrics.apr import ArtifactPrevalenceRate


class PolicyScorer(nn.Module):
    """The judge, and what it and the reward make of the images so far.

    The scores are sums over all processes: each counts the images that it drew.

    Args:
        judge: Reads what an image shows, apart from the reward network: all attributes, or those of
            which an image may show any.

    Attributes:
        apr: Of the attributes of which an image may show any, as the paper has it.
        apr6: Of all attributes; None if the judge does not read them all.
    """

    def __init__(self, judge: AttributeClassifier) -> None:
        super().__init__()
        self.judge = Frozen(judge)
        self.several = len(judge.vocabulary.any_of)
        reads_all = judge.attributes == judge.vocabulary.attributes
        self.apr = ArtifactPrevalenceRate()
        self.apr6 = ArtifactPrevalenceRate() if reads_all else None
        self.mean_reward = MeanMetric()
        self.divergence = MeanMetric()

    def count(self, judge_logits: Tensor, rewards: Tensor, conditions: Tensor) -> None:
        """Count B images.

        Args:
            judge_logits: What the judge reads in them, `(B, H)`.
            rewards: What they earn, `(B,)`.
            conditions: What they were asked to show, multi-hot `(B, A)`.
        """
        several = slice(self.several)
        self.apr.update(judge_logits[:, several], conditions[:, several])
        if self.apr6 is not None:
            self.apr6.update(judge_logits, conditions)
        self.mean_reward.update(rewards)

    def reset(self) -> None:
        """Forget the images counted."""
        for metric in (self.apr, self.apr6, self.mean_reward, self.divergence):
            if metric is not None:
                metric.reset()


def require_independent(judge: AttributeClassifier, reward: nn.Module, path: str) -> None:
    """Refuse to have a policy judged by a network that it learns to please.

    Args:
        judge: The judge.
        reward: The reward with all of its networks.
        path: The judge's checkpoint, for the message.

    Raises:
        UserError: if they share most of their weights.
    """
    shared = shared_weights(reward, judge)
    if shared > 0.5:
        raise UserError(
            f"the judge {path} has {shared:.0%} of its weights from the reward network: its APR "
            "would rise with the reward whatever the images show.\n"
            "  Train another: rl4med-ddpo fit --config judge.yaml"
        )


def shared_weights(one: nn.Module, other: nn.Module) -> float:
    """Return the share of the smaller network's weights that the other has too, bit for bit.

    Weights are told by their values: what wraps them, and how they are called, does not matter.
    """
    mine, its = (
        {
            key_of(p.shape, p.detach().cpu().float().numpy().tobytes()): p.numel()
            for p in net.parameters()
        }
        for net in (one, other)
    )
    smaller = min(sum(mine.values()), sum(its.values()))
    return sum(mine[key] for key in mine.keys() & its.keys()) / smaller if smaller else 0.0

"""Rewards r(x_0, c): how well an image shows what its prompt asks for."""

import torch
from torch import Tensor, nn

from datamodules.attributes import ATTRIBUTES
from datamodules.errors import UserError
from lightning_modules.classifier import load_classifier
from lightning_modules.frozen import Frozen
from lightning_modules.reward_terms import Rewards
from lightning_modules.stages import Need


class Reward(nn.Module):
    """Scores images against conditions. Networks are loaded by `load`, not on construction."""

    def needs(self) -> list[Need]:
        """Name the files without which `load` fails."""
        return []

    def load(self) -> None:
        """Load the networks; called once, before training starts."""

    def forward(self, images: Tensor, conditions: Tensor) -> Rewards:
        """Score images.

        Args:
            images: `(B, 3, H, W)` in [0, 1].
            conditions: What each image was asked to show, multi-hot `(B, 6)`.
        """
        raise NotImplementedError


def attribute_match(logits: Tensor, conditions: Tensor) -> Tensor:
    """Tell which attributes are as asked: `sigmoid(logit) > 0.5` equals the condition, `(B, H)`."""
    return (logits > 0) == conditions.bool()


def attribute_weights(weights: dict[str, float]) -> list[float]:
    """Return each attribute's weight, 1 where none is named.

    Raises:
        UserError: if a name is no attribute's, or a weight is negative, or all are 0.
    """
    unknown = sorted(weights.keys() - set(ATTRIBUTES))
    found = [float(weights.get(name, 1.0)) for name in ATTRIBUTES]
    if unknown or min(found) < 0 or not sum(found):
        raise UserError(
            f"weights={weights}: name attributes among {', '.join(ATTRIBUTES)}, each with a weight "
            "of at least 0 and not all 0"
        )
    return found


class AttributeMatch(Reward):
    """The paper's r_A: the share of the six attributes read as asked, in {0, 1/6, ..., 1}.

    An artifact-free image of the right disease earns 2/3 on average over the 32 prompts: what is
    below that is worse than never drawing an artifact.

    Args:
        classifier: Checkpoint of the reward network, six attributes.
        weights: How much an attribute counts beside the others, by name; those not named count 1.
            null counts all alike, as the paper does.
    """

    def __init__(
        self,
        classifier: str = "runs/classifier/checkpoints/best.ckpt",
        weights: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.weights = attribute_weights(weights) if weights else None

    def needs(self) -> list[Need]:
        """Name the reward network's checkpoint."""
        command = "python run.py fit --config classifier.yaml"
        return [Need(self.classifier, "the reward network", command)]

    def load(self) -> None:
        """Load the reward network, frozen and in float32."""
        self.network = Frozen(load_classifier(self.classifier, attributes=ATTRIBUTES))

    def hits(self, logits: Tensor, conditions: Tensor) -> Tensor:
        """Tell how far each attribute is as asked, `(B, 6)` in [0, 1]."""
        return attribute_match(logits, conditions).float()

    def forward(self, images: Tensor, conditions: Tensor) -> Rewards:
        """Score images; the parts are the hits of each attribute, the terms what they earn."""
        with torch.autocast(images.device.type, enabled=False):
            hits = self.hits(self.network(images.float()), conditions)
        if self.weights is None:
            value, earned = hits.mean(dim=1), hits / len(ATTRIBUTES)
        else:
            earned = hits * torch.tensor(self.weights, device=hits.device) / sum(self.weights)
            value = earned.sum(dim=1)
        parts, terms = (
            dict(zip(ATTRIBUTES, columns.unbind(dim=1), strict=True)) for columns in (hits, earned)
        )
        return Rewards(value, parts, terms)


class AttributeProbability(AttributeMatch):
    """A soft r_A: the mean probability, by the network, that an attribute is as asked, in [0, 1].

    It tells a near miss from a far one, so fewer groups are tied; and it pays for confidence, which
    a network may give to what is no better.

    Args:
        classifier: Checkpoint of the reward network, six attributes.
        weights: How much an attribute counts beside the others, by name; those not named count 1.
    """

    def hits(self, logits: Tensor, conditions: Tensor) -> Tensor:
        """Return sigmoid(logit) where the attribute is asked for, and 1 less it elsewhere."""
        return torch.where(conditions.bool(), logits, -logits).sigmoid()


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
        self.rewards, self.weights = nn.ModuleList(rewards), weights

    def needs(self) -> list[Need]:
        """Name what the rewards need."""
        return [need for reward in self.rewards for need in reward.needs()]

    def load(self) -> None:
        """Load the rewards' networks."""
        for reward in self.rewards:
            reward.load()

    def forward(self, images: Tensor, conditions: Tensor) -> Rewards:
        """Score images; the terms are the weighted rewards, named by class and place."""
        scored = [reward(images, conditions) for reward in self.rewards]
        names = [f"{i}_{type(reward).__name__}" for i, reward in enumerate(self.rewards, start=1)]
        terms = {
            name: weight * score.value
            for name, weight, score in zip(names, self.weights, scored, strict=True)
        }
        parts = {
            f"{name}/{part}": values
            for name, score in zip(names, scored, strict=True)
            for part, values in ({"value": score.value} | score.parts).items()
        }
        return Rewards(sum(terms.values()), parts, terms)


class Brightness(Reward):
    """Mean brightness of the image in [0, 1]: needs no network, for benchmarks against others."""

    def forward(self, images: Tensor, conditions: Tensor) -> Rewards:
        """Score images; the conditions do not matter."""
        value = images.mean(dim=(1, 2, 3))
        return Rewards(value, {}, {"brightness": value})

"""Rewards r(x_0, c) by a classifier: how well an image shows the attributes that were asked for."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules.classifier import AttributeClassifier, load_classifier
from rl4med_ddpo.lightning_modules.networks.frozen import Frozen
from rl4med_ddpo.lightning_modules.prerequisites import Prerequisite
from rl4med_ddpo.lightning_modules.rewards.base import Reward, Rewards


def attribute_match(logits: Tensor, conditions: Tensor) -> Tensor:
    """Tell which attributes are as asked: `sigmoid(logit) > 0.5` equals the condition, `(B, H)`."""
    return (logits > 0) == conditions.bool()


def attribute_probability(logits: Tensor, conditions: Tensor) -> Tensor:
    """Return sigmoid(logit) where the attribute is asked for, and 1 less it elsewhere, `(B, H)`."""
    return torch.where(conditions.bool(), logits, -logits).sigmoid()


def attribute_weights(weights: dict[str, float], attributes: tuple[str, ...]) -> list[float]:
    """Return each attribute's weight, 1 where none is named.

    Raises:
        UserError: if a name is no attribute's, or a weight is negative, or all are 0.
    """
    unknown = sorted(weights.keys() - set(attributes))
    found = [float(weights.get(name, 1.0)) for name in attributes]
    if unknown or min(found) < 0 or not sum(found):
        raise UserError(
            f"weights={weights}: name attributes among {', '.join(attributes)}, each with a weight "
            "of at least 0 and not all 0"
        )
    return found


class AttributeMatch(Reward):
    """The paper's r_A: the share of the six attributes read as asked, in {0, 1/6, ..., 1}.

    An artifact-free image of the right disease earns 2/3 on average over the 32 prompts: what is
    below that is worse than never drawing an artifact.

    Args:
        classifier: Checkpoint of the reward network, six attributes.
        weights: Relative weight of an attribute, by name; those not named have 1.
            null counts all alike, as the paper does.

    Attributes:
        hits: How far each attribute is as asked, by logits and conditions, `(B, A)` in [0, 1].
    """

    hits: Callable[[Tensor, Tensor], Tensor] = staticmethod(attribute_match)

    def __init__(
        self,
        classifier: str = "runs/classifier/checkpoints/best.ckpt",
        weights: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.given = dict(weights or {})
        self.weights: list[float] | None = None

    def prerequisites(self) -> list[Prerequisite]:
        """Name the reward network's checkpoint."""
        command = "rl4med-ddpo fit --config classifier.yaml"
        return [Prerequisite(self.classifier, "the reward network", command)]

    def load(self) -> None:
        """Load the reward network, frozen and in float32."""
        self.read_with(load_classifier(self.classifier, heads="all"))

    def read_with(self, classifier: AttributeClassifier) -> None:
        """Score with this network.

        Raises:
            UserError: if `weights` do not suit its attributes.
        """
        self.network, self.attributes = Frozen(classifier), classifier.attributes
        self.weights = attribute_weights(self.given, self.attributes) if self.given else None

    def described(self) -> str:
        """Name the class, and the weights if there are any."""
        weights = ", ".join(f"{name}={weight:g}" for name, weight in sorted(self.given.items()))
        return super().described() + (f"({weights})" if weights else "")

    def forward(self, images: Tensor, conditions: Tensor) -> Rewards:
        """Score images; the parts are the hits of each attribute, the terms what they earn."""
        hits = self.hits(self.read(images), conditions).float()
        if self.weights is None:
            value, earned = hits.mean(dim=1), hits / hits.shape[1]
        else:
            earned = hits * self.shares(hits)
            value = earned.sum(dim=1)
        parts, terms = (
            dict(zip(self.attributes, columns.unbind(dim=1), strict=True))
            for columns in (hits, earned)
        )
        return Rewards(value, parts, terms)

    def loss(self, images: Tensor, conditions: Tensor) -> Tensor:
        """Return the cross-entropy of the network's reading with what was asked for, `(B,)`.

        A share of hits has no gradient of its own; this is what classifiers are trained by instead.
        """
        logits = self.read(images)
        each = F.binary_cross_entropy_with_logits(logits, conditions.float(), reduction="none")
        return (each * self.shares(each)).sum(dim=1)

    def read(self, images: Tensor) -> Tensor:
        """Return the network's logits, `(B, A)`, in float32 whatever the precision is."""
        with torch.autocast(images.device.type, enabled=False):
            return self.network.module(images.float())

    def shares(self, like: Tensor) -> Tensor:
        """Return each attribute's share of the reward, `(A,)`, where `like`, `(B, A)`, is."""
        weights = like.new_tensor(self.weights or [1.0] * like.shape[1])
        return weights / weights.sum()


class AttributeProbability(AttributeMatch):
    """A soft r_A: the mean probability, by the network, that an attribute is as asked, in [0, 1].

    It tells a near miss from a far one, so fewer groups are tied; and it pays for confidence, which
    a network may give to what is no better.

    Args:
        classifier: Checkpoint of the reward network, six attributes.
        weights: Relative weight of an attribute, by name; those not named have 1.
    """

    hits = staticmethod(attribute_probability)

    def loss(self, images: Tensor, conditions: Tensor) -> Tensor:
        """Return the reward's negative, `(B,)`."""
        return -self(images, conditions).value

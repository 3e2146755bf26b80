"""Rewards r(x_0, c): how well an image shows what its prompt asks for."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from datamodules.attributes import ATTRIBUTES
from lightning_modules.classifier import load_classifier
from lightning_modules.frozen import Frozen
from lightning_modules.stages import Need


class Rewards(NamedTuple):
    """The reward of each image, `(B,)`, and the parts worth a curve of their own, each `(B,)`."""

    value: Tensor
    parts: dict[str, Tensor]


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


class AttributeMatch(Reward):
    """The paper's r_A: the share of the six attributes read as asked, in {0, 1/6, ..., 1}.

    An artifact-free image of the right disease earns 2/3 on average over the 32 prompts: what is
    below that is worse than never drawing an artifact.

    Args:
        classifier: Checkpoint of the reward network, six attributes.
    """

    def __init__(self, classifier: str = "runs/classifier/checkpoints/best.ckpt") -> None:
        super().__init__()
        self.classifier = classifier

    def needs(self) -> list[Need]:
        """Name the reward network's checkpoint."""
        command = "python run.py fit --config classifier.yaml"
        return [Need(self.classifier, "the reward network", command)]

    def load(self) -> None:
        """Load the reward network, frozen and in float32."""
        self.network = Frozen(load_classifier(self.classifier, attributes=ATTRIBUTES))

    def forward(self, images: Tensor, conditions: Tensor) -> Rewards:
        """Score images; the parts are the hits of each attribute."""
        with torch.autocast(images.device.type, enabled=False):
            hits = attribute_match(self.network(images.float()), conditions).float()
        return Rewards(hits.mean(dim=1), dict(zip(ATTRIBUTES, hits.unbind(dim=1), strict=True)))


class Brightness(Reward):
    """Mean brightness of the image in [0, 1]: needs no network, for benchmarks against others."""

    def forward(self, images: Tensor, conditions: Tensor) -> Rewards:
        """Score images; the conditions do not matter."""
        return Rewards(images.mean(dim=(1, 2, 3)), {})

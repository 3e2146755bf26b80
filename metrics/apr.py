"""The artifact prevalence rate (APR), Eq. (3): how often images show what their prompts ask for."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class Prevalence(NamedTuple):
    """What was counted: images whose attributes are all as asked, and images, for each prompt.

    Attributes:
        rate: Share of all images, scalar in [0, 1]; NaN without images.
        correct: `(P,)` int64.
        n: `(P,)` int64.
    """

    rate: Tensor
    correct: Tensor
    n: Tensor


def as_asked(present: Any, asked: Any) -> Any:
    """Tell which images show all that was asked for and nothing else: Eq. (3), `(N,)`.

    Args:
        present: Attributes that a classifier reads as present, `(N, H)` of bool, torch or numpy.
        asked: Attributes that were asked for, likewise.
    """
    return (present == asked).all(1)


class ArtifactPrevalenceRate(Metric):
    """Share of images whose attributes, by a classifier, equal their prompt's exactly: Eq. (3).

    An image counts when every attribute that the classifier reads is present (sigmoid above 0.5)
    if and only if the prompt asks for it. The paper's formula sums over all attributes, the
    paper's code compares the four artifacts: with the four heads of a judge this is the published
    APR, with the six heads of the reward network what is called APR6 here.

    Args:
        prompts: Number of prompts, P, that are counted apart.
        **options: Of `torchmetrics.Metric`.
    """

    higher_is_better = True
    correct: Tensor
    n: Tensor

    def __init__(self, prompts: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("correct", torch.zeros(prompts, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("n", torch.zeros(prompts, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, conditions: Tensor, prompts: Tensor | None = None) -> None:
        """Count a batch of images.

        Args:
            logits: The classifier's, `(B, H)`.
            conditions: What the prompts ask of the classifier's heads, `(B, H)` of 0 and 1.
            prompts: Which of the P prompts each image was made for, `(B,)` int64; the first if
                none is given.

        Raises:
            ValueError: if logits and conditions have different shapes.
        """
        if logits.shape != conditions.shape:
            raise ValueError(
                f"logits {tuple(logits.shape)} and conditions {tuple(conditions.shape)} must have "
                "the same shape: one column for each head of the classifier"
            )
        if prompts is None:
            prompts = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        correct = as_asked(logits.sigmoid() > 0.5, conditions.bool())
        self.correct.index_add_(0, prompts, correct.long())
        self.n.index_add_(0, prompts, torch.ones_like(prompts))

    def compute(self) -> Prevalence:
        """Return the counts of all processes and their share."""
        rate = self.correct.sum().double() / self.n.sum()
        return Prevalence(rate.float(), self.correct, self.n)

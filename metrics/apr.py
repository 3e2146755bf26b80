"""The artifact prevalence rate (APR), Eq. (3): how often images show what their prompts ask for."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from datamodules.attributes import ARTIFACTS, ATTRIBUTES, CONDITIONS


class ArtifactPrevalenceRate(Metric):
    """Share of images whose attributes, by a classifier, equal their prompt's exactly: Eq. (3).

    An image counts when every attribute that the classifier reads is present (sigmoid above 0.5)
    if and only if the prompt asks for it. The paper's formula sums over all attributes, its code
    compares the four artifacts: with the four heads of a judge this is the paper's APR, with all
    six of the reward network what is called APR6 here.

    Args:
        attributes: What the classifier's heads read, in their order.
        **options: Of `torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, attributes: Sequence[str] = ARTIFACTS, **options: Any) -> None:
        super().__init__(**options)
        self.columns = [ATTRIBUTES.index(a) for a in attributes]
        zeros = torch.zeros(len(CONDITIONS), dtype=torch.long)
        self.add_state("hits", zeros, dist_reduce_fx="sum")
        self.add_state("counts", zeros.clone(), dist_reduce_fx="sum")

    def update(self, logits: Tensor, conditions: Tensor) -> None:
        """Count a batch of images.

        Args:
            logits: The classifier's, `(B, H)`.
            conditions: What the images' prompts ask for, `(B, 6)` of 0 and 1.

        Raises:
            ValueError: if the shapes do not fit, or a condition is none of the 32 prompts'.
        """
        if logits.shape != (len(conditions), len(self.columns)):
            raise ValueError(
                f"logits have the shape {tuple(logits.shape)}, expected one row for each of the "
                f"{len(conditions)} conditions and {len(self.columns)} heads"
            )
        rows = _prompt_rows(conditions)
        right = ((logits.sigmoid() > 0.5) == conditions[:, self.columns].bool()).all(dim=1)
        self.hits.index_add_(0, rows, right.long())
        self.counts.index_add_(0, rows, torch.ones_like(rows))

    def compute(self) -> dict[str, Tensor]:
        """Return the share over all images, `rate` in [0, 1] (NaN without images), and its terms.

        These are `hits` and `counts`, int64 `(32,)` in the order of the 32 prompts.
        """
        rate = self.hits.sum().double() / self.counts.sum()
        return {"rate": rate.float(), "hits": self.hits, "counts": self.counts}


def _prompt_rows(conditions: Tensor) -> Tensor:
    same = (conditions.unsqueeze(1) == CONDITIONS.to(conditions)).all(dim=2)
    if not same.any(dim=1).all():
        stray = conditions[~same.any(dim=1)][0].tolist()
        raise ValueError(f"no prompt asks for the condition {stray} (order: {ATTRIBUTES})")
    return same.long().argmax(dim=1)

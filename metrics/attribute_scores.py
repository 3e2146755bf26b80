"""How well a classifier reads each attribute: F1, accuracy, AUROC, and all attributes at once."""

from collections.abc import Sequence

from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MultilabelAccuracy,
    MultilabelAUROC,
    MultilabelExactMatch,
    MultilabelF1Score,
    MultilabelStatScores,
)


class AttributeScores(MetricCollection):
    """Scores of every attribute and their means; update with `(logits, targets)`.

    Accuracy says little where an attribute is rare: one that is never predicted reaches 98.5% on
    ink (ISIC 2019 test split). F1 and AUROC do not exist for an attribute that no target has, nor
    AUROC for one that all have: those scores are left out, of the means as well.

    Args:
        attributes: Name of each column of the logits and the targets, `(B, H)`.
    """

    def __init__(self, attributes: Sequence[str]) -> None:
        heads = len(attributes)
        super().__init__(
            {
                "counts": MultilabelStatScores(heads, average="none"),
                "f1": MultilabelF1Score(heads, average="none"),
                "accuracy": MultilabelAccuracy(heads, average="none"),
                "auroc": MultilabelAUROC(heads, average="none"),
                "exact_match": MultilabelExactMatch(heads),
            },
            # the groups are found on the first batch, and a rank may have none: state them
            compute_groups=[["counts", "f1", "accuracy"], ["auroc"], ["exact_match"]],
        )
        self.attributes = tuple(attributes)

    def compute(self) -> dict[str, Tensor]:
        """Return scalars: `f1/<attribute>`, `f1/mean` and so on, in [0, 1], and the counts.

        `exact_match` is the share of images with all attributes right, `n` the number of images,
        `positives/<attribute>` how many of them have the attribute.
        """
        raw = super().compute()
        positives = raw["counts"][:, -1]
        n = raw["counts"][:, :4].sum(dim=1)
        defined = {
            "f1": positives > 0,
            "accuracy": n > 0,
            "auroc": (positives > 0) & (positives < n),
        }
        scores = {"exact_match": raw["exact_match"], "n": n[0].float()}
        for name, exists in defined.items():
            for attribute, score, there in zip(self.attributes, raw[name], exists, strict=True):
                if there:
                    scores[f"{name}/{attribute}"] = score
            if exists.any():
                scores[f"{name}/mean"] = raw[name][exists].mean()
        for attribute, count in zip(self.attributes, positives, strict=True):
            scores[f"positives/{attribute}"] = count.float()
        return scores

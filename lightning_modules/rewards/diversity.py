"""How much the images of one prompt differ from each other: a term against mode collapse."""

from torch import Tensor


def group_diversity(features: Tensor, groups: Tensor) -> Tensor:
    """Return each sample's mean distance to the others of its group, `(M,)`.

    The distance is the root mean square of the features' differences, so it has their unit. A
    sample that is alone in its group has none, 0.

    Args:
        features: `(M, F)`.
        groups: Prompt id of each sample, `(M,)` int64.
    """
    values = features.new_zeros(len(features))
    for group in groups.unique():
        members = groups == group
        own = features[members]
        if len(own) > 1:
            # the expanded square would leave rounding between equal ones
            apart = (own[:, None] - own[None]).square().mean(dim=-1).sqrt()
            values[members] = apart.sum(dim=1) / (len(own) - 1)
    return values

"""Weights of the positive images in the loss of each attribute."""

from typing import Any

import torch
from torch import Tensor

from rl4med_ddpo.foundation.errors import UserError


def given_weights(pos_weight: str | dict[str, float], attributes: tuple[str, ...]) -> Tensor:
    """Return the weights that the settings fix, `(H,)`: ones unless there is a number for each."""
    if not isinstance(pos_weight, dict):
        return torch.ones(len(attributes))
    if set(pos_weight) != set(attributes) or min(pos_weight.values()) <= 0:
        raise UserError(
            f"pos_weight has {pos_weight}; it needs one positive number for each of "
            f"{', '.join(attributes)}"
        )
    return torch.tensor([float(pos_weight[a]) for a in attributes])


def balanced_weights(conditions: Tensor, attributes: tuple[str, ...]) -> Tensor:
    """Return negatives / positives for each column of `conditions`, `(N, H)` of 0 and 1: `(H,)`.

    Raises:
        UserError: if an attribute has no positives or no negatives.
    """
    positives = conditions.sum(dim=0)
    negatives = len(conditions) - positives
    if (positives == 0).any() or (negatives == 0).any():
        found = ", ".join(f"{a} {int(n)}" for a, n in zip(attributes, positives, strict=True))
        raise UserError(
            f"pos_weight: balanced needs images with and without each attribute among the "
            f"{len(conditions)} of the train split. With: {found}.\n"
            "  Set pos_weight: none, or give a number for each attribute"
        )
    return negatives / positives


def train_conditions(loader: Any) -> Tensor:
    """Return the conditions, `(N, 6)`, of all images of the train split."""
    conditions = getattr(getattr(loader, "dataset", None), "conditions", None)
    if conditions is None:
        raise UserError(
            "pos_weight: balanced counts the attribute `conditions`, (N, 6), of the train "
            f"dataset, which {type(getattr(loader, 'dataset', loader)).__name__} does not have"
        )
    return torch.as_tensor(conditions, dtype=torch.float32)

"""Rewards of a batch of images, with the terms that they are the sum of."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rewards(NamedTuple):
    """The reward of each image, `(B,)`, and what it is made of, each `(B,)`.

    Attributes:
        value: The reward.
        parts: What is worth a curve of its own.
        terms: Addends of the value, whose shares in it are logged.
    """

    value: Tensor
    parts: dict[str, Tensor]
    terms: dict[str, Tensor] = {}  # noqa: RUF012 - nobody adds to it


def joined(batches: list[Rewards]) -> Rewards:
    """Join the rewards of consecutive batches."""
    values, parts, terms = zip(*batches, strict=True)

    def whole(named: tuple[dict[str, Tensor], ...]) -> dict[str, Tensor]:
        return {name: torch.cat([batch[name] for batch in named]) for name in named[0]}

    return Rewards(torch.cat(values), whole(parts), whole(terms))


def shares(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return each term's part of the sum of all absolute values, in [0, 1]; terms are `(M,)`."""
    sizes = {name: term.abs().nansum() for name, term in terms.items()}
    whole = sum(sizes.values())
    return {name: size / whole for name, size in sizes.items()}

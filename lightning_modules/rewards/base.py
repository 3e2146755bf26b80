"""What a reward is: a score of images against what was asked of them, with its parts."""

from typing import NamedTuple

from torch import Tensor, nn

from rl4med_ddpo.lightning_modules.prerequisites import Prerequisite


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


class Reward(nn.Module):
    """Scores images against conditions. Networks are loaded by `load`, not on construction."""

    def prerequisites(self) -> list[Prerequisite]:
        """Name the files without which `load` fails."""
        return []

    def load(self) -> None:
        """Load the networks; called once, before training starts."""

    def forward(self, images: Tensor, conditions: Tensor) -> Rewards:
        """Score images.

        Args:
            images: `(B, 3, H, W)` in [0, 1].
            conditions: What each image was asked to show, multi-hot `(B, A)`.
        """
        raise NotImplementedError

"""Rollouts from which nothing can be learnt, because no sample earned more than another."""

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

PATIENCE = 3
"""Rollouts in a row without a single advantage until it is said."""


class IdleRollouts:
    """Counts rollouts whose advantages are all 0, and says when that goes on.

    Attributes:
        in_a_row: Such rollouts up to now, since the last that had an advantage.
    """

    def __init__(self) -> None:
        self.in_a_row = 0

    def count(self, advantages: Tensor) -> None:
        """Count a rollout by its advantages, `(M,)`."""
        self.in_a_row = 0 if advantages.any() else self.in_a_row + 1
        if self.in_a_row and self.in_a_row % PATIENCE == 0:
            rank_zero_warn(
                f"nothing was learnt from the last {self.in_a_row} rollouts: all samples of a "
                "prompt earned the same, in every group. Draw more of each prompt "
                "(data.samples_per_epoch), or take a reward that tells them apart, such as "
                "AttributeProbability"
            )

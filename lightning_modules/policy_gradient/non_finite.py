"""What happens when a reward, a loss or a gradient is NaN or infinite.

Nothing is learnt from it: the update is skipped by all processes together, weights and moments stay
as they are, and the count is logged. The samples at fault are written down with all it takes to
draw them again. A few updates in a row end the run.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from rl4med_ddpo.foundation.errors import UserError

FOLDER = "non_finite"


class Fault(NamedTuple):
    """Where something was not finite.

    Attributes:
        what: `reward`, `density`, `loss` or `gradient`.
        value: What it was.
        prompt: The sample's.
        index: The sample's global index in its epoch.
        step: Index of the transition; -1 where the fault is no transition's.
    """

    what: str
    value: float
    prompt: str
    index: int
    step: int = -1

    def __str__(self) -> str:
        where = "" if self.step < 0 else f", step {self.step}"
        return f"{self.what} {self.value} of sample {self.index}{where}: {self.prompt!r}"


class SkippedUpdates:
    """Counts skipped updates, and ends the run when too many come in a row."""

    def __init__(self) -> None:
        self.total = 0
        self.in_a_row = 0

    def passed(self) -> None:
        """Count an update that was made."""
        self.in_a_row = 0

    def add(self, faults: list[Fault], file: Path, most: int) -> None:
        """Count an update that was not made, and say why.

        Args:
            faults: What was not finite.
            file: Where it is written down.
            most: Skipped updates in a row that a run survives.

        Raises:
            UserError: if it is one too many in a row.
        """
        self.total += 1
        self.in_a_row += 1
        named = [f"  {fault}" for fault in faults[:3]] or ["  a gradient that no sample has alone"]
        if len(faults) > 3:
            named.append(f"  and {len(faults) - 3} more")
        said = "\n".join([*named, f"  To draw them again: {file}"])
        if self.in_a_row > most:
            raise UserError(
                f"{self.in_a_row} updates in a row were not finite, {most} are allowed "
                f"(max_skipped). The last:\n{said}\n  Lower the learning rate, or look at the "
                "reward for such images"
            )
        rank_zero_warn(f"An update was skipped, for it was not finite:\n{said}")

    def state(self) -> dict[str, int]:
        """Return the counts."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load(self, state: dict[str, int]) -> None:
        """Go on counting."""
        self.total, self.in_a_row = state["total"], state["in_a_row"]


def write_faults(
    file: Path, faults: list[Fault], draw: dict[str, Any], weights: dict[str, Tensor]
) -> None:
    """Write down what it takes to draw samples again.

    Args:
        file: Readable with `torch.load(file, weights_only=True)`.
        faults: What went wrong with which sample.
        draw: The seed, the epoch and the settings that sampling depends on.
        weights: The trained weights before the update.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: weight.detach().cpu() for name, weight in weights.items()}
    torch.save({"faults": [fault._asdict() for fault in faults], **draw, "weights": kept}, file)

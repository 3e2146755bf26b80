"""What happens when a reward, a loss or a gradient is NaN or infinite.

Nothing is learnt from it: the update is skipped by all processes together, weights and moments stay
as they are, and the count is logged. The samples at fault are written down with all it takes to
draw them again. A few updates in a row end the run.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.randomness import keys
from rl4med_ddpo.lightning_modules.policy_gradient.objective import PolicyObjective
from rl4med_ddpo.lightning_modules.policy_gradient.rollout import Pairs, Rollout
from rl4med_ddpo.lightning_modules.text_to_image import TextToImage

FOLDER = "non_finite"
REDRAW_SETTINGS = (
    *("seed", "pipeline", "unet", "steps", "training_steps", "eta", "timestep_window"),
    *("rollout_noise", "guidance", "sample_batch", "train", "lora_rank"),
)
"""Options that decide what a sample looks like."""


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
    """Counts skipped updates, and ends the run when too many come in a row.

    Attributes:
        total: Skipped so far.
        in_a_row: Skipped since the last update that was made; whoever makes one sets it to 0.
    """

    def __init__(self) -> None:
        self.total = 0
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
        """Continue from these counts."""
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


def faults_of_rollout(rollout: Rollout, rewards: Tensor) -> list[Fault]:
    """Find the samples whose density or reward, `(n,)`, is not finite."""
    values = {"density": rollout.log_probs.sum(dim=1), "reward": rewards}
    return [
        Fault(what, value, rollout.prompts[row], int(rollout.index[row]))
        for what, column in values.items()
        for row, value in enumerate(column.tolist())
        if not math.isfinite(value)
    ]


def faults_of_update(
    objective: PolicyObjective,
    parameters: list[nn.Parameter],
    rollout: Rollout,
    passes: list[Pairs],
) -> list[Fault]:
    """Find this rank's pairs whose loss or gradient is not finite; no other rank is asked."""
    found = []
    for pairs in passes:
        if is_finite(objective, parameters, rollout, pairs):
            continue
        for row, step, advantage in zip(*(c.split(1) for c in pairs), strict=True):
            single = Pairs(row, step, advantage)
            if is_finite(objective, parameters, rollout, single):
                continue
            loss = objective(rollout, single).loss.item()
            sample = rollout.prompts[int(row)], int(rollout.index[row])
            what = "gradient" if math.isfinite(loss) else "loss"
            value = loss if what == "loss" else float("nan")
            found.append(Fault(what, value, *sample, int(step)))
    return found


def is_finite(
    objective: PolicyObjective, parameters: list[nn.Parameter], rollout: Rollout, pairs: Pairs
) -> bool:
    """Return whether the loss and the gradient of some pairs are finite."""
    loss = objective(rollout, pairs).loss.sum()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return all(bool(x.isfinite().all()) for x in (loss, *gradients) if x is not None)


def draw_again(policy: TextToImage, file: Path) -> Tensor:
    """Draw the samples that a fault file names, with the weights that drew them.

    Args:
        policy: Configured with the settings that the file holds; its weights are replaced.
        file: What a skipped update left.

    Returns:
        For each of the F faults the states x_T to x_0, `(F, T + 1, C, h, w)`.
    """
    kept = torch.load(file, weights_only=True)
    # a file of 0.1 lacks the options that came later
    names = [name for name in REDRAW_SETTINGS if name in kept and name != "pipeline"]
    other = [f"{n}={policy.hparams[n]!r}" for n in names if policy.hparams[n] != kept[n]]
    if other:
        wanted = ", ".join(f"{name}={kept[name]!r}" for name in names)
        raise UserError(f"{file} was drawn with {wanted}; the policy given has {', '.join(other)}")
    policy.load_state_dict(kept["weights"])
    faults = kept["faults"]
    index = torch.tensor([fault["index"] for fault in faults])
    noise_keys = keys(kept["seed"], "rollout", kept["epoch"], index)
    with torch.no_grad():
        prompts = [fault["prompt"] for fault in faults]
        schedule = policy.rollout_schedule()
        steps = list(policy.model.trajectory(prompts, noise_keys, schedule))
        return torch.stack([steps[0].latents, *(step.previous for step in steps)], dim=1)

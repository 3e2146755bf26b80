"""Which options of DDPO go together: refused at construction, not after the first rollout."""

from collections.abc import Mapping, Sequence
from typing import Any

from rl4med_ddpo.foundation.errors import UserError


def require_options(options: Mapping[str, Any]) -> None:
    """Check DDPO's options, by name, alone and beside each other.

    Raises:
        UserError: what was given, what is allowed, what to do.
    """
    if not 0 < options["timestep_fraction"] <= 1:
        raise UserError(f"timestep_fraction={options['timestep_fraction']}: allowed are (0, 1]")
    _require_window(options["timestep_window"], options["steps"])
    below, above = clip_pair(options["clip_range"])
    if not (0 < below < 1 and above > 0):
        raise UserError(
            f"clip_range={options['clip_range']}: the ratio is clipped between 1 - {below:g} and "
            f"1 + {above:g}; allowed are (0, 1) below and anything above 0 above; "
            "try --model.clip_range 0.0001"
        )
    if options["kl_weight"] and options["train"] == "full":
        raise UserError(
            "kl_weight needs the policy before training, which is the U-Net without its adapters: "
            "with train: full there is none, short of a second copy. Use train: lora, or "
            "kl_weight: 0 with a smaller learning rate"
        )
    half = not options["guidance_in_training"] and options["guidance"] != 1
    if half and options["old_log_probs"] == "rollout":
        raise UserError(
            "guidance_in_training: false trains another policy than the guided one that sampled, "
            "so the ratio of their densities is not 1 to begin with: add old_log_probs: training"
        )


def _require_window(window: tuple[int, int] | None, steps: int) -> None:
    if window is None or 0 <= window[0] < window[1] <= steps:
        return
    raise UserError(
        f"timestep_window={list(window)}: it holds the first trained step and the first after, "
        f"0 being the noisiest; of {steps} steps all are [0, {steps}], the last half is "
        f"[{steps // 2}, {steps}]"
    )


def clip_pair(clip_range: float | Sequence[float]) -> tuple[float, float]:
    """Return how far the ratio may fall below 1 and rise above it; YAML gives two as a list."""
    if isinstance(clip_range, int | float):
        return clip_range, clip_range
    below, above = clip_range
    return below, above

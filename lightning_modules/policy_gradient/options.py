"""Options of DDPO and DRaFT: ranges, and which go together; checked before anything is loaded."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rl4med_ddpo.foundation.errors import UserError


class Range(NamedTuple):
    """Allowed values: from `least`, without it if `open`, up to `most`; and one that works."""

    least: float
    open: bool
    most: float | None
    suggestion: float

    def __str__(self) -> str:
        if self.most is None:
            return f"{'above' if self.open else 'at least'} {self.least:g}"
        return f"{'(' if self.open else '['}{self.least:g}, {self.most:g}]"


RANGES = {
    "eta": Range(0, True, 1, 1.0),
    "steps": Range(1, False, None, 50),
    "guidance": Range(0, False, None, 5.0),
    "training_steps": Range(1, False, None, 10),
    "max_kl": Range(0, True, None, 1e-5),
    "last_steps": Range(1, False, None, 10),
    "penalty": Range(0, False, None, 5.0),
    "updates": Range(1, False, None, 2),
    "inner_epochs": Range(1, False, None, 1),
    "kl_weight": Range(0, False, None, 0),
    "std_floor": Range(0, False, None, 0.05),
    "advantage_clip": Range(0, True, None, 5.0),
    "max_grad_norm": Range(0, True, None, 1.0),
    "sample_batch": Range(1, False, None, 8),
    "micro_batch": Range(1, False, None, 8),
    "lora_rank": Range(1, False, None, 4),
    "max_skipped": Range(0, False, None, 3),
}


def require_options(options: Mapping[str, Any]) -> None:
    """Check DDPO's options, by name, alone and in combination.

    Raises:
        UserError: what was given, what is allowed, what to do.
    """
    require_in_range(options)
    if not 0 < options["timestep_fraction"] <= 1:
        raise UserError(f"timestep_fraction={options['timestep_fraction']}: allowed are (0, 1]")
    training_steps = options["training_steps"] or options["steps"]
    _require_window(options["timestep_window"], training_steps)
    if options["rollout_noise"] == "window" and not options["timestep_window"]:
        raise UserError(
            "rollout_noise: window draws noise in the steps of the timestep_window alone, and none "
            f"is given. Add --model.timestep_window [0, {max(1, training_steps // 2)}], or leave "
            "rollout_noise: all"
        )
    below, above = clip_pair(options["clip_range"])
    if not (0 < below < 1 and above > 0):
        raise UserError(
            f"clip_range={options['clip_range']}: the ratio is clipped between 1 - {below:g} and "
            f"1 + {above:g}; allowed are (0, 1) below and anything above 0 above; "
            "try --model.clip_range 0.0001"
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


def require_last_steps(last_steps: int | None, steps: int) -> None:
    """Refuse a gradient through more steps than there are."""
    if last_steps is not None and last_steps > steps:
        raise UserError(
            f"last_steps={last_steps} of {steps} steps: allowed are 1 to {steps}, or null for all "
            "of them"
        )


def require_groups(samples_per_prompt: int | None, baseline: str) -> None:
    """Refuse groups of one sample, which has nothing to be compared with.

    Args:
        samples_per_prompt: Of an epoch; None where the prompts are drawn.
        baseline: DDPO's option.
    """
    if samples_per_prompt == 1 and baseline == "group":
        raise UserError(
            "samples_per_epoch is the number of prompts, so each prompt has one sample, which is "
            "its own baseline: every advantage would be 0, and nothing would be learnt. Draw more "
            "(--data.samples_per_epoch), or compare with past rollouts (--model.baseline window)"
        )


def clip_pair(clip_range: float | Sequence[float]) -> tuple[float, float]:
    """Return how far the ratio may fall below 1 and rise above it; YAML gives two as a list."""
    if isinstance(clip_range, int | float):
        return clip_range, clip_range
    below, above = clip_range
    return below, above


def require_in_range(options: Mapping[str, Any]) -> None:
    """Refuse values out of their range, each named with a value that works."""
    wrong = [
        f"  {name}={options[name]}: allowed is {allowed}; try --model.{name} {allowed.suggestion:g}"
        for name, allowed in RANGES.items()
        if name in options and not _within(options[name], allowed)
    ]
    if wrong:
        raise UserError("options out of range:\n" + "\n".join(wrong))


def _within(value: float | Literal["auto"] | None, allowed: Range) -> bool:
    if value is None or value == "auto":
        return True
    above = value > allowed.least if allowed.open else value >= allowed.least
    return above and (allowed.most is None or value <= allowed.most)


def require_unscaled_gradients(precision: str) -> None:
    """Refuse the precision in which the updates, though not other training, come out wrong."""
    if precision == "16-mixed":
        raise UserError(
            "precision 16-mixed scales the gradients before they are clipped, which would shrink "
            "every update: use --trainer.precision bf16-mixed or 32-true"
        )

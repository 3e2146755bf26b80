"""Ranges of DDPO's settings, checked before anything is loaded."""

from collections.abc import Mapping
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


def require_in_range(settings: Mapping[str, Any]) -> None:
    """Refuse settings that cannot work.

    Raises:
        UserError: naming each with its value, its range, and a value that works.
    """
    wrong = [
        f"  {name}={settings[name]}: allowed is {allowed}; "
        f"try --model.{name} {allowed.suggestion:g}"
        for name, allowed in RANGES.items()
        if name in settings and not _within(settings[name], allowed)
    ]
    if wrong:
        raise UserError("settings out of range:\n" + "\n".join(wrong))


def _within(value: float | Literal["auto"], allowed: Range) -> bool:
    if value == "auto":
        return True
    above = value > allowed.least if allowed.open else value >= allowed.least
    return above and (allowed.most is None or value <= allowed.most)

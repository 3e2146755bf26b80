"""Where this process is in its run: for the watchdog to watch, and for tests to fail it there."""

from collections.abc import Callable
from dataclasses import dataclass

from rl4med_ddpo.fault_tolerance.faults import fault_point


@dataclass
class Progress:
    """The phase that the main thread is in, how many points it has passed, and whom to tell."""

    phase: str = "setup"
    passed: int = 0
    tell: Callable[[], None] | None = None


progress = Progress()


def reach(point: str) -> None:
    """Pass a point of the run, such as `rollout` or `save.fsync`."""
    before, progress.phase = progress.phase, point.partition(".")[0]
    progress.passed += 1
    if progress.tell is not None and progress.phase != before:
        progress.tell()
    fault_point(point)

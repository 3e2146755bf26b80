"""Clocks, memory and the machine's peak: what the benchmarks of all tools measure with.

Times are taken twice, on the wall and in the process's CPU seconds over all of its threads. On a
machine that others use as well, only the latter say what a run costs.
"""

import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class Seconds(NamedTuple):
    """A span of time: on the wall, and of the processor over all threads."""

    wall: float
    cpu: float

    def __add__(self, other: "Seconds") -> "Seconds":  # type: ignore[override]
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.wall - other.wall, self.cpu - other.cpu)


def now() -> Seconds:
    """Read both clocks, after the GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return Seconds(time.perf_counter(), time.process_time())


class Stopwatch:
    """Sums up the time of named parts, less what other named parts inside them take."""

    def __init__(self) -> None:
        self.spent: dict[str, Seconds] = defaultdict(lambda: Seconds(0.0, 0.0))
        self._running: list[str] = []
        self._since = now()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of the block to a part."""
        self._charge()
        self._running.append(name)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def timed(self, name: str, function: Callable) -> Callable:
        """Return the function with its time counted to a part."""

        def measured(*args: Any, **options: Any) -> Any:
            with self.part(name):
                return function(*args, **options)

        return measured

    def _charge(self) -> None:
        moment = now()
        if self._running:
            self.spent[self._running[-1]] += moment - self._since
        self._since = moment


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """Measure the most operations a second: per CPU second of a thread, or per GPU second.

    The best of several runs of a matrix product and of a 3x3 convolution of sizes that suit the
    machine.
    """
    n, side, channels = (8192, 64, 640) if device == "cuda" else (1024, 64, 128)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    image = torch.randn(4, channels, side, side, device=device, dtype=dtype)
    kernel = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
    runs = [
        (2 * n**3, lambda: a @ b),
        (
            2 * image.numel() * 9 * channels,
            lambda: torch.nn.functional.conv2d(image, kernel, padding=1),
        ),
    ]
    best = 0.0
    for operations, run in runs:
        run()
        for _ in range(8):
            before = now()
            run()
            spent = now() - before
            best = max(best, operations / (spent.wall if device == "cuda" else spent.cpu))
    return best


def peak_memory(device: str) -> dict[str, int | None]:
    """Return the process's peak memory so far, in MB."""
    gpu = torch.cuda.max_memory_reserved() // 2**20 if device == "cuda" else None
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {"peak_rss_mb": rss, "peak_gpu_mb": gpu}


class Epoch(NamedTuple):
    """What one epoch took."""

    rollout: Seconds
    update: Seconds
    whole: Seconds
    reward: float


def summary(epochs: list[Epoch], samples: int, pairs: int) -> dict[str, Any]:
    """Return the medians over epochs: speeds, and seconds of a whole one.

    Args:
        epochs: Those to count.
        samples: Images an epoch.
        pairs: Image-timesteps trained an epoch.
    """

    def median(part: str, clock: str) -> float:
        return statistics.median(getattr(getattr(epoch, part), clock) for epoch in epochs)

    rates = {
        "rollout_images": (samples, "rollout"),
        "update_image_timesteps": (pairs, "update"),
    }
    found: dict[str, Any] = {}
    for name, (count, part) in rates.items():
        for unit, clock in (("s", "wall"), ("cpu_s", "cpu")):
            found[f"{name}_per_{unit}"] = round(count / median(part, clock), 3)
    found["epoch_s"] = round(median("whole", "wall"), 3)
    found["epoch_cpu_s"] = round(median("whole", "cpu"), 3)
    return found

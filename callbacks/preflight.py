"""What an epoch of DDPO will do, counted and estimated before the first rollout."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Epoch(NamedTuple):
    """The sizes that decide an epoch.

    Attributes:
        samples: Images, over all processes.
        ranks: Processes.
        sample_batch: Images sampled at a time on each.
        steps: Denoising steps of an image.
        trained_steps: Of these, how many each image trains in an inner epoch.
        micro_batch: (sample, step) pairs a pass.
        updates: Optimizer steps of an inner epoch.
        inner_epochs: Rounds over one rollout.
        latent_bytes: Of one image's trajectory.
        on_host: Whether the trajectories are kept in the host's memory.
    """

    samples: int
    ranks: int
    sample_batch: int
    steps: int
    trained_steps: int
    micro_batch: int
    updates: int
    inner_epochs: int
    latent_bytes: int
    on_host: bool

    @property
    def samples_per_rank(self) -> int:
        """Images that each process samples."""
        return self.samples // self.ranks

    @property
    def batches(self) -> int:
        """Batches that each process samples."""
        return math.ceil(self.samples_per_rank / self.sample_batch)

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps, one reduction of the gradients each."""
        return self.updates * self.inner_epochs

    @property
    def passes(self) -> int:
        """Training passes of an update on each process."""
        pairs = self.samples_per_rank // self.updates * self.trained_steps
        return math.ceil(pairs / self.micro_batch)


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """Time the second of two runs on the wall; the first warms up."""
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def table(epoch: Epoch, batch_step_seconds: float, pass_seconds: float) -> str:
    """Lay out an epoch's numbers, one a line.

    Args:
        epoch: Its sizes.
        batch_step_seconds: Of one denoising step of one batch.
        pass_seconds: Of one training pass, forward and backward.
    """
    sampling = epoch.batches * epoch.steps * batch_step_seconds
    training = epoch.optimizer_steps * epoch.passes * pass_seconds
    megabytes = epoch.samples_per_rank * epoch.latent_bytes / 1e6
    rows = [
        ("samples", epoch.samples, "an epoch, by all processes"),
        ("samples a process", epoch.samples_per_rank, f"on {epoch.ranks} processes"),
        ("batches", epoch.batches, f"of {epoch.sample_batch} images, {epoch.steps} steps each"),
        ("optimizer steps", epoch.optimizer_steps, f"{epoch.inner_epochs} x {epoch.updates}"),
        ("micro-batches", epoch.passes, f"an update, of {epoch.micro_batch} (sample, step) pairs"),
        ("reductions", epoch.optimizer_steps, "of the gradients, one an optimizer step"),
        ("latents", f"{megabytes:,.1f} MB", "host" if epoch.on_host else "device"),
        ("seconds", f"{sampling + training:,.1f}",
         f"estimated: {sampling:,.1f} sampling, {training:,.1f} training at most"),
    ]  # fmt: skip
    lines = [
        f"  {name:<18}{number if isinstance(number, str) else f'{number:,}':>12}   {note}"
        for name, number, note in rows
    ]
    return "\n".join(["An epoch of DDPO:", *lines])

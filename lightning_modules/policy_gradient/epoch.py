"""The sizes of an epoch of DDPO, from which its cost follows."""

import math
from typing import NamedTuple


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
        one_pass: Whether gradients are taken while sampling, and updates cost no pass of their own.
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
    one_pass: bool = False

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

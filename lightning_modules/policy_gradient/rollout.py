"""The samples of an epoch: how they are drawn and kept, and which of them each update trains on."""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.progress import progress
from rl4med_ddpo.foundation.randomness import generator, key, keys
from rl4med_ddpo.lightning_modules.diffusion.latent_diffusion import (
    DDIMSchedule,
    LatentDiffusion,
    Transition,
)
from rl4med_ddpo.lightning_modules.rewards.base import Reward, Rewards, joined, scored


@dataclass(frozen=True)
class Rollout:
    """This rank's share of the samples of one epoch, n of M.

    Attributes:
        index: Global sample index, `(n,)` int64.
        prompts: n texts.
        conditions: Multi-hot, `(n, A)`.
        latents: x_T to x_0, `(n, T + 1, C, h, w)` float32, stored once, on the device or the host.
        log_probs: log p of each action under the policy that took it, `(n, T)` float32; 0 where a
            transition is deterministic.
        noise: The noise predictions that the actions were drawn by, `(n, T, C, h, w)`, where the
            latents are; `(0,)` if nothing compares with them.
        scored: What the images of x_0 earned; the images themselves are not kept.
        appearance: Their colours on 8x8 pixels, `(n, 192)` in [0, 1].
    """

    index: Tensor
    prompts: list[str]
    conditions: Tensor
    latents: Tensor
    log_probs: Tensor
    noise: Tensor
    scored: Rewards
    appearance: Tensor


class RolloutSampler:
    """Draws this process's samples of an epoch: the sampling half of Algorithm 1.

    Args:
        model: The policy.
        schedule: Of the rollouts.
        reward: Scores each batch of images when it is drawn, so that no more images are in memory
            than its own.
        seed: Decides the noise together with the epoch and the samples' global indices.
        batch: Images sampled at a time.
        on_host: Keep the trajectories in the host's memory, pinned if the device is a GPU.
        keep_noise: Keep the noise predictions too.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        schedule: DDIMSchedule,
        reward: Reward,
        seed: int,
        batch: int,
        on_host: bool,
        keep_noise: bool = False,
    ) -> None:
        self.model, self.schedule, self.reward = model, schedule, reward
        self.seed, self.batch, self.on_host = seed, batch, on_host
        self.keep_noise = keep_noise
        self.epoch = 0

    @torch.no_grad()
    def collect(self, batch: dict[str, Any], mine: Tensor, epoch: int) -> Rollout:
        """Draw samples with their intermediate states (Algorithm 1, line 4), and score them.

        Args:
            batch: Of all processes: `index` (global sample indices), `prompt` and `condition`.
            mine: Rows of the batch that this process draws, `(n,)` int64.
            epoch: Decides the noise too.
        """
        self.epoch = epoch
        n, steps, device = len(mine), self.schedule.steps, self.schedule.sigma.device
        conditions = batch["condition"][mine].to(device)
        kept = torch.device("cpu") if self.on_host else device
        pinned = self.on_host and device.type == "cuda"
        noise_shape = (n, steps, *self.model.latent_shape) if self.keep_noise else (0,)
        rollout = Rollout(
            index=batch["index"][mine],
            prompts=[batch["prompt"][row] for row in mine.tolist()],
            conditions=conditions,
            latents=torch.empty(
                (n, steps + 1, *self.model.latent_shape),
                device=kept,
                pin_memory=pinned,
            ),
            log_probs=torch.empty(n, steps, device=device),
            noise=torch.empty(noise_shape, device=kept, pin_memory=pinned),
            scored=Rewards(torch.empty(0, device=device), {}),
            appearance=torch.empty(0, device=device),
        )
        earned, appearance = [], []
        for first in range(0, n, self.batch):
            rows = slice(first, first + self.batch)
            images = self.model.decode(self.sample_batch(rollout, rows))
            earned.append(scored(self.reward, images, conditions[rows]))
            appearance.append(F.adaptive_avg_pool2d(images, 8).flatten(1))
        return replace(rollout, scored=joined(earned), appearance=torch.cat(appearance))

    def sample_batch(self, rollout: Rollout, rows: slice) -> Tensor:
        """Sample some rows from x_T to x_0, keep every state, and return x_0, `(B, C, h, w)`."""
        noise_keys = keys(self.seed, "rollout", self.epoch, rollout.index[rows])
        done, total = rows.start * self.schedule.steps, rollout.log_probs.numel()
        for transition in self.model.trajectory(rollout.prompts[rows], noise_keys, self.schedule):
            if transition.step == 0:
                rollout.latents[rows, 0] = transition.latents
            rollout.latents[rows, transition.step + 1] = transition.previous
            rollout.log_probs[rows, transition.step] = transition.log_prob.detach()
            if self.keep_noise:
                rollout.noise[rows, transition.step] = transition.noise
            done += len(noise_keys)
            progress.report("rollout", done, total)
            self.after_step(transition, rows)
        return transition.previous

    def after_step(self, transition: Transition, rows: slice) -> None:
        """Do nothing more; a sampler that takes gradients on the way overrides this."""


def require_divisible(samples: int, updates: int, ranks: int) -> None:
    """Refuse an epoch that does not divide into equal parts, one for each update and rank."""
    parts = updates * ranks
    if samples % parts:
        nearest = [n for n in (samples // parts * parts, -(-samples // parts) * parts) if n]
        raise UserError(
            f"{samples} samples an epoch do not divide into {updates} updates on {ranks} "
            f"processes: samples_per_epoch must be a multiple of {parts}; the nearest are "
            f"{' and '.join(map(str, nearest))}"
        )


class Pairs(NamedTuple):
    """(sample, step) pairs of one forward and backward pass, each column `(P,)`.

    Attributes:
        row: Row of this rank's rollout, on the CPU.
        step: Index of the transition, on the CPU.
        advantage: The sample's; zero for a pair that only keeps the ranks in step.
    """

    row: Tensor
    step: Tensor
    advantage: Tensor


def chosen_steps(
    index: Tensor, window: tuple[int, int], kept: int, seeds: tuple[int, int, int]
) -> Tensor:
    """Draw the steps that each sample trains, without replacement, `(n, kept)` int64.

    Args:
        index: Global sample index, `(n,)`.
        window: First step to draw from, and the first one after.
        kept: Steps a sample.
        seeds: The experiment's seed, the epoch and the inner epoch.
    """
    seed, *when = seeds
    draws = (generator(key(seed, "timesteps", *when, i)) for i in index.tolist())
    first, end = window
    permuted = (torch.randperm(end - first, generator=draw) for draw in draws)
    return torch.stack([first + steps[:kept] for steps in permuted])


def plan_passes(
    advantages: Tensor, rank: int, steps: Tensor, micro_batch: int, skip: bool = True
) -> list[Pairs]:
    """Divide an update's pairs into passes, as many on every rank.

    A sample whose advantage is zero has a zero policy gradient and costs no pass. As all ranks know
    all advantages, they agree on the number of passes without a word; a rank that has fewer pairs
    than another fills up with one pair of weight zero.

    Args:
        advantages: Of the update's samples, `(rows, ranks)`.
        rank: This one.
        steps: That this rank's rows train, `(rows, kept)` int64.
        micro_batch: Pairs a pass.
        skip: Whether a sample of advantage zero is left out; it has a gradient of its own if the
            loss has other terms.
    """
    live = (advantages != 0) | (not skip)
    kept = steps.shape[1]
    passes = max(1, math.ceil(int(live.sum(dim=0).max()) * kept / micro_batch))
    rows = live[:, rank].nonzero().flatten()
    row = rows.repeat_interleave(kept)
    pairs = Pairs(row, steps[rows].flatten(), advantages[row, rank])
    idle = Pairs(row.new_zeros(1), row.new_zeros(1), advantages.new_zeros(1))
    chunks = zip(*(column.split(micro_batch) for column in pairs), strict=True)
    planned = [Pairs(*columns) for columns in chunks if len(columns[0])]
    return planned + [idle] * (passes - len(planned))


def blank_rollout(steps: int, latent_shape: tuple[int, ...], device: torch.device) -> Rollout:
    """Return one sample of zeros, to try what a pass costs."""
    return Rollout(
        index=torch.zeros(1, dtype=torch.long),
        prompts=[""],
        conditions=torch.zeros(1, 1, device=device),
        latents=torch.zeros(1, steps + 1, *latent_shape, device=device),
        log_probs=torch.zeros(1, steps, device=device),
        noise=torch.zeros(1, steps, *latent_shape, device=device),
        scored=Rewards(torch.zeros(1, device=device), {}),
        appearance=torch.zeros(1, 192, device=device),
    )


def blank_pairs(n: int, window: tuple[int, int]) -> Pairs:
    """Return n pairs of the one sample of a blank rollout, over the steps of a window."""
    first, end = window
    row = torch.zeros(n, dtype=torch.long)
    return Pairs(row, first + torch.arange(n) % (end - first), torch.ones(n))

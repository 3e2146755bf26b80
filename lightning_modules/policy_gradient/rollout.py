"""What a rollout leaves for the updates, and which of it each update trains on."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.randomness import generator, key
from rl4med_ddpo.lightning_modules.diffusion.ddim import Transition
from rl4med_ddpo.lightning_modules.rewards.base import Rewards


@dataclass(frozen=True)
class Rollout:
    """This rank's share of the samples of one epoch, n of M.

    Attributes:
        index: Global sample index, `(n,)` int64.
        prompts: n texts.
        conditions: Multi-hot, `(n, A)`.
        latents: x_T to x_0, `(n, T + 1, C, h, w)` float32, stored once, on the device or the host.
        log_probs: log p of each action under the policy that took it, `(n, T)` float32.
        scored: What the images of x_0 earned; the images themselves are not kept.
        appearance: Their colour and layout, `(n, F)` in [0, 1].
    """

    index: Tensor
    prompts: list[str]
    conditions: Tensor
    latents: Tensor
    log_probs: Tensor
    scored: Rewards
    appearance: Tensor

    def transitions(self, row: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Return states and actions, x_t and x_{t-1}, each `(P, C, h, w)` on the device.

        Args:
            row: Row of each, `(P,)` int64 on the CPU.
            step: Index of its transition, `(P,)` int64 on the CPU.
        """
        device = self.log_probs.device
        state, action = self.latents[row, step], self.latents[row, step + 1]
        return state.to(device, non_blocking=True), action.to(device, non_blocking=True)

    def keep(self, rows: slice, transition: Transition) -> Tensor:
        """Store a transition of some samples, B of n, and return the state it leads to."""
        if transition.step == 0:
            self.latents[rows, 0] = transition.latents
        self.latents[rows, transition.step + 1] = transition.previous
        self.log_probs[rows, transition.step] = transition.log_prob.detach()
        return transition.previous


def empty_rollout(
    index: Tensor, prompts: list[str], conditions: Tensor, shape: tuple[int, ...], on_host: bool
) -> Rollout:
    """Make room for the latents and log-probs of n samples, in one piece.

    Args:
        index: Global sample indices, `(n,)` int64.
        prompts: n texts.
        conditions: Multi-hot, `(n, A)`, on the device.
        shape: `(T + 1, C, h, w)` of a sample's latents.
        on_host: Keep the latents in the host's memory, pinned if the device is a GPU.
    """
    n, device = len(index), conditions.device
    kept = torch.device("cpu") if on_host else device
    pinned = on_host and device.type == "cuda"
    return Rollout(
        index=index,
        prompts=prompts,
        conditions=conditions,
        latents=torch.empty(n, *shape, device=kept, pin_memory=pinned),
        log_probs=torch.empty(n, shape[0] - 1, device=device),
        scored=Rewards(torch.empty(0, device=device), {}),
        appearance=torch.empty(0, device=device),
    )


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


def sample_order(samples: int, seed: int, epoch: int) -> Tensor:
    """Shuffle the global sample indices of an epoch, `(M,)`.

    Position p of the order belongs to rank p mod W. An update takes a run of consecutive positions,
    so it trains on the same samples for any number of ranks W.
    """
    return torch.randperm(samples, generator=generator(key(seed, "order", epoch)))


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
    rollout = empty_rollout(
        torch.zeros(1, dtype=torch.long),
        [""],
        torch.zeros(1, 1, device=device),
        (steps + 1, *latent_shape),
        on_host=False,
    )
    rollout.latents.zero_()
    rollout.log_probs.zero_()
    return rollout


def blank_pairs(n: int, steps: int) -> Pairs:
    """Return n pairs of the one sample of a blank rollout."""
    row = torch.zeros(n, dtype=torch.long)
    return Pairs(row, torch.arange(n) % steps, torch.ones(n))

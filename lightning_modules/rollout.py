"""What a rollout leaves for the updates, and which of it each update trains on."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from datamodules.errors import UserError
from lightning_modules.ddim import Transition
from lightning_modules.randomness import generator, key


@dataclass(frozen=True)
class Rollout:
    """This rank's share of the samples of one epoch, n of M.

    Attributes:
        index: Global sample index, `(n,)` int64.
        prompts: n texts.
        conditions: Multi-hot, `(n, 6)`.
        latents: x_T to x_0, `(n, T + 1, C, h, w)` float32, stored once.
        log_probs: log p of each action under the policy that took it, `(n, T)` float32.
        images: x_0 decoded, `(n, 3, H, W)` in [0, 1].
    """

    index: Tensor
    prompts: list[str]
    conditions: Tensor
    latents: Tensor
    log_probs: Tensor
    images: Tensor


class Trajectory(NamedTuple):
    """States x_T to x_0, `(B, T + 1, C, h, w)`, and the actions' log-probs, `(B, T)`."""

    latents: Tensor
    log_probs: Tensor


def record(latents: Tensor, transitions: Iterable[Transition]) -> Trajectory:
    """Follow a walk from x_T, `(B, C, h, w)`, to its end and keep all of it."""
    states, log_probs = [latents], []
    for transition in transitions:
        states.append(transition.previous)
        log_probs.append(transition.log_prob)
    return Trajectory(torch.stack(states, dim=1), torch.stack(log_probs, dim=1))


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


def require_window(window: tuple[int, int] | None, steps: int) -> None:
    """Refuse a window of trained steps that is empty or leaves the trajectory."""
    if window is None or 0 <= window[0] < window[1] <= steps:
        return
    raise UserError(
        f"timestep_window={list(window)}: it holds the first trained step and the first after, "
        f"0 being the noisiest; of {steps} steps all are [0, {steps}], the last half is "
        f"[{steps // 2}, {steps}]"
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
        row: Row of this rank's rollout.
        step: Index of the transition.
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


def plan_passes(advantages: Tensor, rank: int, steps: Tensor, micro_batch: int) -> list[Pairs]:
    """Divide an update's pairs into passes, as many on every rank.

    A sample whose advantage is zero has a zero gradient and costs no pass. As all ranks know all
    advantages, they agree on the number of passes without a word; a rank that has fewer pairs than
    another fills up with one pair of weight zero.

    Args:
        advantages: Of the update's samples, `(rows, ranks)`.
        rank: This one.
        steps: That this rank's rows train, `(rows, kept)` int64.
        micro_batch: Pairs a pass.
    """
    live = advantages != 0
    kept = steps.shape[1]
    passes = max(1, math.ceil(int(live.sum(dim=0).max()) * kept / micro_batch))
    rows = live[:, rank].nonzero().flatten()
    row = rows.repeat_interleave(kept)
    pairs = Pairs(row, steps[rows].flatten(), advantages[row, rank])
    idle = Pairs(row.new_zeros(1), row.new_zeros(1), advantages.new_zeros(1))
    chunks = zip(*(column.split(micro_batch) for column in pairs), strict=True)
    planned = [Pairs(*columns) for columns in chunks if len(columns[0])]
    return planned + [idle] * (passes - len(planned))

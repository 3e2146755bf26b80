"""What an epoch of DDPO or DRaFT will do, counted and estimated before the first sample."""

import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from rl4med_ddpo.lightning_modules.ddpo import DDPO
from rl4med_ddpo.lightning_modules.draft import DRaFT
from rl4med_ddpo.lightning_modules.policy_gradient.epoch import Epoch
from rl4med_ddpo.lightning_modules.policy_gradient.rollout import blank_pairs, blank_rollout


class Preflight(Callback):
    """Prints the sizes of an epoch and its estimated seconds before DDPO or DRaFT draw a sample.

    Other modules pass unnoticed.
    """

    def __init__(self) -> None:
        self.is_done = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count again for each run."""
        self.is_done = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count and time before the first sample."""
        if self.is_done or not isinstance(pl_module, DDPO | DRaFT):
            return
        self.is_done = True
        samples = len(batch["prompt"])
        with trainer.precision_plugin.forward_context():
            if isinstance(pl_module, DRaFT):
                passes = pl_module.passes_of(samples)
                said = draft_table(pl_module, samples, passes, seconds_of_a_pass(pl_module))
            else:
                epoch = pl_module.epoch_of(samples)
                said = table(epoch, *seconds_of(epoch, *measured(pl_module, epoch)))
        rank_zero_info(said)


def measured(policy: DDPO, epoch: Epoch) -> tuple[float, float]:
    """Time one denoising step of a batch and one training pass; nothing is changed by them."""
    model, n = policy.model, epoch.sample_batch
    rollout = blank_rollout(epoch.steps, model.latent_shape, policy.device)
    latents = torch.zeros(n, *model.latent_shape, device=policy.device)
    timestep = torch.zeros(n, dtype=torch.long, device=policy.device)
    pairs = blank_pairs(epoch.micro_batch, policy.window_of_steps)

    def sample() -> None:
        with torch.no_grad():
            model.predict_noise(latents, timestep, model.embed([""] * n))

    def train() -> None:
        loss = policy.objective(rollout, pairs).loss.sum()
        torch.autograd.grad(loss, policy.trained_parameters())

    return seconds(sample, policy.device), seconds(train, policy.device)


def seconds_of_a_pass(policy: DRaFT) -> float:
    """Estimate the seconds of a forward and backward pass from one step of each kind."""
    model, n = policy.model, policy.micro_batch
    text, schedule = model.embed([""] * n), model.schedule
    latents = torch.zeros(n, *model.latent_shape, device=policy.device)
    conditions = torch.zeros(n, policy.attributes, device=policy.device)

    def plain() -> None:
        with torch.no_grad():
            policy.sampler.follow(latents, latents, 0, text)

    def differentiated() -> None:
        plain()
        last = policy.sampler.follow(latents, latents, schedule.steps - 1, text)
        torch.autograd.grad(last.sum(), policy.trained_parameters())

    def scored() -> None:
        states = latents.clone().requires_grad_()
        loss = policy.reward.loss(model.decode(states), conditions).sum()
        torch.autograd.grad(loss, states)

    back = policy.sampler.last_steps
    each = [seconds(run, policy.device) for run in (plain, differentiated, scored)]
    # the change since the start is measured in one state, by a step of either kind
    penalty = each[0] + each[1] if policy.sampler.start is not None else 0.0
    return (schedule.steps - back) * each[0] + back * each[1] + each[2] + penalty


def draft_table(policy: DRaFT, samples: int, passes: int, a_pass: float) -> str:
    """Lay out the numbers of an epoch of DRaFT, one a line.

    Args:
        policy: What is trained.
        samples: Of an epoch, over all processes.
        passes: Of an update, on each process.
        a_pass: Seconds of a forward and backward pass.
    """
    ranks, updates = policy.trainer.world_size, policy.hparams.updates
    steps, back = policy.model.schedule.steps, policy.sampler.last_steps
    rows = [
        ("samples", samples, "an epoch, by all processes"),
        ("samples a process", samples // ranks, f"on {ranks} processes"),
        ("optimizer steps", updates, f"of {samples // updates:,} samples each"),
        ("micro-batches", passes, f"an update, of {policy.micro_batch} images"),
        ("steps", steps, f"an image, the last {back} with a gradient"),
        ("reductions", updates, "of the gradients, one an optimizer step"),
        ("seconds", f"{updates * passes * a_pass:,.1f}", "estimated"),
    ]
    return "\n".join(["An epoch of DRaFT:", *map(_line, rows)])


def _line(row: tuple[str, str | int, str]) -> str:
    name, number, note = row
    shown = number if isinstance(number, str) else f"{number:,}"
    return f"  {name:<18}{shown:>12}   {note}"


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """Time the second of two runs on the wall; the first warms up."""
    started = 0.0
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def seconds_of(epoch: Epoch, step: float, training: float) -> tuple[float, float]:
    """Estimate the seconds of an epoch's sampling, and of its training at most.

    Args:
        epoch: Its sizes.
        step: Seconds of one denoising step of one batch.
        training: Of one training pass, forward and backward.
    """
    passes = epoch.optimizer_steps * epoch.passes
    if not epoch.one_pass:
        return epoch.batches * epoch.steps * step, passes * training
    trained = epoch.trained_steps / epoch.steps
    both = training * epoch.sample_batch / epoch.micro_batch
    return epoch.batches * epoch.steps * (trained * both + (1 - trained) * step), 0.0


def table(epoch: Epoch, sampling: float, training: float) -> str:
    """Lay out an epoch's numbers, one a line.

    Args:
        epoch: Its sizes.
        sampling: Seconds of the rollout.
        training: Seconds of the updates, at most.
    """
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
    return "\n".join(["An epoch of DDPO:", *map(_line, rows)])

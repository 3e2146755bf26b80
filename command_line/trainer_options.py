"""The options of Lightning's trainer that cannot work here: refused in words, before any work."""

from typing import Any

import lightning as L
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from rl4med_ddpo.foundation.errors import UserError


def require_results(options: Any) -> None:
    """Refuse options under which a run would leave nothing.

    Args:
        options: The trainer's, by name.
    """
    if options.barebones:
        raise UserError(
            "trainer.barebones turns off curves, checkpoints and progress, which are what a run "
            "leaves here: leave it out. --trainer.profiler simple says where the time goes"
        )


def require_support(trainer: L.Trainer, options: Any) -> None:
    """Refuse what this machine's processor or the framework's start cannot do.

    Args:
        trainer: Built of the options.
        options: The trainer's, by name.
    """
    on_cpu = isinstance(trainer.accelerator, CPUAccelerator)
    precision = str(options.precision)
    if on_cpu and precision.startswith("16"):
        # Lightning would take another one in its place
        raise UserError(
            f"precision {precision} needs a GPU, and this run is on the CPU. Allowed here are "
            "32-true and bf16-mixed: --trainer.precision 32-true"
        )
    if on_cpu and options.sync_batchnorm:
        raise UserError(
            "trainer.sync_batchnorm needs GPUs, and this run is on the CPU: leave it out"
        )
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher) and launcher._start_method == "spawn":
        raise UserError(
            f"strategy {options.strategy} sends what this process has built to new ones, which "
            "cannot be done. Use --trainer.strategy ddp, or start the processes by torchrun or srun"
        )


def require_training(trainer: L.Trainer, model: L.LightningModule) -> None:
    """Refuse a `fit` that would train nothing, and what manual optimization does by itself."""
    limits = ("max_epochs", "max_steps", "limit_train_batches")
    if nothing := [f"trainer.{limit}" for limit in limits if getattr(trainer, limit) == 0]:
        raise UserError(
            f"{' and '.join(nothing)} = 0 trains nothing, and fit would leave an untrained model. "
            "Give at least 1; to score what is there, take validate or test"
        )
    if model.automatic_optimization:
        return
    if trainer.gradient_clip_val is not None:
        raise UserError(
            f"trainer.gradient_clip_val={trainer.gradient_clip_val}: DDPO and DRaFT clip their "
            "gradients themselves, by norm, before each update: use --model.max_grad_norm"
        )
    if trainer.accumulate_grad_batches != 1:
        raise UserError(
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}: DDPO and DRaFT "
            "add up the gradients of an update themselves: --model.updates says how many updates "
            "an epoch makes, --model.micro_batch how much a pass takes"
        )

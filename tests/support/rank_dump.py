"""A callback that writes down what a process has at the end of training, and what it reduced."""

from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook


class RankDump(Callback):
    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.reductions = 0

    def on_train_start(self, trainer, pl_module):
        if isinstance(trainer.strategy, DDPStrategy):
            trainer.strategy.model.register_comm_hook(None, self._reduce)

    def _reduce(self, group, bucket):
        self.reductions += bucket.is_last()
        return allreduce_hook(group, bucket)

    def on_train_end(self, trainer, pl_module):
        self.folder.mkdir(exist_ok=True)
        dumped = {
            "state": pl_module.state_dict(),
            "window": pl_module.window.history,
            "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
            "reductions": self.reductions,
            "optimizer_steps": trainer.global_step,
        }
        torch.save(dumped, self.folder / f"rank_{trainer.global_rank}.pt")

"""Leave in good order when a scheduler asks: save once, and end with 128 + the signal."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from rl4med_ddpo.fault_tolerance.checkpoint_io import LAST
from rl4med_ddpo.fault_tolerance.command import disable_process_observer, resume_command
from rl4med_ddpo.fault_tolerance.resume import checkpoint_folders
from rl4med_ddpo.foundation.progress import progress

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
Rewind = Callable[[dict[str, Any]], None]


class Preempted(SystemExit):
    """Ends the process with 128 + the signal that asked for it."""


class Preemption(Callback):
    """Answers SIGTERM and SIGUSR1, on whichever process they arrive.

    A signal is only noted. At the next safe point all processes agree on it, process 0 saves, and
    all leave. A second signal ends the process at once; what is on disk stays whole.

    Safe points lie between training batches and between batches that are drawn. Where an epoch is
    one step of minutes, as in DDPO, they lie inside it too: between two denoising steps, the
    reward, and two passes of an update. That step is then given up, and what is kept is the state
    before it. It draws the same samples when it is done again.
    """

    def __init__(self) -> None:
        self.received = 0
        self.saved_step: int | None = None
        self.before: dict[str, Any] | None = None
        self._handlers: dict[int, Any] = {}
        self._trainer: L.Trainer | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Listen to signals."""
        self.received, self.saved_step, self.before = 0, None, None
        self._handlers = {s: signal.getsignal(s) for s in SIGNALS}
        self._listen()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave signals as they were, and listen no more."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
        progress.unsubscribe(self._at)
        self._trainer = None

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Clean up as after a run that went well."""
        self.teardown(trainer, pl_module, "")

    def _listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received:
            os.write(2, f"\n{name} again: leaving at once\n".encode())
            os._exit(128 + number)
        self.received = number
        os.write(
            2, f"\n{name}: leaving at the next safe point; once more to leave at once\n".encode()
        )

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen again, for Lightning has put handlers of its own in place; and to reports.

        Its own would hang when a signal reaches one process only: Lightning's issue 20806.
        """
        self._listen()
        if self._trainer is None:
            self._trainer = trainer
            progress.subscribe(self._at)

    def _at(self, point: str, done: int, total: int) -> None:
        """Leave between two steps of work that has a length."""
        trainer = self._trainer
        # not all processes sample as often, so they cannot agree there
        if trainer and total and (point != "sampling" or trainer.world_size == 1):
            self.safe_point(trainer)

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to listen."""
        self._begin(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to listen."""
        self._begin(trainer, pl_module)
        if trainer.ckpt_path:
            self.saved_step = trainer.global_step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to listen."""
        self._begin(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to listen."""
        self._begin(trainer, pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to listen."""
        self._begin(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Safe point; keep the state before a long step, unless it is on disk."""
        asked = self._agreed(trainer)
        if trainer.current_epoch > 0 and (asked or self._is_long(trainer)):
            self.before = self._unsaved(trainer, at_epoch_start)
        if asked:
            self._leave(trainer, asked, self.before)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Safe point between two training batches."""
        progress.report("batch")
        # after a validation within an epoch Lightning counts otherwise: the next batch will do
        every = trainer.val_check_batch
        if batch_idx == 0 or not every or batch_idx % every == 0:
            return
        # a checkpoint does not hold the gradients of the batches before
        if batch_idx % trainer.accumulate_grad_batches:
            return
        if asked := self._agreed(trainer):
            self._leave(trainer, asked, self._unsaved(trainer, between_batches))

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Safe point, where the epoch is given up as a whole anyway."""
        progress.report("validation")
        if trainer.state.fn != TrainerFn.FITTING or self._is_long(trainer):
            self.safe_point(trainer)

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Safe point, once each process has had its turn: samples are drawn at the same time."""
        progress.report("test")
        if batch_idx % trainer.world_size == 0:
            self.safe_point(trainer)

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Safe point, as in a test."""
        progress.report("predict")
        if batch_idx % trainer.world_size == 0:
            self.safe_point(trainer)

    def safe_point(self, trainer: L.Trainer) -> None:
        """Leave if any process was asked to; each process has to come here as often."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting and (trainer.sanity_checking or not self._is_long(trainer)):
            return
        if asked := self._agreed(trainer):
            self._leave(trainer, asked, self.before)

    def _is_long(self, trainer: L.Trainer) -> bool:
        """Tell whether an epoch is a single step, which is given up when it is interrupted."""
        return trainer.state.fn == TrainerFn.FITTING and trainer.num_training_batches == 1

    def _agreed(self, trainer: L.Trainer) -> int:
        """Return the signal that any process has received, 0 for none."""
        if trainer.world_size == 1:
            return self.received
        received = torch.tensor(self.received, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(received, reduce_op="max"))

    def _unsaved(self, trainer: L.Trainer, rewind: Rewind) -> dict[str, Any] | None:
        """Return the state as process 0 would save it, None if that state is on disk."""
        if self.saved_step == trainer.global_step:
            return None
        saved_step = self.saved_step
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        self.saved_step = saved_step
        if not trainer.is_global_zero:
            return None
        rewind(state)
        return _on_cpu(state)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note, on all processes alike, which state is on disk."""
        if trainer.training:
            self.saved_step = trainer.global_step

    def _leave(self, trainer: L.Trainer, number: int, state: dict[str, Any] | None) -> None:
        disable_process_observer(trainer)
        kept = "Nothing was lost."
        if state is not None:
            path = _path(trainer)
            trainer.strategy.checkpoint_io.save_checkpoint(state, path)
            kept = f"Saved {path}."
        trainer.strategy.barrier("Preemption")
        if trainer.is_global_zero:
            name = signal.Signals(number).name
            print(f"{name}: {kept} To resume: {resume_command()}", file=sys.stderr, flush=True)
        raise Preempted(128 + number)


def at_epoch_start(state: dict[str, Any]) -> None:
    """Make a state of `on_train_epoch_start` look as saved at the end of the epoch before."""
    progress = state["loops"]["fit_loop"]["epoch_progress"]
    for counts in (progress["total"], progress["current"]):
        counts["ready"] -= 1
    progress["total"]["completed"] -= 1
    progress["current"]["completed"] -= 1
    state["epoch"] -= 1


def between_batches(state: dict[str, Any]) -> None:
    """Make a state of `on_train_batch_start` look as saved before the batch was fetched."""
    progress = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        counts["ready"] -= 1
    progress["is_last_batch"] = False


def _path(trainer: L.Trainer) -> Path:
    """Name the file that `last.ckpt` names, or `last.ckpt` itself."""
    lasts = [folder / LAST for folder in checkpoint_folders(trainer)]
    return next((last.resolve() for last in lasts if last.is_symlink()), lasts[0])


def _on_cpu(value: Any) -> Any:
    """Copy all tensors in nested containers."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_cpu(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_on_cpu, value))
    return value

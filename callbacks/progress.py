"""A progress bar that moves inside a step of minutes."""

import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tqdm.contrib.logging import logging_redirect_tqdm

from rl4med_ddpo.foundation.progress import progress

SECONDS_BETWEEN_LINES = 60.0


def steady(bar: Tqdm) -> Tqdm:
    """Count a bar's time by a clock that is never set back; tqdm's own is that of the day."""
    bar._time = time.monotonic
    bar.start_t = bar.last_print_t = time.monotonic()
    return bar


@contextmanager
def above_bars() -> Iterator[None]:
    """Write messages and warnings in lines above the bars, where they would break these."""

    def shown(message: Warning | str, category: type[Warning], *place: Any, **_: Any) -> None:
        name, line = place[:2]
        Tqdm.write(warnings.formatwarning(message, category, name, line), file=sys.stderr, end="")

    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    before, warnings.showwarning = warnings.showwarning, shown
    try:
        with logging_redirect_tqdm(loggers, tqdm_class=Tqdm):
            yield
    finally:
        warnings.showwarning = before


class InnerProgressBar(TQDMProgressBar):
    """Lightning's progress bar, with another below it for what a single step is doing.

    It shows what is reported to `progress` with a length. Where the output is no terminal, as in
    the log of a cluster's job, there are lines in place of bars: one an epoch with the metrics, and
    not more than one a minute in between.

    Args:
        refresh_rate: Batches between two updates of the outer bar; 0 shows nothing.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate)
        self._inner: dict[str, Tqdm] = {}
        self._lines = False
        self._last_line = 0.0
        self._batch = ""
        self._validated = False
        self._through = ExitStack()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Listen to the run, on rank 0."""
        super().setup(trainer, pl_module, stage)
        if self.is_disabled and not self._lines:
            return
        self._lines = not sys.stdout.isatty()
        self._last_line = time.monotonic()
        if self._lines:
            self.disable()
        else:
            self._through.enter_context(above_bars())
        progress.subscribe(self._report)

    def init_sanity_tqdm(self) -> Tqdm:
        """Lightning's bar of the validation before training."""
        return steady(super().init_sanity_tqdm())

    def init_train_tqdm(self) -> Tqdm:
        """Lightning's bar of training."""
        return steady(super().init_train_tqdm())

    def init_validation_tqdm(self) -> Tqdm:
        """Lightning's bar of validation."""
        return steady(super().init_validation_tqdm())

    def init_test_tqdm(self) -> Tqdm:
        """Lightning's bar of testing."""
        return steady(super().init_test_tqdm())

    def init_predict_tqdm(self) -> Tqdm:
        """Lightning's bar of prediction."""
        return steady(super().init_predict_tqdm())

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Listen no more, and close the bars."""
        progress.unsubscribe(self._report)
        self._through.close()
        for phase in list(self._inner):
            self._inner.pop(phase).close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Clean up as after a run that went well."""
        self.teardown(trainer, pl_module, "")

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Begin an epoch, which has not been validated yet."""
        super().on_train_epoch_start(trainer)
        self._validated = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that the scores are those of this epoch."""
        super().on_validation_end(trainer, pl_module)
        self._validated = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the epoch with its metrics; those of a validation only if there was one."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._lines:
            metrics = {
                name: value
                for name, value in self.get_metrics(trainer, pl_module).items()
                if isinstance(value, int | float)
                and (self._validated or not name.startswith("val/"))
            }
            shown = [f"{name} {value:.4g}" for name, value in metrics.items()]
            self._line(", ".join([f"epoch {trainer.current_epoch + 1} done", *shown]))

    def on_test_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note which batch the lines are about."""
        super().on_test_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        self._batch = f", batch {batch_idx + 1} of {self.total_test_batches_current_dataloader}"

    def on_predict_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note which batch the lines are about."""
        super().on_predict_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        self._batch = f", batch {batch_idx + 1} of {self.total_predict_batches_current_dataloader}"

    def _report(self, phase: str, done: int, total: int) -> None:
        if not total:
            return
        if not self._lines:
            self._move(phase, done, total)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._line(f"{self._where()}: {phase} {done}/{total}")

    def _where(self) -> str:
        stage = self.trainer.state.stage
        assert stage is not None
        if self.trainer.state.fn == TrainerFn.FITTING:
            place = f"epoch {self.trainer.current_epoch + 1}"
            return place if stage == RunningStage.TRAINING else f"{place}, {stage.value}"
        return f"{stage.value}{self._batch}"

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        rank_zero_info(text)

    def _move(self, phase: str, done: int, total: int) -> None:
        bar = self._inner.get(phase)
        if bar is None:
            self._close_finished()
            bar = self._inner[phase] = self._new_bar(phase, total)
        if done < bar.n or total != bar.total:
            bar.reset(total)
        bar.update(done - bar.n)

    def _close_finished(self) -> None:
        for phase in [p for p, bar in self._inner.items() if bar.n >= bar.total]:
            self._inner.pop(phase).close()

    def _new_bar(self, phase: str, total: int) -> Tqdm:
        outer = 1 + (self.trainer.validating or self.trainer.sanity_checking)
        bar = Tqdm(
            desc=phase,
            total=total,
            position=2 * self.process_position + outer + len(self._inner),
            leave=False,
            dynamic_ncols=True,
            file=sys.stdout,
            bar_format=self.BAR_FORMAT,
        )
        return steady(bar)

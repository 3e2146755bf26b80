"""How a run ends before its last epoch: by a callback, or within an epoch."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason


def ended(trainer: L.Trainer, callback_settings: dict[str, Any]) -> dict[str, Any]:
    """Say why a run ends before its last epoch or step; empty while it goes on.

    Args:
        trainer: At the moment of a save.
        callback_settings: Options of the run's callbacks, each as `Class.option`.

    Returns:
        `why`, a sentence without its full stop; `by`, the classes; `settings`, their options.
    """
    if not trainer.should_stop:
        return {}
    reasons = {
        type(callback).__name__: reason
        for callback in trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        if (reason := _reason(callback))
    }
    mine = {
        key: value
        for key, value in callback_settings.items()
        if not reasons or key.partition(".")[0] in reasons
    }
    why = " ".join(reasons.values()) or "A callback asked it to stop"
    by = " and ".join(reasons) or "the callback"
    return {"why": why.rstrip("."), "by": by, "settings": mine}


def keep_patience(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Let the patience that was given now count: EarlyStopping would take the checkpoint's.

    Args:
        trainer: Of the resumed run.
        checkpoint: Loaded, not yet restored; changed in place.
    """
    states = checkpoint.get("callbacks", {})
    for callback in trainer.early_stopping_callbacks:
        if callback.state_key in states and "patience" in states[callback.state_key]:
            states[callback.state_key]["patience"] = callback.patience


def stops_within_epoch(trainer: L.Trainer) -> bool:
    """Tell whether a state of `on_train_epoch_end` is that of an epoch with batches left."""
    loop = trainer.fit_loop
    epochs, batches = vars(loop.epoch_progress.current), loop.epoch_loop.batch_progress
    at_end = trainer.training and epochs["processed"] > epochs["completed"]
    return at_end and not batches.is_last_batch and batches.current.ready < loop.max_batches


def within_epoch(trainer: L.Trainer, state: dict[str, Any]) -> None:
    """Make such a state look as saved between two batches, so that the batches left are trained.

    Args:
        trainer: At the moment of the save.
        state: A whole checkpoint; changed in place.
    """
    loop = state["loops"]["fit_loop"]
    for counts in (loop["epoch_progress"]["total"], loop["epoch_progress"]["current"]):
        counts["processed"] -= 1
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    if trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher):
        # after a validation Lightning will count the batch before it again
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def at_epoch_end(trainer: L.Trainer) -> bool:
    """Tell whether a restored run continues with a new epoch.

    Without `max_epochs` Lightning would run the rest of the finished one, which has no batches.
    """
    loop = trainer.fit_loop
    epochs, batches = vars(loop.epoch_progress.current), loop.epoch_loop.batch_progress
    return batches.is_last_batch and epochs["processed"] == epochs["ready"]


def _reason(callback: L.Callback) -> str | None:
    """Ask a callback of Lightning's, or one built on it, why it stopped the run; None if not."""
    if isinstance(callback, Timer):
        left = callback.time_remaining()
        return None if left is None or left > 0 else "Its time (max_time) was used up"
    if isinstance(callback, EarlyStopping):
        if callback.stopping_reason == EarlyStoppingReason.NOT_STOPPED:
            return None
        return callback.stopping_reason_message or f"{callback.monitor} did not improve"
    return None

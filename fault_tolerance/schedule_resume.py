"""Learning rate schedules of a resumed run: the saved one goes on, or a changed one as a whole."""

import warnings
from typing import Any

import lightning as L
from torch.optim.lr_scheduler import ReduceLROnPlateau

PROGRESS = frozenset(
    {
        "last_epoch",
        "_step_count",
        "_last_lr",
        "_get_lr_called_within_step",
        "_is_initial",
        "T_cur",
        "T_i",
        "best",
        "num_bad_epochs",
        "cooldown_counter",
    }
)
"""What a schedule's state says about where it is; the rest says which schedule it is."""


def changed_schedules(trainer: L.Trainer, checkpoint: dict[str, Any]) -> list[int]:
    """List the places of the trainer's schedules that are not those of a checkpoint."""
    saved = checkpoint.get("lr_schedulers", [])
    now = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    pairs = enumerate(zip(saved, now, strict=True)) if len(saved) == len(now) else ()
    return [i for i, (old, new) in pairs if _constants(old) != _constants(new)]


def continue_schedule(trainer: L.Trainer, checkpoint: dict[str, Any], place: int) -> None:
    """Bring a new schedule to where the saved one stopped, and have the checkpoint resume there.

    The run then has the learning rates that the new schedule would have had from here on, had the
    run begun with it.

    Args:
        trainer: Its optimizers and schedules are those of the start of the run.
        checkpoint: Loaded, not yet restored; changed in place.
        place: Of the schedule, in the trainer's order.
    """
    schedule = trainer.lr_scheduler_configs[place].scheduler
    saved = checkpoint["lr_schedulers"][place]
    if isinstance(schedule, ReduceLROnPlateau):
        progress = {k: v for k, v in saved.items() if k in PROGRESS}
        checkpoint["lr_schedulers"][place] = schedule.state_dict() | progress
        return
    with warnings.catch_warnings():
        # no optimizer steps between these
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        warnings.filterwarnings("ignore", "The epoch parameter in `scheduler.step")
        for _ in range(saved["last_epoch"]):
            schedule.step()
    checkpoint["lr_schedulers"][place] = schedule.state_dict()
    optimizer = trainer.optimizers.index(schedule.optimizer)
    groups = checkpoint["optimizer_states"][optimizer]["param_groups"]
    for group, now in zip(groups, schedule.optimizer.param_groups, strict=True):
        group |= {name: now[name] for name in ("lr", "initial_lr") if name in now}


def _constants(state: dict[str, Any]) -> dict[str, Any]:
    """Leave out of a schedule's state, and of those nested in it, what changes as it is stepped."""
    kept = {key: value for key, value in state.items() if key not in PROGRESS}
    if "_schedulers" in kept:
        kept["_schedulers"] = [_constants(inner) for inner in kept["_schedulers"]]
    return kept

"""Lightning's trainer with all of its attributes declared, and where its products go."""

from pathlib import Path
from typing import Any

import lightning as L


class Trainer(L.Trainer):
    """An `L.Trainer`, for annotations: names what Lightning sets and does not declare.

    Attributes:
        callbacks: In the order in which their hooks run.
        datamodule: The data module of the run, None without one.
        fast_dev_run: Batches of a trial run, 0 in any other.
    """

    callbacks: list[L.Callback]
    datamodule: Any
    fast_dev_run: int


def trial(trainer: L.Trainer) -> str | None:
    """Name the option that makes a run a trial, which must not touch what a run left; None if none.

    The limits of `fit` are no trial: they are settings of a run, which a resume compares.
    """
    fast: int = trainer.fast_dev_run  # pyright: ignore[reportAttributeAccessIssue]
    if fast:
        return f"fast_dev_run={fast}"
    stage = trainer.state.fn and trainer.state.fn.value
    name = {"test": "limit_test_batches", "predict": "limit_predict_batches"}.get(stage or "")
    limit = getattr(trainer, name) if name else 1.0
    return None if isinstance(limit, float) and limit == 1.0 else f"{name}={limit}"


def products_folder(trainer: L.Trainer) -> Path:
    """Return where results go: the run folder, or `trial` in it."""
    root = Path(trainer.default_root_dir)
    return root / "trial" if trial(trainer) else root

"""Lightning's trainer with all of its attributes declared, and where its products go."""

from pathlib import Path
from typing import Any

import lightning as L

from rl4med_ddpo.foundation.errors import UserError


class Trainer(L.Trainer):
    """An `L.Trainer`, for annotations: names what Lightning sets and does not declare.

    Attributes:
        callbacks: In the order in which their hooks run.
        datamodule: The data module of the run, None without one.
        fast_dev_run: Batches of a trial run, 0 in any other.
        overfit_batches: Number or share of the batches that every epoch repeats; 0 for all.
    """

    callbacks: list[L.Callback]
    datamodule: Any
    fast_dev_run: int
    overfit_batches: int | float


ROUNDED = {
    "16-true": "rounds log-probs and losses beyond use",
    "bf16-true": "keeps the trained weights in 8 bits of precision, where a small step is lost",
    "64-true": "is computed by no GPU's fast units, and the frozen networks are kept in float32",
}
"""Precisions that no stage trains or scores in, and why."""


def require_precision(trainer: L.Trainer) -> None:
    """Refuse precisions that keep the weights in another type than float32."""
    if why := ROUNDED.get(trainer.precision):
        raise UserError(
            f"precision {trainer.precision} {why}: use --trainer.precision bf16-mixed or 32-true"
        )


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

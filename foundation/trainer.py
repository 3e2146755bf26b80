"""Lightning's trainer with all of its attributes declared."""

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

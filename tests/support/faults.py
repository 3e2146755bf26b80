"""Faults on demand, so that tests can have a run fail at a chosen place.

`FAULT=point:n:action` does something at the n-th pass of a point, and `FAULT=point:n:action:rank`
in one process only; several are separated by commas. Importing this module is enough, also into a
command line of its own, by `--trainer.callbacks+=support.faults.Faults`.
"""

import errno
import os
import signal
import time
from collections import Counter

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from rl4med_ddpo.foundation.progress import progress

FAULT = "FAULT"
SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "term": signal.SIGTERM,
    "usr1": signal.SIGUSR1,
}
_passed: Counter[str] = Counter()


class InjectedFault(RuntimeError):
    """Raised by the action `raise`."""


class Faults(Callback):
    """Has a command line of its own import this module."""


def fault_point(point: str, done: int, total: int) -> None:
    """Pass a point, and fail there if `FAULT` says so."""
    if FAULT not in os.environ:
        return
    _passed[point] += 1
    for fault in os.environ[FAULT].split(","):
        where, n, action, *rank = fault.split(":")
        here = not rank or int(rank[0]) == rank_zero_only.rank
        if (point, _passed[point]) == (where, int(n)) and here:
            _fail(point, action)


def _fail(point: str, action: str) -> None:
    if action in SIGNALS:
        os.kill(os.getpid(), SIGNALS[action])
    elif action == "hang":
        time.sleep(3600)
    elif action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        raise InjectedFault(f"{action} at {point}")


progress.subscribe(fault_point)

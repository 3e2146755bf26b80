"""Faults on demand, so that tests can have a run fail at a chosen place.

`FAULT=point:n:action` does something at the n-th pass of a point, and `FAULT=point:n:action:rank`
in one process only; several are separated by commas. Without the variable nothing happens.
"""

import errno
import os
import signal
import time
from collections import Counter

from lightning.pytorch.utilities import rank_zero_only

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


def fault_point(point: str) -> None:
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

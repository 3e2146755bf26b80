"""Faults on demand, so that tests can have a run fail at a chosen place.

`FAULT=point:n:action` does something at the n-th pass of a point, and `FAULT=point:n:action:rank`
in one process only. Without the variable nothing happens.
"""

import errno
import os
import signal
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
    where, n, action, *rank = os.environ[FAULT].split(":")
    if point != where or (rank and int(rank[0]) != rank_zero_only.rank):
        return
    _passed[point] += 1
    if _passed[point] != int(n):
        return
    if action in SIGNALS:
        os.kill(os.getpid(), SIGNALS[action])
    elif action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        raise InjectedFault(f"{action} at pass {n} of {point}")

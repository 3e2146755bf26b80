"""A trial in a process of its own, without the seconds that importing takes."""

import os
import signal
import socket
import sys
import time
import traceback

from lightning.pytorch.utilities import rank_zero_only

from support import faults  # noqa: F401 - listens in forked processes

PATIENCE = 250.0
"""Seconds until something has to happen."""


def forked(function, *args):
    """Call in a forked process; return its exit code, or minus the signal that ended it."""
    _, status = os.waitpid(start_forked(function, *args), 0)
    return os.waitstatus_to_exitcode(status)


def start_forked(function, *args):
    """Call in a forked process; return its number without waiting for its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        call_and_leave(function, args)
    return child


def forked_ranks(function, *args, ranks=2, limit=60.0, stopped_get=None):
    """Call in processes that find each other as DDP's do; return their exit codes.

    Args:
        limit: Seconds in which all have to end once one of them has ended, or has stopped itself.
            Whoever takes longer is killed, which shows in its exit code.
        stopped_get: Signal that a process gets, from outside, when it has stopped itself.
    """
    port = _free_port()
    children = [_start_rank(rank, ranks, port, function, args) for rank in range(ranks)]
    codes, until = {}, time.monotonic() + PATIENCE
    while len(codes) < ranks:
        for child in set(children) - codes.keys():
            pid, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
            if pid:
                until = min(until, time.monotonic() + limit)
            if pid and not os.WIFSTOPPED(status):
                codes[child] = os.waitstatus_to_exitcode(status)
            elif pid and stopped_get:
                os.kill(child, stopped_get)
                os.kill(child, signal.SIGCONT)
        if time.monotonic() > until:
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[child] for child in children]


def _start_rank(rank, ranks, port, function, args):
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    rank_zero_only.rank = rank
    call_and_leave(function, args)


def call_and_leave(function, args):
    try:
        function(*args)
        os._exit(0)
    except SystemExit as end:
        os._exit(end.code or 0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]

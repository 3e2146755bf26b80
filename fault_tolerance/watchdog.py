"""End a run when one of its processes is dead or hangs, and say which, where, and what to do."""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch.distributed import DistError, TCPStore

from rl4med_ddpo.fault_tolerance.checkpoint_io import LAST
from rl4med_ddpo.fault_tolerance.command import (
    disable_process_observer,
    resume_command,
    started_processes,
)
from rl4med_ddpo.fault_tolerance.resume import checkpoint_folders
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.progress import progress

BEAT = 0.5
"""Seconds between two signs of life."""
GRACE = 10.0
"""Seconds to find out which process an error in a collective comes from, and to end after it."""
FATAL = 1


@dataclass
class Peer:
    """What was last heard of a process, and when, by this process's own clock."""

    beat: dict[str, Any]
    heard: float
    moved: float


class Watchdog(Callback):
    """Watches, from a thread of each process, that all processes of a run live and move.

    Otherwise the rest would wait in a collective for half an hour, or for ever. The run ends with
    exit code 1; the last lines name the process, its phase, the last checkpoint and the command to
    resume. The stacks of a process that hangs are in `stacks` in the run folder.

    Args:
        silence: Seconds without a sign of life after which a process counts as dead or stopped.
        limit: Seconds in one place after which a process counts as hung; longer than the longest
            step between two denoising steps, passes, batches, or writes of a checkpoint.
    """

    def __init__(self, silence: float = 300.0, limit: float = 1800.0) -> None:
        if silence < 4 * BEAT or limit < silence:
            raise UserError(
                f"Watchdog(silence={silence}, limit={limit}): silence must be at least {4 * BEAT} "
                "seconds, limit at least as long"
            )
        self.silence = silence
        self.limit = limit
        self.thread: threading.Thread | None = None
        self.ending = threading.Event()
        self.found = threading.Event()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin to watch, where there is more than one process."""
        if trainer.world_size == 1:
            return
        disable_process_observer(trainer)
        self.trainer, self.rank, self.peers = trainer, trainer.global_rank, {}
        folder = Path(trainer.default_root_dir) / "stacks"
        folder.mkdir(parents=True, exist_ok=True)
        self.stacks = (folder / f"process_{self.rank}.txt").open("w")
        faulthandler.register(signal.SIGUSR2, self.stacks, all_threads=True)
        self.store = self._connect(trainer)
        self.ending.clear()
        self.beats = 0
        self.told_phase = progress.phase
        # before whatever may fail there
        progress.subscribe(self._tell_change, first=True)
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop watching."""
        self._stop()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Stop watching; but an error in a collective may be another process's end."""
        if self.thread is None:
            return
        if isinstance(exception, DistError | RuntimeError):
            print(f"{type(exception).__name__}: {exception}", file=sys.stderr, flush=True)
            self.found.wait(GRACE)
        self._stop("well" if isinstance(exception, SystemExit) else "badly")

    def _connect(self, trainer: L.Trainer) -> TCPStore:
        """Open a store of the watchdogs' own, so that no collective is in their way."""
        host, patience = os.environ["MASTER_ADDR"], timedelta(seconds=self.silence)
        store, n = None, trainer.world_size
        if self.rank == 0:
            store = TCPStore(host, 0, n, True, timeout=patience, wait_for_workers=False)
        port = trainer.strategy.broadcast(store.port if store else 0)
        return store or TCPStore(host, port, n, False, timeout=patience, wait_for_workers=False)

    def _stop(self, end: str = "well") -> None:
        if self.thread is None:
            return
        progress.unsubscribe(self._tell_change)
        self.end = end
        self.ending.set()
        self.thread.join()
        self.thread = None
        faulthandler.unregister(signal.SIGUSR2)
        self.stacks.close()
        if not Path(self.stacks.name).stat().st_size:
            Path(self.stacks.name).unlink()

    def _watch(self) -> None:
        while True:
            ending = self.ending.wait(BEAT)
            try:
                self._tell(self.end if ending else None)
                if ending:
                    self._linger()
                    return
                self._look()
            except (DistError, RuntimeError):
                # the store lives in process 0, and goes with it
                if not self.ending.is_set() and self._end_of(0) != "well":
                    self._end(0, "it does not answer any more")
                return

    def _linger(self) -> None:
        """Keep the store until the others know that process 0 has ended."""
        until = time.monotonic() + (GRACE if self.end == "well" else 2 * BEAT)
        others = [f"beat/{rank}" for rank in range(1, self.trainer.world_size)]
        while self.rank == 0 and time.monotonic() < until:
            known = self.store.check(others)
            if known and all(json.loads(self.store.get(key))["ended"] for key in others):
                return
            time.sleep(BEAT / 5)

    def _tell_change(self, point: str, done: int, total: int) -> None:
        """Tell the others of a new phase at once."""
        if progress.phase == self.told_phase:
            return
        self.told_phase = progress.phase
        # what is wrong with the store is for the thread to notice
        with suppress(DistError, RuntimeError):
            self._tell(None)

    def _tell(self, ended: str | None) -> None:
        self.beats += 1
        beat = {
            "beats": self.beats,
            "ended": ended,
            "phase": progress.phase,
            "passed": progress.passed,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        self.store.set(f"beat/{self.rank}", json.dumps(beat))

    def _look(self) -> None:
        """Process 0 watches all processes, itself included; the others watch process 0."""
        for rank in range(self.trainer.world_size) if self.rank == 0 else [0]:
            if self.store.check([f"beat/{rank}"]):
                self._judge(rank, json.loads(self.store.get(f"beat/{rank}")))
        for rank, process in enumerate(started_processes(self.trainer), start=1):
            if process.poll() and not self._end_of(rank):
                self._end(rank, _ended(process.returncode))

    def _judge(self, rank: int, beat: dict[str, Any]) -> None:
        now = time.monotonic()
        peer = self.peers.setdefault(rank, Peer(beat, now, now))
        if beat["beats"] != peer.beat["beats"]:
            peer.heard = now
        if (beat["passed"], beat["phase"]) != (peer.beat["passed"], peer.beat["phase"]):
            peer.moved = now
        peer.beat = beat
        if beat["ended"] == "well":
            return
        if beat["ended"] == "badly":
            if now - peer.heard > GRACE:
                self._end(rank, "it ended with an error of its own, and the others did not")
        elif now - peer.heard > self.silence:
            self._end(rank, f"it gave no sign of life for {self.silence:g} s")
        elif not _is_alive(beat):
            self._end(rank, "it was killed, or crashed")
        elif now - peer.moved > self.limit:
            self._end(rank, f"it did not move for {self.limit:g} s")

    def _end_of(self, rank: int) -> str | None:
        return self.peers[rank].beat["ended"] if rank in self.peers else None

    def _end(self, rank: int, why: str) -> None:
        """Have the stacks written, say what happened, and end all processes of this machine."""
        self.found.set()
        if rank == 0 and self._end_of(0) == "badly":
            # it has said why itself
            os._exit(FATAL)
        faulthandler.dump_traceback(self.stacks, all_threads=True)
        here = [
            peer.beat["pid"]
            for r, peer in self.peers.items()
            if r != self.rank and peer.beat["host"] == socket.gethostname()
        ]
        for pid in here:
            # one that is stopped has to continue to write its stack
            _send(pid, signal.SIGUSR2)
            _send(pid, signal.SIGCONT)
        time.sleep(BEAT)
        # what process 0 said last went with it; the others are where it was
        phase = self.peers[rank].beat["phase"] if rank and rank in self.peers else progress.phase
        os.write(2, self._message(rank, phase, why).encode())
        if self.rank == 0:
            for pid in here:
                _send(pid, signal.SIGKILL)
        os._exit(FATAL)

    def _message(self, rank: int, phase: str, why: str) -> str:
        lasts = [folder / LAST for folder in checkpoint_folders(self.trainer)]
        last = next((path for path in lasts if path.exists()), None)
        return (
            f"\nerror: process {rank} of {self.trainer.world_size} was lost in the phase {phase}: "
            f"{why}.\n"
            f"  Stacks: {Path(self.stacks.name).parent}\n"
            f"  Last checkpoint: {last or 'none yet'}\n"
            f"  To resume: {resume_command()}\n"
        )


def _is_alive(beat: dict[str, Any]) -> bool:
    if beat["host"] != socket.gethostname():
        return True
    try:
        os.kill(beat["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _ended(code: int) -> str:
    if code < 0:
        return f"it was killed by {signal.Signals(-code).name}"
    return f"it ended with exit code {code}; its own message is above"

"""The command line of this run, and the processes that it started."""

import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import lightning as L
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher


def resume_command() -> str:
    """Return the command that resumes this run: its own, without the checkpoint that it names."""
    words, skip = [], False
    for word in sys.argv[1:]:
        if skip or word.startswith("--ckpt_path="):
            skip = False
        elif word == "--ckpt_path":
            skip = True
        else:
            words.append(word)
    script = Path(sys.argv[0])
    if script.name == "rl4med-ddpo":
        start = [script.name]
    elif script.name == "__main__.py":
        start = ["python", "-m", "rl4med_ddpo"]
    else:
        start = ["python", os.path.relpath(script)]
    return shlex.join([*start, *words])


def disable_process_observer(trainer: L.Trainer) -> None:
    """Keep Lightning's observer from killing this process when one that it started ends first.

    It would do so without a word, in the middle of a save or of a message.
    """
    if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
        for thread in threading.enumerate():
            if isinstance(thread, _ChildProcessObserver):
                thread._child_processes = []


def started_processes(trainer: L.Trainer) -> list[subprocess.Popen[bytes]]:
    """List the processes of ranks 1, 2, ... if this one has started them."""
    launcher = trainer.strategy.launcher
    return launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []

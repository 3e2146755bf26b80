"""Random faults against a tiny DDPO run and its generation.

Each trial takes a (point, action) pair from a seed, lets a run fail there, and gives the same
command again until it is done. What is left must equal, bit for bit, what an undisturbed run
leaves.
"""

import os
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl4med_ddpo.callbacks import SampleFolder
from rl4med_ddpo.fault_tolerance.preemption import Preemption
from rl4med_ddpo.lightning_modules import DDPO
from support.forked import forked
from support.tiny import prompts
from support.tiny_runs import differing, everything, fit
from support.trainers import quiet_trainer

POINTS = {
    # how often an undisturbed run passes each
    "rollout": 6,
    "reward": 3,
    "update": 6,
    "validation": 3,
    "sampling": 7,
    "save.write": 5000,
    "save.fsync": 4,
    "save.replace": 10,
    "save.manifest": 8,
}
ACTIONS = ("kill", "term", "usr1", "raise", "enospc")
SIGNALS = ("term", "usr1")
DRAWING = {"predict": 8, "sampling": 8}


@dataclass(frozen=True)
class Trial:
    """A fault, `point:n:action`, and what it is tried on."""

    fault: str
    drawing: bool


def draw(seed: int, number: int) -> list[Trial]:
    """Draw trials; a fifth of them are about generation."""
    rng = random.Random(seed)
    trials = []
    for _ in range(number):
        drawing = rng.random() < 0.2
        point, passes = rng.choice(sorted((DRAWING if drawing else POINTS).items()))
        fault = f"{point}:{rng.randint(1, passes)}:{rng.choice(ACTIONS)}"
        trials.append(Trial(fault, drawing))
    return trials


class Chaos:
    """Undisturbed runs, and trials to compare with them.

    Args:
        module: A DDPO in memory.
        fitted: All that an undisturbed training leaves.
        folder: Where runs are made.
    """

    def __init__(self, module: DDPO, fitted: dict[str, Any], folder: Path) -> None:
        self.module, self.fitted, self.folder = module, fitted, folder
        assert forked(self.generate, folder / "samples") == 0
        self.drawn = contents(folder / "samples")

    def generate(self, folder: Path) -> None:
        """Draw 16 samples in 8 batches."""
        data = prompts(8, test_samples_per_prompt=4, predict_batch_size=2)
        trainer = quiet_trainer(folder.parent, callbacks=[Preemption(), SampleFolder(str(folder))])
        trainer.predict(self.module, data, return_predictions=False)

    def lost(self, trial: Trial) -> str | None:
        """Try a fault; say what it cost, None for nothing."""
        folder = self.folder / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        run = self.generate if trial.drawing else (lambda f: fit(f, self.module))
        os.environ["FAULT"] = trial.fault
        first = forked(quiet, run, folder)
        del os.environ["FAULT"]
        # a signal may come after the last safe point, when all is done
        if first == 0 and not trial.fault.endswith(SIGNALS):
            return f"{trial.fault}: nothing failed"
        if first and (second := forked(quiet, run, folder)):
            return f"{trial.fault}: ended with {first}, and then with {second}"
        if trial.drawing:
            different = differing(contents(folder), self.drawn)
        else:
            different = differing(everything(folder), self.fitted)
        return f"{trial.fault}: {different[:3]}" if different else None


def quiet(run, folder: Path) -> None:
    """Run without a word: tracebacks of injected faults are no news."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    for stream in (1, 2):
        os.dup2(sys.stdout.fileno(), stream)
    run(folder)


def contents(folder: Path) -> dict[str, bytes]:
    """Read all files of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

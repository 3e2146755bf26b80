"""What `test` leaves behind: `results/metrics.json`, each rate with its n and interval."""

import json
import os
from pathlib import Path
from typing import Any

from datamodules.attributes import CONDITIONS, PROMPTS, short_name
from metrics.apr import Prevalence
from metrics.intervals import wilson_interval


def alignment_results(prevalence: Prevalence, reward: float) -> dict[str, Any]:
    """Lay out APR over all prompts and for each, with 95% Wilson intervals, and the mean reward."""
    asked, correct = prevalence.n.int().tolist(), prevalence.correct.int().tolist()
    return {
        **_rate(sum(correct), sum(asked)),
        "reward": reward,
        "prompts": {
            short_name(condition): {"prompt": prompt, **_rate(k, n)}
            for condition, prompt, k, n in zip(CONDITIONS, PROMPTS, correct, asked, strict=True)
        },
    }


def _rate(correct: int, n: int) -> dict[str, Any]:
    if n == 0:
        return {"apr": None, "apr_interval": None, "correct": 0, "n": 0}
    interval = list(wilson_interval(correct, n))
    return {"apr": correct / n, "apr_interval": interval, "correct": correct, "n": n}


def write_results(run_folder: str | Path, results: dict[str, Any]) -> Path:
    """Write `results/metrics.json` in a run folder, whole or not at all."""
    path = Path(run_folder) / "results" / "metrics.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(unfinished, path)
    return path

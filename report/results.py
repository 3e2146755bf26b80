"""What `test` leaves behind: `results/metrics.json`, and what it rests on."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd

from rl4med_ddpo.foundation.files import write_whole

RESULTS = "results"
METRICS = "metrics.json"
FRONTIER = "frontier.json"
PACKAGES = (
    "torch", "torchvision", "lightning", "diffusers", "transformers", "timm", "torchmetrics",
    "torch-fidelity", "lpips", "numpy", "scipy", "pillow",
)  # fmt: skip


def write_results(run_folder: str | Path, results: dict[str, Any]) -> Path:
    """Write `results/metrics.json` in a run folder, whole or not at all."""
    path = Path(run_folder) / RESULTS / METRICS
    write_whole(path, json.dumps(results, indent=2) + "\n")
    return path


def write_csv(path: Path, table: pd.DataFrame, index: bool = True) -> None:
    """Write a table, whole or not at all."""
    write_whole(path, table.to_csv(index=index, lineterminator="\n"))


def versions() -> dict[str, str]:
    """Return the versions that a number can depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found

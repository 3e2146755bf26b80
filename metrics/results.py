"""What `test` leaves behind: `results/metrics.json`, and what it rests on."""

import hashlib
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd

RESULTS = "results"
METRICS = "metrics.json"
PACKAGES = (
    "torch", "torchvision", "lightning", "diffusers", "transformers", "timm", "torchmetrics",
    "torch-fidelity", "lpips", "numpy", "scipy", "pillow",
)  # fmt: skip


def write_results(run_folder: str | Path, results: dict[str, Any]) -> Path:
    """Write `results/metrics.json` in a run folder, whole or not at all."""
    path = Path(run_folder) / RESULTS / METRICS
    write_text(path, json.dumps(results, indent=2) + "\n")
    return path


def write_csv(path: Path, table: pd.DataFrame, index: bool = True) -> None:
    """Write a table, whole or not at all."""
    write_text(path, table.to_csv(index=index, lineterminator="\n"))


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def file_hash(path: Path) -> str:
    """Return a file's sha256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions that a number can depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found

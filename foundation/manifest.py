"""The manifest next to a checkpoint: written last, it says that the checkpoint is whole."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rl4med_ddpo.foundation.files import write_whole


@dataclass(frozen=True)
class Manifest:
    """What is known of a checkpoint file without opening it.

    Attributes:
        file: Its name when it was written.
        bytes: Its size.
        sha256: Of its content, in hexadecimal.
        epoch: Epochs that were finished, or begun, when it was written.
        global_step: Optimizer steps taken.
        between_steps: Whether training can resume from it exactly: no validation was running.
        settings: What the run's course depends on, by key.
        ended: Empty while the run goes on. Else `why` it ended before its last epoch or step, and
            the `settings` of the callbacks that ended it.
        loggers: Folder (relative to the run's) and version of each logger that a resume continues.
    """

    file: str
    bytes: int
    sha256: str
    epoch: int
    global_step: int
    between_steps: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    ended: dict[str, Any] = field(default_factory=dict)
    loggers: list[dict[str, Any]] = field(default_factory=list)


def manifest_path(checkpoint: Path) -> Path:
    """Name the manifest of a checkpoint file."""
    return checkpoint.with_name(checkpoint.name + ".json")


def write_manifest(checkpoint: Path, manifest: Manifest) -> None:
    """Write the manifest of a checkpoint, whole or not at all."""
    write_whole(manifest_path(checkpoint), json.dumps(asdict(manifest), indent=2) + "\n")


def read_manifest(path: Path) -> Manifest | None:
    """Read a manifest file; None if there is none, or if it is no manifest."""
    try:
        return Manifest(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None

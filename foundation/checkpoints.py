"""Read checkpoints of unknown origin: tensors and plain values, never code.

`weights_only=True` alone is not enough: Lightning and jsonargparse import the classes that a
checkpoint's hyperparameters name before they check what they are.
"""

import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rl4med_ddpo.foundation.class_names import with_current_names
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.hashes import sha256_of
from rl4med_ddpo.foundation.manifest import manifest_path, read_manifest

CLASS_KEYS = ("class_path", "_class_path", "_instantiator")
KNOWN_INSTANTIATORS = ("lightning.pytorch.cli.instantiate_module",)
UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    AttributeError,
)


def read_checkpoint(path: Path, verify: bool = True) -> dict[str, Any]:
    """Load a checkpoint on the CPU.

    Args:
        path: The file.
        verify: Compare the file with its manifest, if there is one.

    Raises:
        UserError: if there is no such file, if it is damaged, is not what its manifest says, holds
            more than tensors and plain values, or names a class that is not loaded.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}.\n  Correct the path, or leave it out.")
    if verify:
        require_manifest(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise UserError(_cannot_read(path, error)) from error
    if isinstance(checkpoint, dict):
        named = with_current_names(checkpoint.get("hyper_parameters", {}))
        require_known_classes(named, path)
        if named:
            checkpoint["hyper_parameters"] = named
    return checkpoint


def require_manifest(path: Path) -> None:
    """Refuse a file whose content is not what the manifest next to it says.

    Raises:
        UserError: naming both hashes.
    """
    manifest = read_manifest(manifest_path(path.resolve()))
    if manifest is None:
        return
    found = sha256_of(path)
    if found != manifest.sha256:
        raise UserError(
            f"{path} is not the file that was saved:\n"
            f"  sha256 now       {found}\n"
            f"  in its manifest  {manifest.sha256}\n"
            "  It was damaged or replaced. Copy it again with its manifest "
            f"{manifest_path(path).name}, or remove the manifest if the file is as you want it"
        )


def require_known_classes(hyperparameters: Any, path: Path) -> None:
    """Refuse hyperparameters that would have anything imported.

    Raises:
        UserError: naming the key and the class.
    """
    for key, name in _class_names(hyperparameters, "hyper_parameters"):
        if not isinstance(name, str) or not _is_known(key, name):
            raise UserError(
                f"the checkpoint {path} was not loaded: its {key} names {name!r}, which is not "
                "loaded here.\n  To import it would run its code. If you trust it, import its "
                "module before, or name the class in your own configuration"
            )


def _class_names(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Find all values in nested containers that name a class, each with its key."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name in CLASS_KEYS:
                yield f"{key}.{name}", inner
            else:
                yield from _class_names(inner, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _class_names(inner, f"{key}[{i}]")


def _is_known(key: str, name: str) -> bool:
    if key.endswith("_instantiator"):
        return name in KNOWN_INSTANTIATORS
    module, _, attribute = name.rpartition(".")
    return not module or isinstance(getattr(sys.modules.get(module), attribute, None), type)


def _cannot_read(path: Path, error: Exception) -> str:
    # torch's own message would also advise switching the protection off
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return (
            f"the checkpoint {path} was not loaded: it holds more than tensors and plain values, "
            f"namely {refused[1]}.\n  Such a file can run code when it is opened. Take it from a "
            "source that writes plain state dicts, or as safetensors"
        )
    return (
        f"the checkpoint {path} cannot be read ({type(error).__name__}): it is damaged or cut "
        "short. Copy the file again, or train again"
    )

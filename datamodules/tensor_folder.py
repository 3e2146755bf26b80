"""Tensors that are dear to compute, kept on disk under a key of what they were computed from."""

import os
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.files import write_whole


class TensorFolder:
    """One safetensors file a key. Processes may share it: a file appears whole or not at all.

    Args:
        root: The folder; made when the first tensor is written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def __contains__(self, key: str) -> bool:
        return self._path(key).is_file()

    def read(self, key: str) -> Tensor:
        """Return the tensor of a key.

        Raises:
            UserError: if it is gone or damaged.
        """
        try:
            return load_file(self._path(key))["tensor"]
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(
                f"cannot read {self._path(key)} from the cache: {error}.\n"
                f"  Delete that file, or the whole folder {self.root}, and start again: it is "
                "rebuilt."
            ) from error

    def write(self, key: str, tensor: Tensor) -> None:
        """Keep a tensor.

        Raises:
            UserError: if the folder cannot be written, for want of space or permission.
        """
        path = self._path(key)
        own = f".{os.getpid()}.part"
        try:
            write_whole(path, save({"tensor": tensor.contiguous().cpu()}), part=own)
        except OSError as error:
            with suppress(OSError):
                path.with_name(path.name + own).unlink()
            raise UserError(
                f"cannot write the cache {self.root}: {error.strerror}.\n"
                "  Give another folder (--model.cache, --data.copies), or null to do without."
            ) from error

    def _path(self, key: str) -> Path:
        # not more than some hundred files in a folder
        return self.root / key[:2] / f"{key}.safetensors"

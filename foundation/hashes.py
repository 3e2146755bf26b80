"""Name files, weights and cache entries by their content."""

import hashlib
from collections.abc import Iterator
from hashlib import blake2b
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

CHUNK = 1 << 22


def sha256_of(path: Path) -> str:
    """Hash a file, or a folder: the names and contents of all files in it."""
    if path.is_dir():
        whole = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            whole.update(f"{file.relative_to(path)}\0{sha256_of(file)}\n".encode())
        return whole.hexdigest()
    content = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            content.update(chunk)
    return content.hexdigest()


def weights_digest(module: nn.Module) -> str:
    """Hash a network's parameters and buffers by name: blake2b, 16 hexadecimal digits."""
    hashed = blake2b(digest_size=8)
    for name, tensor in tensors_of(module):
        hashed.update(name.encode())
        hashed.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def has_weights(module: nn.Module) -> bool:
    """Tell whether a network has anything to hash."""
    return next(tensors_of(module), None) is not None


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers with their names."""
    return chain(module.named_parameters(), module.named_buffers())


def key_of(*parts: object) -> str:
    """Hash bytes, or the text of anything else, into the key of a cache entry."""
    hashed = blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        hashed.update(len(data).to_bytes(8, "big") + data)
    return hashed.hexdigest()

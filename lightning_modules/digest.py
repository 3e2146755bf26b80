"""Name weights by what they are."""

from collections.abc import Iterator
from hashlib import blake2b
from itertools import chain

import torch
from torch import Tensor, nn


def digest(module: nn.Module) -> str:
    """Hash a network's parameters and buffers, by name."""
    hashed = blake2b(digest_size=8)
    for name, tensor in tensors_of(module):
        hashed.update(name.encode())
        hashed.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers with their names."""
    return chain(module.named_parameters(), module.named_buffers())

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


def shared_weights(one: nn.Module, other: nn.Module) -> float:
    """Return the share of the smaller network's weights that the other has too, bit for bit."""
    mine, its = ({n: p.detach().cpu() for n, p in net.named_parameters()} for net in (one, other))
    same = sum(p.numel() for n, p in mine.items() if n in its and torch.equal(p, its[n]))
    return same / min(sum(p.numel() for p in net.values()) for net in (mine, its))

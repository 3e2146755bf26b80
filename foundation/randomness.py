"""Random numbers that depend on what they are for, never on who draws them or when.

Each draw has a key made of the experiment's seed, a purpose and the indices of the thing drawn. So
a run gives the same samples on 1 or N processes and after any resume, with no generator state to
save, and any image can be drawn again from its key.
"""

import hashlib

import torch
from torch import Tensor

Draw = torch.Generator | list[torch.Generator]
"""Where numbers come from: one generator for a batch, or one for each of its rows."""


def key(seed: int, purpose: str, *indices: int | str) -> int:
    """Hash (seed, purpose, indices) to an integer in [0, 2**63)."""
    text = ":".join(map(str, (seed, purpose, *indices)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def keys(seed: int, purpose: str, epoch: int, indices: Tensor) -> Tensor:
    """Return one key an index, `(B,)` int64."""
    return torch.tensor([key(seed, purpose, epoch, i) for i in indices.tolist()])


def generator(key: int) -> torch.Generator:
    """Return a CPU generator whose stream is decided by the key."""
    return torch.Generator().manual_seed(key)


def integers(end: int, n: int, draw: Draw) -> Tensor:
    """Draw n of the numbers from 0 to below `end`, `(n,)` int64."""
    if isinstance(draw, torch.Generator):
        return torch.randint(end, (n,), generator=draw)
    return torch.cat([torch.randint(end, (1,), generator=row) for row in draw])

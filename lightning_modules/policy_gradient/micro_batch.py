"""How many (sample, step) pairs a training pass can hold."""

import os
from collections.abc import Callable

import torch
from torch import Tensor

USABLE = 0.6
"""Share of the free memory that activations may take; the rest is for workspaces."""

MOST = 64
"""Pairs beyond which a pass is no faster a pair, on GPUs too."""


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Count the bytes that a forward pass keeps for its backward, each storage once."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = run()
    assert result.requires_grad
    return sum(storages.values())


def free_memory(device: torch.device) -> int:
    """Return the bytes that the device can still give."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def largest_micro_batch(run: Callable[[int], Tensor], most: int, free: int) -> int:
    """Return the largest power of two of pairs whose activations fit into memory.

    Args:
        run: Forward pass over so many pairs.
        most: Pairs of an update.
        free: Bytes that there are.
    """
    one, two = saved_bytes(lambda: run(1)), saved_bytes(lambda: run(2))
    # the weights are kept once, whatever the number of pairs
    a_pair, fixed = max(two - one, 1), max(2 * one - two, 0)
    fitting = max(int((USABLE * free - fixed) / a_pair), 1)
    return 2 ** (min(fitting, most, MOST).bit_length() - 1)

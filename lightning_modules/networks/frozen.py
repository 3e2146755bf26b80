"""Keep frozen weights out of checkpoints, with strict loading."""

from collections.abc import Iterable
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def omit_frozen(module: nn.Module) -> None:
    """Leave what is frozen in `module` now out of every state dict, and do without it in loading.

    Left out is each entry that is not a parameter which requires grad: frozen parameters and
    buffers. In loading, the module's own tensors stand in for them, so strict loading works and a
    missing trainable entry is still an error. Deep copies of the module do the same.
    """
    trainable = {
        name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad
    }
    frozen = frozenset(module.state_dict().keys() - trainable)
    module.register_state_dict_post_hook(partial(_drop, frozen))
    module.register_load_state_dict_pre_hook(partial(_fill, frozen))


def _drop(
    frozen: Iterable[str], module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    for name in frozen:
        state_dict.pop(prefix + name, None)


def _fill(
    frozen: Iterable[str], module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    own: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    own.update(module.named_buffers(remove_duplicate=False))
    for name in frozen:
        state_dict.setdefault(prefix + name, own[name])


class Frozen(nn.Module, Generic[Network]):
    """A network that is used and never trained: frozen, in eval mode for good, not in checkpoints.

    Its forward runs in the network's own dtype whatever the trainer's precision is; floating-point
    inputs are cast to it. Other methods are reached through `.module` and run as the caller does.

    Args:
        module: The network.
        dtype: Its dtype from now on.
    """

    def __init__(self, module: Network, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.module = module.to(dtype).eval().requires_grad_(False)
        self.dtype = dtype
        super().train(False)
        omit_frozen(self)

    def train(self, mode: bool = True) -> "Frozen":
        """Stay in eval mode."""
        return self

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Call the network."""
        cast = [
            x.to(self.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
            for x in inputs
        ]
        device = next(self.module.parameters()).device.type
        with torch.autocast(device, enabled=False):
            return self.module(*cast, **options)

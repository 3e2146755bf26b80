"""The gradient of each sample of a batch for the weights of low-rank adapters, in one backward.

Autograd sums a weight's gradient over the batch. Here each adapter's product gets, next to its
weight, a tensor of zeros with one slice per sample. It does not change the product, and its
gradient is that sample's share of the weight's gradient. Backward passes add up in it as they do in
any leaf.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PerSampleLinear(torch.autograd.Function):
    """x W^T, whose weight gradient goes sample by sample to another tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, collector: Tensor) -> Tensor:
        """Multiply.

        Args:
            ctx: Autograd's.
            x: `(G B, ..., in)`: G groups of the same B samples, as guidance has two.
            weight: `(out, in)`, without gradient.
            collector: `(B, out, in)`; gets the gradient of each sample.
        """
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, weight)
        ctx.samples = len(collector)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor]:
        """Return the gradients of x and, for each sample, of the weight."""
        x, weight = ctx.saved_tensors
        outer = torch.bmm(gradient.flatten(1, -2).mT, x.flatten(1, -2))
        own = outer.float().unflatten(0, (-1, ctx.samples)).sum(dim=0)
        return gradient @ weight if ctx.needs_input_grad[0] else None, None, own


@contextmanager
def per_sample_gradients(layers: list[nn.Linear], samples: int) -> Iterator[list[Tensor]]:
    """Have backward passes collect each sample's gradient for the weights of some layers.

    Args:
        layers: Layers without bias, whose inputs are `(G samples, ..., in)`.
        samples: B.

    Yields:
        For each layer a tensor whose `grad`, `(B, out, in)` float32, is the sum over the backward
        passes so far. The weights' own gradients stay as they are.
    """
    collectors = []
    for layer in layers:
        zeros = layer.weight.new_zeros(()).expand(samples, *layer.weight.shape)
        collectors.append(zeros.requires_grad_())
        # shadows the class's method until it is deleted below
        layer.forward = _Collecting(layer, collectors[-1])
    try:
        yield collectors
    finally:
        for layer in layers:
            del layer.forward


class _Collecting:
    def __init__(self, layer: nn.Linear, collector: Tensor) -> None:
        self.layer, self.collector = layer, collector

    def __call__(self, input: Tensor) -> Tensor:
        return PerSampleLinear.apply(input, self.layer.weight.detach(), self.collector)

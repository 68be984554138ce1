"""What is computed for every image on its own, a few images at a time: memory of a tile, not of the batch.

In: a function of some images. Out: its results for all of them. What the function makes on the way is
dropped, and made again tile by tile in the backward pass. Terms that read image patches work through this:
the patches of a batch are its largest tensor, so no normalised float32 copy of all of them is ever made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Function = Callable[..., tuple[Tensor, ...]]

CPU_TILE = 2**19
"""Patch values in one tile (five images of B-16); about five float32 copies live while it is worked on."""

CUDA_TILE = 2**23
"""A GPU wants few, large kernels."""


def imagewise(
    function: Function, images: Sequence[Tensor], shared: Sequence[Tensor] = (), size: int = 1
) -> tuple[Tensor, ...]:
    """`function(*images, *shared)`, `size` images at a time, keeping none of its intermediate tensors.

    function: returns tensors whose first axis is that of its images; an image's results depend on that
    image and on `shared` alone. Gradient reaches what the function is given, not what it closes over.
    images: tensors with one row for each image. shared: tensors that every image reads.
    Beside the gradients themselves, which are summed in place, the backward pass holds one tile.
    """
    outputs: tuple[Tensor, ...] = _Imagewise.apply(function, size, len(images), *images, *shared)
    return outputs


def images_at_a_time(patches_BPE: Tensor) -> int:
    """How many images `imagewise` takes at a time where it reads their patches."""
    values = CUDA_TILE if patches_BPE.is_cuda else CPU_TILE
    return max(1, values // patches_BPE[0].numel())


class _Imagewise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Function, size: int, count: int, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*given)
        ctx.function, ctx.size, ctx.count = function, size, count
        images, shared = given[:count], given[count:]
        tiles = [function(*tile, *shared) for tile in zip(*(x.split(size) for x in images), strict=True)]
        return tuple(torch.cat(parts) for parts in zip(*tiles, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given, count = ctx.saved_tensors, ctx.count
        wanted = ctx.needs_input_grad[3:]
        sums = [torch.zeros_like(x) if needed else None for x, needed in zip(given, wanted, strict=True)]
        shared = [_leaf(*pair) for pair in zip(given[count:], sums[count:], strict=True)]
        for start in range(0, len(given[0]), ctx.size):
            rows = slice(start, start + ctx.size)
            tile = [
                _leaf(x[rows], None if total is None else total[rows])
                for x, total in zip(given[:count], sums[:count], strict=True)
            ]
            with torch.enable_grad():
                outputs = ctx.function(*tile, *shared)
            pairs = [(x, grad[rows]) for x, grad in zip(outputs, grads, strict=True) if x.requires_grad]
            torch.autograd.backward([x for x, _ in pairs], [grad for _, grad in pairs])
        return (None, None, None, *sums)


def _leaf(x: Tensor, total: Tensor | None) -> Tensor:
    """`x` as the start of a graph of its own; the backward pass adds its gradient to `total` in place."""
    leaf = x.detach()
    if total is not None:
        leaf.requires_grad_().grad = total
    return leaf

"""A batch in chunks of images: what is encoded at a time, so that memory need not grow with the batch.

In: a `Batch`. Out: `Chunk`s that are views of it, and a way to encode them that keeps nothing for
the backward pass but its inputs. The embeddings of all chunks side by side give the loss of the whole batch,
and its one backward pass makes each chunk again in turn: the memory and the cost of GradCache (Gao et al.
2021, arXiv 2101.06983) with autograd's own gradients, so nothing else of a training loop need know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..types import Batch, UserError


class Chunk(NamedTuple):
    """What the towers read of some images of a batch."""

    pixels_BCHW: Tensor  # uint8
    tokens_T: Tensor  # int32
    lengths_BK: NDArray[np.int32]
    draws_B: NDArray[np.int64]
    stored_BF: Tensor | None = None  # what stands for the pixels, see `cached`


def chunks(batch: Batch, size: int | None, stored_BF: Tensor | None = None) -> Iterator[Chunk]:
    """`size` images at a time with their captions, in order; the last chunk may be smaller. None: all."""
    images, lengths_BK = len(batch.keys), batch.lengths_BK.numpy()
    draws_B = np.zeros(images, np.int64) if batch.draws_B is None else batch.draws_B.numpy()
    ends = [0, *lengths_BK.sum(1).cumsum().tolist()]
    for first in range(0, images, size or images):
        last = min(first + (size or images), images)
        tokens_T = batch.tokens_T[ends[first] : ends[last]]
        known_BF = None if stored_BF is None else stored_BF[first:last]
        yield Chunk(
            batch.pixels_BCHW[first:last], tokens_T, lengths_BK[first:last], draws_B[first:last], known_BF
        )


def in_backward_again(encode: Callable[..., Any], *args: Any) -> Any:
    """`encode(*args)`, keeping the arguments alone: the backward pass makes the rest again, dropout included.

    One of `args` must lie on the device that `encode` computes on, whose random state is then kept.
    """
    # A cached cast of a weight would be shared by all chunks, whose gradients would then add up in bfloat16.
    torch.clear_autocast_cache()
    return checkpoint(encode, *args, use_reentrant=False)


def check_chunkable(model: nn.Module, size: int | None) -> None:
    """Raise UserError where a model's parts would not compute the same in chunks."""
    if size is None:
        return
    if size < 1:
        raise UserError(f"micro_batch is {size}; it counts images: 1 or more, or null for all at once")
    norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    if norms:
        raise UserError(
            f"micro_batch={size} would let {len(norms)} batch norms ({norms[0]}, ...) take their statistics "
            "from each chunk, twice: freeze them (model.freeze.image=true model.freeze.image_bn_stats=true), "
            "choose a ViT, or leave micro_batch=null"
        )

"""LoRA (Hu et al. 2021, arXiv 2106.09685): matrices that stay as they are and learn a small difference.

In: a model of open_clip's. Out: the same in place, every matrix of its blocks' attention and MLPs now

    W' = W + alpha / r * B A,   A [r, in], B [out, r], B = 0 at first

of which A and B train. Embeddings, norms, biases and projections train as before; what is locked stays so.
By torch's parametrisations: `attn.in_proj_weight` goes on being the whole matrix, so that packed text,
open_clip's own forward and timm's need not know. Gradients and moments are kept for A and B alone; arithmetic
is not saved, since the gradient of W' is made on the way. `merge_matrices` gives open_clip's names back, by
which checkpoints are read and exported.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from open_clip.transformer import Attention
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..types import UserError

_ORIGINAL = ".original"


class Lora(NamedTuple):
    """How small: `rank` r, 0 for none; `alpha`, null for r, which makes the factor alpha / r one."""

    rank: int = 0
    alpha: float | None = None


class LowRank(nn.Module):
    """What is added to a matrix of `shape`; nothing at first."""

    factor: Tensor  # a buffer, so that a checkpoint can be merged without its config

    def __init__(self, matrix: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.down = nn.Parameter(matrix.new_empty(rank, matrix.shape[1]))
        self.up = nn.Parameter(matrix.new_zeros(matrix.shape[0], rank))
        self.register_buffer("factor", torch.tensor([alpha / rank]))
        nn.init.kaiming_uniform_(self.down, math.sqrt(5))

    def forward(self, matrix: Tensor) -> Tensor:
        # In bfloat16 a small difference would be lost in the sum.
        with torch.autocast(matrix.device.type, enabled=False):
            return matrix + self.factor * (self.up @ self.down)


def adapt(model: nn.Module, lora: Lora) -> None:
    """Let every matrix of the blocks that trains learn a difference of low rank instead, in place.

    Raises:
        UserError: an impossible rank, or nothing to adapt.
    """
    if lora.rank < 0:
        raise UserError(f"model.lora.rank is {lora.rank}; it must be 1 or more (8 is usual), or 0 for none")
    if not lora.rank:
        return
    places = [(module, name) for module, name in _matrices(model) if getattr(module, name).requires_grad]
    if not places:
        raise UserError(
            "model.lora.rank finds no matrix to adapt, all blocks being locked: lift model.freeze.image or "
            "model.freeze.text, or set model.lora.rank=0"
        )
    for module, name in places:
        matrix = getattr(module, name)
        low = LowRank(matrix, lora.rank, lora.rank if lora.alpha is None else lora.alpha)
        # Unchecked: a plan is made on the meta device, of which autocast knows nothing.
        parametrize.register_parametrization(module, name, low, unsafe=True)
        matrix.requires_grad_(False)


def _matrices(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(module, attribute) of linear layers in a tower's row of equal blocks, which have numbers for names."""
    for path, module in list(model.named_modules()):
        if not any(part.isdigit() for part in path.split(".")):
            continue
        if isinstance(module, nn.Linear):
            yield module, "weight"
        elif isinstance(module, nn.MultiheadAttention | Attention):
            yield module, "in_proj_weight"


def merge_matrices(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict whose adapted matrices are W' again, under open_clip's own names."""
    merged = dict(state)
    for name in [name for name in state if name.endswith(_ORIGINAL)]:
        prefix = name.removesuffix(_ORIGINAL)
        matrix, up, down, factor = (
            merged.pop(prefix + end) for end in (_ORIGINAL, ".0.up", ".0.down", ".0.factor")
        )
        merged[prefix.replace("parametrizations.", "")] = matrix + factor * (up @ down)
    return merged

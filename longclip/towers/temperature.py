"""TempScale: a text tower whose attention is sharper than trained, for texts longer than it was trained on.

In: a model of open_clip's. Out: the same in place, with weights that any library opens. Attention over more
tokens is flatter, which makes it a mean, so that long texts come to lie closer together than short ones
("length collapse"); a temperature below 1 holds against it (Zhou et al. 2024, arXiv 2410.24200):

    softmax(q . k / (tau sqrt(d)))   by   W_q / tau,  b_q / tau
"""

from __future__ import annotations

from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..types import UserError
from .positions import text_module


def scale_attention(model: nn.Module, temperature: float) -> None:
    """Divide what the softmax of every text block sees by `temperature`, in place; 1 changes nothing.

    Raises:
        UserError: no temperature, or blocks that are not open_clip's plain ones.
    """
    if not temperature > 0:
        raise UserError(
            f"attention_temperature is {temperature}; it must be above 0: 1 for none, 0.8 to sharpen"
        )
    if temperature == 1:
        return
    text: Any = text_module(model)
    blocks = text.transformer.resblocks
    if any(type(block) is not ResidualAttentionBlock for block in blocks):
        raise UserError(
            f"attention_temperature={temperature} divides queries, which blocks of type "
            f"{type(blocks[0]).__name__} normalise afterwards: leave it at 1 for this architecture"
        )
    with torch.no_grad():
        for block in blocks:
            width = block.attn.embed_dim
            _stored(block.attn)[:width] /= temperature
            block.attn.in_proj_bias[:width] /= temperature


def _stored(attn: Any) -> Tensor:
    """The matrix itself, without a difference that it learns (`lora`)."""
    adapted = parametrize.is_parametrized(attn, "in_proj_weight")
    return attn.parametrizations.in_proj_weight.original if adapted else attn.in_proj_weight

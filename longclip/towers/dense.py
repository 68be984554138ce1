"""Patch tokens for looking closely: what the last block of an image tower mixes into them is a choice.

In: a ViT of open_clip's, the name of an attention. Out: the same tower, whose patch tokens are other ones for
a while. CLIP's last block mixes patch tokens for the good of the class token, so that what lies at a
patch is no longer read there best; segmentation without training therefore puts another attention in its
place. A model whose training compares patches with texts needs none of this: `plain`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn import functional as F

from ..types import UserError
from .image import has_patches


def check_attention(visual: nn.Module, attention: str) -> None:
    """Raise UserError where this tower has no patch tokens, or none with this attention."""
    if attention not in ATTENTIONS:
        raise UserError(f"attention is one of {', '.join(ATTENTIONS)}; got {attention!r}")
    if not has_patches(visual):
        raise UserError(
            "segmentation compares image patches with class names, and the image tower of this model is a "
            f"{type(visual).__name__} without patch tokens in the joint space; take a ViT such as ViT-B-16"
        )
    block = _last_block(visual)
    if attention != "plain" and (type(block) is not ResidualAttentionBlock or not block.attn.batch_first):
        raise UserError(
            f"attention={attention} changes open_clip's usual block, and the last one of this model is a "
            f"{type(block).__name__}; take attention=plain"
        )


@contextmanager
def attending(visual: nn.Module, attention: str) -> Iterator[None]:
    """The last block with one of `ATTENTIONS`, for as long as this lasts.

    plain: its own, softmax(q k'): the tokens that patch terms train and heat maps show.
    value: every token keeps its own value (MaskCLIP, Zhou et al. 2022, arXiv 2112.01071).
    csa: softmax(q q') + softmax(k k') (SCLIP, Wang et al. 2023, arXiv 2312.01597).
    """
    check_attention(visual, attention)
    mix = ATTENTIONS[attention]
    if mix is None:
        yield
        return
    block = _last_block(visual)
    block.attention = partial(_mixed, block.attn, mix)  # hides the method of its class
    try:
        yield
    finally:
        del block.attention


def _last_block(visual: Any) -> Any:
    return visual.transformer.resblocks[-1]


def _mixed(attn: nn.MultiheadAttention, mix: _Mix, q_x: Tensor, **_: object) -> Tensor:
    """What `ResidualAttentionBlock.attention` returns, of tokens [B, T, D]."""
    qkv = F.linear(q_x, attn.in_proj_weight, attn.in_proj_bias).unflatten(-1, (3, attn.num_heads, -1))
    q_BHTd, k_BHTd, v_BHTd = qkv.permute(2, 0, 3, 1, 4)
    mixed_BTD: Tensor = attn.out_proj(mix(q_BHTd, k_BHTd, v_BHTd).transpose(1, 2).flatten(2))
    return mixed_BTD


def _value(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v


def _csa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, q, v) + F.scaled_dot_product_attention(k, k, v)


_Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
ATTENTIONS: dict[str, _Mix | None] = {"plain": None, "value": _value, "csa": _csa}

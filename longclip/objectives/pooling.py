"""Attention from captions to the patches of an image: FLAIR's text-conditioned pooling.

In: captions and patches in the joint space. Out: for each caption one vector of what it found.
Local legend: J captions that an image meets, H heads, d their width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, pad, scaled_dot_product_attention

from longclip.types import UserError


class Weights(NamedTuple):
    """What `pool` needs of a PoolingHead: two layer norms, two projections in, one out."""

    key_gain_E: Tensor
    key_shift_E: Tensor
    value_gain_E: Tensor
    value_shift_E: Tensor
    key_EE: Tensor
    key_E: Tensor
    value_EE: Tensor
    value_E: Tensor
    out_EE: Tensor
    out_E: Tensor


def pool(query_BJE: Tensor, patches_BPE: Tensor, weights: Weights, heads: int, empty: bool = True) -> Tensor:
    """What each caption finds among the patches of the image it meets, [B, J, E].

        k_p = W_k LN(p) + b_k;  v_p = W_v LN(p) + b_v;  k_0 = v_0 = 0
        v_h = sum_p softmax_p(q_h . k_hp / sqrt(d)) v_hp;  out = W_o concat(v_1 .. v_H) + b_o

    FLAIR, Xiao et al. 2025, section 3.2: one multi-head cross-attention without residual or MLP, with an
    empty slot (k_0, v_0) for the caption that finds nothing. query_BJE: `PoolingHead.queries`. empty: False
    leaves that slot out, where captions only meet images that they are about.
    """
    w, shape = weights, patches_BPE.shape[-1:]
    # In the precision that the patches come in, whatever autocast is around; casts are not cached, since
    # a cast made while nothing is recorded would be found again by the backward pass.
    half = patches_BPE.dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(patches_BPE.device.type, patches_BPE.dtype, enabled=half, cache_enabled=False):
        patches_BPE = patches_BPE if half else patches_BPE.to(query_BJE.dtype)
        key_BPE = linear(layer_norm(patches_BPE, shape, w.key_gain_E, w.key_shift_E), w.key_EE, w.key_E)
        value_BPE = linear(
            layer_norm(patches_BPE, shape, w.value_gain_E, w.value_shift_E), w.value_EE, w.value_E
        )
        slot = (0, 0, 0, int(empty))  # one more row below the patches
        query_BHJd, key_BHPd, value_BHPd = (
            x.unflatten(-1, (heads, -1)).transpose(1, 2)
            for x in (query_BJE, pad(key_BPE, slot), pad(value_BPE, slot))
        )
        found_BHJd = scaled_dot_product_attention(query_BHJd, key_BHPd, value_BHPd)
        return linear(found_BHJd.transpose(1, 2).flatten(2), w.out_EE, w.out_E)


class PoolingHead(nn.Module):
    """Parameters of FLAIR's text-conditioned pooling, initialised as torch initialises attention.

    empty: whether there is an empty slot; without it a softmax cannot tell that all keys are shifted.
    """

    def __init__(self, width: int, heads: int, empty: bool = True) -> None:
        super().__init__()
        self.query_norm, self.value_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.key_norm = nn.LayerNorm(width, bias=empty)
        self.attention = nn.MultiheadAttention(width, heads, add_zero_attn=empty, batch_first=True)

    def queries(self, text_XE: Tensor) -> Tensor:
        """W_q LN(t) + b_q of unit vectors t, brought to the length at which LN's epsilon does not count."""
        width = text_XE.shape[-1]
        weight_EE, shift_E = self.attention.in_proj_weight[:width], self.attention.in_proj_bias[:width]
        return linear(self.query_norm(text_XE * math.sqrt(width)), weight_EE, shift_E)

    def weights(self) -> Weights:
        """All the others."""
        _, key_EE, value_EE = self.attention.in_proj_weight.chunk(3)
        _, key_E, value_E = self.attention.in_proj_bias.chunk(3)
        key, value, out = self.key_norm, self.value_norm, self.attention.out_proj
        key_shift_E = torch.zeros_like(key.weight) if key.bias is None else key.bias
        norms = (key.weight, key_shift_E, value.weight, value.bias)
        return Weights(*norms, key_EE, key_E, value_EE, value_E, out.weight, out.bias)


def check_heads(heads: int, width: int) -> None:
    """Raise UserError where the heads of a term's attention do not divide the width."""
    if heads < 1 or width % heads:
        raise UserError(
            f"the attention of this term has {heads} heads, which do not divide the {width} values of this "
            "model's embeddings; set the term's heads to a divisor of that, such as 8"
        )

"""Causal attention over packed captions: one interface, one dense oracle, fast paths behind it.

In: queries, keys and values of all captions end to end, [T, heads, head width], and a `Layout` that
says where each caption begins and ends. Out: the attended values, [T, heads, head width]. A token
sees itself and the tokens before it in its own caption, and nothing of any other caption.

`Layout` is made once per batch and shared by all blocks. Which path runs is a fact of the device:
FlashAttention's variable-length kernel on CUDA in half precision, length buckets elsewhere.
"""

from __future__ import annotations

import inspect
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

BUCKET_SLACK = 0.75
"""A bucket takes captions of at least this share of its longest one: below 8 % of the tower's work is
attention, so a quarter of padding inside it costs less than another kernel launch."""


class Layout:
    """Where each of S captions lies in the flat row of T tokens.

    Args:
        lengths_S: tokens of each caption, start and end token included, all positive.
        longest: the largest of them, known on the host.
    """

    def __init__(self, lengths_S: Tensor, longest: int) -> None:
        self.lengths_S = lengths_S
        self.longest = longest
        self.cumulative = F.pad(lengths_S.cumsum(0), (1, 0)).to(torch.int32)

    @cached_property
    def ends_S(self) -> Tensor:
        """The flat index of every caption's end token."""
        return (self.cumulative[1:] - 1).long()

    @cached_property
    def positions_T(self) -> Tensor:
        """Every token's place within its own caption, from 0."""
        starts_S = self.cumulative[:-1].long()
        total = int(self.cumulative[-1])
        starts_T = torch.repeat_interleave(starts_S, self.lengths_S.long(), output_size=total)
        return torch.arange(total, device=starts_T.device) - starts_T

    @cached_property
    def captions_T(self) -> Tensor:
        """Which caption every token belongs to."""
        index_S = torch.arange(len(self.lengths_S), device=self.lengths_S.device)
        return torch.repeat_interleave(index_S, self.lengths_S.long())

    @cached_property
    def buckets(self) -> Buckets:
        return Buckets(self)


class Buckets:
    """Captions of similar length, laid out as padded rectangles for the attention alone.

    `rows[i]` are flat token indices [n, length], padded at the end with the caption's last token:
    under a causal mask nothing real looks there. `captions[i]` names the captions of bucket i,
    `back_T` and `back_S` bring the concatenated results into flat and into caption order.
    """

    def __init__(self, layout: Layout) -> None:
        lengths = layout.lengths_S.cpu().numpy().astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        order = np.argsort(-lengths, kind="stable")
        device = layout.lengths_S.device
        self.rows: list[Tensor] = []
        self.valid: list[Tensor] = []
        back = np.empty(int(lengths.sum()), dtype=np.int64)
        offset = 0
        groups = _groups(lengths, order)
        for members in groups:
            place = np.arange(lengths[members[0]])
            valid = place[None, :] < lengths[members, None]
            row = starts[members, None] + np.minimum(place[None, :], lengths[members, None] - 1)
            back[row[valid]] = offset + np.flatnonzero(valid)
            offset += row.size
            self.rows.append(torch.from_numpy(row).to(device))
            self.valid.append(torch.from_numpy(valid).to(device))
        self.captions = [torch.from_numpy(members).to(device) for members in groups]
        self.back_T = torch.from_numpy(back).to(device)
        self.back_S = torch.from_numpy(np.argsort(order, kind="stable")).to(device)


def _groups(lengths: np.ndarray, order: np.ndarray) -> list[np.ndarray]:
    """Split captions, given longest first, where the next is much shorter than the group's longest."""
    groups, first = [], 0
    for i in range(1, len(order) + 1):
        if i == len(order) or lengths[order[i]] < BUCKET_SLACK * lengths[order[first]]:
            groups.append(order[first:i])
            first = i
    return groups


def packed_attention(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, layout: Layout) -> Tensor:
    """Causal attention inside every caption, [T, heads, head width]."""
    if _use_varlen(q_THD):
        cumulative = layout.cumulative
        return _varlen(q_THD, k_THD, v_THD, cumulative, cumulative, layout.longest, layout.longest, True)
    buckets = layout.buckets
    outs = []
    for rows in buckets.rows:
        q, k, v = (_rectangle(x, rows) for x in (q_THD, k_THD, v_THD))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs).index_select(0, buckets.back_T)


def end_attention(q_SHD: Tensor, k_THD: Tensor, v_THD: Tensor, layout: Layout) -> Tensor:
    """The same for the end tokens alone, [S, heads, head width]: an end token sees its whole caption."""
    if _use_varlen(q_SHD):
        one_each = torch.arange(len(q_SHD) + 1, dtype=torch.int32, device=q_SHD.device)
        return _varlen(q_SHD, k_THD, v_THD, one_each, layout.cumulative, 1, layout.longest, False)
    buckets = layout.buckets
    outs = []
    for rows, valid, captions in zip(buckets.rows, buckets.valid, buckets.captions, strict=True):
        q = q_SHD.index_select(0, captions)[:, :, None]
        k, v = _rectangle(k_THD, rows), _rectangle(v_THD, rows)
        outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None])[:, :, 0])
    return torch.cat(outs).index_select(0, buckets.back_S)


def dense_attention(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, layout: Layout) -> Tensor:
    """The oracle: one T x T block-diagonal causal mask. Quadratic in T; for tests."""
    caption_T, place_T = layout.captions_T, layout.positions_T
    same_TT = caption_T[:, None] == caption_T[None, :]
    mask_TT = same_TT & (place_T[None, :] <= place_T[:, None])
    q, k, v = (x.transpose(0, 1) for x in (q_THD, k_THD, v_THD))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TT).transpose(0, 1)


def _rectangle(x_THD: Tensor, rows: Tensor) -> Tensor:
    """Flat tokens -> [n, heads, length, head width]."""
    # index_select, not indexing: its backward is index_add, several times faster on the CPU.
    return x_THD.index_select(0, rows.flatten()).unflatten(0, rows.shape).transpose(1, 2)


def _use_varlen(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and _varlen_kernel() is not None


@lru_cache
def _varlen_kernel() -> tuple[Any, bool] | None:
    """torch's variable-length attention, and whether it spells causality `is_causal` (2.10, 2.11)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn, "is_causal" in inspect.signature(varlen_attn).parameters


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool
) -> Tensor:
    kernel = _varlen_kernel()
    assert kernel is not None
    attend, takes_flag = kernel
    how = {"is_causal": causal} if takes_flag else {"window_size": (-1, 0) if causal else (-1, -1)}
    return attend(q, k, v, cu_q, cu_k, max_q, max_k, **how)

"""Causal attention over packed captions: one interface, one dense oracle, fast paths behind it.

In: queries, keys and values of all captions end to end, [T, heads, head width], and a `Layout` that
says where each caption begins and ends. Out: the attended values, [T, heads, head width]. A token
sees itself and the tokens before it in its own caption, and nothing of any other caption.

`Layout` is made once per batch and shared by all blocks. Where positions are rotary it turns queries and keys
before they meet. Which path runs is a fact of the device:
FlashAttention's variable-length kernel on CUDA in half precision, length buckets elsewhere.
"""

from __future__ import annotations

import inspect
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .rotary import Turns

BUCKET_SLACK = 0.9
"""A bucket takes captions of at least this share of its longest one. Measured on a CPU with 8 to 64 images of
eight short captions and a long one: smaller shares pad more, larger ones make more calls."""


class Layout:
    """Where each of S captions lies in the flat row of T tokens. Asks nothing of the device.

    Args:
        lengths_S: tokens of each caption, start and end token included, all positive; on the host.
        device: where the tokens are.
        frequencies_F: of rotary positions (`rotary.frequencies`); None: attention knows no positions.
    """

    def __init__(
        self, lengths_S: NDArray[np.int32], device: torch.device, frequencies_F: Tensor | None = None
    ) -> None:
        self.host_S, self.longest, total = lengths_S, int(lengths_S.max()), int(lengths_S.sum())
        self.lengths_S = torch.from_numpy(lengths_S).to(device, non_blocking=True)
        self.cumulative = F.pad(self.lengths_S.cumsum(0), (1, 0)).to(torch.int32)
        self.captions_T = torch.repeat_interleave(self.lengths_S.long(), output_size=total)
        starts_T = self.cumulative.index_select(0, self.captions_T)
        self.positions_T = torch.arange(total, device=starts_T.device) - starts_T
        self.ends_S = (self.cumulative[1:] - 1).long()
        self.frequencies_F = frequencies_F
        self.turns = None if frequencies_F is None else Turns.at(self.positions_T, frequencies_F)

    @cached_property
    def buckets(self) -> Buckets:
        return Buckets(self.host_S.astype(np.int64), self.lengths_S.device)


class Buckets:
    """Captions of similar length, laid out as padded rectangles for the attention alone.

    Attributes:
        shapes: of each rectangle, captions x tokens.
        rows_P: the flat index of every place of all rectangles, end to end. A short caption's row is filled
            with its last token: under a causal mask nothing real looks there.
        places_T: the other way round, where in the rectangles every token lies.
        own_P: which places are not filling.
        captions_S: the captions in the order of the rectangles' rows.
    """

    def __init__(self, lengths_S: np.ndarray, device: torch.device) -> None:
        starts_S = np.cumsum(lengths_S) - lengths_S
        order = np.argsort(-lengths_S, kind="stable")
        groups = _groups(lengths_S, order)
        self.shapes = [(len(members), int(lengths_S[members[0]])) for members in groups]
        rows, own = [], []
        for members, (_, longest) in zip(groups, self.shapes, strict=True):
            place, length_N1 = np.arange(longest), lengths_S[members, None]
            rows.append((starts_S[members, None] + np.minimum(place, length_N1 - 1)).ravel())
            own.append((place < length_N1).ravel())
        rows_P, own_P = np.concatenate(rows), np.concatenate(own)
        places_T = np.empty(lengths_S.sum(), np.int64)
        places_T[rows_P[own_P]] = np.flatnonzero(own_P)
        self.rows_P, self.own_P, self.places_T, self.captions_S = (
            torch.from_numpy(array).to(device) for array in (rows_P, own_P, places_T, order)
        )

    def split(self, x_P: Tensor) -> list[Tensor]:
        """Every rectangle's share of something that has a row for every place: [captions, tokens, ...]."""
        parts = x_P.split([captions * tokens for captions, tokens in self.shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes, strict=True)]


def _groups(lengths: np.ndarray, order: np.ndarray) -> list[np.ndarray]:
    """Split captions, given longest first, where the next is much shorter than the group's longest."""
    groups, first = [], 0
    for i in range(1, len(order) + 1):
        if i == len(order) or lengths[order[i]] < BUCKET_SLACK * lengths[order[first]]:
            groups.append(order[first:i])
            first = i
    return groups


def packed_attention(qkv_T3HD: Tensor, layout: Layout) -> Tensor:
    """Causal attention inside every caption: queries, keys and values [T, 3, heads, head width] to
    [T, heads, head width]."""
    qkv_T3HD = _turned(qkv_T3HD, layout)
    if _use_varlen(qkv_T3HD):
        q, k, v = qkv_T3HD.unbind(1)
        cumulative = layout.cumulative
        return _varlen(q, k, v, cumulative, cumulative, layout.longest, layout.longest, True)
    return _bucketed(qkv_T3HD, layout)


def end_attention(q_SHD: Tensor, kv_T2HD: Tensor, layout: Layout) -> Tensor:
    """The same for the end tokens alone, [S, heads, head width]: an end token sees its whole caption."""
    if layout.turns is not None:
        q_SHD = layout.turns.rows(layout.ends_S)(q_SHD[:, None])[:, 0]
    kv_T2HD = _turned(kv_T2HD, layout)
    if _use_varlen(q_SHD):
        k, v = kv_T2HD.unbind(1)
        one_each = torch.arange(len(q_SHD) + 1, dtype=torch.int32, device=q_SHD.device)
        return _varlen(q_SHD, k, v, one_each, layout.cumulative, 1, layout.longest, False)
    return _bucketed_ends(q_SHD, kv_T2HD, layout)


def dense_attention(qkv_T3HD: Tensor, layout: Layout) -> Tensor:
    """The oracle: one T x T block-diagonal causal mask. Quadratic in T; for tests."""
    caption_T, place_T = layout.captions_T, layout.positions_T
    same_TT = caption_T[:, None] == caption_T[None, :]
    mask_TT = same_TT & (place_T[None, :] <= place_T[:, None])
    q, k, v = _turned(qkv_T3HD, layout).permute(1, 2, 0, 3)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TT).transpose(0, 1)


def _turned(x_TNHD: Tensor, layout: Layout) -> Tensor:
    """All but the values, which come last, turned as their positions say."""
    if layout.turns is None:
        return x_TNHD
    return torch.cat([layout.turns(x_TNHD[:, :-1]), x_TNHD[:, -1:]], 1)


# No batch has the buckets of the one before it, so a compiled graph would be made anew for each; left out of
# it, one graph of what stands around serves every batch and every block.
@torch.compiler.disable
def _bucketed(qkv_T3HD: Tensor, layout: Layout) -> Tensor:
    buckets, mixed = layout.buckets, []
    for part in buckets.split(_Spread.apply(qkv_T3HD, buckets.rows_P, buckets.places_T)):
        q, k, v = part.permute(2, 0, 3, 1, 4)  # each [captions, heads, tokens, head width]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed.append(out.transpose(1, 2).flatten(0, 1))
    return _Collect.apply(torch.cat(mixed), buckets.places_T)


@torch.compiler.disable
def _bucketed_ends(q_SHD: Tensor, kv_T2HD: Tensor, layout: Layout) -> Tensor:
    buckets = layout.buckets
    queries = q_SHD.index_select(0, buckets.captions_S)[:, :, None]
    parts = zip(
        queries.split([captions for captions, _ in buckets.shapes]),
        buckets.split(_Spread.apply(kv_T2HD, buckets.rows_P, buckets.places_T)),
        buckets.split(buckets.own_P),
        strict=True,
    )
    mixed = []
    for q, kv, own in parts:
        k, v = kv.permute(2, 0, 3, 1, 4)
        mixed.append(F.scaled_dot_product_attention(q, k, v, attn_mask=own[:, None, None])[:, :, 0])
    return torch.empty_like(q_SHD).index_copy(0, buckets.captions_S, torch.cat(mixed))


class _Spread(torch.autograd.Function):
    """Tokens into rectangles. What fills a rectangle has no gradient, so that the backward pass need only
    pick what is not filling, where autograd would add everything up."""

    @staticmethod
    def forward(ctx: Any, x_T: Tensor, rows_P: Tensor, places_T: Tensor) -> Tensor:
        ctx.save_for_backward(places_T)
        return x_T.index_select(0, rows_P)

    @staticmethod
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor, None, None]:
        return grad_P.index_select(0, ctx.saved_tensors[0]), None, None


class _Collect(torch.autograd.Function):
    """Rectangles back into tokens."""

    @staticmethod
    def forward(ctx: Any, x_P: Tensor, places_T: Tensor) -> Tensor:
        ctx.save_for_backward(places_T)
        ctx.places = len(x_P)
        return x_P.index_select(0, places_T)

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None]:
        grad_P = grad_T.new_zeros(ctx.places, *grad_T.shape[1:])
        return grad_P.index_copy_(0, ctx.saved_tensors[0], grad_T), None


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

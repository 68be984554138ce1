"""Corner tokens: further summaries of a caption, at which none of its tokens looks.

In: packed tokens and M learned vectors. Out: what all tokens and the corners of every caption say, in the
joint space. LoTLIP (Wu et al. 2024, arXiv 2410.05249) puts corners beside [CLS] of a bidirectional tower; in
a causal one they stand behind the end token, which is its [CLS]. A corner sees its whole caption and itself;
no token and no other corner sees it, so that captions have the features that they have without.

Local legend: M corners of a caption, X = T + M * S rows: all tokens, the first corner of every caption, ...
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..tokens import Tokenizer
from ..types import UserError
from .attention import Layout, end_attention, packed_attention
from .positions import text_module
from .text import embedded, projected, through

NEAR = 0.02
"""The spread of open_clip's token embeddings at the start."""


def first_corners(model: Any, tokenizer: Tokenizer, count: int) -> Tensor:
    """Where corners begin, [M, D]: as the end token, which knows how to sum up, and a little apart.

    Raises:
        UserError: a count that makes no sense.
    """
    if count < 1:
        raise UserError(f"model.corners is {count}; it counts features of a caption, 1 or more (LoTLIP: 2)")
    text: Any = text_module(model)
    end_D = text.token_embedding.weight[tokenizer.suffix[-1]].detach()
    return end_D + NEAR * torch.randn(count, len(end_D), device=end_D.device)


class Cornered(NamedTuple):
    """Where captions lie, and where they would with one corner each behind them."""

    alone: Layout
    longer: Layout
    rows: Tensor  # of the longer captions: a row of the tokens, or T + s for the corner of caption s


def cornered(layout: Layout) -> Cornered:
    """The layout of the same captions with room for a corner."""
    longer = Layout(layout.host_S + 1, layout.lengths_S.device, layout.frequencies_F)
    place = torch.arange(len(longer.captions_T), device=longer.captions_T.device)
    rows = place - longer.captions_T  # each caption before has one row more there
    corner_S = len(layout.captions_T) + torch.arange(len(layout.host_S), device=rows.device)
    return Cornered(layout, longer, rows.index_copy(0, longer.ends_S, corner_S))


def encode_corners(
    model: Any, tokens_T: Tensor, corners_MD: Tensor, places: Cornered
) -> tuple[Tensor, Tensor]:
    """Flat tokens -> (words_TE as `text.encode_words` gives them, corners_SME), neither normalised."""
    text: Any = text_module(model)
    tokens, captions = len(tokens_T), len(places.alone.host_S)
    x_TD = embedded(text, tokens_T, places.alone)
    x_XD = torch.cat([x_TD, corners_MD.to(x_TD.dtype).repeat_interleave(captions, 0)])
    for block in text.transformer.resblocks:
        if text.transformer.grad_checkpointing and torch.is_grad_enabled():
            x_XD = checkpoint(through, block, x_XD, places, _attend, use_reentrant=False)
        else:
            x_XD = through(block, x_XD, places, _attend)
    words_TE, corners_YE = projected(text, text.ln_final(x_XD)).tensor_split([tokens])
    return words_TE, corners_YE.unflatten(0, (-1, captions)).transpose(0, 1)


def _attend(qkv_X3HD: Tensor, places: Cornered) -> Tensor:
    """Tokens among themselves; each corner to its caption and to itself."""
    tokens, captions = len(places.alone.captions_T), len(places.alone.host_S)
    qkv_T3HD, *corners = qkv_X3HD.split([tokens, *[captions] * ((len(qkv_X3HD) - tokens) // captions)])
    mixed = [packed_attention(qkv_T3HD.contiguous(), places.alone)]
    for corner_S3HD in corners:
        kv_2HD = torch.cat([qkv_T3HD[:, 1:], corner_S3HD[:, 1:]]).index_select(0, places.rows)
        mixed.append(end_attention(corner_S3HD[:, 0], kv_2HD, places.longer))
    return torch.cat(mixed)

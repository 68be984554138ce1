"""The text tower on packed tokens, over open_clip's own parameters and names.

In: tokens of all captions end to end (`tokens_T`) and a `Layout`. Out: `text_SE`, one projected
feature per caption, not normalised. Nothing is copied or renamed: the functions read the modules of
an open_clip `CLIP` or `CustomTextCLIP`, so its state dict, its locks and its own forward stay as they are.

Packing is exact for a causal tower that pools at the end token: no token sees what comes after it, so
padding behind the end token never mattered. `why_padded` names the reason where that does not hold;
such a tower runs padded, through open_clip's own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.model import CustomTextCLIP
from open_clip.transformer import ResidualAttentionBlock, TextTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from ..tokens import unpack
from .attention import Layout, end_attention, packed_attention
from .positions import text_module
from .rotary import frequencies


def why_padded(model: Any) -> str | None:
    """Why this text tower cannot run packed; None if it can."""
    # A frozen position head makes a parametrized subclass of the very same tower.
    if isinstance(model, CustomTextCLIP):
        kind = parametrize.type_before_parametrizations(model.text)
        if kind is not TextTransformer:
            return f"its text tower is a {kind.__name__}"
    text: Any = text_module(model)
    if text.attn_mask is None:
        return "its text attention is bidirectional"
    if isinstance(text, TextTransformer) and (text.cls_emb is not None or text.use_pad_mask):
        return "it appends a class token or masks padding"
    pool = text.pool_type if isinstance(text, TextTransformer) else text.text_pool_type
    if pool not in ("argmax", "eos"):
        return f"it pools its text by {pool!r}, not at the end token"
    blocks = text.transformer.resblocks
    if any(type(block) is not ResidualAttentionBlock for block in blocks):
        return f"its text blocks are {type(blocks[0]).__name__}"
    return None


def laid_out(model: Any, lengths_S: NDArray[np.int32], device: torch.device) -> Layout:
    """Where captions lie, and how this tower turns them."""
    return Layout(lengths_S, device, frequencies(model))


def encode_packed(model: Any, tokens_T: Tensor, layout: Layout) -> Tensor:
    """Flat tokens -> text_SE. The last block computes its MLP for the end tokens only."""
    x_TD = _all_but_last(model, tokens_T, layout)
    text: Any = text_module(model)
    return projected(text, text.ln_final(_last_block(text.transformer.resblocks[-1], x_TD, layout)))


def encode_words(model: Any, tokens_T: Tensor, layout: Layout) -> Tensor:
    """Flat tokens -> words_TE: every token as `encode_packed` gives the end tokens."""
    x_TD = _all_but_last(model, tokens_T, layout)
    text: Any = text_module(model)
    return projected(text, text.ln_final(through(text.transformer.resblocks[-1], x_TD, layout)))


def projected(text: Any, x_XD: Tensor) -> Tensor:
    """From the tower's width into the joint space."""
    projection = text.text_projection
    if projection is None:
        return x_XD
    return projection(x_XD) if isinstance(projection, nn.Linear) else x_XD @ projection


def embedded(text: Any, tokens_T: Tensor, layout: Layout) -> Tensor:
    """Tokens with their positions, before the first block."""
    x_TD = F.embedding(tokens_T, text.token_embedding.weight)
    return x_TD + text.positional_embedding.index_select(0, layout.positions_T)


def _all_but_last(model: Any, tokens_T: Tensor, layout: Layout) -> Tensor:
    text: Any = text_module(model)
    x_TD = embedded(text, tokens_T, layout)
    for block in text.transformer.resblocks[:-1]:
        if text.transformer.grad_checkpointing and torch.is_grad_enabled():
            x_TD = checkpoint(through, block, x_TD, layout, use_reentrant=False)
        else:
            x_TD = through(block, x_TD, layout)
    return x_TD


def encode_padded(
    model: Any, tokens_T: Tensor, lengths_S: NDArray[np.int32], context: int, pad_id: int
) -> Tensor:
    """The same through open_clip's own forward on captions padded to the context length."""
    return model.encode_text(unpack(tokens_T, lengths_S, context, pad_id))


def through(
    block: Any, x_TD: Tensor, layout: Any, attend: Callable[..., Tensor] = packed_attention
) -> Tensor:
    """A block on rows that look at each other as `attend(qkv_T3HD, layout)` lets them."""
    attn = block.attn
    qkv = F.linear(block.ln_1(x_TD), attn.in_proj_weight, attn.in_proj_bias)
    mixed = attn.out_proj(attend(qkv.unflatten(1, (3, attn.num_heads, -1)), layout).flatten(1))
    x_TD = x_TD + block.ls_1(mixed)
    return x_TD + block.ls_2(block.mlp(block.ln_2(x_TD)))


def _last_block(block: Any, x_TD: Tensor, layout: Layout) -> Tensor:
    """As `through`, but only the end tokens ask: the others would not be read."""
    attn, width = block.attn, x_TD.shape[-1]
    weight, bias = attn.in_proj_weight, attn.in_proj_bias
    normed_TD = block.ln_1(x_TD)
    end_SD, normed_end_SD = x_TD.index_select(0, layout.ends_S), normed_TD.index_select(0, layout.ends_S)
    q = F.linear(normed_end_SD, weight[:width], bias[:width])
    kv = F.linear(normed_TD, weight[width:], bias[width:])
    q, kv = q.unflatten(1, (attn.num_heads, -1)), kv.unflatten(1, (2, attn.num_heads, -1))
    mixed = attn.out_proj(end_attention(q, kv, layout).flatten(1))
    end_SD = end_SD + block.ls_1(mixed)
    return end_SD + block.ls_2(block.mlp(block.ln_2(end_SD)))

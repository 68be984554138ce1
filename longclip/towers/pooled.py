"""The last block of an image tower for its class token alone, where nothing else of it is read.

In: open_clip's `VisionTransformer`, changed in place. Out: the same image features and gradients. Only the
class token of the last block is pooled, so the other tokens need but their keys and values there: with 12
blocks a fifteenth of the tower's work is saved. The text tower does the same for its end tokens (`text`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock, Transformer, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def pool_alone(visual: nn.Module) -> None:
    """Let a ViT's last block work for its class token, unless patch tokens are asked for (`output_tokens`).

    In place; a tower that pools otherwise stays as it is. Only the walk through the blocks is replaced, so
    that whatever wraps the tower's forward goes on working. The last block's own forward is no longer called.
    """
    if (
        isinstance(visual, VisionTransformer)
        and visual.attn_pool is None
        and visual.pool_type == "tok"
        and visual.transformer.batch_first
        and type(visual.transformer.resblocks[-1]) is ResidualAttentionBlock
    ):
        visual.transformer.forward = partial(_blocks, visual)


def _blocks(visual: Any, x_BPD: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """The output of the last block: the class token's, [B, 1, D], or that of all tokens."""
    transformer = visual.transformer
    if visual.output_tokens or attn_mask is not None:
        whole_BPD: Tensor = Transformer.forward(transformer, x_BPD, attn_mask)
        return whole_BPD
    *blocks, last = transformer.resblocks
    for block in (*blocks, partial(_class_token, last)):
        if transformer.grad_checkpointing and torch.is_grad_enabled():
            x_BPD = checkpoint(block, x_BPD, use_reentrant=False)
        else:
            x_BPD = block(x_BPD)
    return x_BPD


def _class_token(block: Any, x_BPD: Tensor) -> Tensor:
    """As the block's forward, but only the class token asks: [B, P, D] -> [B, 1, D]."""
    normed_BPD = block.ln_1(x_BPD)
    x_B1D = x_BPD[:, :1] + block.ls_1(block.attention(normed_BPD[:, :1], normed_BPD, normed_BPD))
    pooled_B1D: Tensor = x_B1D + block.ls_2(block.mlp(block.ln_2(x_B1D)))
    return pooled_B1D

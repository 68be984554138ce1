"""The towers as their weights came: frozen, at the context length that those were trained with.

In: a `DualTower` that has not trained yet. Out: a copy that never will, and what it reads of a batch. Its
text positions and attention are those of the weights, whatever became of them, its captions end where its
context does: it answers as the published model would.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..tokens import Tokenizer
from .chunks import Chunk
from .positions import text_module
from .rotary import Published, set_theta
from .temperature import scale_attention

if TYPE_CHECKING:
    from .clip import DualTower

_TABLE = "positional_embedding"


def frozen(tower: DualTower, published: Published | None) -> DualTower:
    """A copy with the weights of this moment, read as they were published; None: as they are."""
    copied = copy.deepcopy(tower).requires_grad_(False).eval()
    copied.backbone.set_grad_checkpointing(False)
    if published is not None:
        text = text_module(copied.backbone)
        _replace_positions(text, published.table_LD)
        set_theta(text, published.theta)
        scale_attention(copied.backbone, 1 / published.temperature)
        copied.tokenizer.context_length = len(published.table_LD)
    return copied


def _replace_positions(text: Any, table_LD: Tensor) -> None:
    length, table_LD = len(table_LD), table_LD.to(text.positional_embedding, copy=True)
    if parametrize.is_parametrized(text, _TABLE):  # and stays so: its class is that of the tower that trains
        split = text.parametrizations[_TABLE]
        keep = len(split.original0)
        split.original0, split.original1 = _still(table_LD[:keep]), _still(table_LD[keep:])
    else:
        text.positional_embedding = _still(table_LD)
    if text.attn_mask is not None:
        text.attn_mask = text.attn_mask[:length, :length]


def _still(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)


def cut(part: Chunk, tokenizer: Tokenizer, read_K: NDArray[np.bool_] | None = None) -> Chunk:
    """What a tower with the context of `tokenizer` reads: longer captions are cut before their end token.

    Of slots where `read_K` is False it reads no captions.
    """
    long_BK = part.lengths_BK.astype(np.int64)
    short_BK = long_BK.clip(max=tokenizer.context_length)
    if read_K is not None:
        short_BK *= read_K
    long_X, short_X = long_BK.ravel(), short_BK.ravel()
    if (short_X == long_X).all():
        return part
    place_T = np.arange(short_X.sum()) - np.repeat(short_X.cumsum() - short_X, short_X)
    ending_T = place_T >= np.repeat(short_X, short_X) - len(tokenizer.suffix)
    place_T += np.repeat(long_X - short_X, short_X) * ending_T
    source_T = torch.from_numpy(np.repeat(long_X.cumsum() - long_X, short_X) + place_T)
    tokens_T = part.tokens_T.index_select(0, source_T.to(part.tokens_T.device, non_blocking=True))
    return part._replace(tokens_T=tokens_T, lengths_BK=short_BK.astype(np.int32))

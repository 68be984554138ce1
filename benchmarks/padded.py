"""open_clip's way with captions: a table padded to one length, through its own modules.

In: how long captions are. Out: the same captions flat (ours) and padded (theirs), and open_clip's text tower
on either layout: everything at the full context, or sub-captions at 77 tokens and long ones at the context.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from open_clip.model import CLIP
from torch import Tensor

from longclip.towers import configs

from .lengths import LONG, SHORT

START, END = 49406, 49407


class Captions(NamedTuple):
    """The captions of B images, K sub-captions and then a long one each, in every layout."""

    lengths_BK: Tensor  # int32; 0 where an image has no such caption
    tokens_T: Tensor  # int32, as `longclip.types.Batch` has them
    padded_SL: Tensor  # all that exist, LONG tokens each
    short_SL: Tensor  # the sub-captions, SHORT tokens each
    long_BL: Tensor  # the long ones, LONG tokens each
    order_S: Tensor  # where each caption stands in short_SL and long_BL together

    @property
    def longest(self) -> int:
        return int(self.lengths_BK.max())


def captions(lengths_BK: np.ndarray, short: int = SHORT, long: int = LONG) -> Captions:
    """Random words, captions so long."""
    rng = np.random.default_rng(0)
    kept = [[_words(rng, int(length)) for length in row if length] for row in lengths_BK]
    flat = [ids for row in kept for ids in row]
    is_long = np.array([place == len(row) - 1 for row in kept for place in range(len(row))])
    return Captions(
        torch.from_numpy(lengths_BK.astype(np.int32)),
        torch.from_numpy(np.concatenate(flat).astype(np.int32)),
        _table(flat, long),
        _table([ids for row in kept for ids in row[:-1]], short),
        _table([row[-1] for row in kept], long),
        torch.from_numpy(np.argsort(np.argsort(is_long, kind="stable"))),
    )


def config(name: str, layers: int | None = None, context: int = LONG) -> dict[str, Any]:
    """Of an architecture, for long captions; with so many layers in both towers, if given."""
    found = configs.named(name)
    found["text_cfg"]["context_length"] = context
    if layers:
        found["text_cfg"]["layers"] = found["vision_cfg"]["layers"] = layers
    return found


def model(name: str, layers: int | None = None, context: int = LONG) -> CLIP:
    torch.manual_seed(0)
    return CLIP(**config(name, layers, context))


def at_full_context(model: Any, captions: Captions) -> Tensor:
    """open_clip's `encode_text`: text_SE, not normalised."""
    features: Tensor = model.encode_text(captions.padded_SL)
    return features


def at_two_lengths(model: Any, captions: Captions) -> Tensor:
    """Sub-captions at 77 tokens, long ones at the context."""
    short = captions.short_SL
    # As encode_text, which refuses a table narrower than the context.
    x_SLD = model.token_embedding(short) + model.positional_embedding[: short.shape[1]]
    x_SLD = model.transformer(x_SLD, attn_mask=model.attn_mask[: short.shape[1], : short.shape[1]])
    end_SD = model.ln_final(x_SLD)[torch.arange(len(short)), short.argmax(1)]
    both = torch.cat([end_SD @ model.text_projection, model.encode_text(captions.long_BL)])
    return both.index_select(0, captions.order_S)


def _words(rng: np.random.Generator, length: int) -> np.ndarray:
    return np.concatenate([[START], rng.integers(1, START, length - 2), [END]])


def _table(captions: list[np.ndarray], length: int) -> Tensor:
    table = np.zeros((len(captions), length), np.int64)
    for row, ids in zip(table, captions, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(table)

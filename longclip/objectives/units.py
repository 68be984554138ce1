"""Captions of one or several groups side by side, and how much each of them counts.

In: `Embeddings` and the names of groups. Out: their texts as slots, and weights.
Local legend: k slots of all the groups together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longclip.types import Embeddings, UserError


class Units(NamedTuple):
    """Caption slots of several groups, in their order; slot by slot from the same source for every image."""

    text_BkE: Tensor
    mask_Gk: Tensor  # of all processes
    weights_Bk: Tensor  # `Text.weight`; 0 where there is no caption


def names(texts: str | Sequence[str]) -> tuple[str, ...]:
    """One caption group or several; raises UserError for none."""
    groups = (texts,) if isinstance(texts, str) else tuple(texts)
    if not groups:
        raise UserError("the term reads no caption group; name one or several: texts=[GROUP, ...]")
    return groups


def units(embeddings: Embeddings, groups: Sequence[str]) -> Units:
    """The captions of these groups."""
    return Units(
        torch.cat([embeddings.text(group).float() for group in groups], 1),
        torch.cat([embeddings.all_mask(group) for group in groups], 1),
        torch.cat([embeddings.weights(group).float() for group in groups], 1),
    )


def relative_weights(embeddings: Embeddings, group: str) -> Tensor:
    """Weights of this process's captions, over their mean in the global batch; 0 where all are 0."""
    weights_BK = embeddings.weights(group).float()
    total, captions = embeddings.gather(weights_BK).sum(), embeddings.all_mask(group).sum()
    return weights_BK * captions / total.clamp_min(torch.finfo(total.dtype).tiny)

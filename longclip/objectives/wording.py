"""The words of captions as rectangles: what a term reads that compares or mixes single words.

In: the packed words of a batch. Out: of one caption slot, the captions that have words, longest first, one a
row, so that some rows in a row are cut to the length of their first. Asks nothing of the device.
Local legend: X captions of a slot that have words, L words of the longest.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longclip.types import Words


def rectangle(
    states_TE: Tensor, starts_X: NDArray[np.int64], lengths_X: NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """(words_XLE, mask_XL) of the captions that begin there and have so many words, at least one each.

    A caption's last word fills its row.
    """
    place_L = np.arange(lengths_X.max(initial=1))
    rows_XL = starts_X[:, None] + np.minimum(place_L, lengths_X[:, None] - 1)
    where_XL, mask_XL = (
        torch.from_numpy(array).to(states_TE.device, non_blocking=True)
        for array in (rows_XL, place_L < lengths_X[:, None])
    )
    return states_TE.index_select(0, where_XL.flatten()).unflatten(0, where_XL.shape), mask_XL


class Wording(NamedTuple):
    """Captions of one slot as a `rectangle`."""

    words_XLE: Tensor
    mask_XL: Tensor
    images_X: NDArray[np.int64]  # whose they are, on the host
    lengths_X: NDArray[np.int64]  # falling, all positive


def laid_out(words: Words, slot: int, ends: bool = False) -> Wording:
    """The captions in a slot of the batch. ends: with their start and end tokens."""
    lengths_BK = words.lengths_BK.astype(np.int64)
    starts_BK = lengths_BK.cumsum().reshape(lengths_BK.shape) - lengths_BK
    start_B, length_B = starts_BK[:, slot], lengths_BK[:, slot]
    if not ends:
        start_B, length_B = start_B + 1, length_B - 2
    order_B = np.argsort(-length_B, kind="stable")
    images_X = order_B[length_B[order_B] > 0]
    lengths_X = length_B[images_X]
    return Wording(*rectangle(words.states_TE, start_B[images_X], lengths_X), images_X, lengths_X)


def worded(words: Words, slots: slice) -> Tensor:
    """Which captions of a group have a word between start and end token, [B, k] bool, where the words are."""
    mask_Bk = torch.from_numpy(words.lengths_BK[:, slots] > 2)
    return mask_Bk.to(words.states_TE.device, non_blocking=True)

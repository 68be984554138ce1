"""An evaluation set as a tower sees it, under several views of its captions: what diagnoses read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..features import Features
from ..judging import Each
from ..retrieval import hits, search


class Pairs(NamedTuple):
    """The images that have a caption in a view, each with its first one; features L2-normalised float32."""

    keys: list[str]
    image_QE: Tensor
    text_QE: Tensor
    tokens_Q: Tensor  # of the caption before any cut, start and end included; on the host
    dropped_Q: Tensor  # of them, beyond the context length; on the host

    @property
    def cosine_Q(self) -> Tensor:
        """Of each image and its caption, float64 on the host."""
        return (self.image_QE.double() * self.text_QE.double()).sum(1).cpu()


class Seen(NamedTuple):
    """Everything encoded once, and where each view's captions are."""

    found: Features
    slots: Mapping[str, slice]

    def pairs(self, view: str) -> Pairs:
        """See `Pairs`."""
        k, found = self.slots[view].start, self.found
        row_Q = (found.lengths_NK[:, k] > 0).nonzero()[:, 0]
        there_Q = row_Q.to(found.image_NE.device)
        dropped_Q = found.dropped_NK[row_Q, k]
        return Pairs(
            keys=chosen(found.keys, row_Q),
            image_QE=found.image_NE[there_Q],
            text_QE=found.text_NKE[there_Q, k],
            tokens_Q=found.lengths_NK[row_Q, k] + dropped_Q,
            dropped_Q=dropped_Q,
        )

    def hits(self, view: str, chosen_N: Tensor | None = None) -> dict[str, Each]:
        """R@1 of both directions, 100 or 0 for each query: the captions of a view against all images.

        Args:
            chosen_N: the images whose captions count; None: all.
        """
        found = self.found
        if chosen_N is not None:
            found = found._replace(lengths_NK=found.lengths_NK * chosen_N[:, None])
        each = hits(found, self.slots[view], search(found, self.slots[view]))
        return {name: each[name] for name in ("i2t_r1", "t2i_r1")}


def chosen(keys: list[str], row_Q: Tensor) -> list[str]:
    """The keys of these rows."""
    return [keys[row] for row in row_Q.tolist()]


def mean(each: Each) -> float:
    """What a number is."""
    return float(torch.tensor(each.values, dtype=torch.float64).mean())


def r1(each: Mapping[str, Each]) -> float:
    """Mean R@1 of both directions, in percent."""
    return sum(map(mean, each.values())) / len(each)

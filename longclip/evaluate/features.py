"""An evaluation set through the towers: all features, and what was said of every image.

In: a tower, batches of a set. Out: `Features`, equal on every process however many share the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..data.judging import JudgeBatches
from ..objectives.late import unit
from ..tokens import Tokenizer
from ..types import Batch
from .judging import to_device
from .sharing import collect, collect_values, share

Item = TypeVar("Item")


class Features(NamedTuple):
    """N images with K caption slots each, in stored order. Only features are where the tower is."""

    keys: list[str]
    image_NE: Tensor
    text_NKE: Tensor  # zeros where there is no caption
    lengths_NK: Tensor  # tokens shown, start and end included; 0 where there is no caption
    dropped_NK: Tensor  # tokens that the context length cut off
    tokens_T: Tensor  # all that was shown, end to end
    patches_NPE: Tensor | None = None  # L2-normalised, in the dtype of the tower; only where asked for
    words_TE: Tensor | None = None  # the same of every token

    def mask(self, slot: slice) -> Tensor:
        """Which captions of these slots exist, [N, k] bool."""
        return self.lengths_NK[:, slot] > 0


class _Part(NamedTuple):
    """The same of one batch."""

    keys: list[str]
    image_BE: Tensor
    text_BKE: Tensor
    lengths_BK: Tensor
    dropped_BK: Tensor
    tokens_T: Tensor
    patches_BPE: Tensor | None
    words_TE: Tensor | None


def features(tower: Any, batches: JudgeBatches, fine: bool = False) -> Features:
    """Encode every batch, each on one process. fine: with patches and words, which the towers must have."""
    parts = [_encoded(tower, batch, fine) for _, batch in _ahead(share(batches))]
    keys, *tensors = zip(*parts, strict=True)
    count, asked = len(batches), tensors if fine else tensors[:-2]
    return Features(collect_values(keys, count), *(collect(of_batches, count) for of_batches in asked))


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """A thread makes the next item while this one is looked at."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def _encoded(tower: Any, batch: Batch, fine: bool) -> _Part:
    needs = frozenset({"patches", "words"}) if fine else frozenset[str]()
    found = tower(to_device(batch, tower), {"all": slice(None)}, needs)
    return _Part(
        keys=batch.keys,
        image_BE=found.image_BE,
        text_BKE=found.text_BKE,
        lengths_BK=batch.lengths_BK,
        dropped_BK=batch.dropped_BK,
        tokens_T=batch.tokens_T,
        patches_BPE=unit(found.patches_BPE.flatten(0, 1)).view_as(found.patches_BPE) if fine else None,
        words_TE=unit(found.words.states_TE) if fine else None,
    )


class Shown(Sequence[str]):
    """The texts of some slots as the model was shown them: decoded from their tokens when they are asked for.

    The M texts are those that exist, image by image.
    """

    def __init__(self, found: Features, slot: slice, tokenizer: Tokenizer) -> None:
        self.tokens, self.tokenizer = found.tokens_T.numpy(), tokenizer
        ends_NK = found.lengths_NK.numpy().astype(np.int64).ravel().cumsum().reshape(found.lengths_NK.shape)
        shown_NK = found.mask(slot).numpy()
        self.ends: NDArray[np.int64] = ends_NK[:, slot][shown_NK]
        self.starts = self.ends - found.lengths_NK[:, slot].numpy()[shown_NK]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> str:  # type: ignore[override]
        ids = self.tokens[self.starts[number] : self.ends[number]].tolist()
        return self.tokenizer.text(ids[len(self.tokenizer.prefix) : len(ids) - len(self.tokenizer.suffix)])

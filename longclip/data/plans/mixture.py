"""Several sources in one stream, in exact proportions, as arithmetic: see `order`.

In: for every source an `Order` of its draws, and how many of them an epoch shows. Out: a `Stream` over one
index that counts through all sources. An epoch is laid out in rows of about 1,024 positions. After row i of
R, a source that shows c samples an epoch has shown round(c * i / R) of them: every row holds the sources in
their shares, shuffled, and every epoch holds exactly c. Each source goes through its own order, pass after
pass, whatever the others do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .order import Order, Stream, permutation, random_bits

ROW = 1024  # positions whose sources are shuffled together


class Shares:
    """Samples drawn in proportion to a weight: systematic resampling.

    With S_i the sum of the first i weights, scaled to a sum of N for N samples, and u ~ U[0, 1) of the pass,
    draw k of the N draws of a pass shows the sample i with S_i <= k + u < S_(i+1). A sample of scaled weight
    w comes floor(w) or ceil(w) times a pass, and w times on average: sampling in proportion to a score
    (Compress & Align) that stays a function of the position.
    """

    def __init__(self, weights: NDArray[np.float64]) -> None:
        sums = np.concatenate([[0.0], np.cumsum(weights, dtype=np.float64)])
        self.sums = sums * (len(weights) / sums[-1])
        self.sums[-1] = len(weights)
        self.most = max(1, int(np.ceil(np.diff(self.sums).max())))  # times that a sample comes in a pass

    def draw(self, shown: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
        """(pass, draw) -> (pass, sample). A repetition within a pass counts as a pass, to look different."""
        passes, draws = shown[:, 0], shown[:, 1]
        offsets = np.empty(len(shown))
        for number in np.unique(passes):
            offsets[passes == number] = _offset(seed, int(number))
        samples = np.searchsorted(self.sums, draws + offsets, side="right") - 1
        samples = np.minimum(samples, len(self.sums) - 2)
        again = draws - np.ceil(self.sums[samples] - offsets).astype(np.int64)
        return np.stack([passes * self.most + np.clip(again, 0, self.most - 1), samples], axis=1)


@dataclass(frozen=True, eq=False)
class Part:
    """One source of a mixture.

    Args:
        name: of the source.
        order: of its draws: as many as there are samples to choose from.
        start: where its samples begin in the common index.
        epoch: draws that an epoch of the mixture shows.
        kept: the samples to choose from, where some are left out.
        shares: of the samples, where they are drawn in proportion to a weight.
    """

    name: str
    order: Order
    start: int
    epoch: int
    kept: NDArray[np.int64] | None = None
    shares: Shares | None = None

    def span(self, start: int, stop: int) -> NDArray[np.int64]:
        """(pass, index) of the source's own draws from `start` up to `stop`, [stop - start, 2]."""
        shown = self.order.span(start, stop)
        if self.shares is not None:
            shown = self.shares.draw(shown, self.order.seed)
        if self.kept is not None:
            shown[:, 1] = self.kept[shown[:, 1]]
        return shown + np.array([0, self.start])


class Mixture(Stream):
    """The sources of a run in one stream; `samples` is the length of an epoch.

    Args:
        parts: the sources.
        seed: of the run.
    """

    def __init__(self, parts: Sequence[Part], seed: int) -> None:
        self.parts, self.seed = tuple(parts), seed
        self.epochs = np.array([part.epoch for part in parts], np.int64)
        self.samples = int(self.epochs.sum())
        self._rows = -(-self.samples // ROW)
        self._ends = self._before(np.arange(1, self._rows + 1)).sum(axis=1)

    def span(self, start: int, stop: int) -> NDArray[np.int64]:
        shown = np.empty((stop - start, 2), np.int64)
        filled = 0
        while filled < stop - start:
            epoch, row, place = self._locate(start + filled)
            labels, places = _row(self, epoch, row)
            labels, places = labels[place:][: len(shown) - filled], places[place:][: len(shown) - filled]
            part_of_row = shown[filled : filled + len(labels)]
            for number in np.flatnonzero(np.bincount(labels)):
                mine = labels == number
                first = epoch * int(self.epochs[number]) + int(places[mine][0])
                part_of_row[mine] = self.parts[number].span(first, first + int(mine.sum()))
            filled += len(labels)
        return shown

    def shown(self, position: int) -> dict[str, int]:
        """Samples of each source before a position."""
        epoch, row, place = self._locate(position)
        counts = epoch * self.epochs + self._before(np.array([row]))[0]
        counts += np.bincount(_row(self, epoch, row)[0][:place], minlength=len(self.parts))
        return {part.name: int(count) for part, count in zip(self.parts, counts, strict=True)}

    def _locate(self, position: int) -> tuple[int, int, int]:
        """Epoch, row and place in the row."""
        epoch, offset = divmod(position, self.samples)
        row = int(np.searchsorted(self._ends, offset, side="right"))
        return epoch, row, offset - (int(self._ends[row - 1]) if row else 0)

    def _before(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many samples of each source an epoch shows before these rows, [rows, parts]."""
        return (2 * rows[:, None] * self.epochs + self._rows) // (2 * self._rows)


@lru_cache(maxsize=16)
def _offset(seed: int, number: int) -> float:
    """u of a pass."""
    return int(random_bits(1, seed, number, 2)[0]) / 2**64


@lru_cache(maxsize=64)
def _row(mixture: Mixture, epoch: int, row: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For every position of a row its source, and which of the source's samples of this epoch it shows."""
    before, after = mixture._before(np.array([row, row + 1]))
    counts = after - before
    labels = np.repeat(np.arange(len(counts)), counts)
    labels = labels[permutation(len(labels), mixture.seed, epoch, row, 1)]
    places = np.empty(len(labels), np.int64)
    for number in np.flatnonzero(counts):
        places[labels == number] = np.arange(before[number], after[number])
    return labels, places

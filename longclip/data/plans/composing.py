"""Which samples share a batch: those of like captions, of equal load, or of one group.

In: a `Stream`. Out: a `Stream` of the same samples, arranged within pools of many batches: again a function
of the position alone, and the same on every process.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ...types import UserError
from .order import Stream, permutation

Ints = NDArray[np.int64]


class Pool(NamedTuple):
    """Samples to arrange: neighbours in the stream."""

    samples_N: Ints
    batch_N: Ints  # the batch that each position falls into
    words: tuple[int, ...]  # seeds of its randomness

    def random(self, tag: int) -> Ints:
        """A random rank for each position."""
        return permutation(len(self.samples_N), *self.words, tag)

    def shuffled_batches(self) -> Ints:
        """For each position the random rank of its batch."""
        ranks = permutation(int(self.batch_N[-1] - self.batch_N[0]) + 1, *self.words, 0)
        return ranks[self.batch_N - self.batch_N[0]]

    def place_N(self) -> Ints:
        """The place of each position within its batch, as far as that lies in the pool."""
        return np.arange(len(self.batch_N)) - np.searchsorted(self.batch_N, self.batch_N)

    def size_N(self) -> Ints:
        """The size of each position's batch, as far as that lies in the pool."""
        return np.bincount(self.batch_N - self.batch_N[0])[self.batch_N - self.batch_N[0]]


class Arrange(Protocol):
    """A pool -> the sample of each position, as places in the pool: a permutation."""

    def __call__(self, pool: Pool) -> Ints: ...


@dataclass(frozen=True, eq=False)
class Similar:
    """Captions of about one length share a batch; batches come in random order."""

    lengths: NDArray[np.int32]  # tokens by sample

    def __call__(self, pool: Pool) -> Ints:
        by_length = np.lexsort((pool.random(1), self.lengths[pool.samples_N]))
        return _placed(by_length, np.lexsort((pool.random(2), pool.shuffled_batches())))


@dataclass(frozen=True, eq=False)
class Balanced:
    """All batches, and all processes within one, hold about the same number of tokens.

    Samples are dealt to the batches from the longest to the shortest, forth and back. Within a batch they
    lie in van der Corput's order, of which every aligned half, quarter, ... is spread over the whole range.
    """

    lengths: NDArray[np.int32]

    def __call__(self, pool: Pool) -> Ints:
        by_length = np.lexsort((pool.random(1), self.lengths[pool.samples_N]))[::-1]
        within = np.lexsort((_bit_reversed(pool.place_N()), pool.batch_N))
        rank_N = np.empty_like(within)
        rank_N[within] = pool.place_N()  # 0: the place of a batch that gets its longest caption
        share_N = (rank_N + 0.5) / pool.size_N()
        turn_N = pool.shuffled_batches() * np.where(rank_N % 2, -1, 1)
        return _placed(by_length, np.lexsort((turn_N, share_N)))


@dataclass(frozen=True, eq=False)
class Grouped:
    """`share` of a batch of `size` comes from one label, as far as the pool holds whole groups of it.

    The rest is random. A label below 0 is none.

    Raises:
        UserError: a batch is of one image.
    """

    labels: Ints
    size: int
    share: float

    def __post_init__(self) -> None:
        if self.size < 2:
            raise UserError(
                f"batch_size is {self.size}, and data.plan.batches=COLUMN puts images of one label together; "
                "give 2 or more, or data.plan.batches=random"
            )

    def __call__(self, pool: Pool) -> Ints:
        together = max(2, round(self.share * self.size))
        groups = self._groups(pool, together)
        within = np.lexsort((pool.random(2), pool.batch_N))
        chosen = within[(pool.place_N() < together) & (pool.size_N() == self.size)].reshape(-1, together)
        count = min(len(groups), len(chosen))
        groups = groups[permutation(len(groups), *pool.words, 3)][:count]
        chosen = chosen[permutation(len(chosen), *pool.words, 4)][:count]
        rest = np.setdiff1d(np.arange(len(within)), groups)
        arranged = np.empty_like(within)
        arranged[chosen] = groups
        arranged[np.setdiff1d(within, chosen)] = rest[permutation(len(rest), *pool.words, 5)]
        return arranged

    def _groups(self, pool: Pool, together: int) -> Ints:
        """The pool's samples in groups of one label, drawn anew for each pool, [groups, together]."""
        label_N = self.labels[pool.samples_N]
        by_label = np.lexsort((pool.random(1), label_N))
        label_N = label_N[by_label]
        first_N, last_N = (np.searchsorted(label_N, label_N, side) for side in ("left", "right"))
        whole_N = np.arange(len(label_N)) - first_N < (last_N - first_N) // together * together
        return by_label[whole_N & (label_N >= 0)].reshape(-1, together)


def _placed(samples: Ints, positions: Ints) -> Ints:
    placed = np.empty_like(positions)
    placed[positions] = samples
    return placed


def _bit_reversed(numbers: Ints) -> Ints:
    """32 bits in reverse: the order in which van der Corput's sequence visits [0, 1)."""
    reversed_ = np.zeros_like(numbers)
    for bit in range(32):
        reversed_ |= (numbers >> bit & 1) << (31 - bit)
    return reversed_


class Composed(Stream):
    """A stream whose samples are arranged within pools of `pool` batches; no pool crosses an epoch.

    Args:
        stream: to take samples from.
        arrange: what to do with a pool.
        size: images a batch. It shapes the stream: a run that resumes with another one in the middle of a
            pool repeats some of the pool's samples and leaves out others.
        pool: batches that are arranged together; all of them are in memory, 16 bytes a sample.
        seed: of the run.
    """

    def __init__(self, stream: Stream, arrange: Arrange, size: int, pool: int, seed: int) -> None:
        if pool < 1:
            raise UserError(f"data.plan.pool is {pool}; batches are composed among at least 1")
        self.stream, self.arrange, self.size, self.pool, self.seed = stream, arrange, size, pool, seed
        self.samples = stream.samples

    def span(self, start: int, stop: int) -> Ints:
        parts = [np.empty((0, 2), np.int64)]
        while start < stop:
            first, arranged = _arranged(self, *self._pool(start))
            parts.append(arranged[start - first : stop - first])
            start += len(parts[-1])
        return np.concatenate(parts)

    def _pool(self, position: int) -> tuple[int, int]:
        epoch, whole = position // self.samples, self.size * self.pool
        first = max(epoch * self.samples, position // whole * whole)
        return first, min((epoch + 1) * self.samples, (position // whole + 1) * whole)


@lru_cache(maxsize=4)
def _arranged(composed: Composed, first: int, stop: int) -> tuple[int, Ints]:
    shown = composed.stream.span(first, stop)
    batch_N = np.arange(first, stop) // composed.size
    pool = Pool(shown[:, 1], batch_N, (composed.seed, first))
    return first, shown[composed.arrange(pool)]

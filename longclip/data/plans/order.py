"""Which sample comes next: a pure function of (seed, position), with no state to save.

In: how many samples there are, and a seed. Out: for any position in the endless stream of a run, the pass
over the data that it falls into and the sample to show. Ranks, workers and batch sizes only cut this one
stream, so a run resumes from one integer, in the middle of an epoch, on any number of processes.

Within a pass, blocks of neighbouring samples (the unit of reading) are permuted, and each run of
`window` permuted blocks (the unit of shuffling) is shuffled sample by sample. Only blocks are ever
listed: ten million samples cost a permutation of 312,500 blocks and a window of 1,024 samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ...types import UserError

STRETCH = 256  # positions that are looked up at once: one alone takes as long


class Stream(ABC):
    """An endless stream of samples by position.

    Attributes:
        samples: positions of one epoch.
    """

    samples: int

    @abstractmethod
    def span(self, start: int, stop: int) -> NDArray[np.int64]:
        """(pass, sample index) of the positions from `start` up to `stop`, [stop - start, 2]."""

    def at(self, position: int) -> tuple[int, int]:
        """(pass, sample index) of a position >= 0. A sample never comes twice with the same pass."""
        assert position >= 0, f"position {position} < 0"
        stretch, place = divmod(position, STRETCH)
        shown, index = _stretch(self, stretch)[place].tolist()
        return shown, index


@lru_cache(maxsize=16)
def _stretch(stream: Stream, number: int) -> NDArray[np.int64]:
    return stream.span(number * STRETCH, (number + 1) * STRETCH)


@dataclass(frozen=True)
class Order(Stream):
    """The order of one dataset: every sample exactly once a pass, differently in each.

    Where there are several windows, the first third of a pass holds no sample of the last third of the pass
    before, so that no batch that straddles the two holds an image twice.

    Args:
        samples: size of the dataset.
        seed: another seed is another order.
        block: neighbouring samples that stay in one window.
        window: blocks whose samples are shuffled together.
    """

    samples: int
    seed: int
    block: int = 32
    window: int = 32

    def __post_init__(self) -> None:
        for name in ("samples", "block", "window"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"an order of samples needs {name} >= 1, got {getattr(self, name)}; set it to 1 or more"
                )

    def span(self, start: int, stop: int) -> NDArray[np.int64]:
        shown, filled = np.empty((stop - start, 2), np.int64), 0
        while filled < len(shown):
            epoch, offset = divmod(start + filled, self.samples)
            window, place = self._locate(epoch, offset)
            found = _window(self, epoch, window)[place : place + len(shown) - filled]
            shown[filled : filled + len(found), 0] = epoch
            shown[filled : filled + len(found), 1] = found
            filled += len(found)
        return shown

    def _locate(self, epoch: int, offset: int) -> tuple[int, int]:
        """Window and place in it. One block is short where `block` does not divide `samples`."""
        blocks, full = -(-self.samples // self.block), self.window * self.block
        missing = blocks * self.block - self.samples
        short_window = _short_place(blocks, self.window, self.seed, epoch) // self.window
        if offset >= (short_window + 1) * full - missing:
            offset += missing
        return divmod(offset, full)


def permutation(size: int, *words: int) -> NDArray[np.int64]:
    """A permutation of range(size) that is a function of its seed words on every numpy version."""
    return np.argsort(random_bits(size, *words), kind="stable")


def random_bits(size: int, *words: int) -> NDArray[np.uint64]:
    """64 random bits for each of `size`. Bit generators promise a stable stream; `Generator` does not."""
    return np.random.Philox(np.random.SeedSequence([word % 2**64 for word in words])).random_raw(size)


@lru_cache(maxsize=16)
def _blocks(blocks: int, window: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The blocks of a pass in order: permuted, then those shown late in the pass before moved back.

    The move stays within the first two thirds, so the last third is that of the bare permutation, and
    a pass depends on no more than the one before it.
    """
    order, rest = permutation(blocks, seed, epoch), blocks % window
    near = (blocks - 2 * rest) // (3 * window) * window
    if epoch == 0 or near <= 0:
        return order
    late = permutation(blocks, seed, epoch - 1)[-(near + rest) :]
    head = order[: near + len(late)]
    return np.concatenate([head[np.argsort(np.isin(head, late), kind="stable")], order[len(head) :]])


@lru_cache(maxsize=16)
def _short_place(blocks: int, window: int, seed: int, epoch: int) -> int:
    """Where the last block, the only one that may be short, comes in a pass."""
    return int(np.flatnonzero(_blocks(blocks, window, seed, epoch) == blocks - 1)[0])


@lru_cache(maxsize=64)
def _window(order: Order, epoch: int, window: int) -> NDArray[np.int64]:
    """The samples of one window in the order they are shown."""
    blocks = _blocks(-(-order.samples // order.block), order.window, order.seed, epoch)
    chosen = blocks[window * order.window : (window + 1) * order.window]
    samples = (chosen[:, None] * order.block + np.arange(order.block)).reshape(-1)
    samples = samples[samples < order.samples]
    return samples[permutation(len(samples), order.seed, epoch, window)]

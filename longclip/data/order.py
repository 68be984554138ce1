"""Which sample comes next: a pure function of (seed, epoch, position), with no state to save.

In: how many samples there are, and a seed. Out: for any position in the endless stream of a run, the epoch it
falls into and the sample to show. Ranks, workers and batch sizes only cut this one stream, so a run
resumes from one integer, in the middle of an epoch, on any number of processes.

Within an epoch, blocks of neighbouring samples (the unit of reading) are permuted, and each run of
`window` permuted blocks (the unit of shuffling) is shuffled sample by sample. Only blocks are ever
listed: ten million samples cost a permutation of 312,500 blocks and a window of 1,024 samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..types import UserError


@dataclass(frozen=True)
class Order:
    """The order of one dataset: every sample exactly once an epoch, differently in each.

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

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, sample index) of a position >= 0 in the endless stream."""
        assert position >= 0, f"position {position} < 0"
        epoch, offset = divmod(position, self.samples)
        window, offset = self._locate(epoch, offset)
        return epoch, int(_window(self, epoch, window)[offset])

    def _locate(self, epoch: int, offset: int) -> tuple[int, int]:
        """Window and place in it. One block is short where `block` does not divide `samples`."""
        blocks, full = -(-self.samples // self.block), self.window * self.block
        missing = blocks * self.block - self.samples
        short_window = _short_place(blocks, self.seed, epoch) // self.window
        if offset >= (short_window + 1) * full - missing:
            offset += missing
        return divmod(offset, full)


class Batches:
    """This rank's batches of positions, from `start` up to `stop`, in global batches of the whole run.

    Step s covers positions [start + s * global_batch, start + (s + 1) * global_batch), of which each
    rank takes its contiguous slice. Only whole global batches are yielded. A batch may straddle two
    epochs; that batch can then hold an image twice.

    `len()` counts the run from its beginning, `before` steps included, because Lightning adds the
    steps of a checkpoint to those it fetches and compares the sum with the loader's length; iterating
    yields only the steps that are left.

    Raises:
        UserError: `global_batch` is no multiple of `world`, or exceeds the dataset.
    """

    def __init__(
        self, order: Order, global_batch: int, rank: int, world: int, start: int, stop: int, before: int = 0
    ) -> None:
        assert 0 <= rank < world, f"rank {rank} of {world}"
        if global_batch < 1 or global_batch % world:
            raise UserError(
                f"batch_size counts the samples of all processes and must be a multiple of their number: "
                f"{global_batch} over {world} processes; "
                f"set batch_size={max(1, global_batch // world) * world}"
            )
        if order.samples < global_batch:
            largest = order.samples // world * world or world
            raise UserError(
                f"the training data has {order.samples} samples, fewer than one batch of {global_batch}; "
                f"set batch_size={largest} or name more data: data.root=FOLDER"
            )
        self.order, self.global_batch, self.local = order, global_batch, global_batch // world
        self.first, self.start, self.before = rank * self.local, start, before
        self.left = max(0, stop - start) // global_batch

    def __len__(self) -> int:
        return self.before + self.left

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.left):
            first = self.start + step * self.global_batch + self.first
            yield list(range(first, first + self.local))


def _permutation(size: int, *words: int) -> NDArray[np.int64]:
    """A permutation of range(size) that is a function of its seed words on every numpy version.

    Bit generators promise a stable stream; `Generator.permutation` does not.
    """
    bits = np.random.Philox(np.random.SeedSequence([word % 2**64 for word in words])).random_raw(size)
    return np.argsort(bits, kind="stable")


@lru_cache(maxsize=4)
def _blocks(blocks: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return _permutation(blocks, seed, epoch)


@lru_cache(maxsize=4)
def _short_place(blocks: int, seed: int, epoch: int) -> int:
    """Where the last block, the only one that may be short, comes in an epoch."""
    return int(np.flatnonzero(_blocks(blocks, seed, epoch) == blocks - 1)[0])


@lru_cache(maxsize=64)
def _window(order: Order, epoch: int, window: int) -> NDArray[np.int64]:
    """The samples of one window in the order they are shown."""
    blocks = _blocks(-(-order.samples // order.block), order.seed, epoch)
    chosen = blocks[window * order.window : (window + 1) * order.window]
    samples = (chosen[:, None] * order.block + np.arange(order.block)).reshape(-1)
    samples = samples[samples < order.samples]
    return samples[_permutation(len(samples), order.seed, epoch, window)]

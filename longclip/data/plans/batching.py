"""Where a stream of samples is cut into batches.

In: a `Stream`, the batch size, perhaps a budget of tokens. Out: this process's positions, batch by batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...types import UserError
from .order import Stream

AHEAD = 65_536  # positions whose lengths are looked up at once


class Budget(NamedTuple):
    """At most so many tokens in a batch."""

    tokens: int
    lengths: NDArray[np.int32]  # tokens by sample


class Batches:
    """This rank's batches of positions, from `start` up to `stop`, in global batches of the whole run.

    A global batch is the next `global_batch` positions, or as many of them as a budget of tokens allows, and
    each rank takes its contiguous slice. Only whole ones are yielded; with a budget, whatever number of
    images the processes can share. Where a batch ends depends only on where it starts.

    `len()` counts the run from its beginning, `before` steps included, because Lightning adds the
    steps of a checkpoint to those it fetches and compares the sum with the loader's length; iterating
    yields only the steps that are left. With a budget they are counted by going through all lengths:
    some seconds for ten million samples.

    Raises:
        UserError: `global_batch` is no multiple of `world`, or exceeds an epoch; one image for each
            process already exceeds the budget.
    """

    def __init__(
        self,
        order: Stream,
        global_batch: int,
        rank: int,
        world: int,
        start: int,
        stop: int,
        before: int = 0,
        budget: Budget | None = None,
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
        self.order, self.global_batch, self.rank, self.world = order, global_batch, rank, world
        self.start, self.stop, self.before, self.budget = start, stop, before, budget

    def __len__(self) -> int:
        return self.before + self.left

    @cached_property
    def left(self) -> int:
        """Steps from `start` on."""
        if self.budget is None:
            return max(0, self.stop - self.start) // self.global_batch
        return sum(1 for _ in self._cut(self.budget))

    def __iter__(self) -> Iterator[list[int]]:
        for first, size in self._cut(self.budget) if self.budget else self._equal():
            local = size // self.world
            yield list(range(first + self.rank * local, first + (self.rank + 1) * local))

    def _equal(self) -> Iterator[tuple[int, int]]:
        """First position and size of every global batch."""
        for step in range(self.left):
            yield self.start + step * self.global_batch, self.global_batch

    def _cut(self, budget: Budget) -> Iterator[tuple[int, int]]:
        """The same within a budget: the most images that fit and that the processes can share."""
        position, ahead = self.start, max(AHEAD, self.global_batch)
        sums, looked_from = np.zeros(1, np.int64), position
        while position + self.world <= self.stop:
            here = position - looked_from
            if here + self.global_batch > len(sums) - 1 and looked_from + len(sums) - 1 < self.stop:
                samples = self.order.span(position, min(position + ahead, self.stop))[:, 1]
                sums, looked_from = np.append(0, np.cumsum(budget.lengths[samples], dtype=np.int64)), position
                continue
            fitting = int(np.searchsorted(sums, sums[here] + budget.tokens, side="right")) - 1 - here
            size = min(fitting, self.global_batch) // self.world * self.world
            if size == 0:
                needed = int(sums[min(here + self.world, len(sums) - 1)] - sums[here])
                raise UserError(
                    f"data.plan.tokens={budget.tokens} is less than one image for each of {self.world} "
                    f"processes needs ({needed} tokens); set it to {needed} or more, or to null"
                )
            yield position, size
            position += size

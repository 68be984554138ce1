"""Judging on many processes: whose turn it is with what, and how everybody gets everything.

In: items (batches, chunks of queries) and what a process made of its own. Out: the results of all items in
their order, equal on every process. On one process both are no-ops.

    found = [encode(tower, batch) for batch in share(batches)]
    image_NE = collect(found, len(batches))

An item is whole on one process, so that the numbers do not depend on how many there are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import dist

Item = TypeVar("Item")
ItemOut = TypeVar("ItemOut", covariant=True)


class Items(Protocol[ItemOut]):
    """As much of a sequence as is needed: an item is made when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> ItemOut: ...


def share(items: Items[Item]) -> Iterator[Item]:
    """The items of this process: each world-th one.

    All processes get equally many, because a model that FSDP2 holds can only be called by all at once:
    where the number does not divide, the last item is taken more than once, and `collect` drops that.
    """
    turns = -(-len(items) // dist.world())
    for turn in range(turns):
        yield items[min(turn * dist.world() + dist.rank(), len(items) - 1)]


def collect(parts: Sequence[Tensor], count: int) -> Tensor:
    """The rows of all `count` items, one after the other.

    Args:
        parts: [n, ...] of each item of this process's share; n may differ, the rest may not.
        count: of the items that were shared.
    """
    rows = torch.cat(list(parts))
    if dist.world() == 1:
        return rows
    sizes = [json.loads(word) for word in dist.everyone(json.dumps([len(part) for part in parts]))]
    longest = max(sum(own) for own in sizes)
    padded = F.pad(rows.to(dist.device()), [0, 0] * (rows.ndim - 1) + [0, longest - len(rows)])
    everything = dist.gather(padded).view(dist.world(), longest, *rows.shape[1:])
    cut = [whole[: sum(own)].split(own) for whole, own in zip(everything, sizes, strict=True)]
    return torch.cat(_in_order(cut, count)).to(rows.device)


def collect_values(parts: Sequence[Sequence[Any]], count: int) -> list[Any]:
    """The same of plain JSON values: keys, texts, numbers."""
    told = [json.loads(word) for word in dist.everyone(json.dumps([list(part) for part in parts]))]
    return [value for part in _in_order(told, count) for value in part]


def _in_order(by_process: Sequence[Sequence[Item]], count: int) -> list[Item]:
    return [by_process[number % len(by_process)][number // len(by_process)] for number in range(count)]

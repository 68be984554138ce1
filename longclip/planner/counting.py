"""Count what a piece of work does: FLOPs, bytes that autograd keeps, the most bytes alive at one time.

In: a function that runs forward and returns what to run backward from. Out: `Counts`. The tensors may be
fake (`torch._subclasses.FakeTensorMode`): shapes without content, so that models and batches that no
machine at hand could hold are counted by running the real code.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Forward = Callable[[], Sequence[Tensor]]


class Counts(NamedTuple):
    """Of one forward and backward pass."""

    forward: float  # FLOPs of matrix products, convolutions and attentions
    flops: float  # of both passes, what is computed again included
    saved: float  # bytes that the forward pass keeps for the backward pass, parameters left out
    peak: float  # the most bytes alive at one time of those made in here, gradients included

    def __mul__(self, factor: float) -> Counts:  # type: ignore[override]
        return Counts(*(value * factor for value in self))

    def __add__(self, other: Counts) -> Counts:  # type: ignore[override]
        return Counts(*(one + two for one, two in zip(self, other, strict=True)))


class Line(NamedTuple):
    """Counts as a straight line in the number of images."""

    fixed: Counts
    each: Counts

    def at(self, images: int) -> Counts:
        return self.fixed + self.each * images


def line(count_of: Callable[[int], Counts], images: int) -> Line:
    """Through the counts at `images` and at twice as many."""
    one, two = count_of(images), count_of(2 * images)
    each = (two + one * -1) * (1 / images)
    return Line(one + each * -images, each)


def count(forward: Forward) -> Counts:
    """Run forward, then backward from all results that have a gradient."""
    with Watch() as watch:
        with saving() as saved:
            results = [result for result in forward() if result.requires_grad]
        once, kept = watch.flops, sum(storage.nbytes() for storage in saved.values())
        saved.clear()
        if results:
            torch.autograd.backward(results, [torch.ones_like(result) for result in results])
    return Counts(once, watch.flops, kept, watch.peak)


@contextmanager
def saving() -> Iterator[dict[int, torch.UntypedStorage]]:
    """What forward passes in here keep for their backward passes, each storage once.

    Parameters and views of them are left out: they are there anyway.
    """
    saved: dict[int, torch.UntypedStorage] = {}  # kept alive: no other storage may get the address of one

    def keep(x: Tensor) -> Tensor:
        if not isinstance(x if x._base is None else x._base, nn.Parameter):
            saved.setdefault(x.untyped_storage()._cdata, x.untyped_storage())
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        yield saved


def added_product(into: Sequence[int], a: Sequence[int], b: Sequence[int], **_: object) -> int:
    """FLOPs of into += a @ b, from shapes; torch has a formula for it out of place only."""
    return 2 * math.prod(a) * b[-1]


IN_PLACE = (torch.ops.aten.addmm_, torch.ops.aten.baddbmm_)
"""What `added_product` holds for."""


class Watch(TorchDispatchMode):
    """Adds up FLOPs, and the storages that operators make until nothing holds them any more.

    `peak` is the most bytes at one time in what operators returned, gradients included, not what one holds
    inside itself while it runs. On CPU, meta and fake tensors.

    One mode with torch's own formulas instead of its FlopCounterMode beside another: on fake tensors the
    modes are what takes the time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.now = self.peak = 0
        self._bytes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        kind = func._overloadpacket
        if kind in flop_registry:
            self.flops += flop_registry[kind](*args, **(kwargs or {}), out_val=result)
        elif kind in IN_PLACE:
            self.flops += added_product(*(x.shape for x in args[:3]))
        # What comes in may be older than this, and then its views and what works in place are, too.
        older = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata not in older and storage._cdata not in self._bytes:
                self._bytes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, storage: int) -> None:
        self.now -= self._bytes.pop(storage)


def _storages(tree: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]

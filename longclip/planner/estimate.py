"""Add up what a step needs, and choose the chunks that fit.

In: a `LongClip` without memory, the lengths of some images' captions, the size of the job. Out: `Costs`,
which give memory and FLOPs for any micro_batch, and the `Choice` that a given memory allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..training import LongClip
from .counting import Line
from .pretending import Pretence

MOMENTS = 2
"""What Adam keeps beside every trainable parameter; a running average (`optim.ema`) is one more."""

FEW = 8
"""Chunks of fewer images leave a device idle: blocks are checkpointed before chunks get smaller than this."""

MOST = 0.92
"""Of the memory: what a plan fills. The rest is for allocators that split it and for libraries' own."""


class Job(NamedTuple):
    """What is planned, per step."""

    batch_size: int  # over all processes
    world: int = 1
    precision: str = "32-true"  # as Lightning names it

    @property
    def local(self) -> int:
        return self.batch_size // self.world


class Costs:
    """What the parts of a step cost one process.

    Args:
        module: made under `with torch.device("meta")`, it never needs memory; becomes fake in here.
        lengths_BK: of some images' captions, which stand for those of all.
        job: what is planned.

    Raises:
        UserError: what the terms say to a batch of this size.
    """

    def __init__(self, module: LongClip, lengths_BK: NDArray[np.int32], job: Job) -> None:
        self.job, self._kept = job, MOMENTS + bool(module.optim.ema)
        self._pretence = Pretence(module, lengths_BK, job.precision)
        self._towers: dict[bool, tuple[Line, Line]] = {}
        self.tokens = float(lengths_BK.sum(1).mean())  # of one image
        self.parameters, self.gradients, self._largest = self._pretence.parameters()
        self.loss, self.embeddings = self._pretence.loss(job.local, job.world)

    def memory(self, micro_batch: int | None, checkpointing: bool) -> dict[str, float]:
        """Bytes by part. In chunks only one tower has activations at a time: the larger is counted."""
        at_a_time = min(micro_batch or self.job.local, self.job.local)
        image, text = (part.at(at_a_time) for part in self._lines(checkpointing))
        adding = 0
        if at_a_time < self.job.local:
            nothing, adding = image * 0, self._largest  # a chunk's gradient, before it is added to the sum
            image, text = (image, nothing) if image.saved > text.saved else (nothing, text)
        working = max(image.peak - image.saved, text.peak - text.saved, self.loss.peak - self.loss.saved)
        return {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimiser states": self._kept * self.gradients,
            "activations, image tower": image.saved,
            "activations, text tower": text.saved,
            "working memory": max(working, 0) + adding,
            "pixels": at_a_time * self._pretence.pixels,
            "embeddings": self.embeddings,
            "loss": self.loss.saved,
        }

    def flops(self, micro_batch: int | None, checkpointing: bool) -> dict[str, float]:
        """FLOPs of a step on one process by part: both passes, and the forward pass again for chunks."""
        chunked = micro_batch is not None and micro_batch < self.job.local
        image, text = (part.at(self.job.local) for part in self._lines(checkpointing))
        return {
            "image tower": image.flops + chunked * image.forward,
            "text tower": text.flops + chunked * text.forward,
            "loss": self.loss.flops,
        }

    def _lines(self, checkpointing: bool) -> tuple[Line, Line]:
        if checkpointing not in self._towers:
            self._towers[checkpointing] = self._pretence.towers(checkpointing)
        return self._towers[checkpointing]


class Choice(NamedTuple):
    """How to encode, and the bytes it takes."""

    micro_batch: int | None
    grad_checkpointing: bool
    need: float
    fits: bool


def choose(costs: Costs, memory: float, checkpointing: bool = False) -> Choice:
    """The largest chunks, powers of two, that fit into so many bytes; the whole batch where it does.

    Blocks are checkpointed (`checkpointing`: they are anyhow) only where chunks would get too small. Where
    nothing fits, what needs least.
    """
    tried = []
    for micro_batch, again in _ways(costs.job.local, checkpointing):
        need = sum(costs.memory(micro_batch, again).values())
        tried.append(Choice(micro_batch, again, need, need <= MOST * memory))
        if tried[-1].fits:
            return tried[-1]
    return min(tried, key=lambda choice: choice.need)


def _ways(local: int, checkpointing: bool) -> Iterator[tuple[int | None, bool]]:
    """From the fastest to the smallest."""
    powers = [1 << n for n in range((local - 1).bit_length())][::-1]
    blocks = [True] if checkpointing else [False, True]
    for again in blocks:
        yield from ((size, again) for size in [None, *(p for p in powers if p >= FEW)])
    for again in blocks:
        yield from ((size, again) for size in powers if size < FEW)

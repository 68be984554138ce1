"""Out of memory as one sentence: what was being done, and three things to type that need less.

In: the error that an allocator raised, and what the run is. Out: a `UserError`. A process that stops this
way ends the run on all of them: whoever started them stops the others, which wait for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from .types import UserError

_PHRASES = ("DefaultCPUAllocator: can't allocate", "bad_alloc", "ALLOC_FAILED", "out of memory")


class Load(NamedTuple):
    """What a step of this run puts into memory."""

    doing: str  # a part of the step: see `LongClip.doing`
    batch_size: int  # over all processes
    world: int
    micro_batch: int | None
    grad_checkpointing: bool
    tokens: int | None  # `data.plan.tokens`

    @property
    def at_a_time(self) -> int:
        """Images that a process encodes at once."""
        local = self.batch_size // self.world
        return min(self.micro_batch or local, local)


@contextmanager
def explained(load: Callable[[], Load]) -> Iterator[None]:
    """Turn a failure to allocate into a `UserError`; let every other error through."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(sentence(error, load())) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator of the device, of the host, or one behind a library had no more to give."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(phrase in str(error) for phrase in _PHRASES)


def sentence(error: BaseException, load: Load) -> str:
    """What happened and what to type."""
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ [KMG]iB)", str(error))
    return (
        f"out of memory during {load.doing}{f' (asked for {asked[1]} more)' if asked else ''}, with "
        f"{load.at_a_time:,} images at a time on each process: add one of {', '.join(remedies(load))}; "
        "plan=auto says what fits before anything is trained"
    )


def remedies(load: Load) -> list[str]:
    """Three overrides that need less memory. The first two leave loss and gradients as they are."""
    same, other = [], []
    if load.at_a_time > 1:
        same.append(f"micro_batch={power_of_two(max(load.at_a_time // 4, 1))}")
    if not load.grad_checkpointing:
        same.append("model.grad_checkpointing=true")
    if load.batch_size >= 4 * load.world:
        other.append(f"batch_size={load.batch_size // load.world // 2 * load.world}")
    if load.tokens:
        other.append(f"data.plan.tokens={load.tokens // 2}")
    other += [
        "model.backbone.patch_dropout=0.5",
        "model.backbone.context_length=77",
        "model.freeze.image=true",
    ]
    # Chunks make towers cheap, not losses.
    return ([*other[:1], *same, *other[1:]] if load.doing == "the loss" else [*same, *other])[:3]


def power_of_two(most: int) -> int:
    """The largest one that is not above `most`.

    >>> [power_of_two(n) for n in (1, 3, 32, 100)]
    [1, 2, 32, 64]
    """
    return 1 << most.bit_length() - 1

"""Which process am I, and what do the others hold: the only file that talks to `torch.distributed`.

In: tensors with equal shapes on every process. Out: their concatenation, with gradient. On one
process everything here is a no-op that returns its argument.

Convention of the whole package: a loss term returns on process r a value L_r whose MEAN over the
processes is the loss of the global batch (local rows, global columns, global counts). The backward
pass of `gather` SUMS what all processes send back, and data parallelism (DDP, FSDP, DeepSpeed)
averages parameter gradients, so parameters see exactly the gradient of that mean, whether they sit
in a tower (reached through `gather`) or in a term (reached directly).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .launching import place, plugins


@contextmanager
def group(device: torch.device) -> Iterator[None]:
    """The processes that srun or torchrun has started, as one group: for programs that have no trainer.

    Args:
        device: where this process computes.
    """
    here = place()
    if here.world == 1:
        yield
        return
    found = plugins()[0]  # knows whom to ask, whoever started the processes
    os.environ.setdefault("MASTER_ADDR", found.main_address)
    os.environ.setdefault("MASTER_PORT", str(found.main_port))
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, rank=here.rank, world_size=here.world)
    yield  # after an error nobody waits: the others may not know of it
    torch.distributed.destroy_process_group()


def rank() -> int:
    """This process's number, 0 where torch.distributed is not initialised."""
    return torch.distributed.get_rank() if _running() else 0


def world() -> int:
    """How many processes share the batch, 1 where torch.distributed is not initialised."""
    return torch.distributed.get_world_size() if _running() else 1


def device() -> torch.device:
    """Where tensors must lie for the processes to exchange them."""
    nccl = _running() and torch.distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def rows(local: int) -> slice:
    """Where this process's `local` rows lie in a gathered tensor."""
    return slice(rank() * local, (rank() + 1) * local)


def gather(x: Tensor) -> Tensor:
    """Concatenate `x` [n, ...] over all processes in rank order: [world * n, ...], with gradient.

    Every process must call it in the same order with the same shape and dtype: ragged captions are
    a mask, never a ragged collective. Bool tensors pass. On one process this returns `x` itself.
    """
    if world() == 1:
        return x
    if x.dtype == torch.bool:  # not every backend knows bool
        return _all_gather(x.view(torch.uint8)).view(torch.bool)
    gathered: Tensor = _Gather.apply(x)
    return gathered


def exchange(x: Tensor) -> Tensor:
    """Part p of `x` [world, ...] goes to process p: returns what each sent here, [world, ...], with gradient.

    The gradient of a part goes back to where it came from; a part has one reader, so nothing is summed.
    """
    if world() == 1:
        return x
    exchanged: Tensor = _Exchange.apply(x)
    return exchanged


def anywhere(flag: bool | Tensor, device: torch.device | None = None) -> bool:
    """Whether the flag holds on any process, so that all of them stop together or none does."""
    return bool(highest([flag], device)[0])


def highest(values: Sequence[int | Tensor], device: torch.device | None = None) -> list[int]:
    """The largest of each value (integers or booleans) over all processes, in one collective."""
    if world() == 1:
        return [int(value) for value in values]
    stacked = torch.stack(
        [torch.as_tensor(value, dtype=torch.int32, device=device).reshape(()) for value in values]
    )
    torch.distributed.all_reduce(stacked, torch.distributed.ReduceOp.MAX)
    largest: list[int] = stacked.tolist()
    return largest


def total(counts: Sequence[int]) -> list[int]:
    """The sum of each count over all processes."""
    if world() == 1:
        return list(counts)
    sums = torch.tensor(counts, device=device())
    torch.distributed.all_reduce(sums)
    summed: list[int] = sums.tolist()
    return summed


def everyone(word: str) -> list[str]:
    """What every process says, in rank order; a slow collective, for once in a run."""
    words = [word] * world()
    if world() > 1:
        torch.distributed.all_gather_object(words, word)
    return words


class Gather:
    """`gather` with a memory: two terms that ask for the same tensor share one collective.

    Make a fresh one for every step: it keeps what it saw alive.
    """

    def __init__(self) -> None:
        # The source is kept beside its result because an id is only unique while its owner lives.
        self._memo: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """As `gather`; the very same result for the very same tensor."""
        if id(x) not in self._memo:
            self._memo[id(x)] = (x, gather(x))
        return self._memo[id(x)][1]


class _Gather(torch.autograd.Function):
    """All-gather forward; backward the sum over processes of each one's own slice of the gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return _all_gather(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        own = grad.new_empty(grad.shape[0] // world(), *grad.shape[1:])
        torch.distributed.reduce_scatter_tensor(own, grad.contiguous())
        return own


class _Exchange(torch.autograd.Function):
    """All-to-all, which is its own transpose."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return _all_to_all(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        return _all_to_all(grad)


def _all_to_all(x: Tensor) -> Tensor:
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.distributed.all_to_all_single(received, x.contiguous())
    return received


def _all_gather(x: Tensor) -> Tensor:
    everything = x.new_empty(world() * x.shape[0], *x.shape[1:])
    torch.distributed.all_gather_into_tensor(everything, x.contiguous())
    return everything


def _running() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()

"""Run a function on several gloo processes of this machine and bring back what each returns.

Processes are forked from a server that has imported torch and done nothing else: starting one is
quick, and no thread of the test run is copied.
"""

import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

Results = dict[str, Tensor]
WAITS = 1800
"""Seconds that a collective waits, unless told otherwise."""


def spawn(function: Callable[[], Results], world: int, folder: Path) -> list[Results]:
    """What `function` (at module level, so that a child can import it) returns on each process."""
    _start(function, world, folder, join=True)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def start(function: Callable[[], object], world: int, folder: Path, seconds: float = WAITS) -> list[Any]:
    """The processes, not waited for: `function` is expected to end them in its own way."""
    return _start(function, world, folder, False, seconds).processes


def _start(
    function: Callable[[], object], world: int, folder: Path, join: bool, seconds: float = WAITS
) -> Any:
    # What processes would import at first use, each for itself and for seconds: torch._dynamo (by
    # torch.utils.checkpoint and the collectives), deepspeed.
    preload = ["longclip.training", "torch._dynamo", "deepspeed"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
    return multiprocessing.start_processes(
        _child, (function, world, str(folder), seconds), nprocs=world, join=join, start_method="forkserver"
    )


def _child(rank: int, function: Callable[[], object], world: int, folder: str, seconds: float) -> None:
    if Path("/sys/class/net/lo").exists():  # else gloo looks the host's name up, which may hang
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",  # needs no free port
        timeout=timedelta(seconds=seconds),
        rank=rank,
        world_size=world,
    )
    torch.save(function(), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def descend(module: Any, batches: Iterable[Any]) -> Results:
    """The weights of a LongClip after one step of plain SGD on each batch, as data parallelism takes it."""
    stepper: nn.Module = _Stepper(module)
    if distributed.is_initialized():
        stepper = DistributedDataParallel(stepper)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for batch in batches:
        optimizer.zero_grad()
        stepper(batch).backward()
        optimizer.step()
    return dict(module.state_dict())


class _Stepper(nn.Module):
    """A module whose forward pass is a training step, which DistributedDataParallel wraps."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any) -> Tensor:
        return self.module.training_step(batch, 0)

"""How the processes of a run are doing: times, memory, gradient norms, and which process is slow.

A step takes every process equally long, since the fast ones wait in its collectives for the slow ones. What
tells them apart is what each does before it meets the others: waiting for its batch, and encoding it.
All of it travels in one collective per logging interval, and only then does anyone wait for the device.
"""

from __future__ import annotations

import logging
import re
import resource
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from . import dist
from .strategies import gradients
from .types import UserError

log = logging.getLogger(__name__)

WORTH = 0.1
"""Of a step: a process that holds the others up by less is not called slow."""


class Observe(Callback):
    """Logs `rank/*`, `memory/*` and `grad_norm/*`; names a process that stays slower than the others.

    Comes after the callbacks that judge and save, which do not count as waiting for data. Under fsdp2 and
    ZeRO 3 encoding itself waits for the others, so there a process is only found slow by its data.

    Args:
        slow: this many times the median of the others is slow.
        patience: logging intervals in a row after which it is said.
        each: log `rank/R/data_time` and `rank/R/compute_time` of every process R, too.
    """

    def __init__(self, slow: float, patience: int, each: bool = False) -> None:
        if slow <= 1 or patience < 1:
            raise UserError(
                f"observe.slow is {slow} and observe.patience {patience}; slow is a factor above 1 (1.5), "
                "patience a number of logging intervals, 1 or more"
            )
        self.slow, self.patience, self.each = slow, patience, each

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        device = trainer.strategy.root_device
        self.step, self.data, self.compute = Spans(device), Spans(device), Spans(device)
        self.parts = {gradients.part(name) for name, p in module.named_parameters() if p.requires_grad}
        self.nodes = dist.everyone(socket.gethostname())
        self.streaks = [0] * dist.world()
        self.hooks = [
            module.tower.register_forward_pre_hook(self._encoding),
            module.tower.register_forward_hook(self._encoded),
        ]
        self._ready()

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        self.data.stop()

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
            self.squares = gradients.squares(trainer)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.step.stop()
        if trainer.global_step % trainer.log_every_n_steps == 0:
            found = self._everyone(module.device)
            module.log_dict(self._values(found))
            for slow in self._persistent(found) if trainer.is_global_zero else ():
                log.warning("%s", self._sentence(slow))
        self._ready()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def _encoding(self, tower: torch.nn.Module, *_: Any) -> None:
        self.compute.start()

    def _encoded(self, tower: torch.nn.Module, *_: Any) -> None:
        if tower.training:  # a judgement encodes, too
            self.compute.stop()

    def _ready(self) -> None:
        self.step.start()
        self.data.start()

    def _everyone(self, device: torch.device) -> Table:
        """The collective: one row per process."""
        times = [self.step.mean(), self.data.mean(), self.compute.mean()]
        row = torch.tensor([*times, peak_gib(device), resident_gib("VmRSS")], device=device)
        rows = dist.gather(torch.cat([row, self.squares])[None]).tolist()
        step, data, compute, peak, host, *squares = map(list, zip(*rows, strict=True))
        norms = {name: sum(column) ** 0.5 for name, column in zip(gradients.PARTS, squares, strict=True)}
        return Table(step, data, compute, peak, host, norms)

    def _values(self, found: Table) -> dict[str, float]:
        own = [sum(times) for times in zip(found.data, found.compute, strict=True)]
        values = {
            "rank/step_time_max": max(found.step),
            "rank/data_time_max": max(found.data),
            "rank/data_time_median": median(found.data),
            "rank/compute_time_max": max(found.compute),
            "rank/compute_time_median": median(found.compute),
            "rank/slowest": float(own.index(max(own))),
            "memory/peak_gib": max(found.peak),
            "memory/host_gib": max(found.host),
        }
        values |= {f"grad_norm/{name}": norm for name, norm in found.norms.items() if name in self.parts}
        for rank in range(len(own)) if self.each else ():
            values[f"rank/{rank}/data_time"] = found.data[rank]
            values[f"rank/{rank}/compute_time"] = found.compute[rank]
        return values

    def _persistent(self, found: Table) -> list[Slow]:
        """Those that have been slow for just so long that it is to be said."""
        slow = {s.rank: s for s in slow_ranks(found, self.slow)}
        self.streaks = [streak + 1 if r in slow else 0 for r, streak in enumerate(self.streaks)]
        return [s for r, s in slow.items() if self.streaks[r] == self.patience]

    def _sentence(self, slow: Slow) -> str:
        return (
            f"process {slow.rank} on {self.nodes[slow.rank]} holds the others up by {slow.cause}: it takes "
            f"{slow.own:.3f} s before it meets them, they take {slow.others:.3f} s "
            f"(for {self.patience} logging intervals now)"
        )


class Table(NamedTuple):
    """What an interval was like: lists have one number per process, in seconds per step and GiB."""

    step: list[float]
    data: list[float]
    compute: list[float]
    peak: list[float]
    host: list[float]
    norms: dict[str, float]


class Slow(NamedTuple):
    """A process that holds the others up; seconds per step before the first collective."""

    rank: int
    own: float
    others: float  # the median of the others
    cause: str


def slow_ranks(found: Table, factor: float) -> list[Slow]:
    """Processes that take `factor` times as long as the median of the others before they meet them.

    Their own median would count a slow one among the usual: of two processes neither could be slow.
    """
    own = [data + compute for data, compute in zip(found.data, found.compute, strict=True)]
    slow = []
    for rank, seconds in enumerate(own if len(own) > 1 else ()):
        others = _others(own, rank)
        if seconds > factor * others and seconds - others > WORTH * found.step[rank]:
            waiting = found.data[rank] - _others(found.data, rank)
            encoding = found.compute[rank] - _others(found.compute, rank)
            cause = "waiting for data" if waiting > encoding else "computing"
            slow.append(Slow(rank, seconds, others, cause))
    return slow


def _others(values: Sequence[float], rank: int) -> float:
    return median([*values[:rank], *values[rank + 1 :]])


class Spans:
    """Seconds between `start` and `stop`, by the device's own time.

    On CUDA both are events in the stream: nobody waits before the mean is asked for, and a wait of the
    host that the device does not feel counts nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spans: list[tuple[Any, Any]] = []
        self.begun: Any = None

    def start(self) -> None:
        self.begun = self._now()

    def stop(self) -> None:
        self.spans.append((self.begun, self._now()))

    def mean(self) -> float:
        """Of the spans since the last call; 0 where there are none."""
        spans, self.spans = self.spans, []
        return mean(map(self._seconds, spans)) if spans else 0.0

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, span: tuple[Any, Any]) -> float:
        start, stop = span
        if self.device.type != "cuda":
            return float(stop - start)
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1000


def peak_gib(device: torch.device) -> float:
    """The most that this process has held since its start: on its GPU, else in the host's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resident_gib("VmHWM")


def resident_gib(field: str) -> float:
    """The host's memory of this process, workers not counted: VmRSS now, VmHWM at most.

    Without /proc both are what getrusage knows: the most.
    """
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s+(\d+) kB", status.read_text() if status.exists() else "")
    if found:
        return int(found[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

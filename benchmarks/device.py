"""Time and memory on whatever device there is: a CUDA GPU, or the CPU, which only shows that all runs.

In: jobs without arguments. Out: seconds by the wall, with the device's queue empty at both ends; bytes; the
speed of a large matrix product, which no training step can exceed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from typing import NamedTuple

import torch

from .measures import Job, peak_bytes


class Device(NamedTuple):
    """Where a benchmark runs; `quick` for toy sizes."""

    at: torch.device
    quick: bool

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.at) if self.at.type == "cuda" else "a CPU"

    def wait(self) -> None:
        """Until everything asked of the device is done."""
        if self.at.type == "cuda":
            torch.cuda.synchronize(self.at)

    def autocast(self) -> torch.autocast:
        """bf16-mixed; off on the CPU, most of which only emulate bf16."""
        return torch.autocast(self.at.type, torch.bfloat16, enabled=self.at.type == "cuda")

    def once(self, job: Job) -> float:
        """Seconds of one turn."""
        self.wait()
        started = time.perf_counter()
        job()
        self.wait()
        return time.perf_counter() - started

    def seconds(self, jobs: Mapping[str, Job], rounds: int = 10) -> dict[str, float]:
        """The fastest of `rounds` turns of each job, after one to warm up; jobs take turns."""
        for job in jobs.values():
            job()
        best = dict.fromkeys(jobs, float("inf"))
        for _ in range(1 if self.quick else rounds):
            for name, job in jobs.items():
                best[name] = min(best[name], self.once(job))
        return best

    def peak(self, job: Job) -> int:
        """The most bytes at one time beyond those in use before."""
        if self.at.type != "cuda":
            return peak_bytes(job)
        self.clear()
        before = torch.cuda.memory_allocated(self.at)
        torch.cuda.reset_peak_memory_stats(self.at)
        job()
        self.wait()
        return torch.cuda.max_memory_allocated(self.at) - before

    def clear(self) -> None:
        """Give back what nothing holds, so that one job does not disturb the next."""
        gc.collect()
        if self.at.type == "cuda":
            torch.cuda.empty_cache()

    def ceiling(self) -> float:
        """FLOP/s of a large bf16 matrix product: the most that this very device has shown."""
        side = 256 if self.quick else 8192
        a, b = (torch.randn(side, side, device=self.at, dtype=torch.bfloat16) for _ in range(2))
        return 2 * side**3 / self.seconds({"product": lambda: a @ b}, rounds=30)["product"]

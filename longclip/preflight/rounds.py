"""The three rounds: arrive, compare, all-reduce."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from ..launching import place
from ..types import UserError
from .meeting import GRACE, Meeting
from .reports import Look, Report, node, problems, report

MEGABYTES = {"nccl": 256, "gloo": 16}
"""What is sent around: enough to see the bandwidth of the network, little enough to take no time."""
HINT = "the all-reduce does not end (NCCL_DEBUG=INFO shows where, NCCL_SOCKET_IFNAME chooses the network)"


def check(folder: Path, seconds: float, free_gb: float) -> None:
    """Meet the others, compare, and print one line on rank 0.

    Args:
        folder: where runs are kept, which all processes must share.
        seconds: the deadline; a hanging library is ended `2 * GRACE` later.
        free_gb: wanted on the folder's disk.

    Raises:
        UserError: the job is not fit to train.
    """
    begun, here = time.monotonic(), place()
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))
    meeting = Meeting(address, port, here.rank, here.world, node(), seconds)
    mark = folder / f".preflight-{port}-{here.rank}"
    try:
        own = report(here, mark)
        meeting.ask("start", "", lambda words: "")
        _compare(meeting, own, mark.with_name(f".preflight-{port}-0"), free_gb)
        speed = _all_reduce(meeting, own)
    finally:
        mark.unlink(missing_ok=True)
        with contextlib.suppress(RuntimeError):  # the host may be gone; what went wrong is said already
            meeting.leave()
    if here.rank == 0:
        took, what = time.monotonic() - begun, ", ".join(f"{k} {v}" for k, v in own.same.items())
        print(
            f"preflight: {here.world} process(es) on {here.nodes} node(s) in {took:.1f} s; {speed}; "
            f"{own.free_gb:,.0f} GB free in {folder}; {what}",
            flush=True,
        )


def _compare(meeting: Meeting, own: Report, first: Path, free_gb: float) -> None:
    def judge(words: Sequence[str]) -> str:
        heard = [json.loads(word) for word in words]
        reports, looks = [Report(*each[0]) for each in heard], [Look(*each[1]) for each in heard]
        return ". ".join(problems(reports, looks, free_gb))

    meeting.ask("compare", json.dumps([own, Look(time.time(), first.exists())]), judge)


def _all_reduce(meeting: Meeting, own: Report) -> str:
    """Bandwidth of a checked all-reduce, as NCCL's own tests count it."""
    backend, device = ("nccl", f"cuda:{own.local_rank}") if own.gpus else ("gloo", "cpu")
    all_clear = meeting.watch("end", HINT)
    try:
        seconds = _reduce_ones(meeting, backend, torch.ones(MEGABYTES[backend] * 250_000, device=device))
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:300]
        raise UserError(
            f"rank {own.rank} on {own.node}: the all-reduce failed ({reason}): {meeting.absent('end')}"
        ) from error
    meeting.ask("end", "", lambda words: "")
    all_clear()
    moved = 2 * (meeting.world - 1) / meeting.world * MEGABYTES[backend] / 1e3
    return f"all-reduce over {backend} at {moved / seconds:.1f} GB/s"


def _reduce_ones(meeting: Meeting, backend: str, ones: torch.Tensor) -> float:
    """Seconds of the second all-reduce; the first one builds the connections."""
    distributed.init_process_group(
        backend,
        store=distributed.PrefixStore("collective", meeting.store),
        rank=meeting.rank,
        world_size=meeting.world,
        timeout=timedelta(seconds=meeting.left() + GRACE),
    )
    distributed.all_reduce(ones)
    if float(ones.sum(dtype=torch.float64)) != ones.numel() * meeting.world:
        raise RuntimeError("the sum over all processes is wrong")
    begun = time.perf_counter()
    distributed.all_reduce(ones)
    float(ones[0])  # waits for the device
    seconds = time.perf_counter() - begun
    distributed.destroy_process_group()
    return seconds

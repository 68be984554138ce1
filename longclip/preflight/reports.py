"""What a process knows of itself, and what is wrong when all of them are compared."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .. import __version__
from ..launching import Place

SKEW_SECONDS = 30.0
"""Clocks may differ by this much: certificates and file times bear it, and comparing errs by far less."""
ROOT = Path(__file__).resolve().parents[1]


class Report(NamedTuple):
    """One process. `same` must be equal everywhere; `refused` is why it could not write into the folder."""

    rank: int
    node: str
    local_rank: int
    local_world: int
    same: dict[str, str]
    gpus: int
    promised: str | None
    free_gb: float
    refused: str | None


class Look(NamedTuple):
    """What a process saw once all had arrived: its clock, and whether rank 0's file is in the folder."""

    clock: float
    sees_file: bool


def report(here: Place, mark: Path) -> Report:
    """Look around, and leave the file `mark` in the folder that all should share."""
    free, refused = 0.0, None
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(str(here.rank))
        free = shutil.disk_usage(mark.parent).free / 1e9
    except OSError as error:
        refused = str(error)
    promised = os.environ.get("SLURM_STEP_GPUS") or os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Report(
        here.rank, node(), here.local_rank, here.local_world, versions(), gpus, promised, free, refused
    )


def node() -> str:
    """The name that the cluster's own tools use."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def versions() -> dict[str, str]:
    """What must be equal on all processes."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "longclip": f"{__version__} (commit {commit()}, files {digest(ROOT)})",
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def commit() -> str:
    """The checkout's commit, "unknown" outside one."""
    asked = ["git", "-C", str(ROOT), "rev-parse", "--short=9", "HEAD"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def digest(folder: Path) -> str:
    """Of all source files: nodes with copies of their own may have one commit and other edits."""
    seen = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        seen.update(path.read_bytes())
    return seen.hexdigest()[:9]


def problems(reports: Sequence[Report], looks: Sequence[Look], free_gb: float) -> list[str]:
    """One sentence for each thing that is wrong; `reports` and `looks` in rank order."""
    return [
        *_differences(reports),
        *_devices(reports),
        *_folder(reports, looks, free_gb),
        *_clocks(reports, looks),
    ]


def who(reports: Sequence[Report]) -> str:
    """`rank 3, 4 on node2`, by node."""
    nodes: dict[str, list[str]] = {}
    for one in reports:
        nodes.setdefault(one.node, []).append(str(one.rank))
    return "; ".join(f"rank {', '.join(ranks)} on {name}" for name, ranks in nodes.items())


def _differences(reports: Sequence[Report]) -> list[str]:
    found = []
    for what in sorted({key for one in reports for key in one.same}):
        counts = Counter(one.same.get(what, "none") for one in reports)
        usual = counts.most_common(1)[0][0]
        for odd in sorted(counts.keys() - {usual}):
            holders = [one for one in reports if one.same.get(what, "none") == odd]
            found.append(f"{what} is {odd} for {who(holders)} and {usual} elsewhere")
    return found


def _devices(reports: Sequence[Report]) -> list[str]:
    blind = [one for one in reports if one.promised and not one.gpus]
    if blind:
        return [
            f"GPUs {blind[0].promised} were given but torch sees none: {who(blind)} "
            "(the driver, or a CPU build of torch: longclip doctor tells)"
        ]
    short = [one for one in reports if any(other.gpus for other in reports) and one.local_rank >= one.gpus]
    if short:
        return [
            f"no GPU is left for {who(short)} ({short[0].gpus} there): ask for as many GPUs as tasks a node"
        ]
    idle = [one for one in reports if one.gpus > one.local_world]
    if idle:
        one = idle[0]
        return [f"{one.node} has {one.gpus} GPUs for {one.local_world} task(s): --ntasks-per-node={one.gpus}"]
    return []


def _folder(reports: Sequence[Report], looks: Sequence[Look], free_gb: float) -> list[str]:
    refused = [one for one in reports if one.refused]
    if refused:
        return [f"the run folder cannot be written by {who(refused)}: {refused[0].refused}"]
    apart = [one for one, look in zip(reports, looks, strict=True) if not look.sees_file]
    if apart:
        return [
            f"{who(apart)} does not see in the run folder what rank 0 wrote there: "
            "it is a local disk, put runs= on shared storage"
        ]
    full = [one for one in reports if one.free_gb < free_gb]
    if full:
        return [f"{full[0].free_gb:.1f} GB are free in the run folder, {free_gb:g} wanted: {who(full)}"]
    return []


def _clocks(reports: Sequence[Report], looks: Sequence[Look]) -> list[str]:
    middle = sorted(look.clock for look in looks)[len(looks) // 2]
    odd = [one for one, look in zip(reports, looks, strict=True) if abs(look.clock - middle) > SKEW_SECONDS]
    if not odd:
        return []
    off = looks[odd[0].rank].clock - middle
    return [f"the clock is {off:+.0f} s off for {who(odd)}"]

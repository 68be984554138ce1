"""What the machine gives: devices, shared memory, disk, limits. Each check asks the system once."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..data.converting import workers
from .findings import Finding, Level

GB = 1e9
CGROUPS = Path("/sys/fs/cgroup")
SHARED = Path("/dev/shm")  # where workers hand batches over


def devices() -> Iterator[Finding]:
    """The GPUs that torch sees, or why it sees none."""
    import torch

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            yield _gpu(number)
        return
    if Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi"):
        built = f"torch {torch.__version__} (built for CUDA {torch.version.cuda or 'none: a CPU build'})"
        yield Finding(
            "problem",
            "devices",
            f"an NVIDIA driver ({_driver()}) but {built} sees no GPU",
            "a build of torch that this driver can run",
            "nvidia-smi; then install torch and torchvision for the CUDA version it shows",
        )
        return
    yield Finding("ok", "devices", "no GPU: trainer=cpu, enough for the demo and the tests")


def _gpu(number: int) -> Finding:
    import torch

    properties = torch.cuda.get_device_properties(number)
    seen = f"cuda:{number} {properties.name}, {properties.total_memory / GB:.0f} GB, driver {_driver()}, "
    seen += f"CUDA {torch.version.cuda}"
    if torch.cuda.is_bf16_supported(False):
        return Finding("ok", "devices", f"{seen}, bf16")
    return Finding("warning", "devices", f"{seen}, no bf16", "bf16", "trainer.precision=32-true")


def _driver() -> str:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        told = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: nvidia-smi fails ({type(error).__name__})"
    return told[0] if told else "unknown"


def nccl() -> Iterator[Finding]:
    import torch

    if torch.cuda.device_count() < 2:
        yield Finding("ok", "nccl", "not needed: fewer than two GPUs")
    elif torch.distributed.is_available() and torch.distributed.is_nccl_available():
        yield Finding("ok", "nccl", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        remedy = "install torch's CUDA build, or train on one GPU with trainer.devices=1"
        yield Finding("problem", "nccl", "torch was built without it", "NCCL for several GPUs", remedy)


def shared_memory(folder: Path = SHARED) -> Iterator[Finding]:
    """Workers hand batches over through it; a container's default of 64 MB kills them (bus error)."""
    if not folder.is_dir():
        yield Finding("ok", "shared memory", f"no {folder} on this system")
        return
    free = shutil.disk_usage(folder).free
    level: Level = "problem" if free < 0.25 * GB else "warning" if free < GB else "ok"
    remedy = "docker run --shm-size=8g ... (or data.workers=0)"
    yield _space(level, "shared memory", folder, free, "1 GB or more", remedy)


def disk(folders: Iterable[Path]) -> Iterator[Finding]:
    """Room for checkpoints, downloads and caches, and whether they can be written."""
    for folder in folders:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK):
            yield Finding("problem", "disk", f"{folder} cannot be written", "a writable folder", "runs=OTHER")
            continue
        level: Level = "problem" if free < 2 * GB else "warning" if free < 20 * GB else "ok"
        yield _space(
            level, "disk", folder, free, "20 GB or more", f"df -h {there}; then make room, or move it"
        )


def folders(runs: Path) -> list[Path]:
    """Where training writes: runs, downloaded weights, temporary files."""
    hub = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return [runs, Path(hub), Path(tempfile.gettempdir())]


def _space(level: Level, about: str, folder: Path, free: int, wanted: str, remedy: str) -> Finding:
    seen = f"{folder} has {free / GB:,.1f} GB free"
    return Finding(level, about, seen) if level == "ok" else Finding(level, about, seen, wanted, remedy)


def open_files(least: int = 1024) -> Iterator[Finding]:
    """Each worker keeps up to 128 shards open, and every batch on its way holds a few more."""
    try:
        import resource
    except ImportError:
        yield Finding("ok", "open files", "no limit to ask for on this system")
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < least:
        yield Finding("warning", "open files", f"{soft} a process", f"{least} or more", f"ulimit -n {hard}")
    else:
        yield Finding("ok", "open files", f"{soft} a process")


def processors(cgroups: Path = CGROUPS) -> Iterator[Finding]:
    """More threads than the container's share of time only wait for each other."""
    seen = workers.processors()
    quota = _quota(cgroups)
    if quota is None or quota >= seen:
        yield Finding("ok", "processors", f"{seen}")
        return
    whole = max(1, int(quota))
    yield Finding(
        "warning",
        "processors",
        f"{seen} to see, but time for {quota:g} (cgroup quota)",
        "as much time as processors",
        f"export OMP_NUM_THREADS={whole}; data.workers={whole}",
    )


def _quota(cgroups: Path) -> float | None:
    """Processors' worth of time, from cgroup v2 or v1; None where it is not limited."""
    try:
        quota, period = (cgroups / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((cgroups / "cpu" / f"cpu.cfs_{n}_us").read_text() for n in ("quota", "period"))
        except OSError:
            return None
    return None if quota == "max" or float(quota) <= 0 else float(quota) / float(period)


def wandb() -> Iterator[Finding]:
    """The login that `logger=wandb` would use; asking never prompts."""
    from ..hardware import wandb_offline

    with contextlib.redirect_stderr(io.StringIO()):
        offline = wandb_offline()
    if offline:
        seen = (
            "not logged in (or WANDB_MODE says so): logger=wandb keeps runs in files; wandb login changes it"
        )
        yield Finding("ok", "wandb", seen)
    else:
        yield Finding("ok", "wandb", "logged in")

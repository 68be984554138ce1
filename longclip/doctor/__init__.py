"""What is wrong here, and what to type: `longclip doctor`.

    longclip doctor                                        # this machine
    longclip doctor --data datasets/mine --benchmarks datasets/urban1k --deep

In: folders. Out: a line per finding, and exit code 1 if one of them is a problem. `findings` is what a check
says, `versions`, `machine` and `data` are the checks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from . import machine, versions
from .findings import Check, Finding, run, show


def examine(
    train: Sequence[str], benchmarks: Sequence[str], runs: Path, *, model: str, deep: bool = False
) -> int:
    """Print all findings; 1 if one of them is a problem, else 0.

    Args:
        train: folders of shards that train, or roots of several splits, of which train* train.
        benchmarks: the same of those that judge.
        runs: where runs are kept.
        model: an architecture, whose tokenizer the shards should have.
        deep: read every byte: checksums, and the same image under another key.
    """
    return int(show(examination(train, benchmarks, runs, model, deep)))


def examination(
    train: Sequence[str], benchmarks: Sequence[str], runs: Path, model: str, deep: bool
) -> Iterator[Finding]:
    """The findings, as they are made."""
    checks: dict[str, Check] = {
        "python": versions.python,
        "packages": versions.packages,
        "torchvision": versions.torchvision,
        "devices": machine.devices,
        "nccl": machine.nccl,
        "shared memory": machine.shared_memory,
        "disk": partial(machine.disk, machine.folders(runs)),
        "open files": machine.open_files,
        "processors": machine.processors,
        "wandb": machine.wandb,
    }
    if train or benchmarks:
        checks["data"] = partial(_data, train, benchmarks, model, deep)
    for about, check in checks.items():
        yield from run(about, check)


def _data(train: Sequence[str], benchmarks: Sequence[str], model: str, deep: bool) -> Iterator[Finding]:
    from .data import data  # only now: where a package is missing, the checks above can still say so

    yield from data(train, benchmarks, model, deep)

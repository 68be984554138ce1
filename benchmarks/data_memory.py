"""Memory of a worker over many samples, on few shards and on many.

Tiny pictures, so that a minute shows what a worker reads in an hour. What counts is the memory that the
worker has to itself (private pages); pages that it shares with the main process are no growth.
"""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import NamedTuple

import numpy as np
from open_clip.tokenizer import SimpleTokenizer

from longclip.tokens import Tokenizer

from .data_loading import CONTEXT, our_loader
from .data_synthetic import photo, shards
from .measures import Row, at_most

BATCH = 100
POINTS = 20  # of the curve
SIZE = 8


class Point(NamedTuple):
    """Of a curve."""

    seen: int  # samples
    mib: float


def rows(quick: bool, folder: Path) -> list[Row]:
    samples, few, many = (2_000, 2, 20) if quick else (500_000, 100, 2_000)
    tokenizer = Tokenizer(SimpleTokenizer(), CONTEXT)
    on_few = _curve(folder / "few", few, many * 10, samples // 5, tokenizer)
    on_many = _curve(folder / "many", many, many * 10, samples, tokenizer)
    more = on_many[len(on_many) // 5 - 1].mib - on_few[-1].mib
    growth = f"growth of a worker's memory in {samples:,} samples, second half, MiB per 100,000"
    return [
        at_most("memory.time", growth, _slope(on_many), 1),
        at_most("memory.shards", f"memory of a worker, {many:,} shards less {few:,}, MiB", more, 8),
    ]


def _curve(folder: Path, count: int, records: int, samples: int, tokenizer: Tokenizer) -> list[Point]:
    """The memory of the only worker of a training on so many shards, printed as it is measured."""
    shards(folder, [photo(0, SIZE)], records, records // count, tokenizer)
    before, curve = set(multiprocessing.active_children()), list[Point]()
    loader = our_loader(folder, tokenizer, BATCH, samples, workers=1, several=True, size=SIZE)
    for step, _ in enumerate(loader, 1):
        if step * BATCH * POINTS // samples > (step - 1) * BATCH * POINTS // samples:
            (worker,) = set(multiprocessing.active_children()) - before
            curve.append(Point(step * BATCH, _private(worker.pid)))
            print(f"{count:,} shards, {curve[-1].seen:,} samples: {curve[-1].mib:.1f} MiB", flush=True)
    return curve


def _private(pid: int | None) -> float:
    """MiB of memory that no other process has."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def _slope(curve: list[Point]) -> float:
    """MiB per 100,000 samples over the second half: the first fills the caches, which are bounded."""
    seen, mib = np.array(curve[len(curve) // 2 :]).T
    return float(np.polyfit(seen / 100_000, mib, 1)[0])

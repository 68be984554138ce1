"""Memory of a worker over many samples, on few shards and on many.

Tiny pictures, so that a minute shows what a worker reads in an hour. What counts is the memory that the
worker has to itself (private pages); pages that it shares with the main process are no growth.
"""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
from open_clip.tokenizer import SimpleTokenizer

from longclip.tokens import Tokenizer

from .data_loading import our_loader
from .data_synthetic import photo, shards
from .measures import Row, at_most

BATCH = 250
POINTS = 20  # of the curve
SIZE = 8
Curve = list[tuple[int, float]]
"""(samples, MiB)"""


def rows(quick: bool, folder: Path) -> list[Row]:
    samples, many = (2_000, 20) if quick else (500_000, 2_000)
    records = 500 if quick else 50_000
    tokenizer = Tokenizer(SimpleTokenizer(), 248)
    curves = {}
    for count in (many // 20, many):
        tiny = folder / f"tiny-{count}"
        shards(tiny, [photo(0, SIZE)], records, records // count, tokenizer)
        curves[count] = _curve(tiny, tokenizer, samples)
        print(f"{count} shards: " + ", ".join(f"{seen:,}: {mib:.1f} MiB" for seen, mib in curves[count]))
    last = {count: curve[-1][1] for count, curve in curves.items()}
    return [
        at_most(
            "memory.time",
            f"growth of a worker's memory, {many:,} shards, MiB per 100,000 samples",
            _slope(curves[many]),
            1,
        ),
        at_most(
            "memory.shards",
            f"memory of a worker, {many:,} shards against {many // 20:,}, MiB more",
            last[many] - last[many // 20],
            8,
        ),
    ]


def _curve(folder: Path, tokenizer: Tokenizer, samples: int) -> Curve:
    loader = our_loader(folder, tokenizer, BATCH, samples, workers=1, several=True, size=SIZE)
    every, curve = samples // BATCH // POINTS or 1, []
    before = set(multiprocessing.active_children())
    for step, _ in enumerate(loader):
        if step % every == every - 1:
            (worker,) = set(multiprocessing.active_children()) - before
            curve.append(((step + 1) * BATCH, _private(worker.pid)))
    return curve


def _private(pid: int | None) -> float:
    """MiB of memory that no other process has."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def _slope(curve: Curve) -> float:
    """MiB per 100,000 samples over the second half: the first fills the caches, which are bounded."""
    seen, mib = np.array(curve[len(curve) // 2 :]).T
    return float(np.polyfit(seen / 100_000, mib, 1)[0])

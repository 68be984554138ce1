"""Every goal in one table, side by side with open_clip on the same work.

    python -m benchmarks                              # minutes, on a machine where nothing else runs
    python -m benchmarks --quick                      # shows that it runs; its figures mean nothing
    python -m benchmarks --only text losses --json benchmarks.json
    python -m benchmarks --captions my_captions.txt   # real lengths, too; one caption a line

One process, one thread, jobs in turn, the fastest turn of each counts. Needs no data and no network.
The exit code says that everything ran, not that every goal is met.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
from pathlib import Path

from . import documents
from .measures import Row, save, show

PARTS = ["text", "step", "losses", "local", "memory"]
PARTS += ["data_text", "data_images", "data_loading", "data_memory"]
"""Modules of this package, imported when their turn comes: `rows(quick, folder)` is all they share."""

MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**36)}
"""Freed memory stays with the process. Otherwise glibc returns large blocks to the system and faults them
in again, which makes whatever uses the largest tensors look worse than it is."""


def main() -> None:
    options = _options()
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):  # read once, at the start
        os.environ |= MALLOC
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]])
    rows = run(options.only, options.quick, options.captions, options.json)
    title = "longclip beside open_clip, one core"
    show(rows, f"{title}: QUICK, THESE FIGURES MEAN NOTHING" if options.quick else title)
    if options.markdown:
        documents.replace(options.markdown, "goals", documents.of_rows(rows))


def run(parts: list[str], quick: bool, captions: Path | None, json: Path | None) -> list[Row]:
    """The rows of these parts, by goal; those of a quick run are marked. `json` has them after every part."""
    import torch

    from . import lengths

    torch.set_num_threads(1)
    if captions:
        lengths.SOURCES[captions.stem] = lengths.drawn_from(lengths.of_captions(captions))
    rows: list[Row] = []
    mark = "(quick) " if quick else ""
    for part in parts:
        started = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            found = importlib.import_module(f"benchmarks.{part}").rows(quick, Path(folder))
        rows += [row._replace(measure=mark + row.measure) for row in found]
        rows.sort(key=lambda row: (not row.id.startswith("P"), _number(row.id)))  # a stable sort
        if json:
            save(rows, json)
        print(f"{part}: {time.process_time() - started:.0f} s", file=sys.stderr, flush=True)
    return rows


def _number(id: str) -> int:
    """Of the goal: 12 for P12.2.nine."""
    return int("".join(filter(str.isdigit, id.partition(".")[0])) or 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few samples of everything")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument("--captions", type=Path, help="a text file whose captions' lengths are measured, too")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    parser.add_argument("--markdown", type=Path, help="a document that has marks for the table")
    return parser.parse_args()


if __name__ == "__main__":
    main()

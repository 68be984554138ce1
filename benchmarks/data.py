"""The data path beside open_clip's: decoding, tokenising, tar to batch, and a worker's memory.

    python -m benchmarks.data                     # about five minutes where nothing else runs
    python -m benchmarks.data --quick             # seconds; shows that it runs, its figures mean nothing
    python -m benchmarks.data --only text images --json data.json

One run, one thread a process, jobs in turn, the fastest turn of each counts. Needs no data and no network.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from . import data_images, data_loading, data_memory, data_text
from .measures import Row, save, show

PARTS = {
    "images": lambda quick, folder: data_images.rows(quick),
    "text": lambda quick, folder: data_text.rows(quick),
    "loading": data_loading.rows,
    "memory": data_memory.rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few samples of everything")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for part in options.only:
            rows += PARTS[part](options.quick, Path(folder))
    show(rows, "longclip's data path beside open_clip's")
    if options.json:
        save(rows, options.json)


if __name__ == "__main__":
    main()

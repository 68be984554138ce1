"""What only a CUDA GPU can show, beside open_clip on the same GPU.

    python -m benchmarks.gpu --json gpu.json              # about a quarter of an hour on an H200
    python -m benchmarks.gpu --only attention loss
    python -m benchmarks.gpu --device cpu --quick         # toy sizes: shows that everything runs

bf16, one GPU, no data and no network. `--markdown docs/performance.md` writes the table there. Where a part
fails, the others still run; the failure is told and the exit code is 1.
"""

from __future__ import annotations

import argparse
import platform
import sys
import traceback
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from . import documents, gpu_attention, gpu_loss, gpu_steps, gpu_waits
from .device import Device
from .measures import Row, save, show

PARTS: dict[str, Callable[[Device], list[Row]]] = {
    "attention": gpu_attention.rows,
    "loss": gpu_loss.rows,
    "compile": gpu_steps.compilation,
    "speed": gpu_steps.speed,
    "largest": gpu_steps.largest,
    "waits": gpu_waits.rows,
}


def main() -> None:
    options = _options()
    device = Device(torch.device(options.device), options.quick)
    if device.at.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA GPU here; --device cpu --quick shows that the script runs")
    if device.at.type == "cpu":
        torch.compiler.set_default_backend("eager")  # traced as on a GPU, but nothing is generated
    rows, failed = list[Row](), list[str]()
    for part in options.only:
        print(f"{part} ...", file=sys.stderr, flush=True)
        try:
            rows += PARTS[part](device)
        except Exception:  # an hour of a rented GPU should not end with the first surprise
            traceback.print_exc()
            failed.append(part)
        device.clear()
    rows = [row._replace(measure=f"(quick) {row.measure}") for row in rows] if options.quick else rows
    title = f"{device.name}, torch {torch.__version__}, {platform.node()}, {date.today()}"
    show(rows, f"{title}: QUICK, THESE FIGURES MEAN NOTHING" if options.quick else title)
    if options.json:
        save(rows, options.json)
    if options.markdown:
        documents.replace(options.markdown, "gpu", f"{title}\n\n{documents.of_rows(rows)}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... or cpu")
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it runs")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    parser.add_argument("--markdown", type=Path, help="a document that has marks for the table")
    return parser.parse_args()


if __name__ == "__main__":
    main()

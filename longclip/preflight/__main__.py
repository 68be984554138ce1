"""`srun python -m longclip.preflight --folder runs --deadline 120`: exit code 0 fit to train, 2 unfit."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..types import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Check this job from this process; a fault is one sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m longclip.preflight", description="Is this job fit to train?"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs"), help="where runs are kept; default: runs"
    )
    parser.add_argument("--deadline", type=float, default=120, help="seconds for all of it; default: 120")
    parser.add_argument("--free-gb", type=float, default=5, help="wanted on that disk; default: 5")
    options = parser.parse_args(arguments)
    # Ours is the message; torch would print a stack of C++ frames for every attempt to connect.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from .rounds import check

    try:
        check(options.folder, options.deadline, options.free_gb)
    except UserError as error:
        print(f"preflight: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def end(code: int) -> None:
    """At once: threads of a collective that failed can abort a tidy end, and the code would be lost."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end(main())

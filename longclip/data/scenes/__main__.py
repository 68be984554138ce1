"""Draw the picture of a few scenes, or write the splits."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import make
from .picture import picture


def main() -> None:
    """Draw the picture of a few scenes, or write the splits."""
    parser = argparse.ArgumentParser(prog="python -m longclip.data.scenes", description=__doc__)
    parser.add_argument(
        "--picture", metavar="PNG", help="draw a few scenes with their captions into this file"
    )
    parser.add_argument(
        "--make", metavar="DIR", help="write train, heldout and distractors under this directory"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not (options.picture or options.make):
        parser.error("say --picture PNG or --make DIR")
    if options.picture:
        picture(Path(options.picture), options.seed)
        print(f"drew {options.picture}")
    if options.make:
        print(*make(options.make, seed=options.seed).values(), sep="\n")


if __name__ == "__main__":
    main()

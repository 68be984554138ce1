"""`longclip shards | export | import`: everything around training. Each command imports what it needs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .types import UserError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a user's mistake is one sentence and exit code 2."""
    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="longclip", description="Train CLIP on long, detailed captions.")
    commands = root.add_subparsers(required=True, metavar="COMMAND")

    shards = commands.add_parser("shards", help="images and captions -> tar shards to train on")
    shards.add_argument("source", type=Path, help="a folder or a tar with images and captions.jsonl")
    shards.add_argument("--layout", default="jsonl", choices=["jsonl"], help="how the source is laid out")
    shards.add_argument("--out", type=Path, required=True, help="one folder of shards per split is made here")
    shards.add_argument("--samples-per-shard", type=int, default=1000)
    shards.add_argument("--splitter", default="syntok", choices=["syntok", "dreamlip"], help="finds sentences")
    shards.add_argument("--max-faults", type=float, default=0.01, help="stop above this share of bad entries")
    shards.add_argument("--model", default="ViT-B-16", help="the architecture whose tokenizer makes the ids")
    shards.set_defaults(run=_shards)

    export = commands.add_parser("export", help="a run or checkpoint -> a folder that open_clip loads")
    export.add_argument("source", type=Path, help="a run directory or a .ckpt file")
    export.add_argument("--format", default="open_clip", choices=["open_clip"])
    export.add_argument("--out", type=Path, required=True)
    export.set_defaults(run=_export)

    bring = commands.add_parser("import", help="Long-CLIP or OpenAI weights -> a folder that open_clip loads")
    bring.add_argument("source", help="a weights file (OpenAI archive, Long-CLIP .pt, open_clip epoch_N.pt ...)")
    bring.add_argument("--out", type=Path, required=True)
    bring.add_argument("--architecture", help="an open_clip name; default: read from the tensors' shapes")
    bring.add_argument("--context-length", type=int, help="stretch the positions to this; default: as they are")
    bring.set_defaults(run=_import)
    return root

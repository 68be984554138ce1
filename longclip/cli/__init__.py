"""`longclip recipes | shards | sidecar | embed | facets | cluster | search | preview | doctor | ...`.

Each command imports what it needs.
"""

from __future__ import annotations

import argparse
import sys

from ..types import UserError
from . import data, models, recipes, search, sidecars


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a user's mistake is one sentence and exit code 2, a doctor's problem is 1."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="longclip", description="Train CLIP on long, detailed captions.")
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        recipes.recipes_command,
        data.shards_command,
        data.preview_command,
        data.doctor_command,
        sidecars.sidecar_command,
        sidecars.embed_command,
        sidecars.facets_command,
        sidecars.cluster_command,
        search.search_command,
        models.average_command,
        models.export_command,
        models.push_command,
        models.import_command,
    ):
        add(commands)
    return root

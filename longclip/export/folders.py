"""A folder whose files appear together: made in a scratch folder beside, then renamed into place."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from ..types import UserError


def write_whole(directory: Path, marker: str, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into an empty folder and move all of it into `directory`, over an older export.

    `marker` is the file without which nothing opens the folder: it goes first and comes last, so a run that
    dies midway never leaves new weights beside an old configuration. Raises UserError where the disk refuses.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".export-") as scratch:
            fill(Path(scratch))
            (directory / marker).unlink(missing_ok=True)
            for file in sorted(Path(scratch).iterdir(), key=lambda file: file.name == marker):
                file.chmod(0o644)  # safetensors lets nobody else read what it writes
                os.replace(file, directory / file.name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"The export could not be written to {directory}: {error}.") from error

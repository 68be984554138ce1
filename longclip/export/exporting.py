"""A trained model -> a checked folder in one of the formats.

write(backbone, "exports/mine", "hf")           # refuses what the format cannot express, before writing
export_model("runs/mine", "exports/mine", "hf") # opens anything, writes, verifies, describes
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import models
from ..towers.pretrained import Backbone
from ..types import UserError
from . import card, facts, parity
from .folders import write_whole
from .formats import FORMATS, Format
from .model import find_problems, plain

log = logging.getLogger(__name__)


def write(
    backbone: Backbone,
    directory: str | Path,
    kind: str = "open_clip",
    dtype: str = "fp32",
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write the files of a format, unverified; returns the directory.

    `provenance` (plain JSON values) stands in the configuration under "longclip". An older export of the kind
    is replaced. Raises UserError with the list of all that the format cannot express, where a library is
    missing, and where the disk refuses.
    """
    chosen = _format(kind)
    made = plain(backbone, dtype, provenance)
    problems = find_problems(backbone, made) or chosen.problems(made)
    if problems:
        raise UserError(f"This model cannot be exported as {kind}:\n  - " + "\n  - ".join(problems))
    _check_installed(kind, chosen)
    directory = Path(directory).expanduser()
    write_whole(directory, chosen.marker, lambda folder: chosen.write(made, folder))
    return directory


def _format(kind: str) -> Format:
    if kind not in FORMATS:
        raise UserError(f"{kind!r} is no format of an export: choose one of {', '.join(FORMATS)}")
    return FORMATS[kind]


def _check_installed(kind: str, chosen: Format) -> None:
    missing = [name for name in chosen.needs if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"an export as {kind} is written and checked with {', '.join(missing)}, not installed here: "
            f"pip install 'longclip[{chosen.extra}]'"
        )


def export_model(
    source: str | Path,
    directory: str | Path,
    kind: str = "open_clip",
    dtype: str = "fp32",
    weights: str | None = None,
) -> list[parity.Row]:
    """Anything that `models.load` opens -> a folder of that format, verified, with a model card.

    `weights` says which of a checkpoint, as there. Returns what `parity.verify` found. Raises UserError as it
    and `write` do; the files stay where only the check fails, so that they can be looked at.
    """
    backbone = models.load(str(source), weights=weights)
    known = facts.gather(str(source), backbone, dtype, weights)
    write(backbone, directory, kind, dtype, known.provenance)
    rows = parity.verify(backbone, kind, directory, dtype)
    card.write(known, backbone, kind, rows, Path(directory))
    furthest = max(row.difference for row in rows)
    log.info("exported to %s; features equal the model's within %.1e", directory, furthest)
    return rows

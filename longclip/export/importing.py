"""Foreign weights -> a folder that open_clip opens."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..towers.pretrained import build
from .exporting import write


def import_weights(
    source: str,
    out: str | Path,
    architecture: str | None = None,
    context_length: int | None = None,
    positions: str = "stretch",
    keep: int = 20,
    attention_temperature: float = 1.0,
) -> Path:
    """Bring foreign weights (a file, tag, local-dir: or hf-hub:) into an open_clip folder `out`.

    OpenAI's ViT archives and Long-CLIP's .pt say their architecture by their shapes; other files need it
    named. `context_length` None keeps the length of the weights; a longer one resizes the positions as
    `positions` and `keep` say, and `attention_temperature` is folded into the weights: what can be done for
    long texts without training. Raises UserError as `build` and `write` do.
    """
    backbone = build(
        architecture, source, context_length, positions, keep, attention_temperature=attention_temperature
    )
    file = Path(source).expanduser()
    provenance = {"imported_from": source, "architecture": architecture}
    if file.is_file():
        provenance["sha256"] = _sha256(file)
    return write(backbone, out, provenance=provenance)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Search a folder of pictures by long descriptions, on the command line or on a local page.

longclip search DIR --model MODEL [--query "A long description ..."] [--serve]

`folder` finds pictures, `store` keeps embeddings, `index` makes them, `query` answers; `terminal`, `page`,
`gallery` and `serving` show it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch

from .. import models
from ..data.module import transform_of
from ..towers.clip import DualTower
from ..types import UserError
from .folder import walk
from .index import Embedder, build
from .query import Searcher
from .store import Store


def open_folder(
    root: Path,
    model: str,
    progress: Callable[[int, int], object],
    *,
    cache: Path | None = None,
    device: str | None = None,
    batch_size: int = 32,
    workers: int = 2,
) -> Searcher:
    """A folder that answers queries; what is not embedded yet is embedded now.

    Args:
        root: the folder.
        model: whatever `models.load` takes.
        progress: called as (done, total) while pictures are embedded.
        cache: where embeddings are kept; None: the user's cache folder.
        device: torch's name; None: a GPU where there is one.
        workers: threads that read and decode pictures.

    Raises:
        UserError: no such model or folder, or nothing in it to search.
    """
    found = walk(root)  # first, as a wrong folder should be said before a model is loaded
    backbone = models.load(model)
    tower = DualTower(backbone).to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    transform = transform_of(tower.preprocess_cfg)
    store = Store((cache or default_cache()) / _name(root, models.fingerprint(backbone)))
    try:
        index = build(found, Embedder(tower, transform, batch_size, workers), store, progress)
    except KeyboardInterrupt:
        raise UserError("interrupted: the same command goes on with what is embedded already") from None
    return Searcher(tower, transform, index)


def default_cache() -> Path:
    """The user's cache folder, as XDG has it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longclip" / "search"


def _name(root: Path, fingerprint: str) -> str:
    """The place of this folder and this model in the cache."""
    where = hashlib.sha256(f"{root.resolve()}\n{fingerprint}".encode(errors="surrogateescape")).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', root.resolve().name)[:40]}-{where[:16]}"

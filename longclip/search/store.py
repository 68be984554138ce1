"""Embeddings of pictures on disk, so that a picture is embedded once.

    00001.safetensors    image_NE, float32; which files they are of as JSON in the header
    00002.safetensors    ...

A part appears under its name when it is complete, so that a killed run loses the last part only. It is a
cache: a part that cannot be read is as if it were not there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..types import UserError
from .folder import File

Vector = NDArray[np.float32]


class Store:
    """The parts in one folder, which is made when the first is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> dict[File, Vector]:
        """Everything that is stored; of two embeddings of a file the later one."""
        known: dict[File, Vector] = {}
        for part in self._parts():
            known.update(_read(part))
        return known

    def add(self, vectors: Mapping[File, Vector]) -> None:
        """Write one more part."""
        parts = self._parts()
        path = self.folder / f"{int(parts[-1].stem) + 1 if parts else 1:05d}.safetensors"
        partial = path.with_suffix(".partial")
        files = json.dumps([list(file) for file in vectors])
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({"image_NE": np.stack(list(vectors.values()))}, partial, metadata={"files": files})
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the embeddings cannot be kept in {self.folder} ({error}): name another folder with --cache"
            ) from error

    def replace(self, vectors: Mapping[File, Vector]) -> None:
        """Let these be all, in one part."""
        older = self._parts()
        if vectors:
            self.add(vectors)
        for part in older:
            part.unlink(missing_ok=True)

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.safetensors"))


def _read(part: Path) -> dict[File, Vector]:
    try:
        with safe_open(part, framework="numpy") as opened:
            files = [File(*values) for values in json.loads(opened.metadata()["files"])]
            return dict(zip(files, opened.get_tensor("image_NE"), strict=True))
    except (OSError, SafetensorError, ValueError, TypeError, KeyError):
        return {}

"""The pictures below a folder.

In: a folder of the user's. Out: its JPEG, PNG and WebP files, and what else lies there, by kind.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..types import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class File(NamedTuple):
    """A picture and the state that it is in: another size or time means another picture."""

    path: str  # below the folder
    size: int  # bytes
    changed: int  # nanoseconds

    @property
    def shown(self) -> str:
        """The path as it may be printed: file names can hold control characters and broken Unicode."""
        return "".join(char if char.isprintable() else "\ufffd" for char in self.path)


class Found(NamedTuple):
    root: Path
    pictures: list[File]  # by path
    passed_over: Counter[str]  # other files, by suffix or by reason


def walk(root: Path) -> Found:
    """Everything below a folder but for what is hidden. No link leads out of it.

    Raises:
        UserError: no such folder, or no picture in it.
    """
    if not root.is_dir():
        raise UserError(f"{root} is no folder: name the folder with the pictures to search")
    found = Found(root, [], Counter())
    for path in _files(root, found.passed_over):
        kind = path.suffix.lower()
        if kind not in SUFFIXES:
            found.passed_over[kind or "no suffix"] += 1
        elif path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
            found.passed_over["links out of the folder"] += 1
        elif path.is_file():
            state = path.stat()
            found.pictures.append(File(str(path.relative_to(root)), state.st_size, state.st_mtime_ns))
    found.pictures.sort()
    if not found.pictures:
        others = "".join(f"; {count:,} {kind}" for kind, count in found.passed_over.most_common(5))
        raise UserError(
            f"{root} holds no picture ({', '.join(SUFFIXES)}{others}): name the folder with the pictures"
        )
    return found


def _files(root: Path, passed_over: Counter[str]) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        passed_over["folders that cannot be read"] += 1

    for folder, below, names in os.walk(root, onerror=unreadable):
        below[:] = [name for name in below if not name.startswith(".")]
        passed_over.update("linked folders" for name in below if Path(folder, name).is_symlink())
        yield from (Path(folder, name) for name in names if not name.startswith("."))

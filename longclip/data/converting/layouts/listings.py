"""What holds the entries of a source: listings, webdataset tars, or loose files that share a name.

In: what a user points at (a file, a folder, a tar or a glob) and a layout. Out: `Listing`s in the order in
which they are read.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ....types import UserError
from . import samples
from .files import Files, Folder, Place, Tar
from .mapping import Layout


class Listing(NamedTuple):
    """One thing that holds entries; many files of one pattern count as one."""

    kind: str  # "rows", "tar" or "loose"
    name: str  # of the listing, or a pattern, within `files`
    files: Files  # what names in it are relative to
    size: int  # in bytes; of "loose", in files
    path: str = ""  # of a file that the user named, or of a tar

    def parts(self, besides: str) -> Iterator[tuple[str, Place, int]]:
        """Name, place and size of each file of "rows"; not of the one named `besides`."""
        if self.path:
            yield self.name, Place(self.path), self.size
            return
        for name in self.files.match(self.name):
            place = self.files.find(name)
            if place is not None and not name.endswith((samples.SIDE_FILE, besides or "/")):
                yield name, place, os.path.getsize(place.path) if place.size < 0 else place.size


def discover(source: str, layout: Layout, follow_links: bool) -> list[Listing]:
    """All listings of a source.

    Raises:
        UserError: there is no such source, or it holds nothing of this layout.
    """
    found = [listing for path in _paths(source) for listing in _listings(path, layout, follow_links)]
    if not found:
        raise UserError(
            f"{source} holds nothing that fits the layout ({layout.about}): looked for "
            f"{', '.join(layout.files)}; give the listing itself, or another --layout"
        )
    return found


def opened(path: Path, follow_links: bool) -> Files:
    """A folder or a tar.

    Raises:
        UserError: it is neither, or not there.
    """
    if path.is_dir():
        return Folder(path, follow_links)
    if not path.exists():
        raise UserError(f"{path} does not exist; give the folder or tar that image paths begin in")
    return Tar(path)


def _paths(source: str) -> list[Path]:
    if os.path.exists(source):
        return [Path(source)]
    found = sorted(glob.glob(source, recursive=True))
    if not found:
        raise UserError(
            f"{source} does not exist; give a folder, a tar, a listing, or a pattern in quotes ('cc3m/*.tar')"
        )
    return [Path(path) for path in found]


def _listings(path: Path, layout: Layout, follow_links: bool) -> list[Listing]:
    if path.is_file():
        size, beside = path.stat().st_size, Folder(path.parent, follow_links)
        if path.suffix != ".tar":
            return [Listing("rows", path.name, beside, size, str(path))]
        if "*.tar" in layout.files:
            return [Listing("tar", path.name, beside, size, str(path))]
    files = opened(path, follow_links)
    for pattern in layout.files:
        if found := _matching(path, files, pattern, layout.split.file):
            return found
    return []


def _matching(path: Path, files: Files, pattern: str, besides: str) -> list[Listing]:
    if pattern == "**":
        size = samples.count(path) if isinstance(files, Folder) else 0
        return [Listing("loose", str(path), files, size)] if size else []
    whole = Listing("rows", pattern, files, 0)
    if pattern.endswith(".tar"):
        return [Listing("tar", name, files, size, place.path) for name, place, size in whole.parts(besides)]
    sizes = [size for _, _, size in whole.parts(besides)]
    return [whole._replace(size=sum(sizes))] if sizes else []

"""Readers of what people have: one generator per public layout.

In: a folder or an uncompressed tar. Out: `Entry`s, and a `Fault` wherever an entry cannot be used; nothing is
extracted, executed or read outside the source.

`jsonl`: images and a `captions.jsonl`, at the top or one level down, one JSON object a line:

    {"image": "images/1.jpg", "captions": ["A dog.", "A brown dog runs."], "split": "train"}

`image` is looked for beside the file, then in `images/` beside it. `captions` is a list of texts, or an
object {"source": text or list of texts}; texts of a plain list have the source "caption". `split` (default
"train") and `key` (default: made from the path) are optional; other fields are kept as `meta`.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from ..captions import texts_of
from ..types import UserError
from .shards import LONGEST_KEY

LISTING = "captions.jsonl"
_SPLIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Entry(NamedTuple):
    """An image and what is said of it, as the source has it: neither decoded nor cleaned."""

    split: str
    key: str
    image: bytes
    captions: list[tuple[str, str]]  # source, text
    meta: dict[str, object]


class Fault(NamedTuple):
    """Why an entry cannot be used."""

    key: str  # of the entry, or the line it stands on
    reason: str  # a few words, the same for all entries of its kind: faults are counted by it
    detail: str = ""


class _Files(Protocol):
    """A folder or a tar: names with forward slashes, relative to the source."""

    def open(self, name: str) -> IO[bytes] | None: ...

    def listings(self) -> list[str]: ...


def read(source: str | Path, layout: str) -> Iterator[Entry | Fault]:
    """The entries of a source.

    Raises:
        UserError: no such layout or source, or the source holds no listing.
    """
    if layout not in LAYOUTS:
        raise UserError(f"there is no layout {layout!r}; choose one of {', '.join(sorted(LAYOUTS))}")
    return LAYOUTS[layout](_files(Path(source)), str(source))


def _jsonl(files: _Files, source: str) -> Iterator[Entry | Fault]:
    found = files.listings()
    if len(found) != 1:
        seen = f"found {', '.join(found)}" if found else f"found no {LISTING}"
        raise UserError(
            f"{source}: the layout jsonl wants one {LISTING} at the top or one level down; {seen}. "
            'It has a line {"image": "images/1.jpg", "captions": ["A dog.", ...]} for each image'
        )
    listing = files.open(found[0])
    assert listing is not None, found
    with listing:
        for number, line in enumerate(listing, 1):
            if line.strip():
                yield _entry(line, f"{found[0]}:{number}", posixpath.dirname(found[0]), files)


def _entry(line: bytes, where: str, folder: str, files: _Files) -> Entry | Fault:
    try:
        fields = json.loads(line)
    except ValueError as error:
        return Fault(where, "line is no JSON", str(error))
    image = fields.pop("image", None) if isinstance(fields, dict) else None
    if not isinstance(image, str) or not image:
        return Fault(where, "no image named", line[:80].decode(errors="replace"))
    key, split = fields.pop("key", None) or key_of(image), fields.pop("split", "train")
    if not isinstance(key, str):
        return Fault(where, "key is no text", repr(key)[:80])
    if not isinstance(split, str) or not _SPLIT.fullmatch(split):
        return Fault(key, "split is no plain name", repr(split)[:80])
    try:
        captions = _captions(fields.pop("captions", None), where)
    except UserError as error:
        return Fault(key, "captions are no list of texts", str(error))
    for name in (posixpath.join(folder, image), posixpath.join(folder, "images", image)):
        opened = files.open(name)
        if opened is not None:
            with opened:
                return Entry(split, key, opened.read(), captions, {"image": image, **fields})
    return Fault(key, "image is missing", f"{where} names {image}")


def _captions(value: object, where: str) -> list[tuple[str, str]]:
    """(source, text) pairs. A plain string is refused: where a list is meant it would become letters."""
    if not isinstance(value, dict):
        return [("caption", text) for text in texts_of(value, where)]
    return [(source, text) for source in value for text in texts_of(value[source], where, allow_string=True)]


def key_of(image: str) -> str:
    """A sample key from an image's path: no dots, slashes or blanks, short enough, still told apart."""
    path = posixpath.splitext(posixpath.normpath(image).removeprefix("images/"))[0]
    key = re.sub(r"[./\\\s]|[^\w-]", "_", path)
    if len(key.encode()) > LONGEST_KEY:
        beginning = key.encode()[: LONGEST_KEY - 20].decode(errors="ignore")
        key = f"{beginning}-{hashlib.sha256(path.encode()).hexdigest()[:16]}"
    return key


def _files(source: Path) -> _Files:
    if source.is_dir():
        return _Folder(source)
    if not source.exists():
        raise UserError(f"{source} does not exist; give a folder or a tar with images and a {LISTING}")
    try:
        return _Tar(source)
    except tarfile.ReadError as error:
        raise UserError(
            f"{source} is neither a folder nor an uncompressed tar ({error}); gunzip or unpack it first"
        ) from error


class _Folder:
    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self, name: str) -> IO[bytes] | None:
        name = posixpath.normpath(name)
        if name.startswith(("/", "../")) or not (self.root / name).is_file():
            return None
        return open(self.root / name, "rb")

    def listings(self) -> list[str]:
        found = [*self.root.glob(LISTING), *sorted(self.root.glob(f"*/{LISTING}"))]
        return [path.relative_to(self.root).as_posix() for path in found]


class _Tar:
    """Read in place: one pass over the headers, then members by offset."""

    def __init__(self, path: Path) -> None:
        self._tar = tarfile.open(path, "r:")  # noqa: SIM115 - open while entries are read
        self._members = {posixpath.normpath(m.name): m for m in self._tar if m.isreg()}

    def open(self, name: str) -> IO[bytes] | None:
        member = self._members.get(posixpath.normpath(name))
        return None if member is None else self._tar.extractfile(member)

    def listings(self) -> list[str]:
        return sorted(n for n in self._members if posixpath.basename(n) == LISTING and n.count("/") <= 1)


LAYOUTS: dict[str, Callable[[_Files, str], Iterator[Entry | Fault]]] = {"jsonl": _jsonl}

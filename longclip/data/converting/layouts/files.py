"""Where the bytes of a source lie: a folder, or a tar read in place. Nothing is extracted.

In: names that a listing gives, which anybody may have written. Out: `Place`s, or `Unusable` with the reason
where a name is missing or leads out of the source.
"""

from __future__ import annotations

import fnmatch
import io
import os
import posixpath
import sqlite3
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from ....types import UserError

LARGEST = 256 * 2**20  # bytes of one image or text: larger ones are a mistake or an attack


class Unusable(Exception):  # noqa: N818 - it is what the entry is
    """Why an entry of a source cannot be used."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason  # a few words, the same for all of its kind: faults are counted by it
        self.detail = detail


class Place(NamedTuple):
    """A file, or a part of one, so that another process can read it."""

    path: str
    offset: int = 0
    size: int = -1  # -1: to the end

    def open(self) -> IO[bytes]:
        return open(self.path, "rb") if self.size < 0 else io.BufferedReader(_Slice(self))

    def read(self) -> bytes:
        """All of it.

        Raises:
            Unusable: missing, unreadable, larger than LARGEST, or cut off.
        """
        size = self.size
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size if size < 0 else size
                if size > LARGEST:
                    raise Unusable("file is too large", f"{self.path}: {size} bytes, at most {LARGEST}")
                found = os.pread(file.fileno(), size, self.offset)
        except OSError as error:
            raise Unusable("file is unreadable", str(error)) from error
        if len(found) != size:
            raise Unusable("file is cut off", f"{self.path}: {len(found)} of {size} bytes")
        return found


class Files(Protocol):
    """A folder or a tar: names with forward slashes, relative to the source."""

    def find(self, name: str) -> Place | None:
        """Where a file lies, None if there is none.

        Raises:
            Unusable: the name leads out of the source.
        """
        ...

    def match(self, pattern: str) -> Iterator[str]:
        """Names that fit a pattern of plain parts and wildcards, such as `annotations/*.json`, in order."""
        ...


class Folder:
    """Args: `follow_links` admits symbolic links that lead out of the folder."""

    def __init__(self, root: Path, follow_links: bool = False) -> None:
        self.root, self.follow_links = root, follow_links
        self._real = os.path.realpath(root)

    def find(self, name: str) -> Place | None:
        path = self.root / _inside(name)
        try:
            if not path.is_file():
                return None
        except OSError:  # such as a name longer than names can be
            return None
        if not self.follow_links and not _below(os.path.realpath(path), self._real):
            raise Unusable(
                "link leads out of the source",
                f"{path} -> {os.path.realpath(path)}; give --follow-links if that is meant",
            )
        return Place(str(path))

    def match(self, pattern: str) -> Iterator[str]:
        return self._match("", pattern.split("/"))

    def _match(self, inner: str, parts: list[str]) -> Iterator[str]:
        folder = self.root / inner
        if not folder.is_dir():
            return
        for name in sorted(fnmatch.filter(_visible(os.listdir(folder)), parts[0])):
            found = posixpath.join(inner, name)
            if len(parts) > 1:
                yield from self._match(found, parts[1:])
            elif (self.root / found).is_file():
                yield found


class Tar:
    """One pass over the headers, then members by offset. The names are kept on disk, not in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names = sqlite3.connect("")  # a file that SQLite removes by itself
        self._names.execute(
            "CREATE TABLE members (name TEXT PRIMARY KEY, offset INT, size INT) WITHOUT ROWID"
        )
        with open_tar(path) as tar:
            # "or replace": as in tar itself, the last member of a name counts
            self._names.executemany("INSERT OR REPLACE INTO members VALUES (?, ?, ?)", _listed(tar))

    def find(self, name: str) -> Place | None:
        found = self._names.execute(
            "SELECT offset, size FROM members WHERE name = ?", (_inside(name),)
        ).fetchone()
        return Place(str(self.path), *found) if found else None

    def match(self, pattern: str) -> Iterator[str]:
        depth = pattern.count("/")
        for (name,) in self._names.execute("SELECT name FROM members ORDER BY name"):
            if name.count("/") == depth and fnmatch.fnmatchcase(name, pattern):
                yield name


def open_tar(path: Path) -> tarfile.TarFile:
    """An uncompressed tar.

    Raises:
        UserError: it is none.
    """
    try:
        return tarfile.open(path, "r:")
    except (tarfile.ReadError, OSError) as error:
        raise UserError(
            f"{path} is no uncompressed tar ({error}); download it again, or gunzip or unpack it first"
        ) from error


def members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The plain files of a tar: links and devices are passed over, and no list of members grows.

    Raises:
        Unusable: the tar is cut off or damaged; its rest is unknown.
    """
    try:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]
            if member.isreg() and not member.issparse():
                yield member
        # tarfile takes a cut or a damaged header for the end
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(512) != bytes(512):
            raise tarfile.ReadError(f"no end after {tar.offset} bytes")
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise Unusable("tar is cut off or damaged", f"{tar.name!s}: {error}") from error


def _listed(tar: tarfile.TarFile) -> Iterator[tuple[str, int, int]]:
    try:
        for member in members(tar):
            yield posixpath.normpath(member.name), member.offset_data, member.size
    except Unusable as error:
        raise UserError(f"{error.detail}; download it again or unpack what is whole") from error


def _visible(names: Iterable[str]) -> list[str]:
    """What a Mac leaves beside files (._1.txt, __MACOSX) is no data."""
    return [name for name in names if not name.startswith((".", "__MACOSX"))]


def _inside(name: str) -> str:
    plain = posixpath.normpath(name)
    if plain.startswith(("/", "../")) or plain == ".." or "\0" in plain:
        raise Unusable("path leads out of the source", f"{name[:200]!r}; give --images the folder it is in")
    return plain


def _below(path: str, root: str) -> bool:
    return os.path.commonpath([path, root]) == root


class _Slice(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, place: Place) -> None:
        self._file = open(place.path, "rb")  # noqa: SIM115 - closed by close
        self._place, self._at = place, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._place.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = max(0, min(len(buffer), self._place.size - self._at))
        found = os.pread(self._file.fileno(), wanted, self._place.offset + self._at)
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)

    def close(self) -> None:
        self._file.close()
        super().close()

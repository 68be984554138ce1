"""A tar from front to back: for tars without an index, and for servers that know no ranges.

In: an address. Out: one sample after the other, as its members, or a `Damaged` in its place. A connection
that breaks is taken up where it broke. A tar that ends too early, or whose headers are broken, says so:
`tarfile` itself takes both for the end.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from ..faults import Damaged, Reason
from ..tars.retry import insist, shown
from ..tars.storage import Storage, existing, local_path, system_of

CHUNK = 2**20
LARGEST = 2**28  # bytes of a member: no photo is larger


class Members(NamedTuple):
    """The members of one sample, by extension; `key` is their common name, folders included."""

    key: str
    members: dict[str, bytes]


def samples(url: str, storage: Storage) -> Iterator[Members | Damaged]:
    """All samples of a tar: neighbouring members with a common name up to the first dot.

    Raises:
        UserError: the tar cannot be had (see `Storage.read`).
    """
    seen: set[str] = set()
    try:
        for found in _grouped(url, storage):
            if isinstance(found, Members) and found.key in seen:
                yield Damaged(f"sample {found.key!r} comes twice in {shown(url)}", Reason.TWICE)
            else:
                seen |= {found.key} if isinstance(found, Members) else set()
                yield found
    except (tarfile.TarError, EOFError) as error:
        yield Damaged(
            f"{shown(url)} is cut or broken behind {len(seen)} samples ({error!s:.80}), the rest is lost",
            Reason.CUT,
        )


class Tape:
    """A file that is only read forwards, with the retries and the deadline of a `Storage` for each read."""

    def __init__(self, url: str, storage: Storage) -> None:
        self.url, self.storage, self.position = url, storage, 0
        self._local = local_path(url) is not None
        self._file: Any = None

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end. Errors as for `Storage.read`."""
        if self._local:
            return self._read(size)
        content = insist(self.url, lambda: self._read(size), self.storage.retries, self.storage.deadline)
        self.position += len(content)
        return content

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _read(self, size: int) -> bytes:
        try:
            if self._file is None:
                self._file = self._open()
            return bytes(self._file.read(size))
        except Exception:
            self._file = None
            raise

    def _open(self) -> IO[bytes]:
        """The file at `position`: by a range where that works, else by reading again what was had."""
        path = local_path(self.url)
        if path is not None:
            return open(existing(path), "rb")
        system, inner = system_of(self.url)
        if "http" not in system.protocol:
            file = system.open(inner, "rb")
            file.seek(self.position)
            return file
        wanted = {"Range": f"bytes={self.position}-"} if self.position else {}
        file = system.open(inner, "rb", block_size=0, size=1, headers=wanted)
        had = 0 if file.r.status == 206 else self.position
        while had > 0:
            skipped = file.read(min(CHUNK, had))
            if not skipped:
                raise EOFError("the file is shorter than before")
            had -= len(skipped)
        return file


class _Header(tarfile.TarInfo):
    """A header that is an error where it is broken, not the end of the tar."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset}") from error


def _grouped(url: str, storage: Storage) -> Iterator[Members | Damaged]:
    key, members, fault = "", dict[str, bytes](), ""
    tape = Tape(url, storage)
    try:
        with tarfile.open(fileobj=tape, mode="r|", tarinfo=_Header, bufsize=CHUNK) as tar:  # type: ignore[call-overload]
            for info in tar:
                tar.members = []  # else it remembers every header
                folder, slash, name = info.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if not info.isreg() or not stem:
                    continue
                if folder + slash + stem != key:
                    yield from _finished(url, key, members, fault)
                    key, members, fault = folder + slash + stem, {}, ""
                if extension in members:
                    fault = f"member {extension!r} comes twice"
                elif info.size > LARGEST:
                    fault = f"member {extension!r} has {info.size} bytes"
                else:
                    members[extension] = _content(tar, info)
            _check_rest(tar)
            yield from _finished(url, key, members, fault)
    finally:
        tape.close()


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    content = file.read() if file else b""
    if len(content) != info.size:
        raise tarfile.ReadError(f"member {info.name!r:.80} ends after {len(content)} of {info.size} bytes")
    return content


def _check_rest(tar: tarfile.TarFile) -> None:
    """A tar ends in zeros; more behind them means that what looked like the end was damage."""
    while rest := tar.fileobj.read(CHUNK):
        if rest.strip(b"\0"):
            raise tarfile.ReadError("there is data behind its end")


def _finished(url: str, key: str, members: dict[str, bytes], fault: str) -> Iterator[Members | Damaged]:
    if fault:
        yield Damaged(f"sample {key!r} in {shown(url)}: {fault}", Reason.MEMBER)
    elif key:
        yield Members(key, members)

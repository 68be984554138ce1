"""Bytes from anywhere: local files by `pread`, every other address through fsspec with range requests.

In: an address (a path, or a URL that fsspec knows: http, s3, gs, ...) and a range. Out: exactly those bytes,
or one sentence. No read takes longer than `deadline` in all: attempts, pauses and waiting for others
included. Credentials come from where the protocol's own library looks for them (environment, its own
files), and are never shown, see `retry`.

With a cache, whole blocks of 4 MiB are fetched and kept. Blocks and not samples, because `Order` shows
neighbouring samples close in time (32 of them, about 3 MB of photos with captions, are one block of
it), so one request serves about 32 samples, for all processes of the machine. Without a cache, or when
its disk is full, a sample is one request for its own bytes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import fsspec.core

from ...types import UserError
from .cache import BlockCache, open_cache
from .retry import Missing, insist, shown

BLOCK = 4 * 2**20


@dataclass(frozen=True)
class Storage:
    """How to read; says nothing about what.

    Args:
        cache: a folder on a local disk where blocks of remote files are kept; None keeps none.
        cache_gb: its size in 10^9 bytes; what was not read for longest goes first.
        retries: attempts after the first one that failed.
        deadline: seconds that one read may take in all. Local files are read without one.
    """

    cache: str | None = None
    cache_gb: float = 20.0
    retries: int = 5
    deadline: float = 60.0

    def __post_init__(self) -> None:
        if self.retries < 0 or self.deadline <= 0 or self.cache_gb <= 0:
            raise UserError(
                f"storage has retries={self.retries}, deadline={self.deadline} and cache_gb={self.cache_gb}; "
                "retries must be 0 or more, the others above 0"
            )

    def read(self, url: str, offset: int, length: int, size: int = 0, digest: str = "") -> bytes:
        """`length` bytes of a file from `offset` on.

        Args:
            size, digest: of the whole file. With both, what is read may come from the cache and go there:
                blocks are kept under the digest, so a file that was made again is never mixed with its
                former self.

        Raises:
            Missing: no such file.
            UserError: refused, or still failing at the deadline.
        """
        path = local_path(url)
        if path is not None:
            return _pread(path, offset, length)
        cache = self._cache() if size and digest else None
        if cache and cache.usable and offset + length <= size:
            return self._through(cache, url, range(offset, offset + length), size, digest)
        return self._request(url, offset, length, self.deadline)

    def read_all(self, url: str) -> bytes:
        """A whole file; errors as for `read`."""
        path = local_path(url)
        if path is not None:
            return existing(path).read_bytes()
        system, inner = system_of(url)
        return insist(url, lambda: bytes(system.cat_file(inner)), self.retries, self.deadline)

    def size(self, url: str) -> int | None:
        """Bytes of a file, None where the server does not tell; errors as for `read`."""
        path = local_path(url)
        if path is not None:
            return existing(path).stat().st_size
        system, inner = system_of(url)
        return insist(url, lambda: system.info(inner).get("size"), self.retries, self.deadline)

    def exists(self, url: str) -> bool:
        """Whether there is such a file; errors as for `read`, except `Missing`."""
        try:
            self.size(url)
        except Missing:
            return False
        return True

    def _request(self, url: str, offset: int, length: int, seconds: float) -> bytes:
        system, inner = system_of(url)

        def attempt() -> bytes:
            content = bytes(system.cat_file(inner, start=offset, end=offset + length))
            if len(content) > length:
                raise UserError(
                    f"{shown(url)}: the server ignores ranges ({length} bytes were asked for, {len(content)} "
                    "came); read it from front to back (data=stream) or copy it to a local disk"
                )
            if len(content) < length:
                raise EOFError(f"{len(content)} of {length} bytes came")
            return content

        return insist(url, attempt, self.retries, seconds)

    def _through(self, cache: BlockCache, url: str, wanted: range, size: int, digest: str) -> bytes:
        """From the cache, else by one request for all blocks from the first missing to the last."""
        # Hashed, because a digest comes from a file of anybody's and becomes the name of one here.
        name = sha256(f"{digest}/{size}".encode()).hexdigest()[:40]
        ends = time.monotonic() + self.deadline
        numbers = range(wanted.start // BLOCK, (wanted.stop - 1) // BLOCK + 1)

        def kept(number: int) -> bytes | None:
            part = _part(wanted, number)
            return cache.get(f"{name}-{number:06d}", part.start, len(part))

        parts = {number: kept(number) for number in numbers}
        missing = [number for number in numbers if parts[number] is None]
        if missing:
            with cache.claim(f"{name}-{missing[0]:06d}", self.deadline / 2):
                parts |= {number: kept(number) for number in missing}
                missing = [number for number in numbers if parts[number] is None]
                for number, block in self._blocks(url, missing, size, ends - time.monotonic()):
                    cache.put(f"{name}-{number:06d}", block)
                    part = _part(wanted, number)
                    parts[number] = block[part.start : part.stop]
        return b"".join(part for part in parts.values() if part is not None)

    def _blocks(self, url: str, missing: list[int], size: int, seconds: float) -> Iterator[tuple[int, bytes]]:
        if missing:
            start, stop = missing[0] * BLOCK, min((missing[-1] + 1) * BLOCK, size)
            content = memoryview(self._request(url, start, stop - start, seconds))
            for number in range(missing[0], missing[-1] + 1):
                at = number * BLOCK - start
                yield number, bytes(content[at : at + BLOCK])

    def _cache(self) -> BlockCache | None:
        return open_cache(self.cache, int(self.cache_gb * 1e9)) if self.cache else None


def local_path(url: str) -> Path | None:
    """The path of a local file or folder, None for every other address."""
    if url.startswith("file://"):
        return Path(url.removeprefix("file://"))
    return None if "://" in url or "::" in url or url.startswith("pipe:") else Path(url)


def system_of(url: str) -> tuple[Any, str]:
    """What reads this address, and the address as it wants it."""
    if url.startswith("pipe:"):
        raise UserError("pipe: addresses run a program, which a list of shards may not; copy the files here")
    system = _opened(url.rpartition("/")[0], os.getpid())
    return system, system._strip_protocol(url)


def join(url: str, name: str) -> str:
    """The address of a file in a folder; a query stays behind."""
    folder, mark, query = url.partition("?")
    return f"{folder.rstrip('/')}/{name}{mark}{query}"


def within(root: str | Path, name: str) -> str:
    """The address of something named relative to a root, unless the name is a whole address."""
    whole = local_path(name) is None or Path(name).is_absolute()
    return name if whole else join(str(root), name)


def _part(wanted: range, number: int) -> range:
    """What of a block is wanted, counted from the block's start."""
    return range(max(wanted.start - number * BLOCK, 0), min(wanted.stop - number * BLOCK, BLOCK))


def _pread(path: Path, offset: int, length: int) -> bytes:
    descriptor = os.open(existing(path), os.O_RDONLY)
    try:
        return os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)


def existing(path: Path) -> Path:
    """The path, or `Missing` where there is no such file."""
    if not path.is_file():
        raise Missing(f"{path} does not exist")
    return path


@lru_cache(maxsize=64)
def _opened(folder: str, process: int) -> Any:
    """fsspec's file system of a folder's address, one in a process: none survives a fork."""
    try:
        return fsspec.core.url_to_fs(folder)[0]
    except (ImportError, ValueError) as error:
        protocol = folder.partition(":")[0]
        raise UserError(
            f"{shown(folder)}: cannot read {protocol} addresses here ({type(error).__name__}); install what "
            f"fsspec needs for them (s3: pip install s3fs, gs: pip install gcsfs), or copy the files here"
        ) from None

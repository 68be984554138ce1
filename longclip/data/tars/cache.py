"""Blocks of remote files on a local disk, shared by all processes of a machine.

In: named blocks of bytes. Out: any part of them, as long as they are kept. The folder is the only state: a
block is whole when it has its name (it is renamed into place), being read renews it, and what was not
read for longest goes first. Nothing waits for ever: a lock belongs to an open file, so the kernel frees
it when its holder dies, and who waits longer than told goes on without.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from uuid import uuid4
from zlib import crc32

log = logging.getLogger(__name__)

LOCKS = 256  # files; blocks that share one wait for each other, which costs time and nothing else
POLL = 0.02  # seconds between two looks at a lock
RENEW = 60.0  # seconds after which being read counts as use again: a hit should not write
SWEEP = 8  # blocks that a process adds between two looks at the folder's size
STALE = 3600.0  # seconds after which a partial file belongs to a process that was killed


class BlockCache:
    """A folder of blocks, at most `limit` bytes of them; every process may add `SWEEP` blocks above it.

    A folder that cannot be written (full, read-only) is given up by this process, with one warning:
    `usable` is then False, and callers read what they need and no more.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit, self.usable = folder, limit, True
        self._added = 0
        with self._giving_up():
            (folder / "locks").mkdir(parents=True, exist_ok=True)

    def get(self, name: str, start: int, length: int) -> bytes | None:
        """Part of a block; None where the block is not kept, or not whole."""
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY)
        except OSError:
            return None
        try:
            found = os.pread(descriptor, length, start)
            if time.time() - os.fstat(descriptor).st_mtime > RENEW:
                with suppress(OSError):
                    os.utime(descriptor)
        except OSError:
            return None
        finally:
            os.close(descriptor)
        return found if len(found) == length else None

    def put(self, name: str, content: bytes) -> None:
        """Keep a block, and let the oldest go where there are too many. Never fails: see `usable`."""
        partial = self.folder / f"{name}.{uuid4().hex}.partial"
        with self._giving_up():
            try:
                partial.write_bytes(content)
                partial.replace(self.folder / name)
            except OSError:
                with suppress(OSError):
                    partial.unlink()
                raise
            self._added += len(content)
            if self._added >= min(SWEEP * len(content), self.limit // 16):
                self._added = 0
                self.sweep()

    def sweep(self) -> None:
        """Remove what was not used for longest until a tenth of the room is free."""
        now, blocks = time.time(), []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):  # another process sweeps, too
                status = entry.stat()
                if entry.name.endswith(".partial") and now - status.st_mtime > STALE:
                    os.unlink(entry.path)
                elif entry.is_file():
                    blocks.append((status.st_mtime_ns, status.st_size, entry.path))
        excess = sum(size for _, size, _ in blocks) - self.limit
        excess += self.limit // 10 if excess > 0 else 0
        for _, size, path in sorted(blocks):
            if excess <= 0:
                return
            with suppress(FileNotFoundError):
                os.unlink(path)
            excess -= size

    @contextmanager
    def claim(self, name: str, seconds: float) -> Iterator[None]:
        """Keep other processes from fetching the same block; waits for them at most so long."""
        ends = time.monotonic() + seconds
        try:
            lock = os.open(
                self.folder / "locks" / f"{crc32(name.encode()) % LOCKS:03d}", os.O_RDWR | os.O_CREAT, 0o666
            )
        except OSError:  # a folder that went away: two may then fetch the same
            yield
            return
        try:
            while not _locked(lock) and time.monotonic() < ends:
                time.sleep(POLL)
            yield
        finally:
            os.close(lock)

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self.usable:
                log.warning(
                    "the cache in %s cannot be written (%s): reading goes on without it; free some space, "
                    "lower data.storage.cache_gb or choose another data.storage.cache",
                    self.folder,
                    error.strerror,
                )
            self.usable = False


@lru_cache(maxsize=8)
def open_cache(folder: str, limit: int) -> BlockCache:
    """The cache of this process in a folder."""
    return BlockCache(Path(folder).expanduser(), limit)


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True

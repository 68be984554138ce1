"""Read any record of a folder of shards by number.

In: a folder that `shards.Writer` made, on this machine or behind any URL that fsspec knows. Out: `Record`s,
each checked against the CRC of its index. A record costs one `pread` of its own bytes, so the readers of
many processes neither share nor wait for anything; a remote one costs at most one request (see `storage`).
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from ...tokens import Tokenizer
from ...types import Record, UserError
from ..faults import Damaged, Reason
from .catalog import index_of, open_catalog
from .members import parse
from .retry import shown
from .storage import Storage, join, local_path

log = logging.getLogger(__name__)

OPEN_FILES = 128  # file descriptors that one process keeps


class Dataset:
    """A folder of shards as a sequence of records, in the order in which they were written.

    Args:
        directory: a path or a URL; holds `*.tar` with an index each, and `shards.json`.
        tokenizer: if given, every sentence has its ids; shards that another tokenizer made, or
            none, are tokenised while reading, from the same spans.
        storage: how a URL is read.

    Raises:
        UserError: the folder is missing, empty, unfinished, or a shard in it is absent or torn.
    """

    def __init__(
        self, directory: str | Path, tokenizer: Tokenizer | None = None, storage: Storage | None = None
    ) -> None:
        self.url, self.tokenizer, self.storage = str(directory), tokenizer, storage or Storage()
        self.local = local_path(self.url)
        self._catalog = open_catalog(self.url, self.storage)
        wanted = tokenizer.name_hash if tokenizer else None
        self._trusted = [wanted in (None, made_with) for made_with in self._catalog.tokenizers]
        self._files: OrderedDict[int, int] = OrderedDict()
        if self.local is None and not self.storage.cache:
            log.info(
                "%s is read without a cache, one request a sample; data.storage.cache=FOLDER on a local "
                "disk keeps blocks of it",
                shown(self.url),
            )

    def __len__(self) -> int:
        return int(self._catalog.ends[-1])

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each sample's longest caption, start and end included, uncut; 0 where not tokenised."""
        return self._catalog.columns.lengths

    def record(self, index: int) -> Record:
        """The record of this number.

        Raises:
            Damaged: the bytes at its place are not what a writer put there.
            UserError: they cannot be had at all: the shard is gone, or the server does not answer.
        """
        assert 0 <= index < len(self), f"record {index} of {len(self)}"
        shard, place = self._catalog.place(index)
        try:
            return parse(self._block(shard, index), self.tokenizer, self._trusted[shard])
        except Damaged as error:
            raise Damaged(
                f"sample {place} of {self.shard(index)} is damaged ({error}); make or copy this shard again",
                error.reason,
            ) from error

    def shard(self, index: int) -> str:
        """The tar that holds a record, as people may see it."""
        return shown(self._address(self._catalog.place(index)[0]))

    def keys(self) -> Iterator[str]:
        """All keys in order, from the indexes: ten million of them are never in memory at once."""
        for shard in self._catalog.shards:
            yield from index_of(self.url, shard, self.storage).keys

    def _address(self, shard: int) -> str:
        return join(self.url, self._catalog.shards[shard].name)

    def _block(self, shard: int, index: int) -> bytes:
        """The bytes of a sample, as they were written."""
        columns = self._catalog.columns
        offset, size, crc = (int(c[index]) for c in (columns.offsets, columns.sizes, columns.crcs))
        block = self._read(shard, offset, size)
        whole = crc32(block) == crc
        if not whole and self.local is None and self.storage.cache:
            # Perhaps only the copy in the cache is bad: the disk, or a connection without checksums.
            block = self.storage.read(self._address(shard), offset, size)
            whole = crc32(block) == crc
        if len(block) != size:
            raise Damaged(f"the tar ends at {len(block)} of its {size} bytes", Reason.CUT)
        if not whole:
            raise Damaged("its CRC-32 is not that of the index", Reason.BYTES)
        return block

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        if self.local is None:
            listed = self._catalog.shards[shard]
            return self.storage.read(self._address(shard), offset, size, listed.bytes, listed.sha256)
        try:
            return os.pread(self._file(shard), size, offset)
        except OSError as error:
            raise UserError(
                f"{self._address(shard)} was there at the start and cannot be read now ({error.strerror}); "
                "bring it back, then go on with resume=auto"
            ) from error

    def _file(self, shard: int) -> int:
        """A file descriptor of a shard. `pread` has no cursor, so forked workers may inherit it."""
        assert self.local is not None
        found = self._files.get(shard)
        if found is not None:
            return found
        if len(self._files) >= OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = os.open(str(self.local / self._catalog.shards[shard].name), os.O_RDONLY)
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_files", {}).values():
            os.close(descriptor)

"""Shards: tar files that stock webdataset and open_clip read too, each with an index beside it.

In: `Record`s. Out: `DIR/000000.tar`, `DIR/000000.index.json`, ..., at last `DIR/shards.json`
(`dataset.Dataset` reads them, `index` describes what lies beside the tars, `encoding` what is in them).
An index is written after its tar: a shard is whole if its index exists and tells the tar's size. Until a
writer is closed its folder holds a file UNFINISHED, so that the first half of a dataset is never taken for
all of it. The same records give the same bytes.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

from webdataset import TarWriter

from ...types import Record, UserError
from .encoding import check, encode, longest
from .index import LIST, UNFINISHED, VERSION, Index, Shard, digests, dump, dump_list, index_name, read_index
from .keys import Keys

BUFFER = 2**20  # bytes: tarfile writes every 10 kB, which is slow on disks that are far away


class WriteReport(NamedTuple):
    """What a finished writer has written."""

    samples: int
    shards: int
    captions: int
    bytes: int


def write(
    records: Iterable[Record], directory: str | Path, samples_per_shard: int = 1000, tokenizer_hash: str = ""
) -> WriteReport:
    """Write records as shards; see `Writer` for the errors."""
    with Writer(directory, samples_per_shard, tokenizer_hash) as writer:
        for record in records:
            writer.add(record)
    return writer.report


class Writer:
    """Writes records, one at a time, into the shards of one folder; use it in a `with` block.

    Leaving the block by an exception leaves the folder UNFINISHED; the next writer then goes on behind
    its first `kept` shards, and makes all others anew.

    Args:
        directory: made if missing.
        samples_per_shard: the last shard may hold fewer.
        tokenizer_hash: `Tokenizer.name_hash` if the records carry ids; "" stores none.
        keys: those taken so far, shared by the writers of several splits; by default its own.
        kept: finished shards of an interrupted writer, and their keys, that stay as they are.

    Raises:
        UserError: the folder holds finished shards; a key comes twice or has a dot or a slash; a
            record has no caption or an unknown extension; no record came at all; a kept shard is torn.
    """

    def __init__(
        self,
        directory: str | Path,
        samples_per_shard: int = 1000,
        tokenizer_hash: str = "",
        *,
        keys: Keys | None = None,
        kept: int = 0,
    ) -> None:
        if samples_per_shard < 1:
            raise UserError(f"samples_per_shard is {samples_per_shard}; it must be 1 or more")
        self.directory, self.samples_per_shard = Path(directory), samples_per_shard
        self.tokenizer_hash, self.report = tokenizer_hash, WriteReport(0, 0, 0, 0)
        self._shard: _OpenShard | None = None
        self._shards: list[Shard] = []
        _start(self.directory, kept)
        self._own_keys = keys is None
        self._keys = keys or Keys(self.directory / "keys.partial")
        for number in range(kept):
            self._keep(self._path(number))

    def add(self, record: Record) -> None:
        check(record)
        if not self._keys.add(record.key):
            raise UserError(f"sample key {record.key!r} comes twice; keys must be unique within a dataset")
        if self._shard is None:
            self._shard = _OpenShard(self._path(self.report.shards))
        self._shard.add(record, with_ids=bool(self.tokenizer_hash))
        if len(self._shard.keys) == self.samples_per_shard:
            self._finish_shard()

    def close(self) -> None:
        """Finish the last shard, list all of them, and declare the folder complete."""
        self._finish_shard()
        self._forget_keys()
        if not self._shards:
            raise UserError(
                f"no samples came for {self.directory}: there is nothing to write; check the source"
            )
        _publish_bytes(dump_list(self._shards), self.directory / LIST)
        (self.directory / UNFINISHED).unlink()

    def _path(self, number: int) -> Path:
        return self.directory / f"{number:06d}.tar"

    def _keep(self, tar: Path) -> None:
        index = read_index(tar)
        for key in index.keys:
            self._keys.add(key)
        self._count(tar, index)

    def _count(self, tar: Path, index: Index) -> None:
        self._shards.append(Shard(tar.name, index.samples, index.captions, index.bytes, index.sha256))
        added = WriteReport(index.samples, 1, index.captions, index.bytes)
        self.report = WriteReport(*(a + b for a, b in zip(self.report, added, strict=True)))

    def _finish_shard(self) -> None:
        if self._shard is not None:
            self._count(self._shard.path, self._shard.finish(self.tokenizer_hash))
            self._shard = None

    def _forget_keys(self) -> None:
        if self._own_keys:
            self._keys.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        self._forget_keys()
        if self._shard is not None:
            self._shard.abandon()


class _OpenShard:
    """One tar being written under a temporary name."""

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, path.with_suffix(".tar.partial")
        self.keys: list[str] = []
        self.lengths: list[int] = []
        self.ends, self.captions = [0], 0
        self._file: IO[bytes] = open(self.partial, "wb", BUFFER)  # noqa: SIM115 - closed by finish or abandon
        self._tar = TarWriter(
            self._file, user="longclip", group="longclip", mode=0o644, mtime=0, encoder=False
        )
        # Else a name beyond ASCII stands in a header of its own, in front of the member's.
        self._tar.tarstream.format, self._tar.tarstream.encoding = tarfile.USTAR_FORMAT, "utf-8"

    def add(self, record: Record, with_ids: bool) -> None:
        self._tar.write({"__key__": record.key, **encode(record, with_ids)})
        self.keys.append(record.key)
        self.lengths.append(longest(record) if with_ids else 0)
        self.ends.append(self._tar.tarstream.offset)
        self.captions += len(record.captions)

    def finish(self, tokenizer_hash: str) -> Index:
        self._tar.close()
        _publish(self._file, self.path)
        sizes = [end - start for start, end in pairwise(self.ends)]
        sha256, crcs, size = digests(self.path, sizes)
        index = Index(
            VERSION,
            len(self.keys),
            self.keys,
            self.ends[:-1],
            sizes,
            crcs,
            self.lengths,
            self.captions,
            size,
            sha256,
            tokenizer_hash,
        )
        _publish_bytes(dump(index._asdict()), self.path.with_name(index_name(self.path.name)))
        return index

    def abandon(self) -> None:
        """Leave nothing, also where the disk is full and even closing fails."""
        with suppress(OSError):
            self._tar.close()
        with suppress(OSError):
            self._file.close()
        self.partial.unlink(missing_ok=True)


_WRITTEN = re.compile(r"\d{6,}\.(tar|index\.json).*|shards\.json.*|keys\.partial")


def _start(directory: Path, kept: int) -> None:
    """An UNFINISHED folder of `kept` shards. What else an interrupted writer left is removed."""
    directory.mkdir(parents=True, exist_ok=True)
    stays = {name for n in range(kept) for name in (f"{n:06d}.tar", index_name(f"{n:06d}.tar"))}
    left = [path for path in directory.iterdir() if _WRITTEN.fullmatch(path.name)]
    if any(path.suffix == ".json" for path in left) and not (directory / UNFINISHED).exists():
        raise UserError(
            f"{directory} already holds finished shards; choose another folder or remove this one"
        )
    (directory / UNFINISHED).touch()
    for path in left:
        if path.name not in stays:
            path.unlink()


def _publish(file: IO[bytes], path: Path) -> None:
    """Close a file that was written as PATH.partial, and give it its name only when it is on the disk."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(f"{path}.partial", path)


def _publish_bytes(content: bytes, path: Path) -> None:
    with open(f"{path}.partial", "wb") as file:
        file.write(content)
        _publish(file, path)

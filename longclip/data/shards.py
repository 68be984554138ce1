"""Shards: tar files that stock webdataset and open_clip read too, each with an index beside it.

In: `Record`s. Out: `DIR/000000.tar`, `DIR/000000.index.json`, ... (`dataset.Dataset` reads them). A
sample's members are

    KEY.jpg|png|webp  the encoded picture
    KEY.txt           the first caption, for tools that know one caption an image
    KEY.json          {"captions": [{"source", "text", "sentences": [[start, end], ...],
                      "counts": [ids of each sentence], "boxes": [[l, t, r, b] | null, ...]}], "meta": {...}}
    KEY.ids           uint16, little-endian: the ids of all sentences of all captions, end to end

`ids` and `counts` are absent where the captions are not tokenised or an id exceeds 65535, `boxes`
where no sentence has one. An index lists where every sample lies, and is written last: a shard is whole if
its index exists and tells the tar's size. Until a writer is closed its folder holds a file UNFINISHED,
so that the first half of a dataset is never taken for all of it. The same records give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np
from webdataset import TarWriter

from ..types import Caption, Record, UserError

VERSION = 1
UNFINISHED = "UNFINISHED"
IMAGES = ("jpg", "png", "webp")
LONGEST_KEY = 90  # bytes: a tar header holds names of 100


class WriteReport(NamedTuple):
    """What a finished writer has written."""

    samples: int
    shards: int
    captions: int
    bytes: int


class Index(NamedTuple):
    """What `NNNNNN.index.json` says of its tar."""

    version: int
    samples: int
    keys: list[str]
    offsets: list[int]  # of the first header of each sample, in bytes
    sizes: list[int]  # headers and padding included
    captions: int
    bytes: int
    sha256: str
    tokenizer: str  # `Tokenizer.name_hash`, or "" where there are no ids


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

    Leaving the block by an exception leaves the folder UNFINISHED; the next writer then starts it afresh.

    Args:
        directory: made if missing.
        samples_per_shard: the last shard may hold fewer.
        tokenizer_hash: `Tokenizer.name_hash` if the records carry ids; "" stores none.

    Raises:
        UserError: the folder holds finished shards; a key comes twice or has a dot or a slash; a
            record has no caption or an unknown extension; no record came at all.
    """

    def __init__(
        self, directory: str | Path, samples_per_shard: int = 1000, tokenizer_hash: str = ""
    ) -> None:
        if samples_per_shard < 1:
            raise UserError(f"samples_per_shard is {samples_per_shard}; it must be 1 or more")
        self.directory, self.samples_per_shard = Path(directory), samples_per_shard
        self.tokenizer_hash, self.report = tokenizer_hash, WriteReport(0, 0, 0, 0)
        self._keys: set[str] = set()
        self._shard: _OpenShard | None = None
        _start(self.directory)

    def add(self, record: Record) -> None:
        _check(record, self._keys)
        self._keys.add(record.key)
        if self._shard is None:
            self._shard = _OpenShard(self.directory / f"{self.report.shards:06d}.tar")
        self._shard.add(record, with_ids=bool(self.tokenizer_hash))
        if len(self._shard.keys) == self.samples_per_shard:
            self._finish_shard()

    def close(self) -> None:
        """Finish the last shard and declare the folder complete."""
        self._finish_shard()
        if not self._keys:
            raise UserError(
                f"no samples came for {self.directory}: there is nothing to write; check the source"
            )
        (self.directory / UNFINISHED).unlink()

    def _finish_shard(self) -> None:
        if self._shard is None:
            return
        index = self._shard.finish(self.tokenizer_hash)
        added = WriteReport(index.samples, 1, index.captions, index.bytes)
        self.report = WriteReport(*(a + b for a, b in zip(self.report, added, strict=True)))
        self._shard = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._shard is not None:
            self._shard.abandon()


class _OpenShard:
    """One tar being written under a temporary name."""

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, path.with_suffix(".tar.partial")
        self.keys: list[str] = []
        self.ends, self.captions = [0], 0
        self._file: IO[bytes] = open(self.partial, "wb")  # noqa: SIM115 - closed by finish or abandon
        self._tar = TarWriter(
            self._file, user="longclip", group="longclip", mode=0o644, mtime=0, encoder=False
        )

    def add(self, record: Record, with_ids: bool) -> None:
        self._tar.write({"__key__": record.key, **_members(record, with_ids)})
        self.keys.append(record.key)
        self.ends.append(self._tar.tarstream.offset)
        self.captions += len(record.captions)

    def finish(self, tokenizer_hash: str) -> Index:
        self._tar.close()
        _publish(self._file, self.path)
        with open(self.path, "rb") as whole:
            sha256, size = hashlib.file_digest(whole, "sha256").hexdigest(), os.fstat(whole.fileno()).st_size
        sizes = [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]
        index = Index(
            VERSION,
            len(self.keys),
            self.keys,
            self.ends[:-1],
            sizes,
            self.captions,
            size,
            sha256,
            tokenizer_hash,
        )
        with open(f"{_index_path(self.path)}.partial", "wb") as file:
            file.write(json.dumps(index._asdict(), ensure_ascii=False, separators=(",", ":")).encode())
            _publish(file, _index_path(self.path))
        return index

    def abandon(self) -> None:
        """Leave nothing, also where the disk is full and even closing fails."""
        with suppress(OSError):
            self._tar.close()
        with suppress(OSError):
            self._file.close()
        self.partial.unlink(missing_ok=True)


def read_index(tar: Path) -> Index:
    """The index of a shard.

    Raises:
        UserError: the shard is torn: its index is missing, unreadable or tells another size.
    """
    path = _index_path(tar)
    again = (
        f"the shard was not written to its end; remove {tar.parent} and make it again (longclip shards ...)"
    )
    try:
        index = Index(**json.loads(path.read_bytes()))
        found = tar.stat().st_size
    except FileNotFoundError as error:
        raise UserError(
            f"{tar} and {path.name} belong together, but {error.filename} is missing: {again}"
        ) from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is no index of a shard ({error}): {again}") from error
    if index.version != VERSION:
        raise UserError(
            f"{path} has version {index.version}, this longclip reads {VERSION}; make the shards again"
        )
    if not len(index.keys) == len(index.offsets) == len(index.sizes) == index.samples:
        raise UserError(
            f"{path} lists {index.samples} samples but not a key, offset and size for each: {again}"
        )
    if found != index.bytes:
        raise UserError(f"{tar} has {found} bytes, its index says {index.bytes}: {again}")
    return index


def _index_path(tar: Path) -> Path:
    return tar.with_suffix(".index.json")


def _start(directory: Path) -> None:
    """An empty, UNFINISHED folder. What an interrupted writer left is removed; finished shards never are."""
    directory.mkdir(parents=True, exist_ok=True)
    left = [
        p
        for p in directory.iterdir()
        if p.name[:6].isdigit() and p.name[6:].startswith((".tar", ".index.json"))
    ]
    if any(p.suffix == ".json" for p in left) and not (directory / UNFINISHED).exists():
        raise UserError(
            f"{directory} already holds finished shards; choose another folder or remove this one"
        )
    (directory / UNFINISHED).touch()
    for path in left:
        path.unlink()


def _publish(file: IO[bytes], path: Path) -> None:
    """Close a file that was written as PATH.partial, and give it its name only when it is on the disk."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(f"{path}.partial", path)


def _check(record: Record, seen: set[str]) -> None:
    key = record.key
    if not key or not key.isprintable() or set(key) & set("./\\") or len(key.encode()) > LONGEST_KEY:
        raise UserError(
            f"sample key {key!r} cannot name members of a tar: "
            f"give it 1 to {LONGEST_KEY} bytes without dots or slashes"
        )
    if key in seen:
        raise UserError(f"sample key {key!r} comes twice; keys must be unique within a dataset")
    if record.extension not in IMAGES:
        raise UserError(f"sample {key!r} has extension {record.extension!r}; shards hold {', '.join(IMAGES)}")
    if not record.captions:
        raise UserError(f"sample {key!r} has no caption; leave it out or give it one")


def _members(record: Record, with_ids: bool) -> dict[str, bytes]:
    ids = [token for caption in record.captions for sentence in caption.sentences for token in sentence.ids]
    with_ids = with_ids and max(ids, default=0) <= 0xFFFF
    described = {
        "captions": [_described(caption, with_ids) for caption in record.captions],
        "meta": record.meta,
    }
    members = {
        record.extension: record.image,
        "txt": record.captions[0].text.encode(),
        "json": json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode(),
    }
    return members | ({"ids": np.asarray(ids, "<u2").tobytes()} if with_ids else {})


def _described(caption: Caption, with_counts: bool) -> dict[str, Any]:
    sentences = caption.sentences
    described: dict[str, Any] = {"source": caption.source, "text": caption.text}
    described["sentences"] = [[sentence.start, sentence.end] for sentence in sentences]
    if with_counts:
        described["counts"] = [len(sentence.ids) for sentence in sentences]
    if any(sentence.box is not None for sentence in sentences):
        described["boxes"] = [sentence.box for sentence in sentences]
    return described

"""What lies beside the tars: an index per shard, and the list of all shards.

In: the JSON that `shards.Writer` left. Out: `Index` and `Shard`s, checked as data that anybody may have
written: of the right shape, with plain names, consistent in itself.

    NNNNNN.index.json  where every sample of NNNNNN.tar lies
    shards.json        the shards of a finished folder: what there is where a folder cannot be listed
    UNFINISHED         present until the folder is complete
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from ...types import UserError

VERSION = 2
UNFINISHED = "UNFINISHED"
LIST = "shards.json"
_NAME = re.compile(r"\d{6,}\.tar")


class Index(NamedTuple):
    """What `NNNNNN.index.json` says of its tar."""

    version: int
    samples: int
    keys: list[str]
    offsets: list[int]  # of the first header of each sample, in bytes
    sizes: list[int]  # headers and padding included
    crcs: list[int]  # CRC-32 of those bytes: a flipped bit would otherwise be another picture
    lengths: list[int]  # tokens of each sample's longest caption, start and end included; 0: no ids
    captions: int
    bytes: int
    sha256: str
    tokenizer: str  # `Tokenizer.name_hash`, or "" where there are no ids


class Shard(NamedTuple):
    """A line of `shards.json`."""

    name: str
    samples: int
    captions: int
    bytes: int
    sha256: str


def index_name(tar: str) -> str:
    """ "000000.tar" -> "000000.index.json"."""
    return tar.removesuffix(".tar") + ".index.json"


def read_index(tar: Path) -> Index:
    """The index of a shard on this machine.

    Raises:
        UserError: the shard is torn: its index is missing, unreadable or tells another size.
    """
    path = tar.with_name(index_name(tar.name))
    try:
        raw, found = path.read_bytes(), tar.stat().st_size
    except FileNotFoundError as error:
        raise UserError(
            f"{tar} and {path.name} belong together, but {error.filename} is missing: {_again(tar.parent)}"
        ) from error
    index = parse_index(raw, str(path))
    if found != index.bytes:
        raise UserError(f"{tar} has {found} bytes, its index says {index.bytes}: {_again(tar.parent)}")
    return index


def parse_index(raw: bytes, where: str) -> Index:
    """An index from its JSON; `where` names it in errors.

    Raises:
        UserError: no JSON, of another version, or not consistent in itself.
    """
    again = _again(where.rpartition("/")[0])
    described = _object(raw, where, "index of a shard", VERSION)
    try:
        index = Index(**described)
        _check(index)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} is no index of a shard ({error}): {again}") from error
    return index


def parse_list(raw: bytes, where: str) -> list[Shard]:
    """The shards of a folder from its `shards.json`; `where` names it in errors.

    Raises:
        UserError: no JSON, of another version, or a shard has a name that is none.
    """
    described, folder = _object(raw, where, "list of shards", 1), where.rpartition("/")[0]
    try:
        shards = [Shard(**shard) for shard in described["shards"]]
        _require(all(_NAME.fullmatch(shard.name) for shard in shards), "a shard is not named NNNNNN.tar")
        counts = [n for shard in shards for n in (shard.samples, shard.captions, shard.bytes)]
        _require(_naturals(counts), "a count is no whole number")
        _require(sum(shard.samples for shard in shards) == described["samples"], "samples do not add up")
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{where} is no list of shards ({error}): {_again(folder)}") from error
    return shards


def digests(tar: Path, sizes: Iterable[int]) -> tuple[str, list[int], int]:
    """SHA-256 of a whole tar, CRC-32 of each sample in it, and its bytes: as they are on the disk."""
    sha256, crcs = hashlib.sha256(), []
    with open(tar, "rb") as file:
        for size in sizes:
            sample = file.read(size)
            sha256.update(sample)
            crcs.append(crc32(sample))
        sha256.update(file.read())  # the end of the tar
        return sha256.hexdigest(), crcs, file.tell()


def dump_list(shards: Sequence[Shard]) -> bytes:
    """What `parse_list` reads."""
    listed = [shard._asdict() for shard in shards]
    return dump({"version": 1, "shards": listed, "samples": sum(shard.samples for shard in shards)})


def dump(value: object) -> bytes:
    """Compact JSON, the same bytes for the same value."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _object(raw: bytes, where: str, what: str, version: int) -> dict[str, Any]:
    again = _again(where.rpartition("/")[0])
    try:
        described = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no {what} ({error}): {again}") from error
    if not isinstance(described, dict):
        raise UserError(f"{where} is no {what} (a {type(described).__name__}, not an object): {again}")
    if described.get("version") != version:
        raise UserError(
            f"{where} has version {described.get('version')!s:.20}, this longclip reads {version}; "
            "make the shards again (longclip shards ...)"
        )
    return described


def _check(index: Index) -> None:
    columns = (index.keys, index.offsets, index.sizes, index.crcs, index.lengths)
    _require(
        all(isinstance(column, list) and len(column) == index.samples for column in columns),
        f"it lists {index.samples} samples, but not a key, offset, size, CRC and length for each",
    )
    texts = [*index.keys, index.sha256, index.tokenizer]
    _require(all(isinstance(text, str) for text in texts), "a key, the sha256 or the tokenizer is no text")
    _require(len(set(index.keys)) == index.samples, "a key comes twice")
    words = [*index.sizes, *index.crcs, *index.lengths]
    totals = [index.samples, index.captions, index.bytes]
    _require(_naturals([*index.offsets, *words, *totals]), "a number is not whole")
    _require(max(words, default=0) < 2**32, "a size, a CRC or a length has more than 32 bits")
    _require(max(index.lengths, default=0) < 2**31 and index.bytes < 2**63, "a number is absurd")
    ends = [offset + size for offset, size in zip(index.offsets, index.sizes, strict=True)]
    _require(max(ends, default=0) <= index.bytes, "a sample lies beyond the end")


def _naturals(values: Sequence[object]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _again(folder: object) -> str:
    return f"the shard was not written to its end; remove {folder} and make it again (longclip shards ...)"

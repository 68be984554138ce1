"""What a folder of shards holds, known before a byte of a sample is read.

In: a folder, local or remote, that `shards.Writer` made. Out: a `Catalog`: where every sample lies, in
arrays. `shards.json` is believed; a local folder without one is listed. Every index is fetched once and
checked against that list and against the size of its tar, so that an absent, cut or exchanged shard is
an error at the start and not in the third night.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...types import UserError
from .index import LIST, UNFINISHED, Index, Shard, index_name, parse_index, parse_list, read_index
from .retry import Missing, shown
from .storage import Storage, join, local_path

ABREAST = 16  # requests at a time while a remote folder is opened
MAKE = "make one with: longclip shards SRC --layout NAME --out OUT"


class Columns(NamedTuple):
    """One entry a sample, in stored order. Arrays, so that forked workers share their pages."""

    offsets: NDArray[np.int64]  # in the tar
    sizes: NDArray[np.uint32]  # headers and padding included
    crcs: NDArray[np.uint32]
    lengths: NDArray[np.int32]  # tokens of the longest caption, 0 where not tokenised


@dataclass(frozen=True)
class Catalog:
    """The shards of a folder and the samples in them."""

    shards: list[Shard]
    tokenizers: list[str]  # of every shard: `Tokenizer.name_hash`, or ""
    ends: NDArray[np.int64]  # of every shard: number of the first sample behind it
    columns: Columns

    def place(self, index: int) -> tuple[int, int]:
        """The shard of a sample, and its place in it."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        return shard, index - (int(self.ends[shard - 1]) if shard else 0)


def open_catalog(url: str, storage: Storage) -> Catalog:
    """Read the list and every index of a folder.

    Raises:
        UserError: the folder is missing, empty or unfinished; a shard is absent or not the one listed.
    """
    folder = local_path(url)
    shards = _listed(url, storage) if folder is None else _found(folder)
    tokenizers: list[str] = []
    columns: list[Columns] = []
    for index in _indexes(url, shards, storage):
        tokenizers.append(index.tokenizer)
        columns.append(_columns(index))
    if not sum(shard.samples for shard in shards):
        raise UserError(f"the shards in {shown(url)} hold no samples; make them again (longclip shards ...)")
    ends = np.cumsum([shard.samples for shard in shards], dtype=np.int64)
    joined = Columns(*(np.concatenate(parts) for parts in zip(*columns, strict=True)))
    return Catalog(shards, tokenizers, ends, joined)


def index_of(url: str, shard: Shard, storage: Storage) -> Index:
    """The index of one shard, checked against the list and the tar.

    Raises:
        UserError: they are not of one piece, or one of them is absent.
    """
    where = join(url, index_name(shard.name))
    folder = local_path(url)
    if folder is not None:
        index = read_index(folder / shard.name)
    else:
        try:
            index = parse_index(storage.read_all(where), shown(where))
            _check_size(join(url, shard.name), shard, storage)
        except Missing as error:
            raise UserError(
                f"{shown(url)}/{LIST} lists {shard.name}, but {error}; copy the whole folder again"
            ) from error
    if (index.samples, index.bytes, index.sha256) != (shard.samples, shard.bytes, shard.sha256):
        raise UserError(
            f"{shown(where)} tells of {index.samples} samples in {index.bytes} bytes, {LIST} lists "
            f"{shard.samples} in {shard.bytes}, or of another tar; copy the whole folder again"
        )
    return index


def _check_size(url: str, shard: Shard, storage: Storage) -> None:
    size = storage.size(url)
    if size is not None and size != shard.bytes:
        raise UserError(
            f"{shown(url)} has {size} bytes, {LIST} says {shard.bytes}; copy the whole folder again"
        )


def _indexes(url: str, shards: Sequence[Shard], storage: Storage) -> Iterator[Index]:
    """In order; remote ones several at a time."""
    if local_path(url) is not None:
        yield from (index_of(url, shard, storage) for shard in shards)
        return
    pool = ThreadPoolExecutor(ABREAST)
    try:
        yield from pool.map(lambda shard: index_of(url, shard, storage), shards)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _listed(url: str, storage: Storage) -> list[Shard]:
    where = join(url, LIST)
    try:
        return parse_list(storage.read_all(where), shown(where))
    except Missing as error:
        raise UserError(
            f"{shown(url)} is no folder of finished shards (looked for {shown(where)}); {MAKE}, and copy all "
            "of it. Tars without an index can be read from front to back: data=stream"
        ) from error


def _found(folder: Path) -> list[Shard]:
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder of shards (looked for {folder}/000000.tar); {_instead(folder)}"
        )
    if (folder / UNFINISHED).exists():
        raise UserError(f"{folder} is UNFINISHED: its conversion was interrupted or still runs; run it again")
    if (folder / LIST).exists():
        return parse_list((folder / LIST).read_bytes(), str(folder / LIST))
    indexed = {path.with_suffix("").with_suffix(".tar") for path in folder.glob("*.index.json")}
    tars = sorted(indexed | set(folder.glob("*.tar")))
    if not tars:
        inner = sorted(path.parent.name for path in folder.glob("*/*.index.json"))
        hint = f"it has splits, so name one: {folder / inner[0]}" if inner else MAKE
        raise UserError(f"{folder} holds no shards (looked for {folder}/000000.tar); {hint}")
    indexes = [(tar.name, read_index(tar)) for tar in tars]
    return [Shard(name, i.samples, i.captions, i.bytes, i.sha256) for name, i in indexes]


def _instead(folder: Path) -> str:
    """What to name where there is no such folder: those beside it, if any."""
    beside = ", ".join(sorted(path.parent.name for path in folder.parent.glob(f"*/{LIST}")))
    return f"{folder.parent} has {beside}: name one of them (data.train, data.judge)" if beside else MAKE


def _columns(index: Index) -> Columns:
    return Columns(
        np.asarray(index.offsets, np.int64),
        np.asarray(index.sizes, np.uint32),
        np.asarray(index.crcs, np.uint32),
        np.asarray(index.lengths, np.int32),
    )

"""Read any record of a folder of shards by number.

In: a folder that `shards.Writer` made. Out: `Record`s. A record costs one `pread` of its own bytes, so the
readers of many processes neither share nor wait for anything. Members are data: only the four known
extensions are looked at, and nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..tokens import Tokenizer
from ..types import Caption, Record, Sentence, UserError
from .index import UNFINISHED, read_index
from .shards import IMAGES

OPEN_FILES = 128  # file descriptors that one process keeps


class Dataset:
    """A folder of shards as a sequence of records, in the order in which they were written.

    Args:
        directory: holds `*.tar` with an index each.
        tokenizer: if given, every sentence has its ids; shards that another tokenizer made, or
            none, are tokenised while reading, from the same spans.

    Raises:
        UserError: the folder is missing, empty, unfinished, or a shard in it is torn.
    """

    def __init__(self, directory: str | Path, tokenizer: Tokenizer | None = None) -> None:
        self.directory, self.tokenizer = Path(directory), tokenizer
        self.shards = _shards(self.directory)
        indexes = [read_index(path) for path in self.shards]
        self._ends = list(accumulate(index.samples for index in indexes))
        # Arrays, not lists: forked workers then share these pages instead of copying them.
        self._offsets = np.concatenate([np.asarray(index.offsets, np.int64) for index in indexes])
        self._sizes = np.concatenate([np.asarray(index.sizes, np.int64) for index in indexes])
        wanted = tokenizer.name_hash if tokenizer else None
        self._trusted = [wanted is None or index.tokenizer == wanted for index in indexes]
        self._files: OrderedDict[int, int] = OrderedDict()
        if not len(self):
            raise UserError(
                f"the shards in {self.directory} hold no samples; make them again (longclip shards ...)"
            )

    def __len__(self) -> int:
        return self._ends[-1]

    def record(self, index: int) -> Record:
        """The record of this number.

        Raises:
            UserError: the bytes at its place are not what a writer puts there.
        """
        assert 0 <= index < len(self), f"record {index} of {len(self)}"
        shard = bisect_right(self._ends, index)
        offset, size = int(self._offsets[index]), int(self._sizes[index])
        block = os.pread(self._file(shard), size, offset)
        try:
            if len(block) != size:
                raise ValueError(f"{len(block)} bytes instead of {size}")
            return self._parse(*_members(block), self._trusted[shard])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            place = index - (self._ends[shard - 1] if shard else 0)
            raise UserError(
                f"sample {place} of {self.shards[shard]} is damaged ({error!s:.80}); "
                f"remove {self.directory} and make it again (longclip shards ...)"
            ) from error

    def shard(self, index: int) -> Path:
        """The tar that holds a record."""
        return self.shards[bisect_right(self._ends, index)]

    def keys(self) -> Iterator[str]:
        """All keys in order, from the indexes: ten million of them are never in memory at once."""
        for path in self.shards:
            yield from read_index(path).keys

    def _parse(self, key: str, members: dict[str, bytes], trusted: bool) -> Record:
        described = json.loads(members["json"])
        ids = np.frombuffer(members["ids"], "<u2").tolist() if trusted and "ids" in members else None
        captions, used = [], 0
        for item in described["captions"]:
            spans = [(start, end) for start, end in item["sentences"]]
            if ids is not None:
                ends = list(accumulate(item["counts"], initial=used))
                sentence_ids = [tuple(ids[a:b]) for a, b in pairwise(ends)]
                used = ends[-1]
            else:
                sentence_ids = [self._tokenise(item["text"][start:end]) for start, end in spans]
            captions.append(_caption(item, spans, sentence_ids))
        if ids is not None and used != len(ids):
            raise ValueError(f"{len(ids)} ids for sentences of {used}")
        extension = next((kind for kind in IMAGES if kind in members), "image")
        return Record(key, members[extension], extension, tuple(captions), described["meta"])

    def _tokenise(self, text: str) -> tuple[int, ...]:
        return self.tokenizer.ids(text) if self.tokenizer else ()

    def _file(self, shard: int) -> int:
        """A file descriptor of a shard. `pread` has no cursor, so forked workers may inherit it."""
        found = self._files.get(shard)
        if found is not None:
            return found
        if len(self._files) >= OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = os.open(self.shards[shard], os.O_RDONLY)
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_files", {}).values():
            os.close(descriptor)


def _shards(directory: Path) -> list[Path]:
    make = "make one with: longclip shards SRC --layout jsonl --out OUT"
    if not directory.is_dir():
        raise UserError(f"{directory} is no folder of shards (looked for {directory}/000000.tar); {make}")
    if (directory / UNFINISHED).exists():
        raise UserError(
            f"{directory} is UNFINISHED: its conversion was interrupted or still runs; run it again"
        )
    indexed = {path.with_suffix("").with_suffix(".tar") for path in directory.glob("*.index.json")}
    found = sorted(indexed | set(directory.glob("*.tar")))
    if not found:
        inner = sorted(path.parent.name for path in directory.glob("*/*.index.json"))
        hint = f"it has splits, so name one: {directory / inner[0]}" if inner else make
        raise UserError(f"{directory} holds no shards (looked for {directory}/000000.tar); {hint}")
    return found


def _members(block: bytes) -> tuple[str, dict[str, bytes]]:
    """The key and the members of one sample, by extension. tarfile takes ten times as long."""
    members: dict[str, bytes] = {}
    keys: set[bytes] = set()
    at = 0
    while at < len(block):
        header = block[at : at + 512]
        if header[257:262] != b"ustar" or header[156:157] not in (b"0", b"\0"):
            raise ValueError("no tar member where one is expected")
        key, _, extension = header[:100].rstrip(b"\0").partition(b".")
        keys.add(key)
        size = int(header[124:136].rstrip(b"\0 "), 8)
        at += 512
        if at + size > len(block):
            raise ValueError("member longer than its sample")
        members[extension.decode()] = block[at : at + size]
        at += -(-size // 512) * 512
    if len(keys) != 1:
        raise ValueError(f"members of {len(keys)} keys in one sample")
    return keys.pop().decode(), members


def _caption(
    item: dict[str, Any], spans: list[tuple[int, int]], sentence_ids: list[tuple[int, ...]]
) -> Caption:
    boxes = item.get("boxes") or [None] * len(spans)
    sentences = tuple(
        Sentence(start, end, ids, tuple(box) if box else None)
        for (start, end), ids, box in zip(spans, sentence_ids, boxes, strict=True)
    )
    return Caption(item["source"], item["text"], sentences)

"""Images that training and judging share, by key and, with `deep`, by content.

A key alone proves nothing, many sets number theirs: where keys agree, the encoded images are compared.
Judging sets must fit in memory by their keys; training sets of any size need not. An image that was encoded
anew is not recognised.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..data.tars.encoding import IMAGES
from ..data.tars.index import Index
from .findings import Finding

COMPARED = 1000  # pairs with equal keys whose images are read, without `deep`


class Place(NamedTuple):
    """Where a sample lies."""

    tar: Path
    offset: int
    size: int


class Overlap:
    """Show it all judging shards, then all training shards, then ask.

    Args:
        deep: compare every image, not only those with equal keys.
    """

    def __init__(self, deep: bool) -> None:
        self.deep = deep
        self._places: dict[str, list[Place]] = {}  # sets that number theirs have equal keys
        self._digests: dict[bytes, str] = {}
        self._first = ""  # of the images that both have
        self._shared = self._namesakes = self._unread = 0

    def judge(self, tar: Path, index: Index) -> None:
        for key, place in _places(tar, index):
            self._places.setdefault(key, []).append(place)
            if self.deep:
                self._digests[digest(place)] = _name(place, key)

    def train(self, tar: Path, index: Index) -> None:
        for key, place in _places(tar, index):
            namesakes = self._places.get(key, [])
            if self.deep:
                self._judge_pair(self._digests.get(digest(place)), place, key, bool(namesakes))
            elif namesakes and self._namesakes + self._shared >= COMPARED:
                self._unread += 1
            elif namesakes:
                own = digest(place)
                equal = next((there for there in namesakes if digest(there) == own), None)
                self._judge_pair(_name(equal, key) if equal else None, place, key, True)

    def findings(self) -> Iterator[Finding]:
        judged = sum(map(len, self._places.values()))
        if self._shared:
            seen = f"{self._shared:,} images are judged and trained on, first {self._first}"
            remedy = "take them out of the training source, and longclip shards ... again"
            yield Finding("problem", "overlap", seen, "none", remedy)
        if self._unread:
            seen = f"{self._unread:,} more keys are in both; their images were not compared"
            yield Finding("warning", "overlap", seen, "none", "longclip doctor ... --deep")
        if not self._shared and not self._unread:
            seen = f"none of {judged:,} judged images is trained on"
            seen += f"; {self._namesakes:,} keys are equal, their images are not" if self._namesakes else ""
            yield Finding("ok", "overlap", f"{seen} ({'by content' if self.deep else 'by key'})")

    def _judge_pair(self, judged: str | None, place: Place, key: str, namesake: bool) -> None:
        """Count a training image: the same as `judged`, or only of the same key."""
        if judged is None:
            self._namesakes += namesake
            return
        self._first = self._first or f"{judged} = {_name(place, key)}"
        self._shared += 1


def digest(place: Place) -> bytes:
    """Of a sample's encoded image; tar members are data, nothing is extracted."""
    with open(place.tar, "rb") as file:
        file.seek(place.offset)
        block = file.read(place.size)
    with tarfile.open(fileobj=io.BytesIO(block), mode="r:") as tar:
        for member in tar:
            if member.isreg() and member.name.rpartition(".")[2] in IMAGES:
                content = tar.extractfile(member)
                assert content is not None, "a regular member has content"
                return hashlib.blake2b(content.read(), digest_size=16).digest()
    raise ValueError(f"no image at byte {place.offset} of {place.tar}")


def _places(tar: Path, index: Index) -> Iterator[tuple[str, Place]]:
    for key, offset, size in zip(index.keys, index.offsets, index.sizes, strict=True):
        yield key, Place(tar, offset, size)


def _name(place: Place, key: str) -> str:
    return f"{place.tar.parent.name}/{key}"

"""Side-cars: facts about samples that lie beside their shards, joined by key.

In: a folder that `longclip sidecar` made (see `writer`), or several. Out: columns by row, without
holding more than an array of keys. A folder holds

    sidecar.json     {"version", "rows", "source", "example", "tokenizer", "columns": {NAME: KIND}}
    keys.npy         uint64 [rows, 2], sorted: BLAKE2b-128 of each key. The first half is searched, the second
                     half makes a hash that merely collides a missing key
    NAME.npy         a column of kind "number" (float64, NaN where missing) or "label" (int64, -1 there)
    NAME.bin         a column of kind "vector" (float32) or "captions" (see `captions_of`), row after row
    NAME.spans.npy   int64 [rows, 2]: where in NAME.bin each row lies
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...tokens import Tokenizer, stored
from ...types import Caption, Sentence, UserError

VERSION = 1
KINDS = ("number", "label", "vector", "captions")
COLUMN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""What a column may be called: it names files."""

Digests = NDArray[np.uint64]  # [N, 2]


class Store:
    """One side-car, memory-mapped.

    Args:
        directory: made by `longclip sidecar`.

    Attributes:
        keys: digests of the samples' keys, sorted.
        kinds: column -> its kind.

    Raises:
        UserError: the folder is no side-car, or a column in it is torn.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        described = _described(self.directory)
        self.kinds: dict[str, str] = described["columns"]
        self.tokenizer, self.example = described["tokenizer"], described["example"]
        self.keys = self._array("keys.npy", np.dtype(np.uint64), (described["rows"], 2))
        self._fixed: dict[str, NDArray[Any]] = {}
        self._blobs: dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]] = {}
        for name, kind in self.kinds.items():
            if kind in ("number", "label"):
                dtype = np.dtype(np.float64 if kind == "number" else np.int64)
                self._fixed[name] = self._array(f"{name}.npy", dtype, (len(self.keys),))
            else:
                self._blobs[name] = self._blob(name)

    def __reduce__(self) -> tuple[type[Store], tuple[Path]]:
        return Store, (self.directory,)  # a process of its own maps the files anew

    def rows(self, digests: Digests) -> NDArray[np.int32]:
        """The row of each key, -1 where there is none."""
        return find(self.keys, digests)

    def values(self, name: str, rows: NDArray[np.int32]) -> NDArray[Any]:
        """A number or label of each row; NaN or -1 where the row is -1."""
        column = self._fixed[name]
        found = column[np.maximum(rows, 0)]
        found[rows < 0] = np.nan if self.kinds[name] == "number" else -1
        return found

    def vector(self, name: str, row: int) -> NDArray[np.float32]:
        """The vector of a row, empty where there is none."""
        return np.frombuffer(self._bytes(name, row), "<f4")

    def width(self, name: str) -> int:
        """The length that all vectors of a column have.

        Raises:
            UserError: they differ.
        """
        widths = np.unique(np.diff(self._blobs[name][1])) // 4
        widths = widths[widths > 0]
        if len(widths) > 1:
            raise UserError(
                f"the vectors of column {name!r} in {self.directory} have {widths[0]} to {widths[-1]} "
                "numbers; only vectors of one length can lie in a batch (data.sidecar.columns)"
            )
        return int(widths[0]) if len(widths) else 1

    def captions(self, name: str, row: int, tokenizer: Tokenizer | None) -> list[Caption]:
        """The captions of a row, by the source `name`.

        Raises:
            UserError: the row is not what `longclip sidecar` writes.
        """
        trusted = tokenizer is None or tokenizer.name_hash == self.tokenizer
        try:
            found = captions_of(self._bytes(name, row), name, tokenizer, trusted)
        except (ValueError, TypeError, RecursionError) as error:
            path = self.directory / f"{name}.bin"
            raise UserError(
                f"row {row} of {path} is damaged ({error!s:.80}): {_again(path.parent)}"
            ) from error
        return found

    def _bytes(self, name: str, row: int) -> bytes:
        blob, spans = self._blobs[name]
        start, stop = spans[row].tolist() if row >= 0 else (0, 0)
        return blob[start:stop].tobytes()

    def _blob(self, name: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        path = self.directory / f"{name}.bin"
        spans = self._array(f"{name}.spans.npy", np.dtype(np.int64), (len(self.keys), 2))
        size = path.stat().st_size if path.exists() else -1
        if size != int((spans[:, 1] - spans[:, 0]).sum()) or spans.min() < 0 or spans.max() > size:
            raise UserError(
                f"{path} does not hold the rows that {path.stem}.spans.npy lists: {_again(path.parent)}"
            )
        return np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8), spans

    def _array(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        path = self.directory / name
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} is no array ({error!s:.80}): {_again(path.parent)}") from error
        if found.dtype != dtype or found.shape != shape:
            raise UserError(
                f"{path} holds {found.dtype} {list(found.shape)}, not {dtype} {list(shape)}: "
                f"{_again(path.parent)}"
            )
        return found


def digests(keys: Iterable[str]) -> Digests:
    """BLAKE2b-128 of keys, [N, 2]; ten million take 160 MB and about ten seconds."""
    chunks, keys = [np.empty(0, "<u8")], iter(keys)
    while chunk := list(islice(keys, 65_536)):
        found = b"".join(hashlib.blake2b(key.encode(), digest_size=16).digest() for key in chunk)
        chunks.append(np.frombuffer(found, "<u8"))
    return np.concatenate(chunks).reshape(-1, 2)


def label_of(words: Digests) -> NDArray[np.int64]:
    """Words as labels: 63 bits of their digest."""
    return (words[:, 0] >> np.uint64(1)).astype(np.int64)


def find(known: Digests, wanted: Digests) -> NDArray[np.int32]:
    """Where each digest lies among sorted ones, -1 where it does not."""
    if not len(known):
        return np.full(len(wanted), -1, np.int32)
    places = np.minimum(np.searchsorted(known[:, 0], wanted[:, 0]), len(known) - 1)
    return np.where((known[places] == wanted).all(axis=1), places, -1).astype(np.int32)


def captions_of(row: bytes, source: str, tokenizer: Tokenizer | None, trusted: bool = True) -> list[Caption]:
    """A row of captions: JSON [[text, sentence spans, ids of each sentence, score], ...], NUL, ids as uint16.

    Where they are not trusted, the tokenizer makes the ids anew from the spans; sentences and captions of
    which it leaves nothing, such as "?!", are left out.
    """
    described, _, ids = row.partition(b"\0")
    captions = []
    rows = json.loads(described or b"[]")
    every = [count for _, _, counts, _ in rows for count in counts]
    known = iter(stored(ids, every, tokenizer if trusted else None))
    for text, spans, counts, score in rows:
        if not isinstance(text, str) or not isinstance(score, float | int | None):
            raise ValueError("a caption is no text, or its score no number")
        sentences = []
        for (start, end), _ in zip(spans, counts, strict=True):
            made = next(known)
            if tokenizer and not trusted:
                made = tokenizer.ids(text[start:end])
            if made or not tokenizer:
                sentences.append(Sentence(start, end, made))
        if sentences:
            captions.append(Caption(source, text, tuple(sentences), score))
    return captions


def _described(directory: Path) -> dict[str, Any]:
    path = directory / "sidecar.json"
    try:
        described: dict[str, Any] = json.loads(path.read_bytes())
        if described["version"] != VERSION:
            raise ValueError(f"version {described['version']}, this longclip reads {VERSION}")
        if not all(COLUMN.fullmatch(name) and kind in KINDS for name, kind in described["columns"].items()):
            raise ValueError("a column has no proper name or kind")
        return {name: described[name] for name in ("rows", "example", "tokenizer", "columns")}
    except FileNotFoundError as error:
        raise UserError(
            f"{directory} is no side-car (looked for {path}); make one: longclip sidecar SRC --out "
            f"{directory}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} describes no side-car ({error!s:.80}): {_again(directory)}") from error


def _again(directory: Path) -> str:
    return f"remove {directory} and make it again (longclip sidecar SRC --out {directory})"

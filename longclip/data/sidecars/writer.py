"""`longclip sidecar`: a table of facts about samples -> a side-car, in constant memory but for the keys.

In: a table, see `table`. Out: the folder that `store.Store` reads. Rows are written as they come;
at the end only the keys and what has a fixed size are brought into order, of the rest it is told where it
lies.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...sentences import parse, texts_of
from ...tokens import Tokenizer
from ...types import Caption, UserError
from ..tars.index import dump
from .store import COLUMN, VERSION, digests, find, label_of
from .table import PROBE, Row, kinds_of, missing, read

SLAB = 20_000  # rows in memory at once where several processes share them
FEW = 256  # where one has them all: vectors can be long


class SidecarReport(NamedTuple):
    """What was written."""

    rows: int
    kinds: dict[str, str]
    missing: dict[str, int]  # column -> rows without a value


@dataclass(frozen=True)
class Encoder:
    """A row of the table -> the bytes of its key and of each column; b"" where a blob is missing."""

    source: str
    key: str
    kinds: Mapping[str, str]
    tokenizer: Tokenizer
    splitter: str

    def __call__(self, row: Row) -> list[bytes]:
        number, fields = row
        key = fields.get(self.key)
        if not isinstance(key, str | int) or key == "":
            raise UserError(
                f"row {number} of {self.source} has {key!r} for its key {self.key!r}; "
                f"name the column that holds the samples' keys: --key {'|'.join(list(fields)[:6])}"
            )
        encoded = [digests([str(key)]).tobytes()]
        for name, kind in self.kinds.items():
            try:
                encoded.append(ENCODE[kind](self, fields.get(name)))
            except (ValueError, TypeError, AttributeError) as error:
                raise UserError(
                    f"row {number} of {self.source} has {fields.get(name)!r:.60} in column {name!r}, which "
                    f"is of kind {kind} in the rows before ({error!s:.120}); mend the row, or name other "
                    "--columns"
                ) from error
        return encoded

    def number(self, value: Any) -> bytes:
        return np.float64("nan" if missing(value) else value).tobytes()

    def label(self, value: Any) -> bytes:
        found = -1 if missing(value) else label_of(digests([str(value)]))[0]
        return np.int64(found).tobytes()

    def vector(self, value: Any) -> bytes:
        if isinstance(value, np.ndarray):
            return value.astype("<f4").tobytes()
        if missing(value):
            return b""
        found = np.asarray([math.nan if v is None else v for v in value], "<f4")
        if found.ndim != 1:
            raise ValueError(f"{found.ndim} dimensions instead of 1")
        return found.tobytes()

    def neighbours(self, value: Any) -> bytes:
        return digests(map(str, value or ())).tobytes()

    def captions(self, value: Any) -> bytes:
        items = value if isinstance(value, list) else [] if missing(value) else [value]
        pairs = [(i["text"], i.get("score")) if isinstance(i, dict) else (i, None) for i in items]
        texts = texts_of([text for text, _ in pairs], self.source)
        made = [parse(text, "", self.tokenizer, self.splitter) for text in texts]
        return _stored(made, [None if s is None else float(s) for _, s in pairs]) if made else b""


ENCODE: dict[str, Callable[[Encoder, Any], bytes]] = {
    "number": Encoder.number,
    "label": Encoder.label,
    "vector": Encoder.vector,
    "neighbours": Encoder.neighbours,
    "captions": Encoder.captions,
}
FIXED = {"number": np.dtype(np.float64), "label": np.dtype(np.int64)}


def write_sidecar(
    source: Path,
    out: Path,
    tokenizer: Tokenizer,
    *,
    key: str = "key",
    columns: Collection[str] | None = None,
    labels: Collection[str] = (),
    neighbours: Collection[str] = (),
    splitter: str = "syntok",
    processes: int = 1,
) -> SidecarReport:
    """Write a side-car.

    Args:
        source: the table.
        out: the folder to make.
        tokenizer: of the model; captions are stored with its ids.
        key: column of the samples' keys.
        columns: which to take; None: all.
        labels: columns whose texts are labels, not captions.
        neighbours: columns that list the keys of each sample's near neighbours; they become labels of groups,
            see `_groups`.
        splitter: finds the sentences of captions.
        processes: that split and tokenise captions.

    Raises:
        UserError: the folder exists; the table cannot be read or is empty; a column does not exist or has
            values of two kinds; a key comes twice.
    """
    rows = read(source)
    first = list(islice(rows, PROBE))
    if not first:
        raise UserError(f"{source} has no rows: there is nothing to write")
    given = dict.fromkeys(labels, "label") | dict.fromkeys(neighbours, "neighbours")
    kinds = kinds_of(source, first, key, columns, given)
    encoder = Encoder(source.name, key, kinds, tokenizer, splitter)
    return write_rows(chain(first, rows), out, encoder, processes)


def write_rows(rows: Iterable[Row], out: Path, encoder: Encoder, processes: int = 1) -> SidecarReport:
    """The same of rows of known kinds; vectors may be arrays.

    Raises:
        UserError: before the first row is asked for: the folder exists, a column's name is no file's. After
            that: see `write_sidecar`.
    """
    for name in encoder.kinds:
        if not COLUMN.fullmatch(name):
            raise UserError(
                f"column {name!r} cannot name a file; call it by letters, digits, _ and -, a letter or digit "
                "first and 64 in all at most (longclip embed --name NAME)"
            )
    if out.exists():
        raise UserError(f"{out} already exists; choose another folder or remove it")
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{encoder.source} has no rows: there is nothing to write")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    absent = _append(chain([first], rows), encoder, partial, processes)
    count = _sort(partial, encoder)
    described = {
        "version": VERSION,
        "rows": count,
        "source": encoder.source,
        "example": str(first[1][encoder.key]),
        "tokenizer": encoder.tokenizer.name_hash,
        "columns": {name: "label" if kind == "neighbours" else kind for name, kind in encoder.kinds.items()},
    }
    (partial / "sidecar.json").write_text(json.dumps(described, indent=1) + "\n")
    partial.rename(out)
    return SidecarReport(count, dict(encoder.kinds), absent)


def _append(rows: Iterable[Row], encoder: Encoder, folder: Path, processes: int) -> dict[str, int]:
    """All rows as they come: NAME.raw end to end, and NAME.sizes; returns how many cells are empty."""
    nothing = [b"", *(ENCODE[kind](encoder, None) for kind in encoder.kinds.values())]
    absent = dict.fromkeys(encoder.kinds, 0)
    with ExitStack() as stack:
        names = ["keys", *encoder.kinds]
        raw = [stack.enter_context(open(folder / f"{name}.raw", "wb")) for name in names]
        sizes: list[IO[bytes]] = [stack.enter_context(open(folder / f"{name}.sizes", "wb")) for name in names]
        many = processes > 1 and "captions" in encoder.kinds.values()
        pool = stack.enter_context(ProcessPoolExecutor(processes)) if many else None
        left = iter(rows)
        while slab := list(islice(left, SLAB if pool else FEW)):
            found = list(pool.map(encoder, slab, chunksize=256) if pool else map(encoder, slab))
            for place in range(len(names)):
                column = [encoded[place] for encoded in found]
                raw[place].write(b"".join(column))
                sizes[place].write(np.array([len(value) for value in column], np.int64).tobytes())
                if place:
                    absent[names[place]] += column.count(nothing[place])
    return absent


def _sort(folder: Path, encoder: Encoder) -> int:
    """Bring keys and columns into the order of the keys; returns the number of rows."""
    keys = np.fromfile(folder / "keys.raw", np.uint64).reshape(-1, 2)
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    keys = keys[order]
    same = np.flatnonzero(keys[1:, 0] == keys[:-1, 0])
    if len(same):
        twice = sorted(int(row) + 1 for row in order[same[0] : same[0] + 2])
        raise UserError(
            f"rows {twice[0]} and {twice[1]} of {encoder.source} have one key, and {len(same)} rows in all "
            "have that of another; leave one row a sample"
        )
    np.save(folder / "keys.npy", keys)
    for name, kind in encoder.kinds.items():
        raw = folder / f"{name}.raw"
        if kind in FIXED:
            np.save(folder / f"{name}.npy", np.fromfile(raw, FIXED[kind])[order])
            continue
        ends = np.cumsum(np.fromfile(folder / f"{name}.sizes", np.int64))
        spans = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)[order]
        if kind == "neighbours":
            near = find(keys, np.fromfile(raw, np.uint64).reshape(-1, 2))
            np.save(folder / f"{name}.npy", _groups(near, spans // keys.itemsize // 2))
        else:
            np.save(folder / f"{name}.spans.npy", spans)
            raw.rename(folder / f"{name}.bin")
    for left in chain(folder.glob("*.raw"), folder.glob("*.sizes")):
        left.unlink()
    return len(keys)


def _groups(near: NDArray[np.int32], spans: NDArray[np.int64]) -> NDArray[np.int64]:
    """Disjoint groups of near neighbours: row by row, one without a group takes its free neighbours into one.

    Args:
        near: rows of neighbours, -1 where unknown; `near[start:stop]` are those of a row.
        spans: (start, stop) of each row.

    Returns the group of each row: the row that founded it. Rows lie in the order of hashes, so the founders
    are drawn at random.
    """
    groups = np.full(len(spans), -1, np.int64)
    for row, (start, stop) in enumerate(spans):
        if groups[row] < 0:
            known = near[start:stop][near[start:stop] >= 0]
            groups[known[groups[known] < 0]] = row
            groups[row] = row
    return groups


def _stored(captions: Sequence[Caption], scores: Sequence[float | None]) -> bytes:
    """What `store.captions_of` reads."""
    described = [
        [c.text, [[s.start, s.end] for s in c.sentences], [len(s.ids) for s in c.sentences], score]
        for c, score in zip(captions, scores, strict=True)
    ]
    ids = np.array([token for c in captions for s in c.sentences for token in s.ids], np.int64)
    if ids.max(initial=0) > 0xFFFF:
        raise ValueError("ids above 65535: only vocabularies of up to 65,536 words can be stored")
    return dump(described) + b"\0" + ids.astype("<u2").tobytes()

"""The tables that `longclip sidecar` takes.

In: JSON lines, CSV or Parquet with a column of keys, `.npz` with one array per column, or a folder of shards,
whose records' meta is the table. Out: rows one by one, and what kind each column is of: numbers; vectors,
where a value is a list of numbers; captions, where it is a text, a list of texts, or of `{"text": ...,
"score": ...}`; labels, where the user says that its texts are no captions.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...types import UserError
from ..converting.layouts.rows import BadRow, reader
from ..tars.dataset import Dataset
from .store import COLUMN

PROBE = 1000  # rows that tell the kinds

Row = tuple[int, dict[str, Any]]
"""Its number in the table, from 1, and its cells."""


def read(source: Path) -> Iterator[Row]:
    """(number, fields) of a table, whatever it is."""
    if source.is_dir():
        data = Dataset(source)
        records = (data.record(index) for index in range(len(data)))
        yield from ((n, {"key": record.key, **record.meta}) for n, record in enumerate(records, 1))
    elif source.suffix == ".npz":
        yield from _arrays(source)
    else:
        lines = reader(source.name)
        try:
            with open(source, "rb") as stream:
                for row in lines(stream, source.stat().st_size, str(source)):
                    if isinstance(row, BadRow):
                        raise UserError(
                            f"row {row.number} of {source}: {row.reason} ({row.detail:.80}); mend it"
                        )
                    yield row.number, row.fields
        except OSError as error:
            raise UserError(f"{source} cannot be read ({error.strerror}); give a table or shards") from error


def _arrays(source: Path) -> Iterator[Row]:
    try:
        with np.load(source, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{source} holds no plain arrays ({error!s:.80}); save it with np.savez") from error
    if len({len(array) if array.ndim else -1 for array in arrays.values()}) != 1:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise UserError(f"the arrays in {source} differ in length ({shapes}); each needs one row a sample")
    for number in range(len(next(iter(arrays.values())))):
        cells = {name: array[number] for name, array in arrays.items()}
        yield number + 1, {name: cell if _vector(cell) else cell.tolist() for name, cell in cells.items()}


def kinds_of(
    source: Path, rows: Sequence[Row], key: str, columns: Collection[str] | None, given: Mapping[str, str]
) -> dict[str, str]:
    """The kind of each column: as the user gave it, or told from the first rows.

    The texts of shards' meta are labels: their captions are in the shards.
    """
    names = list(dict.fromkeys(name for _, fields in rows for name in fields if name != key))
    absent = sorted({*(columns or ()), *given} - set(names))
    if absent:
        raise UserError(f"{source} has no column {', '.join(absent)}; it has {', '.join([key, *names])}")
    kinds = {}
    for name in names if columns is None else columns:
        if not COLUMN.fullmatch(name):
            raise UserError(
                f"column {name!r} of {source} cannot name a file: rename it to letters, digits, _ and -, "
                "or leave it out with --columns"
            )
        values = [fields[name] for _, fields in rows if not missing(fields.get(name))]
        kinds[name] = given.get(name) or _kind(values, texts_are_labels=source.is_dir())
    if not kinds:
        raise UserError(f"{source} has no column beside its key {key!r}: there is nothing to write")
    return kinds


def _kind(values: Sequence[Any], texts_are_labels: bool) -> str:
    if all(_number(value) for value in values):
        return "number"
    if all(_vector(value) for value in values):
        return "vector"
    return "label" if texts_are_labels else "captions"


def _vector(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype.kind in "fiu"
    return isinstance(value, list) and all(v is None or _number(v) for v in value)


def _number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def missing(value: Any) -> bool:
    """Whether a cell is empty."""
    if isinstance(value, np.ndarray):
        return False
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))

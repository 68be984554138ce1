"""Rows of the listings that people have: JSON lines, JSON, CSV, TSV and Parquet, one row at a time.

In: a binary stream. Out: `Row`s of plain values, and a `BadRow` wherever one cannot be read. No
listing is ever in memory as a whole, however it is laid out.
"""

from __future__ import annotations

import ast
import codecs
import csv
import json
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from ....types import UserError

LONGEST = 64 * 2**20  # bytes of one row: longer ones are a mistake or an attack
CHUNK = 2**20
NO_JSON = (ValueError, RecursionError)


class Row(NamedTuple):
    """One entry of a listing."""

    number: int  # of its line or place in the listing, from 1
    fields: dict[str, Any]
    done: float  # share of the listing that has been read


class BadRow(NamedTuple):
    """One that cannot be read, and why."""

    number: int
    reason: str
    detail: str


Rows = Iterator[Row | BadRow]
Reader = Callable[[IO[bytes], int, str], Rows]
"""A stream, its size in bytes, and its name for errors."""


def reader(name: str) -> Reader:
    """What reads a listing, told from its name.

    Raises:
        UserError: no such container.
    """
    for suffix, found in READERS.items():
        if name.lower().endswith(suffix):
            return found
    raise UserError(f"{name} is no listing that longclip reads; its name should end in {', '.join(READERS)}")


def _lines(stream: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """Lines, and the bytes read with each; a line beyond LONGEST comes in pieces."""
    while line := stream.readline(LONGEST):
        yield line, len(line)


def _jsonl(stream: IO[bytes], size: int, name: str) -> Rows:
    at = 0
    for number, (line, length) in enumerate(_lines(stream), 1):
        at += length
        if line.strip():
            try:
                yield _row(number, json.loads(line.removeprefix(codecs.BOM_UTF8)), at / size)
            except NO_JSON as error:
                yield BadRow(number, "line is no JSON", str(error))


def _json(stream: IO[bytes], size: int, name: str) -> Rows:
    """A list of objects, decoded one by one; or one object, which is one row."""
    text = _Window(stream)
    if text.peek() == "{":
        yield _row(1, text.value(name, 1), 1.0)
        return
    if text.peek() != "[":
        raise UserError(f"{name} begins with {text.peek()!r}; a JSON listing begins with [ or {{")
    number = 0
    text.skip()
    while text.peek() != "]":
        number += 1
        yield _row(number, text.value(name, number), min(1.0, text.read / size))
        if text.peek() == ",":
            text.skip()
        elif text.peek() != "]":
            raise UserError(
                f"{name} has {text.peek() or 'its end'!r} after entry {number}, where a comma or ] belongs; "
                "it was cut off or edited by hand: get it again"
            )


class _Window:
    """The part of a JSON text that is needed for the next value."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._text, self._at, self.read = stream, "", 0, 0
        self._characters = codecs.getincrementaldecoder("utf-8-sig")()
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is no blank, "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at].isspace():
                self._at += 1
            if self._at < len(self._text) or not self._more(CHUNK):
                return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        self._at += 1

    def value(self, name: str, number: int) -> object:
        """The value that begins here.

        Raises:
            UserError: it is no JSON, or longer than LONGEST; the rest of the text cannot be trusted then.
        """
        self.peek()
        chunk = CHUNK
        while True:
            try:
                found, self._at = self._decoder.raw_decode(self._text, self._at)
                return found
            except NO_JSON as error:
                whole = len(self._text) - self._at > LONGEST or not self._more(chunk)
                if whole:
                    raise UserError(
                        f"{name} is broken in entry {number} ({error!s:.80}); "
                        "it was cut off or edited by hand: get it again"
                    ) from error
                chunk *= 2  # a long value is decoded again and again: log, not linear, times

    def _more(self, size: int) -> bool:
        found = self._stream.read(size)
        self.read += len(found)
        try:
            self._text = self._text[self._at :] + self._characters.decode(found, final=not found)
        except UnicodeDecodeError as error:
            raise UserError(f"{self._stream.name} is no UTF-8 text ({error}); convert it first") from error
        self._at = 0
        return bool(found)


def _csv(stream: IO[bytes], size: int, name: str) -> Rows:
    csv.field_size_limit(LONGEST)
    at = 0

    def text() -> Iterator[str]:
        nonlocal at
        for line, length in _lines(stream):
            at += length
            yield line.decode("utf-8-sig" if at == length else "utf-8", errors="replace")

    lines = text()
    first = next(lines, "")
    separator = "\t" if ("\t" in first and "," not in first) or name.lower().endswith(".tsv") else ","
    columns = next(csv.reader([first], delimiter=separator), [])
    table = csv.reader(lines, delimiter=separator, strict=False)
    while True:
        try:
            cells = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadRow(table.line_num + 1, "line is no CSV", str(error))
            continue
        number = table.line_num + 1
        if len(cells) == len(columns):
            yield Row(number, {c: _cell(v) for c, v in zip(columns, cells, strict=True)}, at / size)
        elif cells:
            detail = f"{len(cells)} cells, the header has {len(columns)}: {columns}"
            yield BadRow(number, "row has too many or too few cells", detail)


def _cell(text: str) -> object:
    """A cell; a list that was written as JSON or as Python prints one is a list again."""
    if not (text.startswith(("['", '["')) and text.endswith("]")):
        return text
    for parse in (json.loads, ast.literal_eval):  # literals only: nothing is evaluated
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def _parquet(stream: IO[bytes], size: int, name: str) -> Rows:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(f"{name} needs pyarrow; type: pip install 'longclip[parquet]'") from error
    try:
        table = parquet.ParquetFile(stream)
        total, number = max(1, table.metadata.num_rows), 0
        for batch in table.iter_batches(batch_size=256):
            for fields in batch.to_pylist():
                number += 1
                yield Row(number, fields, number / total)
    except (ArrowException, OSError, ValueError) as error:
        raise UserError(f"{name} is no whole Parquet file ({error!s:.80}); download it again") from error


def _row(number: int, value: object, done: float) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow(number, "entry is no object", f"{value!r:.80}")
    return Row(number, value, min(1.0, done))


READERS: dict[str, Reader] = {
    ".jsonl": _jsonl,
    ".jsonlines": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}

"""Rows of the listings that people have: JSON lines, JSON, CSV, TSV and Parquet, one row at a time.

In: a binary stream. Out: `Row`s of plain values, and a `BadRow` wherever one cannot be read. No listing is
ever in memory as a whole, but for COCO's one object.
"""

from __future__ import annotations

import ast
import codecs
import csv
import json
import posixpath
import re
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from ....types import UserError
from .window import LONGEST, NO_JSON, Window

LIST = re.compile(r"""\[(?:\s*['"+\-.\d].*)?\]""", re.DOTALL)
LARGEST = 8 * LONGEST  # bytes of a listing that is one object, such as Karpathy's COCO (144 MB)


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
    """A list of objects, decoded one by one; or one object, which is one row or holds a list of `images`."""
    text = Window(stream)
    if text.peek() == "{":
        yield from _object(text.value(name, 1, LARGEST))
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


def _object(value: Any) -> Rows:
    """One row; or its `images`, as Karpathy has them, each with COCO's `annotations` by `image_id`."""
    images = value["images"] if isinstance(value.get("images"), list) else [value]
    said: dict[str, list[object]] = {}
    for annotation in value.get("annotations") or []:
        if isinstance(annotation, dict):
            said.setdefault(str(annotation.get("image_id")), []).append(annotation)
    for number, image in enumerate(images, 1):
        if said and isinstance(image, dict):
            image = image | {"annotations": said.get(str(image.get("id")), [])}
        yield _row(number, image, number / len(images))


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


def _tokens(stream: IO[bytes], size: int, name: str) -> Rows:
    """Flickr30k's own: NAME.jpg#0, a tab and a caption in each line."""
    at = 0
    for number, (line, length) in enumerate(_lines(stream), 1):
        at += length
        image, tab, caption = line.decode("utf-8", errors="replace").strip().partition("\t")
        if tab:
            yield Row(number, {"image": image.partition("#")[0], "caption": caption}, min(1.0, at / size))
        elif image:
            yield BadRow(number, "line has no tab", image[:80])


def _text(stream: IO[bytes], size: int, name: str) -> Rows:
    """A text by itself is one row: its `txt`, and its `name` without .txt."""
    stem = posixpath.basename(name).rpartition(".")[0]
    yield Row(1, {"name": stem, "txt": stream.read(LONGEST).decode(errors="replace")}, 1.0)


def _cell(text: str) -> object:
    """A cell; a list of texts or numbers that was written as JSON or as Python prints one is a list again."""
    if not LIST.fullmatch(text):
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
    ".token": _tokens,
    ".txt": _text,
}

"""Samples whose files share a name: KEY.jpg, KEY.txt and KEY.json, loose in a folder or in a webdataset tar.

In: a folder or tars. Out: a `Sample` for every KEY, with the fields of its .json and, as the field `txt`,
its text. Images are only located, not read. Also what img2dataset writes, in either form.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from .files import Folder, Place, Unusable, members, open_tar
from .rows import BadRow
from .window import NO_JSON

PICTURES = ("jpg", "jpeg", "png", "webp")
OTHERS = ("txt", "json")
T = TypeVar("T")
SIDE_FILE = "_stats.json"  # img2dataset's, beside its tars and folders


class Sample(NamedTuple):
    """Files of one name."""

    name: str  # the name that they share, with its folders
    fields: dict[str, Any]
    image: Place | None
    done: float  # share of the tar or folder that has been read


def of_tar(path: Path) -> Iterator[Sample | BadRow]:
    """The samples of a webdataset tar, where the files of one stand one after the other."""
    size = max(1, path.stat().st_size)
    with open_tar(path) as tar:
        found = ((*_key(m.name), Place(str(path), m.offset_data, m.size)) for m in members(tar))
        number = 0
        try:
            for number, (stem, parts) in enumerate(_grouped(found), 1):
                yield from _read(number, stem, parts, tar.offset / size)
        except Unusable as error:
            yield BadRow(number + 1, error.reason, error.detail)


def of_folder(folder: Folder) -> Iterator[Sample | BadRow]:
    """The samples of a folder and all folders in it, in the order of their names."""
    total, seen = max(1, count(folder.root)), 0
    for number, (stem, parts) in enumerate(_grouped(_walk(folder, "")), 1):
        seen += len(parts)
        try:
            found = [(kind, place) for kind, name in parts if (place := folder.find(name))]
        except Unusable as error:
            yield BadRow(number, error.reason, error.detail)
        else:
            yield from _read(number, stem, found, min(1.0, seen / total))


def count(folder: Path) -> int:
    """Files in a folder and all folders in it: tells one state of it from another."""
    return sum(len(files) for _, _, files in os.walk(folder))


def _key(name: str) -> tuple[str, str]:
    """Key and extension, as webdataset tells them: the first dot of the last part of the name divides."""
    folder, slash, last = name.rpartition("/")
    stem, _, kind = last.partition(".")
    return folder + slash + stem, kind if stem else ""  # ._1.jpg, which a Mac leaves beside files, is no data


def _walk(folder: Folder, inner: str) -> Iterator[tuple[str, str, str]]:
    """(stem, extension, name) of every file; the names of one folder at a time are in memory."""
    found = sorted(os.scandir(folder.root / inner), key=lambda item: item.name.rpartition(".")[::2])
    for item in found:
        name = posixpath.join(inner, item.name)
        if item.is_dir(follow_symlinks=folder.follow_links):
            yield from _walk(folder, name)
        elif item.is_file():
            stem, kind = posixpath.splitext(name)
            yield stem, kind[1:], name


def _grouped(found: Iterable[tuple[str, str, T]]) -> Iterator[tuple[str, list[tuple[str, T]]]]:
    """Neighbours that share a name, as (extension, part); other kinds of files are passed over."""
    known = (
        (posixpath.normpath(stem), kind, part)
        for stem, kind, part in found
        if (kind.lower() in OTHERS or _is_picture(kind)) and not f"{stem}.{kind}".endswith(SIDE_FILE)
    )
    for stem, group in groupby(known, key=lambda item: item[0]):
        yield stem, [(kind, part) for _, kind, part in group]


def _is_picture(kind: str) -> bool:
    """Also of "0.jpg", which is no extension of a picture but the end of a name that webdataset cuts."""
    return kind.lower().rpartition(".")[2] in PICTURES


def _read(number: int, stem: str, parts: list[tuple[str, Place]], done: float) -> Iterator[Sample | BadRow]:
    """The sample of a name, or what is wrong with its pictures. Beside KEY.jpg a KEY.mask.png is no fault."""
    pictures = [kind for kind, _ in parts if _is_picture(kind)]
    plain = [kind for kind in pictures if "." not in kind]
    if len(plain) > 1:
        names = ", ".join(f"{stem}.{kind}" for kind in plain)
        yield BadRow(number, "two images of one name", f"{names}; rename all but one of them, or remove them")
    elif plain or not pictures:
        yield _sample(number, stem, {kind.lower(): place for kind, place in parts}, done)
    else:
        for kind in pictures:
            detail = (
                f"{stem}.{kind} belongs to the key {posixpath.basename(stem)!r}, which ends at the first dot"
            )
            yield BadRow(number, "image has a dot in its name", f"{detail}; rename it")


def _sample(number: int, stem: str, parts: dict[str, Place], done: float) -> Sample | BadRow:
    fields: dict[str, Any] = {}
    try:
        if "json" in parts:
            fields = json.loads(parts["json"].read())
        if "txt" in parts and isinstance(fields, dict):
            fields["txt"] = parts["txt"].read().decode(errors="replace")
    except NO_JSON as error:
        return BadRow(number, "json is broken", f"{stem}.json: {error}")
    except Unusable as error:
        return BadRow(number, error.reason, error.detail)
    if not isinstance(fields, dict):
        return BadRow(number, "json is no object", f"{stem}.json holds {fields!r:.80}")
    image = next((parts[kind] for kind in PICTURES if kind in parts), None)
    return Sample(stem, fields, image, done)

"""Questions about a picture with right and wrong captions, from the listings in which they are published.

In: a folder, and which fields of its listings mean what. Out: `Question`s in the order of the listings, and
a fault wherever one cannot be asked. Fields are named by paths (`data.converting.layouts.mapping`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..data.converting.layouts.fields import find, texts_in
from ..data.converting.layouts.files import Folder, Unusable
from ..data.converting.layouts.rows import BadRow, reader
from ..types import UserError
from .showing import Picture, absent, check_keys, check_whole, opened

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
COUNTED = range(2, 11)  # what CountBench counts


class Question(NamedTuple):
    """Every right caption should fit the picture better than every wrong one."""

    key: str
    kind: str
    listing: str
    row: int  # of the listing, from 0
    picture: Picture
    right: tuple[str, ...]
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Questions:
    """How a set of questions is written down.

    Args:
        files: kind -> listing in the root: a JSON list or object of rows, JSON lines, CSV, Parquet.
        image: the path of the picture, with {field} for what a row says, such as "val2017/{filename}".
        right: fields with captions that fit.
        wrong: fields with captions that do not; none where `number` makes them.
        prefix: put before every caption.
        kind: a field that says the kind instead of the file; the items of a list are joined by "_".
        box: four fields, left, top, width and height in pixels: the part of the picture that is meant.
        number: a field with the number (2 to 10) that the right caption names; wrong ones name the others.
        tree: what the folder should look like, for people who have none yet.
    """

    files: Mapping[str, str]
    image: str
    right: Sequence[str]
    wrong: Sequence[str] = ()
    prefix: str = ""
    kind: str | None = None
    box: Sequence[str] = ()
    number: str | None = None
    tree: str = ""

    def read(
        self, root: str, what: str, expected: int | None = None, keys: str | None = None
    ) -> list[Question]:
        """All questions of a folder; `what` they are called where they are counted.

        Raises:
            UserError: the folder or a listing is missing, or not `expected` questions can be asked.
        """
        folder = opened(root, self.tree)
        found = [item for kind in self.files for item in self._of_file(folder, kind)]
        questions = [item for item in found if isinstance(item, Question)]
        faults = [item for item in found if isinstance(item, str)]
        check_whole(root, what, len(questions), expected, faults)
        check_keys(root, (question.key for question in questions), keys if expected else None)
        return questions

    def _of_file(self, folder: Folder, listing: str) -> Iterator[Question | str]:
        """The questions of one listing; a text is a fault."""
        for number, (key, row) in enumerate(_rows(folder, self.files[listing], self.tree)):
            name = f"{listing}/{key}"
            try:
                yield self._question(folder, name, listing, number, row)
            except Unusable as error:
                yield f"{name} ({error.reason})"

    def _question(
        self, folder: Folder, key: str, listing: str, number: int, row: Mapping[str, Any] | BadRow
    ) -> Question:
        if isinstance(row, BadRow):
            raise Unusable(row.reason)
        image = re.sub(r"\{([^{}]+)\}", lambda field: str(_known(row, field[1])), self.image)
        place = folder.find(image)
        if place is None:
            raise Unusable(f"no picture {image}")
        right = self._texts(row, self.right)
        wrong = (
            _other_numbers(right[0], _whole(row, self.number))
            if self.number
            else self._texts(row, self.wrong)
        )
        kinds = _known(row, self.kind) if self.kind else listing
        kind = "_".join(map(str, kinds)) if isinstance(kinds, list) else str(kinds)
        return Question(key, kind, listing, number, Picture(place, self._box(row)), right, wrong)

    def _box(self, row: Mapping[str, Any]) -> tuple[int, int, int, int] | None:
        if not self.box:
            return None
        left, top, width, height = (_whole(row, field) for field in self.box)
        if width < 1 or height < 1:
            raise Unusable("an empty box")
        return left, top, width, height

    def _texts(self, row: Mapping[str, Any], fields: Sequence[str]) -> tuple[str, ...]:
        texts = [self.prefix + text for field in fields for text in texts_in(_known(row, field))]
        if any(not text.strip() for text in texts):
            raise Unusable("an empty caption")
        return tuple(texts)


def _rows(folder: Folder, name: str, tree: str) -> Iterator[tuple[str, Mapping[str, Any] | BadRow]]:
    """Key and fields of every row: its own key where the listing is a JSON object, else its number."""
    place = folder.find(name)
    if place is None:
        raise UserError(absent(str(folder.root), f"lacks {name}", tree))
    with place.open() as stream:
        size = (folder.root / name).stat().st_size
        for number, row in enumerate(reader(name)(stream, max(1, size), name)):
            if isinstance(row, BadRow):
                yield str(number), row
            elif row.fields and all(isinstance(value, dict) for value in row.fields.values()):
                yield from row.fields.items()
            else:
                yield str(number), row.fields


def _known(row: Mapping[str, Any], field: str) -> Any:
    value = find(row, field)
    if value is None or value == "":
        raise Unusable(f"no {field}")
    return value


def _whole(row: Mapping[str, Any], field: str) -> int:
    value = _known(row, field)
    if not isinstance(value, int | float):
        raise Unusable(f"{field} is no number")
    return round(value)


def _other_numbers(caption: str, number: int) -> tuple[str, ...]:
    """The caption with every other number of `COUNTED` in place of its own.

    >>> _other_numbers("Two cats", 2)[:2]
    ('three cats', 'four cats')
    """
    word = NUMBERS[number] if number in COUNTED else ""
    pattern = re.compile(rf"\b{word}\b", re.IGNORECASE)
    if not word or not pattern.search(caption):
        raise Unusable(f"its caption does not say {word or number}")
    return tuple(pattern.sub(NUMBERS[other], caption) for other in COUNTED if other != number)

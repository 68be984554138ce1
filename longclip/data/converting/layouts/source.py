"""From what people have to `Entry`s, whatever its layout and container.

In: a file, a folder, a tar or a glob, and a layout. Out: `Entry`s in a fixed order, whose images are located
but not read, and a `Fault` wherever one cannot be used. Nothing is read outside the source and `--images`.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ....types import UserError
from ...tars.encoding import LONGEST_KEY
from . import samples
from .fields import first, plain
from .files import Files, Folder, Place, Unusable
from .listings import Listing, discover, opened
from .mapping import PLAIN, Layout
from .rows import BadRow, reader


class Entry(NamedTuple):
    """An image and what is said of it, as the source has it: neither decoded nor cleaned."""

    number: int  # in the source, from 1, faults included
    where: str  # listing and line, for messages
    split: str
    key: str
    image: Place | bytes
    captions: list[tuple[str, str]]  # source, text
    meta: dict[str, object]


class Fault(NamedTuple):
    """Why an entry, or a caption of one, cannot be used."""

    number: int
    where: str
    key: str  # "" where the entry has none
    reason: str  # a few words, the same for all of its kind: faults are counted by it
    detail: str = ""
    split: str = ""  # "" where it is not known


class Source:
    """Everything that a conversion reads, in order. It can be iterated over several times.

    Args:
        source: a file, a folder, a tar, or a pattern such as `cc3m/*.tar`.
        layout: what the fields mean.
        images: folder or tar that image paths begin in; default: where the listing is.
        follow_links: admit symbolic links that lead out of the source.

    Attributes:
        done: share that has been read by the latest iteration, from 0 to 1.

    Raises:
        UserError: there is no such source, or it holds nothing of this layout.
    """

    def __init__(
        self, source: str | Path, layout: Layout, images: str | Path | None = None, follow_links: bool = False
    ) -> None:
        self.source, self.layout = str(source), layout
        self.images = opened(Path(images), follow_links) if images else None
        self._images_name = str(images or "")
        self.listings = discover(self.source, layout, follow_links)
        self.done = 0.0
        self._splits: dict[str, str] = {}

    def identity(self) -> dict[str, str]:
        """Tells one source from another: its layout, and the names and sizes of what holds its entries."""
        state = json.dumps([[listing.name, listing.size] for listing in self.listings])
        return {
            "source": hashlib.sha256(state.encode()).hexdigest()[:16],
            "--layout": self.layout.digest(),
            "--images": self._images_name,
        }

    def __iter__(self) -> Iterator[Entry | Fault]:
        total = max(1, sum(listing.size for listing in self.listings))
        before, number, self.done = 0, 0, 0.0
        for listing in self.listings:
            self._splits = self._split_file(listing)
            for done, found in _READ[listing.kind](listing, self.layout.split.file):
                number += 1
                self.done = (before + done * listing.size) / total
                if isinstance(found, Fault):
                    yield found._replace(number=number)
                else:
                    yield self._entry(number, found)
            before += listing.size

    def _entry(self, number: int, found: _Found) -> Entry | Fault:
        key = split = ""
        try:
            name, image = found.image or self._image(number, found)
            key = self._key(name, found)
            split = self._split(number, name, found)
            if image is None:
                raise Unusable("image is missing", f"{found.where} names {name}")
            captions = self.layout.captions_of(found.fields)
            meta = {"image": plain(name)} | self.layout.meta_of(found.fields)
            return Entry(number, found.where, split, key, image, captions, meta)
        except Unusable as error:
            return Fault(number, found.where, key, error.reason, error.detail, split)

    def _image(self, number: int, found: _Found) -> tuple[str, Place | bytes | None]:
        """The image that an entry names: its name, and where it is."""
        value = first(found.fields, self.layout.image)
        if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):  # as Hugging Face keeps images
            return str(value.get("path") or f"{number:09d}"), value["bytes"]
        if isinstance(value, bytes):
            return f"{number:09d}", value
        if not isinstance(value, str) or not value:
            raise Unusable("no image named", f"looked for {', '.join(self.layout.image)}: {value!r:.80}")
        if re.match(r"https?://", value):
            if number == 1:
                raise UserError(self._how_to_download(found.where, value))
            raise Unusable("image is a web address", value[:200])
        if self.layout.suffix and not value.lower().endswith(samples.PICTURES):
            value += self.layout.suffix
        return value, self._place(value, found)

    def _place(self, name: str, found: _Found) -> Place | None:
        files = self.images or found.files
        base = "" if self.images else posixpath.dirname(found.listing)
        for folder in self.layout.folders:
            place = files.find(posixpath.join(base, folder, name))
            if place is not None:
                return place
        return None

    def _key(self, name: str, found: _Found) -> str:
        value = first(found.fields, self.layout.key)
        if value is None or value == "":
            return key_of(name, whole=found.image is not None)
        if not isinstance(value, str | int):
            raise Unusable("key is no text", f"{value!r:.80}")
        return key_of(str(value), whole=True)

    def _split(self, number: int, name: str, found: _Found) -> str:
        rule = self.layout.split
        split: Any = rule.name if number <= rule.held_out else rule.default
        if rule.field and (value := first(found.fields, [rule.field])) not in (None, ""):
            split = value
        if self._splits:
            names = (posixpath.basename(found.listing), posixpath.basename(name))
            split = next((self._splits[n] for n in names if n in self._splits), None)
            if split is None:
                raise Unusable("entry is in no split", f"{rule.file} has none of {', '.join(names)}")
        if not isinstance(split, str) or not PLAIN.fullmatch(split):
            raise Unusable("split is no plain name", f"{split!r:.80}")
        return split

    def _split_file(self, listing: Listing) -> dict[str, str]:
        """Names and their splits, from the file that the layout names, beside the listing or above it."""
        rule = self.layout.split
        if not rule.file or listing.kind != "rows":
            return {}
        folder = posixpath.dirname(next((name for name, *_ in listing.parts(rule.file)), listing.name))
        for base in {folder, posixpath.dirname(folder)}:
            place = listing.files.find(posixpath.join(base, rule.file))
            if place is not None:
                try:
                    return {name: s for s, names in json.loads(place.read()).items() for name in names}
                except (ValueError, AttributeError, TypeError, Unusable) as error:
                    raise UserError(f"{rule.file} is no JSON object {{split: [names]}} ({error})") from error
        return {}

    def _how_to_download(self, where: str, url: str) -> str:
        rules = [path for rule in self.layout.captions for path in (*rule.field, *rule.join)]
        columns = json.dumps([path for path in dict.fromkeys([*rules, *self.layout.meta]) if path != "*"])
        return (
            f"{where} names its image by a web address ({url[:60]}), and longclip downloads nothing; type: "
            f"img2dataset --url_list {self.source} --input_format {self.source.rpartition('.')[2]} "
            f'--url_col "{self.layout.image[0]}" --output_format webdataset --output_folder IMAGES '
            f"--save_additional_columns '{columns}', then give IMAGES instead, with the same --layout"
        )


class _Found(NamedTuple):
    """The fields of an entry, and where they come from."""

    where: str
    fields: dict[str, Any]
    listing: str  # its name within `files`
    files: Files
    image: tuple[str, Place | None] | None = None  # name and place, where the container knows them


def _rows(listing: Listing, besides: str) -> Iterator[tuple[float, _Found | Fault]]:
    """(share of the listing, entry) of each row."""
    before = 0
    for name, place, size in listing.parts(besides):
        with place.open() as stream:
            for row in reader(name)(stream, max(1, size), name):
                where = f"{name}:{row.number}"
                if isinstance(row, BadRow):
                    yield before / max(1, listing.size), Fault(0, where, "", row.reason, row.detail)
                else:
                    done = (before + row.done * size) / max(1, listing.size)
                    yield done, _Found(where, row.fields, name, listing.files)
        before += size


def _tar(listing: Listing, besides: str) -> Iterator[tuple[float, _Found | Fault]]:
    return _samples(listing, samples.of_tar(Path(listing.path)))


def _loose(listing: Listing, besides: str) -> Iterator[tuple[float, _Found | Fault]]:
    assert isinstance(listing.files, Folder), listing
    return _samples(listing, samples.of_folder(listing.files))


def _samples(
    listing: Listing, found: Iterator[samples.Sample | BadRow]
) -> Iterator[tuple[float, _Found | Fault]]:
    done = 0.0
    for sample in found:
        if isinstance(sample, BadRow):
            yield done, Fault(0, f"{listing.name}:{sample.number}", "", sample.reason, sample.detail)
        else:
            done, where = sample.done, f"{listing.name}:{sample.name}"
            named = (sample.name, sample.image)
            yield done, _Found(where, sample.fields, listing.name, listing.files, named)


_READ = {"rows": _rows, "tar": _tar, "loose": _loose}


def key_of(image: str, whole: bool = False) -> str:
    """A sample key from an image's path: no dots, slashes or blanks, short enough, still told apart.

    `whole`: a name, not a path: nothing is taken off its ends.
    """
    path = image if whole else posixpath.splitext(posixpath.normpath(image).removeprefix("images/"))[0]
    key = re.sub(r"[./\\\s]|[^\w-]", "_", path)
    if len(key.encode()) > LONGEST_KEY:
        beginning = key.encode()[: LONGEST_KEY - 20].decode(errors="ignore")
        key = f"{beginning}-{hashlib.sha256(path.encode()).hexdigest()[:16]}"
    return key

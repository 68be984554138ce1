"""A record -> the members of its sample, as they are named and filled in a tar (`members` reads them back).

    KEY.jpg|png|webp  the encoded picture
    KEY.txt           the first caption, for tools that know one caption an image
    KEY.json          {"captions": [{"source", "text", "sentences": [[start, end], ...],
                      "counts": [ids of each sentence], "boxes": [[l, t, r, b] | null, ...]}], "meta": {...}}
    KEY.ids           uint16, little-endian: the ids of all sentences of all captions, end to end

`ids` and `counts` are absent where the captions are not tokenised or an id exceeds 65535, `boxes`
where no sentence has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...types import Caption, Record, UserError
from .index import dump

IMAGES = ("jpg", "png", "webp")
LONGEST_KEY = 90  # bytes: a tar header holds names of 100
ENDS = 2  # start and end token of a caption


def check(record: Record) -> None:
    """Refuse what tools could not read back.

    Raises:
        UserError: the key cannot be a name in a tar, the extension is unknown, there is no caption, or a box
            is not four fractions of the image.
    """
    key = record.key
    if not key or not key.isprintable() or set(key) & set("./\\") or len(key.encode()) > LONGEST_KEY:
        raise UserError(
            f"sample key {key!r} cannot name members of a tar: "
            f"give it 1 to {LONGEST_KEY} bytes without dots or slashes"
        )
    if record.extension not in IMAGES:
        raise UserError(f"sample {key!r} has extension {record.extension!r}; shards hold {', '.join(IMAGES)}")
    if not record.captions:
        raise UserError(f"sample {key!r} has no caption; leave it out or give it one")
    boxed = ((caption, s) for caption in record.captions for s in caption.sentences if s.box is not None)
    for caption, sentence in boxed:
        if not _is_box(sentence.box or ()):
            raise UserError(
                f"sample {key!r} has the box {sentence.box} for "
                f"{caption.text[sentence.start : sentence.end]!r:.60}; a box is left, top, right, bottom as "
                "fractions of the image, left < right and top < bottom: divide pixels by its width and height"
            )


def _is_box(box: Sequence[float]) -> bool:
    if len(box) != 4:
        return False
    left, top, right, bottom = box
    return 0 <= left < right <= 1 and 0 <= top < bottom <= 1


def encode(record: Record, with_ids: bool) -> dict[str, bytes]:
    """The members by extension."""
    ids = [token for caption in record.captions for sentence in caption.sentences for token in sentence.ids]
    with_ids = with_ids and max(ids, default=0) <= 0xFFFF
    described = {
        "captions": [_described(caption, with_ids) for caption in record.captions],
        "meta": record.meta,
    }
    members = {
        record.extension: record.image,
        "txt": record.captions[0].text.encode(),
        "json": dump(described),
    }
    return members | ({"ids": np.asarray(ids, "<u2").tobytes()} if with_ids else {})


def longest(record: Record) -> int:
    """Tokens of the longest caption, start and end token included."""
    return max(ENDS + sum(len(sentence.ids) for sentence in caption.sentences) for caption in record.captions)


def _described(caption: Caption, with_counts: bool) -> dict[str, Any]:
    sentences = caption.sentences
    described: dict[str, Any] = {"source": caption.source, "text": caption.text}
    described["sentences"] = [[sentence.start, sentence.end] for sentence in sentences]
    if with_counts:
        described["counts"] = [len(sentence.ids) for sentence in sentences]
    if any(sentence.box is not None for sentence in sentences):
        described["boxes"] = [sentence.box for sentence in sentences]
    return described

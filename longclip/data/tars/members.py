"""The bytes of one sample, as they lie in a tar -> a `Record`.

In: a run of tar headers and members that `shards.Writer` made, or anybody. Out: a record, or `Damaged`.
Members are data: only the four known extensions are looked at, and nothing is ever unpickled.
"""

from __future__ import annotations

import json
import re
from itertools import chain, islice
from typing import Any

from ...tokens import Tokenizer, stored
from ...types import NO_IDS, Caption, Ids, Record, Sentence
from ..faults import Damaged, Reason
from .encoding import IMAGES


def parse(block: bytes, tokenizer: Tokenizer | None, trusted: bool) -> Record:
    """The record of a sample's bytes.

    Args:
        block: whole members, headers included.
        tokenizer: gives a sentence its ids where the sample's own are not used.
        trusted: whether its own are used where it has some; then they must be of the tokenizer's vocabulary.

    Raises:
        Damaged: the text is what is wrong, without a place.
    """
    try:
        key, members = split(block)
    except ValueError as error:
        raise Damaged(f"{error}", Reason.MEMBER) from error
    extension = next((kind for kind in IMAGES if kind in members), None)
    if extension is None or "json" not in members:
        lost = "image" if extension is None else "json"
        raise Damaged(f"sample {key!r} has no {lost} among its members {sorted(members)}", Reason.MEMBER)
    ids = members.get("ids") if trusted else None
    try:
        captions, meta = _described(members["json"], ids, tokenizer)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        what = f"{type(error).__name__}: {error!s:.80}"
        raise Damaged(f"the json of sample {key!r} is not what shards hold ({what})", Reason.JSON) from error
    return Record(key, members[extension], extension, captions, meta)


def split(block: bytes) -> tuple[str, dict[str, bytes]]:
    """The key and the members of one sample, by extension. tarfile takes ten times as long.

    Raises:
        ValueError: these bytes are no members of one sample.
    """
    members: dict[str, bytes] = {}
    keys: set[bytes] = set()
    at, own_name = 0, None
    while at < len(block):
        header = block[at : at + 512]
        kind = header[156:157]
        if header[257:262] != b"ustar" or kind not in (b"0", b"\0", b"x"):
            raise ValueError("no tar member where one is expected")
        size = int(header[124:136].rstrip(b"\0 "), 8)
        at += 512
        if size < 0 or at + size > len(block):
            raise ValueError("member longer than its sample")
        content = block[at : at + size]
        at += -(-size // 512) * 512
        if kind == b"x":
            own_name = _path(content)
            continue
        key, _, extension = (own_name or header[:100].rstrip(b"\0")).partition(b".")
        own_name = None
        keys.add(key)
        if extension.decode() in members:
            raise ValueError(f"member {extension.decode()} comes twice")
        members[extension.decode()] = content
    if len(keys) != 1:
        raise ValueError(f"members of {len(keys)} keys in one sample")
    return keys.pop().decode(), members


def _path(extended: bytes) -> bytes | None:
    """The next member's name, where an extended header (POSIX.1-2001) has it: beyond ASCII or 100 bytes."""
    found = re.search(rb"(?:^|\n)\d+ path=([^\n]*)\n", extended)
    return found and found[1]


def _described(
    raw: bytes, raw_ids: bytes | None, tokenizer: Tokenizer | None
) -> tuple[tuple[Caption, ...], dict[str, object]]:
    described = json.loads(raw)
    counts = chain.from_iterable(item["counts"] for item in described["captions"])
    known = None if raw_ids is None else iter(stored(raw_ids, counts, tokenizer))
    captions = []
    for item in described["captions"]:
        text, spans = item["text"], [(start, end) for start, end in item["sentences"]]
        if not all(isinstance(at, int) for span in spans for at in span):
            raise TypeError("a sentence's place is no whole number")
        if not all(0 <= start < end <= len(text) for start, end in spans):
            raise ValueError("a sentence lies outside of its caption")
        if known is None:
            sentence_ids = [tokenizer.ids(text[a:b]) if tokenizer else NO_IDS for a, b in spans]
        else:
            sentence_ids = list(islice(known, len(item["counts"])))
        caption = _caption(item, spans, sentence_ids)
        if tokenizer:  # it may leave nothing of "?!"; the caption stays, since scores go by its place
            caption = caption._replace(sentences=tuple(s for s in caption.sentences if s.ids))
        captions.append(caption)
    if not any(caption.sentences for caption in captions) or not isinstance(described["meta"], dict):
        raise ValueError("no captions, or meta is no object")
    return tuple(captions), described["meta"]


def _caption(item: dict[str, Any], spans: list[tuple[int, int]], sentence_ids: list[Ids]) -> Caption:
    if not (isinstance(item["text"], str) and isinstance(item["source"], str)):
        raise TypeError("text or source is no text")
    boxes = item.get("boxes") or [None] * len(spans)
    if not all(box is None or _is_box(box) for box in boxes):
        raise ValueError("a box is not four fractions of the image")
    sentences = tuple(
        Sentence(start, end, ids, tuple(box) if box else None)
        for (start, end), ids, box in zip(spans, sentence_ids, boxes, strict=True)
    )
    return Caption(item["source"], item["text"], sentences)


def _is_box(box: object) -> bool:
    if not isinstance(box, list) or len(box) != 4:
        return False
    return all(isinstance(edge, int | float) and 0 <= edge <= 1 for edge in box)

"""From an entry of a source to a record: read the image, check it, check, split and tokenise the captions.

In: `Entry`s. Out: `Prepared`, or a `Fault` where nothing can be used. It is what a conversion does
in many processes: `Prepare` holds all it needs and can be pickled.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image

from ...sentences import parse
from ...tokens import Tokenizer
from ...types import Caption, Record, UserError
from .. import images
from .layouts.files import Place, Unusable
from .layouts.source import Entry, Fault

LONGEST_CAPTION = 20_000  # characters: longer than any description of one image
REPLACED = "\N{REPLACEMENT CHARACTER}"
REPEATS = 8  # words, from which on repetition counts as absurd


class Prepared(NamedTuple):
    """A record, and what there is to say about it."""

    record: Record
    tokens: list[int]  # of each caption, start and end token included
    lost: list[Fault]  # captions that were left out
    notes: list[str]  # countable peculiarities of what was kept


class Prepare:
    """Callable on entries, one after the other or in many processes.

    Args:
        tokenizer: makes the ids.
        splitter: what finds sentences (`sentences.split`).
    """

    def __init__(self, tokenizer: Tokenizer, splitter: str = "syntok") -> None:
        self.tokenizer, self.splitter = tokenizer, splitter
        self._ends = len(tokenizer.prefix) + len(tokenizer.suffix)

    def __call__(self, entry: Entry | Fault) -> Prepared | Fault:
        """Faults pass through."""
        if isinstance(entry, Fault):
            return entry
        try:
            image = entry.image.read() if isinstance(entry.image, Place) else entry.image
            extension = images.extension(image)
            images.decode(image)
        except Unusable as error:
            return Fault(entry.number, entry.where, entry.key, error.reason, error.detail)
        except UserError as error:
            return Fault(entry.number, entry.where, entry.key, str(error).partition(":")[0], str(error))
        captions, lost = self._captions(entry)
        if not captions:
            detail = "; ".join(fault.reason for fault in lost) or "the list of captions is empty"
            return Fault(entry.number, entry.where, entry.key, "no captions", detail)
        record = Record(entry.key, image, extension, tuple(captions), entry.meta)
        tokens = [self._ends + sum(len(s.ids) for s in caption.sentences) for caption in captions]
        return Prepared(record, tokens, lost, list(_notes(image)))

    def _captions(self, entry: Entry) -> tuple[list[Caption], list[Fault]]:
        captions, lost = [], []
        for source, text in entry.captions:
            reason = absurd(text)
            if reason is None:
                try:
                    captions.append(parse(text, source, self.tokenizer, self.splitter))
                    continue
                except UserError:
                    reason = "caption is empty"
            lost.append(Fault(entry.number, entry.where, entry.key, reason, f"{source}: {text[:80]!r}"))
        return captions, lost


def absurd(text: str) -> str | None:
    """Why a text can be no caption, None if it may be one."""
    if not text.strip():
        return "caption is empty"
    if len(text) > LONGEST_CAPTION:
        return f"caption is longer than {LONGEST_CAPTION:,} characters"
    words = text.lower().split()
    solid = "".join(words)
    if not (solid.isprintable() and REPLACED not in solid) and _junk(solid) > 0.02 * len(text):
        return "caption is binary"
    if len(words) >= REPEATS and len(set(words)) <= len(words) / REPEATS / 2:
        return "caption repeats the same words"
    return None


def _junk(text: str) -> int:
    """Control characters, lone halves of pairs, and what stands for bytes that are no text.

    Not the invisible joiners (Cf) that Persian and Hindi words and many emoji are written with.
    """
    return sum(
        1
        for character in text
        if character == REPLACED or not (character.isprintable() or unicodedata.category(character) == "Cf")
    )


def _notes(image: bytes) -> Iterator[str]:
    mode = Image.open(io.BytesIO(image)).mode
    if mode != "RGB":
        yield f"image is {mode}, read as RGB"

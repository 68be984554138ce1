"""What training shows of a dataset: a few samples in full, and the caption lengths of many.

In: a `Corpus`, a `Recipe`, caption groups. Out: `Shown` samples and `Counts`, plain values for `page`.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..captions import Groups
from ..data.corpus import Corpus
from ..data.images import Augment, EvalTransform, inside
from ..data.loading import picture, seeding, view, window
from ..types import Box, Record, Sentence, Text, UserError
from .recipe import Recipe


class Picture(NamedTuple):
    """An image as the model sees it, with the boxes that are still in it."""

    title: str
    png: bytes
    boxes: dict[int, Box]  # by number, in fractions of this picture


class Slot(NamedTuple):
    """A caption slot: its group, and the text that the recipe put there."""

    group: str
    text: Text | None
    box: int | None  # its number


class Told(NamedTuple):
    """A caption as it is stored: its sentences and the numbers of their boxes."""

    source: str
    sentences: list[tuple[str, int | None]]


class Shown(NamedTuple):
    """One sample. `damage` says why there is nothing to see."""

    key: str
    shard: str
    pictures: list[Picture] = []
    slots: list[Slot] = []
    captions: list[Told] = []
    damage: str = ""


class Counts(NamedTuple):
    """Lengths in tokens, start and end token included, of everything that was looked at."""

    images: int
    damaged: int
    sources: dict[str, list[int]]  # every caption, by who wrote it
    sentences: dict[str, list[int]]  # how many each of them has
    groups: dict[str, list[int]]  # every filled slot of the recipe, by group


def spread(indexes: Sequence[int] | NDArray[np.int64], count: int) -> list[int]:
    """`count` of these, evenly spread: the first of each equal part."""
    total = len(indexes)
    count = min(count, total)
    return [int(indexes[total * part // count]) for part in range(count)]


class Moment(NamedTuple):
    """When in a run."""

    epoch: int = 0
    progress: float = 0.0  # the share that is done: recipes with a schedule go by it


def sample(data: Corpus, index: int, recipe: Recipe, groups: Groups, moment: Moment) -> Shown:
    """One sample as a run shows it at this moment, and as judging does."""
    try:
        record, image_CHW = picture(data, index)
        texts = groups.show(record.captions, record.key, *moment)
    except UserError as error:
        return Shown(f"sample {index}", "", damage=str(error))
    numbers = _numbered(record, texts)
    words = seeding(recipe.seed, moment.epoch, record.key)
    views = {"judging": None} | ({"training, augmented": recipe.augment} if recipe.augment else {})
    return Shown(
        record.key,
        str(data.shard(index)),
        [
            Picture(title, *_seen(image_CHW, recipe.transform, augment, words, numbers))
            for title, augment in views.items()
        ],
        _slots(groups, texts, numbers),
        [_told(caption.source, caption.text, caption.sentences, numbers) for caption in record.captions],
    )


def counts(data: Corpus, indexes: Sequence[int], groups: Groups, moment: Moment, extra: int) -> Counts:
    """Caption lengths of these records; `extra` is the number of start and end tokens."""
    found = Counts(len(indexes), 0, defaultdict(list), defaultdict(list), defaultdict(list))
    damaged = 0
    for index in indexes:
        try:
            record = data.record(index)
            texts = groups.show(record.captions, record.key, *moment)
        except UserError:
            damaged += 1
            continue
        for caption in record.captions:
            found.sources[caption.source].append(extra + sum(len(s.ids) for s in caption.sentences))
            found.sentences[caption.source].append(len(caption.sentences))
        for group, slots in groups.slots.items():
            found.groups[group] += [extra + len(text.ids) for text in texts[slots] if text]
    return found._replace(damaged=damaged)


def _numbered(record: Record, texts: Sequence[Text | None]) -> dict[Box, int]:
    """Every different box, sentences' first, then those that a policy made of several."""
    boxes = [sentence.box for caption in record.captions for sentence in caption.sentences]
    boxes += [text.box for text in texts if text]
    return {box: number for number, box in enumerate(dict.fromkeys(b for b in boxes if b), 1)}


def _seen(
    image_CHW: Tensor, transform: EvalTransform, augment: Augment | None, words: str, numbers: dict[Box, int]
) -> tuple[bytes, dict[int, Box]]:
    """A view of an image as a PNG, and the boxes in it."""
    pixels_HWC = view(image_CHW, transform, augment, words).permute(1, 2, 0).numpy()
    written = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels_HWC)).save(written, "PNG")
    shown = window(image_CHW, transform, augment, words)
    boxes = {number: inside(box, shown) for box, number in numbers.items()}
    return written.getvalue(), {number: box for number, box in boxes.items() if box}


def _slots(groups: Groups, texts: Sequence[Text | None], numbers: dict[Box, int]) -> list[Slot]:
    return [
        Slot(group, text, numbers.get(text.box) if text and text.box else None)
        for group, slots in groups.slots.items()
        for text in texts[slots]
    ]


def _told(source: str, text: str, sentences: Sequence[Sentence], numbers: dict[Box, int]) -> Told:
    spans = [(text[s.start : s.end], numbers.get(s.box) if s.box else None) for s in sentences]
    return Told(source, spans)

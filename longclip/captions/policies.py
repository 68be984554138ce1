"""Policies that choose texts from an image's captions, whoever wrote them.

In: the captions of one image, a seeded source of randomness. Out: at most `count` texts.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from longclip.tokens import joined
from longclip.types import Caption, Ids, Sentence, Text, UserError

Sources = str | Sequence[str] | None
"""Which captions a policy looks at: one source, several, or None for all of an image's."""

SPECIALS = 2  # start and end token, as `limit` and `context_length` count them


class Policy(Protocol):
    """Chooses texts: at most `count` of them, in slot order, None between them; slots without one are masked.

    `progress` is the share of the run that is done, from 0 to 1, for what changes on the way.
    """

    @property
    def count(self) -> int: ...

    def __call__(
        self, captions: Sequence[Caption], rng: random.Random, progress: float = 0.0
    ) -> Sequence[Text | None]: ...


@dataclass(frozen=True)
class Whole:
    """The whole caption: the first one that `source` admits.

    `limit` keeps that many tokens, start and end included (77 keeps 75 ids). `join` puts all admitted
    captions one after the other.
    """

    source: Sources = None
    limit: int | None = None
    join: bool = False
    count: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.limit is not None:
            at_least("Whole.limit", self.limit, SPECIALS + 1)

    def __call__(self, captions: Sequence[Caption], rng: random.Random, progress: float = 0.0) -> list[Text]:
        chosen = admitted(captions, self.source)
        whole = ids(s for caption in (chosen if self.join else chosen[:1]) for s in caption.sentences)
        return [Text(whole if self.limit is None else whole[: self.limit - SPECIALS])] if chosen else []


@dataclass(frozen=True)
class First:
    """The first sentence of the caption that `Whole` shows: Long-CLIP's short caption."""

    source: Sources = None
    count: ClassVar[int] = 1

    def __call__(self, captions: Sequence[Caption], rng: random.Random, progress: float = 0.0) -> list[Text]:
        return [text(caption.sentences[:1]) for caption in admitted(captions, self.source)[:1]]


@dataclass(frozen=True)
class Source:
    """The whole caption that the source `name` wrote; masked where there is none."""

    name: str
    count: ClassVar[int] = 1

    def __call__(self, captions: Sequence[Caption], rng: random.Random, progress: float = 0.0) -> list[Text]:
        return [text(caption.sentences) for caption in admitted(captions, self.name)[:1]]


@dataclass(frozen=True)
class Sentences:
    """`count` sub-captions drawn without replacement from all admitted captions (DreamLIP, ECCV 2024).

    Each starts at a drawn sentence and takes `merge` of them, fewer at the end of its caption: every
    sentence can be the first. Those with equal ids count once, since a repeated text would be a false
    negative; where the pool is smaller than `count`, the remaining slots are masked.
    """

    count: int
    merge: int = 1
    source: Sources = None

    def __post_init__(self) -> None:
        at_least("Sentences.count", self.count, 1)
        at_least("Sentences.merge", self.merge, 1)

    def __call__(self, captions: Sequence[Caption], rng: random.Random, progress: float = 0.0) -> list[Text]:
        pool: dict[bytes, Text] = {}
        for caption in admitted(captions, self.source):
            for start in range(len(caption.sentences)):
                merged = text(caption.sentences[start : start + self.merge])
                pool.setdefault(merged.ids.tobytes(), merged)
        return rng.sample(list(pool.values()), min(self.count, len(pool)))


@dataclass(frozen=True)
class Merged:
    """`count` sub-captions of one to `most` sentences (FLAIR, CVPR 2025, arXiv 2412.03561).

    For each, n ~ U{1..most} sentences: with equal chances n in a row of one caption, or n of all
    admitted captions in random order; fewer where there are fewer. Those with equal ids count once, as
    in `Sentences`, and the remaining slots are masked.
    """

    count: int
    most: int = 3
    source: Sources = None

    def __post_init__(self) -> None:
        at_least("Merged.count", self.count, 1)
        at_least("Merged.most", self.most, 1)

    def __call__(self, captions: Sequence[Caption], rng: random.Random, progress: float = 0.0) -> list[Text]:
        of = [caption for caption in admitted(captions, self.source) for _ in caption.sentences]
        pool = [s for caption in admitted(captions, self.source) for s in caption.sentences]
        drawn: dict[bytes, Text] = {}
        for _ in range(self.count if pool else 0):
            n = rng.randint(1, self.most)
            if rng.random() < 0.5:
                row = rng.choice(of).sentences  # a longer caption is chosen more often
                start = rng.randint(0, max(0, len(row) - n))
                merged = text(row[start : start + n])
            else:
                merged = text(rng.sample(pool, min(n, len(pool))))
            drawn.setdefault(merged.ids.tobytes(), merged)
        return list(drawn.values())


@dataclass(frozen=True)
class Debias:
    """DeBias-CLIP's short caption (CVPR 2026, arXiv 2602.22419): no shortcut through the first sentence.

    Of the sentences s1..sk of the caption that `Whole` shows, s1 is dropped; n ~ U{1..k-1} of the others
    are drawn without replacement and joined in the order drawn; then n_pre ~ U{0..n_post} pad tokens go
    before them, n_post being the padding that would follow, so that nothing is cut. A caption of one
    sentence shows that one.
    """

    context_length: int
    source: Sources = None
    pad_id: int = 0
    count: ClassVar[int] = 1

    def __post_init__(self) -> None:
        at_least("Debias.context_length", self.context_length, SPECIALS + 1)

    def __call__(self, captions: Sequence[Caption], rng: random.Random, progress: float = 0.0) -> list[Text]:
        chosen = admitted(captions, self.source)
        if not chosen:
            return []
        pool = chosen[0].sentences[1:] or chosen[0].sentences
        drawn = ids(rng.sample(pool, rng.randint(1, len(pool))))
        padding = max(0, self.context_length - SPECIALS - len(drawn))
        return [Text(array(drawn.typecode, [self.pad_id]) * rng.randint(0, padding) + drawn)]


@dataclass(frozen=True)
class All:
    """Every admitted caption in its own slot, the first `count` of them."""

    count: int
    source: Sources = None

    def __post_init__(self) -> None:
        at_least("All.count", self.count, 1)

    def __call__(self, captions: Sequence[Caption], rng: random.Random, progress: float = 0.0) -> list[Text]:
        return [text(caption.sentences) for caption in admitted(captions, self.source)[: self.count]]


def admitted(captions: Sequence[Caption], source: Sources) -> Sequence[Caption]:
    """Those by a source that say anything: of "?!" some tokenizers leave no sentence."""
    told = [caption for caption in captions if caption.sentences]
    if source is None:
        return told
    names = (source,) if isinstance(source, str) else source
    return [caption for caption in told if caption.source in names]


def ids(sentences: Iterable[Sentence]) -> Ids:
    return joined(sentence.ids for sentence in sentences)


def text(sentences: Sequence[Sentence]) -> Text:
    """The sentences as one text, with the box around all of theirs if each has one."""
    if len(sentences) == 1:
        return Text(sentences[0].ids, sentences[0].box)
    boxes = [sentence.box for sentence in sentences if sentence.box is not None]
    if not boxes or len(boxes) < len(sentences):
        return Text(ids(sentences))
    left, top, right, bottom = zip(*boxes, strict=True)
    return Text(ids(sentences), (min(left), min(top), max(right), max(bottom)))


def at_least(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise UserError(f"{name} is {value!r}; it must be a whole number of at least {least}.")

"""Policies that disturb a caption's order, or show it piece by piece: does a model read on?

In: the captions of one image, a seeded source of randomness. Out: at most `count` texts, all of the caption
that `Whole` shows; none where it has too few sentences to be disturbed.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from longclip.types import Caption, Sentence, Text

from .policies import Sources, admitted, at_least, ids, text


@dataclass(frozen=True)
class WithoutFirst:
    """All sentences but the first (DeBias-CLIP, CVPR 2026, arXiv 2602.22419)."""

    source: Sources = None
    count: ClassVar[int] = 1

    def __call__(self, captions: Sequence[Caption], rng: random.Random, progress: float = 0.0) -> list[Text]:
        sentences = _sentences(captions, self.source)
        return [text(sentences[1:])] if len(sentences) > 1 else []


@dataclass(frozen=True)
class Moved:
    """The first sentence comes as number `to`, at the latest as the last; the others keep their order."""

    to: int = 4
    source: Sources = None
    count: ClassVar[int] = 1

    def __post_init__(self) -> None:
        at_least("Moved.to", self.to, 2)

    def __call__(self, captions: Sequence[Caption], rng: random.Random, progress: float = 0.0) -> list[Text]:
        sentences = _sentences(captions, self.source)
        moved = (*sentences[1 : self.to], *sentences[:1], *sentences[self.to :])
        return [text(moved)] if len(sentences) > 1 else []


@dataclass(frozen=True)
class Shuffled:
    """All sentences in a random order, which may be the right one."""

    source: Sources = None
    count: ClassVar[int] = 1

    def __call__(self, captions: Sequence[Caption], rng: random.Random, progress: float = 0.0) -> list[Text]:
        sentences = _sentences(captions, self.source)
        return [text(rng.sample(sentences, len(sentences)))] if len(sentences) > 1 else []


@dataclass(frozen=True)
class Preceded:
    """The whole caption after `filler`, token ids that say nothing about the image."""

    filler: Sequence[int]
    source: Sources = None
    count: ClassVar[int] = 1

    def __call__(self, captions: Sequence[Caption], rng: random.Random, progress: float = 0.0) -> list[Text]:
        sentences = _sentences(captions, self.source)
        whole = ids(sentences)
        return [Text(array(whole.typecode, self.filler) + whole)] if sentences else []


@dataclass(frozen=True)
class Beginning:
    """The first n sentences, n ~ U{1..all} (SmartCLIP, CVPR 2025, arXiv 2507.22264)."""

    source: Sources = None
    count: ClassVar[int] = 1

    def __call__(self, captions: Sequence[Caption], rng: random.Random, progress: float = 0.0) -> list[Text]:
        sentences = _sentences(captions, self.source)
        return [text(sentences[: rng.randint(1, len(sentences))])] if sentences else []


@dataclass(frozen=True)
class Prefixes:
    """`count` beginnings of the caption, each longer than the one before, the last one whole.

    The sentences are cut into `count` parts of nearly equal numbers (HiMo-CLIP, AAAI 2026); nothing where
    there are fewer sentences than parts.
    """

    count: int
    source: Sources = None

    def __post_init__(self) -> None:
        at_least("Prefixes.count", self.count, 2)

    def __call__(self, captions: Sequence[Caption], rng: random.Random, progress: float = 0.0) -> list[Text]:
        sentences = _sentences(captions, self.source)
        if len(sentences) < self.count:
            return []
        ends = [len(sentences) * part // self.count for part in range(1, self.count + 1)]
        return [text(sentences[:end]) for end in ends]


def _sentences(captions: Sequence[Caption], source: Sources) -> Sequence[Sentence]:
    return next((caption.sentences for caption in admitted(captions, source)), ())

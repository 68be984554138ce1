"""Policies that write negatives: a text with one thing about it made wrong (SVLC, NegCLIP, Count-to-Ten).

In: the captions of one image, a seeded source of randomness. Out: texts that read like those of the image and
that none of its captions says (`swapping` has the rules, `lexicon.yaml` the words). Slots correspond: where a
text has too few negatives, their slots are empty.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, NamedTuple

from longclip.types import NO_IDS, Caption, Text, UserError

from .lexicon import Lexicon, load
from .policies import SPECIALS, Policy, Sources, admitted, at_least, text
from .swapping import Said, swapped, swaps


class Part(NamedTuple):
    """A sentence as it stands in a text."""

    words: str
    free: bool = True  # may be changed


@dataclass(frozen=True)
class Swapped:
    """Of every text that `of` shows, `negatives` with one thing swapped in one of its sentences.

    Text t has the slots t * negatives and on. Call the group of the right texts "sub" and this "sub-wrong":
    groups that are called the same up to a hyphen draw the same texts. Kinds take turns, in random order, and
    all negatives of a text differ.

    Args:
        of: the policy of the right texts; it shows whole sentences of the captions.
        kinds: of the lexicon (colour, number, ...) and "order"; None: all.
        within: only sentences that end within so many tokens, start and end token included, are changed,
            since what the context length cuts off cannot be told apart: ${model.backbone.context_length}.
        lexicon: a YAML file of one's own; None: lexicon.yaml beside this file.
    """

    of: Policy
    negatives: int = 1
    kinds: Sequence[str] | None = None
    within: int | None = None
    lexicon: str | None = None

    def __post_init__(self) -> None:
        at_least("Swapped.negatives", self.negatives, 1)
        check_kinds(self.kinds, load(self.lexicon))

    @property
    def count(self) -> int:
        return self.of.count * self.negatives

    def __call__(
        self, captions: Sequence[Caption], rng: random.Random, progress: float = 0.0
    ) -> Sequence[Text | None]:
        shown = self.of(captions, rng, progress)
        lexicon = load(self.lexicon)
        said = Said(_sentences(captions), lexicon)
        slots: list[Text | None] = []
        for right in shown:
            found = [] if right is None else list(self._negatives(right, captions, said, rng))
            slots += [*found, *[None] * (self.negatives - len(found))]
        return slots

    def _negatives(
        self, right: Text, captions: Sequence[Caption], said: Said, rng: random.Random
    ) -> Iterator[Text]:
        found = wrong(_parts(right, captions, self.within), said, self.kinds, rng)
        return (right._replace(ids=NO_IDS, words=words) for words in islice(found, self.negatives))


@dataclass(frozen=True)
class Contrasted:
    """Two texts, for judging: one of the caption that `Whole` shows, and the same with one thing swapped.

    The text is one sentence or, with `whole`, the caption; none where nothing of the kind can be swapped.
    """

    kind: str
    whole: bool = False
    source: Sources = None
    lexicon: str | None = None
    count: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_kinds([self.kind], load(self.lexicon))

    def __call__(self, captions: Sequence[Caption], rng: random.Random, progress: float = 0.0) -> list[Text]:
        said = Said(_sentences(captions), load(self.lexicon))
        for caption in admitted(captions, self.source)[:1]:
            rows = [caption.sentences] if self.whole else [(sentence,) for sentence in caption.sentences]
            for row in rng.sample(rows, len(rows)):
                right = text(row)
                for words in wrong(_parts(right, [caption]), said, [self.kind], rng):
                    return [right, right._replace(ids=NO_IDS, words=words)]
        return []


def wrong(
    parts: Sequence[Part], said: Said, kinds: Sequence[str] | None, rng: random.Random
) -> Iterator[str]:
    """Texts with one thing in one part swapped, all different, kinds in turn as long as each has some."""
    turns = list(said.lexicon.kinds if kinds is None else kinds)
    rng.shuffle(turns)
    left = [_made(parts, kind, said, rng) for kind in turns]
    known = set[str]()
    while left:
        for made in tuple(left):
            words = next((words for words in made if words not in known), None)
            if words is None:
                left.remove(made)
            else:
                known.add(words)
                yield words


def _made(parts: Sequence[Part], kind: str, said: Said, rng: random.Random) -> Iterator[str]:
    tries = [
        (n, swap)
        for n, part in enumerate(parts)
        if part.free
        for swap in swaps(part.words, kind, said.lexicon)
    ]
    rng.shuffle(tries)
    for n, swap in tries:
        if not said.has(parts[n].words, swap):
            sentence = swapped(parts[n].words, swap)
            yield " ".join(
                [*(part.words for part in parts[:n]), sentence, *(part.words for part in parts[n + 1 :])]
            )


def _sentences(captions: Sequence[Caption]) -> Iterator[str]:
    return (caption.text[s.start : s.end] for caption in captions for s in caption.sentences)


def _parts(text: Text, captions: Sequence[Caption], within: int | None = None) -> list[Part]:
    """The sentences that a text is made of, found by their ids; those beyond `within` tokens are not free."""
    if text.words is not None:
        return [Part(text.words)]
    known = [(s.ids, caption.text[s.start : s.end]) for caption in captions for s in caption.sentences]
    known.sort(key=lambda sentence: -len(sentence[0]))
    parts: list[Part] = []
    at = 0
    while at < len(text.ids):
        ids, words = next((s for s in known if s[0] and text.ids[at : at + len(s[0])] == s[0]), (NO_IDS, ""))
        if not ids:
            raise UserError(
                "Swapped changes texts of whole sentences, and one that it was given is cut, padded or made "
                "of phrases; give it a policy such as longclip.captions.Sentences, or Whole without a limit."
            )
        at += len(ids)
        parts.append(Part(words, within is None or at + SPECIALS <= within))
    return parts


def check_kinds(kinds: Sequence[str] | None, lexicon: Lexicon) -> None:
    """Raises UserError where the lexicon has no such kind."""
    unknown = [kind for kind in kinds or () if kind not in lexicon.kinds]
    if unknown or (kinds is not None and not kinds):
        seen = repr(unknown[0]) if unknown else "nothing"
        raise UserError(f"kinds of swaps has {seen}; choose from {', '.join(lexicon.kinds)}.")

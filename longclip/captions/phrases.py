"""Sentences and phrases of a caption, beside the whole: the granularities of beta-CLIP.

In: the captions of one image. Out: some sentences and some phrases of the one that `Whole` shows. Phrases
are cut by rule, in English, at punctuation and at words that only join others: no parser to install, and
about ten microseconds a sentence.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from longclip.types import NO_IDS, Caption, Text

from .policies import Sources, admitted, at_least, text

_JOINS = frozenset(
    """
    about above across after against along among amid and around as at before behind below beneath beside
    besides between beyond but by during for from in inside into like near nor of off on onto or out outside
    over past per since so than through throughout to toward towards under underneath until up upon via while
    with within without that which who whom whose where when there here it its they them he she his her their
    this these those we you i
    is are was were be been being am has have had do does did can could may might must shall should will would
    appears seems sits sit stands stand lies lie shows show features contains includes
    next left right front back top bottom side
    """.split()  # noqa: SIM905
)
"""Prepositions, conjunctions, pronouns, auxiliaries, and what descriptions use like them."""

_ARTICLES = frozenset({"a", "an", "the", "some", "each", "every", "both"})
_TOKEN = re.compile(r"\w[\w'’-]*|[^\w\s]")


def phrases(sentence: str) -> Iterator[str]:
    """What is said between joining words and punctuation, where that is two words or more.

    >>> list(phrases("A small red kite flies above the old stone bridge, which is very long."))
    ['A small red kite flies', 'the old stone bridge', 'very long']
    """
    run: list[str] = []
    for token in [*_TOKEN.findall(sentence), "."]:
        if token.lower() not in _JOINS and (token[0].isalnum() or token[0] == "_"):
            run.append(token)
            continue
        if len(run) - (bool(run) and run[0].lower() in _ARTICLES) > 1:
            yield " ".join(run)
        run = []


@dataclass(frozen=True)
class Parts:
    """Up to `sentences` sentences and `phrases` phrases of the caption that `Whole` shows.

    Both are drawn without replacement, and equal ones count once; a sentence that is the whole caption, or
    a phrase that is a whole sentence, is left out, since it would be shown twice. beta-CLIP (CVPR 2026,
    arXiv 2512.12678) shows 5 and 30 beside the whole; its phrases are a parser's noun and verb phrases.
    """

    sentences: int
    phrases: int
    source: Sources = None

    def __post_init__(self) -> None:
        at_least("Parts.sentences", self.sentences, 0)
        at_least("Parts.phrases", self.phrases, 0)
        at_least("Parts.sentences + Parts.phrases", self.count, 1)

    @property
    def count(self) -> int:
        return self.sentences + self.phrases

    def __call__(self, captions: Sequence[Caption], rng: random.Random, progress: float = 0.0) -> list[Text]:
        chosen = admitted(captions, self.source)
        if not chosen:
            return []
        whole = chosen[0]
        said = {whole.text[s.start : s.end]: text([s]) for s in whole.sentences}
        found = {phrase.casefold(): phrase for sentence in said for phrase in phrases(sentence)}
        shorter = [phrase for phrase in found.values() if not any(_equal(phrase, one) for one in said)]
        sentences = list(said.values()) if len(said) > 1 else []
        return [
            *rng.sample(sentences, min(self.sentences, len(sentences))),
            *(Text(NO_IDS, words=one) for one in rng.sample(shorter, min(self.phrases, len(shorter)))),
        ]


def _equal(phrase: str, sentence: str) -> bool:
    return phrase.casefold() == sentence.casefold().rstrip(".!?。")

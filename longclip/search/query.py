"""A long query over an indexed folder -> the pictures that fit, and what of the query each of them fits.

In: a tower, an `Index`, a text. Out: an `Answer`, plain values. Scores are cosines. To say which sentence a
picture fits best, a sentence's scores are compared over the folder: "there is a picture" fits all of them
well, and so says nothing of one. Places begin at 1; pictures that score the same share the worst of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .. import sentences
from ..captions.policies import ids
from ..data.images import EvalTransform
from ..towers.clip import DualTower
from ..types import Ids, Text, UserError
from .index import Index

WINDOW = 77  # tokens that CLIP reads, start and end included


class Fit(NamedTuple):
    """How one sentence fits one picture."""

    similarity: float  # cosine
    above: float  # standard deviations above the folder's mean
    place: int  # among the folder's pictures, for this sentence alone


class Result(NamedTuple):
    number: int  # of the picture in the index
    path: str  # as it may be printed
    score: float  # cosine of the picture and the whole query
    fits: list[Fit]  # by sentence
    window_place: int | None  # its place by the query's first WINDOW tokens; None where those are all

    @property
    def strongest(self) -> int:
        """The sentence that sets this picture apart most."""
        return max(range(len(self.fits)), key=lambda number: self.fits[number].above)


class Answer(NamedTuple):
    text: str  # of the query, cleaned
    sentences: list[str]
    tokens: int  # of the query, start and end included
    unseen: int  # tokens of it that the model does not read
    results: list[Result]  # best first


@dataclass(frozen=True)
class Searcher:
    """Answers queries over one folder."""

    tower: DualTower  # in eval mode
    transform: EvalTransform
    index: Index

    @cached_property
    def _image_EN(self) -> Tensor:
        return self.index.image_NE.T.contiguous()

    @torch.no_grad()
    def answer(self, query: str, count: int) -> Answer:
        """The `count` pictures that fit best. Raises UserError on an empty query."""
        tokenizer = self.tower.tokenizer
        if not tokenizer.clean(query):
            raise UserError("the query is empty: describe a picture, in as many sentences as you like")
        caption = sentences.parse(query, "query", tokenizer)
        whole, extra = ids(caption.sentences), len(tokenizer.prefix) + len(tokenizer.suffix)
        tokens, context = len(whole) + extra, self.tower.context_length
        texts = [whole, whole[: WINDOW - extra], *(sentence.ids for sentence in caption.sentences)]
        score_N, window_N, *score_SN = self._scores(texts)
        return Answer(
            caption.text,
            [caption.text[sentence.start : sentence.end] for sentence in caption.sentences],
            tokens,
            max(0, tokens - context),
            self._results(score_N, window_N if min(tokens, context) > WINDOW else None, score_SN, count),
        )

    def _results(
        self, score_N: Tensor, window_N: Tensor | None, score_SN: Sequence[Tensor], count: int
    ) -> list[Result]:
        best = score_N.argsort(descending=True, stable=True)[:count].tolist()
        fits = [_fits(one_N, best) for one_N in score_SN]
        return [
            Result(
                number,
                self.index.files[number].shown,
                float(score_N[number]),
                [fit[at] for fit in fits],
                None if window_N is None else _place(window_N, number),
            )
            for at, number in enumerate(best)
        ]

    def _scores(self, texts: Sequence[Ids]) -> Tensor:
        """Cosines of every text with every picture, [texts, N], on the host."""
        text_SE = self.tower.encode_ids([Text(one) for one in texts]).cpu()
        return text_SE @ self._image_EN


def _place(score_N: Tensor, number: int) -> int:
    return int((score_N >= score_N[number]).sum())


def _fits(score_N: Tensor, numbers: Sequence[int]) -> list[Fit]:
    mean, deviation = score_N.mean(), score_N.std(correction=0).clamp_min(1e-6)
    return [
        Fit(float(score_N[n]), float((score_N[n] - mean) / deviation), _place(score_N, n)) for n in numbers
    ]

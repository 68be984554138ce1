"""How many tokens captions have: of the data where they are, of made-up paragraphs where they are not."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..captions import Groups
from ..tokens import Tokenizer, pack
from ..types import Caption, Sentence

WORDS = "a red cup stands left of two blue boxes while the small dog under it looks at large trees"
"""One token each in every vocabulary; something among them for policies that swap words to swap."""


def synthetic(groups: Groups, tokenizer: Tokenizer, images: int = 256) -> NDArray[np.int32]:
    """lengths_BK as the recipe shows paragraphs of sentences of 20 tokens (deviation 8), 140 (40) in all.

    That is about what multimodal models write of a photo (DreamLIP, ShareGPT4V).
    """
    groups = groups.reading(tokenizer.ids)
    texts = [groups.show([paragraph(random.Random(i), tokenizer)], str(i), epoch=0) for i in range(images)]
    lengths_BK: NDArray[np.int32] = pack(texts, tokenizer).lengths_BK.numpy()
    return lengths_BK


def paragraph(chance: random.Random, tokenizer: Tokenizer) -> Caption:
    """A caption of real words without meaning."""
    texts, start = list(_sentences(chance)), 0
    sentences = []
    for text in texts:
        sentences.append(Sentence(start, start + len(text), tokenizer.ids(text)))
        start += len(text) + 1
    return Caption("made up", " ".join(texts), tuple(sentences), score=0.3)


def _sentences(chance: random.Random) -> Iterator[str]:
    left = max(20, round(chance.gauss(140, 40)))
    while left > 0:
        words = min(max(5, round(chance.gauss(20, 8))), left)
        yield " ".join(chance.choices(WORDS.split(), k=words))
        left -= words

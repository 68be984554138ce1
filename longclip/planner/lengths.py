"""How many tokens captions have: of the data where they are, of made-up paragraphs where they are not."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..captions import Groups
from ..tokens import Tokenizer, pack
from ..types import Caption, Sentence

WORD = 320  # any id: only their number counts


def synthetic(groups: Groups, tokenizer: Tokenizer, images: int = 256) -> NDArray[np.int32]:
    """lengths_BK as the recipe shows paragraphs of sentences of 20 tokens (deviation 8), 140 (40) in all.

    That is about what multimodal models write of a photo (DreamLIP, ShareGPT4V).
    """
    groups = groups.reading(tokenizer.ids)
    texts = [groups.show([paragraph(random.Random(i))], str(i), epoch=0) for i in range(images)]
    lengths_BK: NDArray[np.int32] = pack(texts, tokenizer).lengths_BK.numpy()
    return lengths_BK


def paragraph(chance: random.Random) -> Caption:
    """A caption of words without meaning."""
    sentences = list(_sentences(chance))
    return Caption("made up", "a " * sentences[-1].end, tuple(sentences))


def _sentences(chance: random.Random) -> Iterator[Sentence]:
    left, start = max(20, round(chance.gauss(140, 40))), 0
    while left > 0:
        words = min(max(5, round(chance.gauss(20, 8))), left)
        yield Sentence(start, start + 2 * words, array("H", [WORD]) * words)
        left, start = left - words, start + 2 * words

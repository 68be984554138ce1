"""How long captions are: what text costs depends on nothing else.

Out: `lengths_BK`, tokens of every caption, start and end token included: SUBS sub-captions of up to SHORT
tokens, then one long caption of up to LONG tokens. 0 where an image has fewer sub-captions.
`SOURCES` names the distributions that a run measures; the command line adds one of a file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from open_clip.tokenizer import SimpleTokenizer

from longclip.sentences import parse
from longclip.tokens import Tokenizer

SUBS, SHORT, LONG = 8, 77, 248


def synthetic(images: int, seed: int) -> np.ndarray:
    """Normal lengths: sub-captions of 20 tokens on average (deviation 8), a long caption of 140 (40)."""
    rng = np.random.default_rng(seed)
    subs_BK = rng.normal(20, 8, (images, SUBS)).round().clip(5, SHORT)
    long_B1 = rng.normal(140, 40, (images, 1)).round().clip(20, LONG)
    return np.concatenate([subs_BK, long_B1], axis=1).astype(np.int64)


def of_captions(path: Path) -> np.ndarray:
    """The lengths of a file's captions, one a line, and of their first SUBS sentences."""
    tokenizer = Tokenizer(SimpleTokenizer(), LONG)
    lines = path.read_text().splitlines()
    captions = [parse(line, str(path), tokenizer) for line in lines if line.strip()]
    lengths_NK = np.zeros((len(captions), SUBS + 1), np.int64)
    for row_K, caption in zip(lengths_NK, captions, strict=True):
        ids = [len(sentence.ids) for sentence in caption.sentences]
        subs = [min(count + 2, SHORT) for count in ids[:SUBS]]  # 2: the start and the end token
        row_K[: len(subs)], row_K[-1] = subs, min(sum(ids) + 2, LONG)
    return lengths_NK


def drawn_from(lengths_NK: np.ndarray) -> Callable[[int, int], np.ndarray]:
    """Batches of these rows: (images, seed) -> lengths_BK, no row twice before every row came once."""

    def draw(images: int, seed: int) -> np.ndarray:
        rng, count = np.random.default_rng(seed), len(lengths_NK)
        turns = [rng.permutation(count) for _ in range(-(-images // count))]
        return lengths_NK[np.concatenate(turns)[:images]]

    return draw


SOURCES: dict[str, Callable[[int, int], np.ndarray]] = {"synthetic": synthetic}
"""Name -> (images, seed) -> lengths_BK."""

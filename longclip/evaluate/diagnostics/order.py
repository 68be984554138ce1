"""Does a model read on after the first sentence, and does every sentence bring a caption nearer its image?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...captions import Moved, Policy, Preceded, Prefixes, Shuffled, Whole, WithoutFirst
from ...tokens import Tokenizer
from ..judging import Each, Findings
from .geometry import correlation
from .seen import Seen, chosen, mean

FEW = 3  # up to this K the paper counts strictly rising rows, above it correlates


@dataclass(frozen=True)
class Order:
    """R@1 with the sentences disturbed, and how much of it is `lost` (DeBias-CLIP, arXiv 2602.22419).

    `whole` as it is; `without_first`; `moved`: the first sentence comes as number `to`; `shuffled`;
    `filler/N`: after N times `filler`. All over the `captions` of two sentences or more, each among the texts
    of its own kind; where there are none, nothing else is told. `lost` is in points of the mean R@1 of both
    directions, below 0 where it rises.

    Args:
        to: place of the first sentence, from 1.
        filler: a sentence that says nothing.
        times: how often it is put before the caption.
    """

    to: int = 4
    filler: str = "This is a photo."
    times: Sequence[int] = (1, 4)

    def views(self, tokenizer: Tokenizer) -> Mapping[str, Policy]:
        filler = tokenizer.ids(tokenizer.clean(self.filler))
        return {
            "whole": Whole(),
            "without_first": WithoutFirst(),
            "moved": Moved(self.to),
            "shuffled": Shuffled(),
            **{f"filler/{n}": Preceded(filler * n) for n in self.times},
        }

    def read(self, seen: Seen) -> Findings:
        several_N = seen.found.mask(seen.slots["without_first"])[:, 0]
        captions = {"captions": float(several_N.sum())}
        if not several_N.any():  # short captions are no mistake
            return Findings(captions)
        found = {view: seen.hits(view, several_N) for view in seen.slots}
        each = dict[str, Each]()
        for view, hits in found.items():
            each |= {f"{view}/{name}": values for name, values in hits.items()}
            if view != "whole":
                each[f"{view}/lost"] = _lost(found["whole"], hits)
        return Findings({**captions, **{name: mean(values) for name, values in each.items()}}, each=each)


def _lost(whole: Mapping[str, Each], disturbed: Mapping[str, Each]) -> Each:
    """By how much each image does worse, mean of both directions."""
    before, after = (
        zip(found["i2t_r1"].values, found["t2i_r1"].values, strict=True) for found in (whole, disturbed)
    )
    values = [(sum(was) - sum(now)) / 2 for was, now in zip(before, after, strict=True)]
    return Each(whole["i2t_r1"].keys, values)


@dataclass(frozen=True)
class HiMo:
    """HiMo@K (HiMo-CLIP, AAAI 2026): does the similarity rise as the caption grows to its whole length?

    The sentences are cut into K parts, and the image is compared with the first 1, 2 ... K of them. K of 2
    and 3: `rising`, the share of captions with strictly rising similarity, in percent. Larger K: `pearson`,
    the mean over captions of the correlation between k and similarity, -1 to 1. Captions of fewer sentences
    than K are left out. What the context length cuts off adds nothing: beginnings that look the same to the
    model score the same.

    Args:
        parts: each K.
    """

    parts: Sequence[int] = (2, 3, 5)

    def views(self, tokenizer: Tokenizer) -> Mapping[str, Policy]:
        return {str(count): Prefixes(count) for count in self.parts}

    def read(self, seen: Seen) -> Findings:
        numbers, each = dict[str, float](), dict[str, Each]()
        for count in self.parts:
            enough_N = seen.found.mask(seen.slots[str(count)]).all(1)
            numbers[f"{count}/captions"] = float(enough_N.sum())
            if enough_N.any():
                score_QK = similarities(seen, str(count))[enough_N]
                name, value_Q = _verdict(score_QK)
                keys = chosen(seen.found.keys, enough_N.nonzero()[:, 0])
                each[f"{count}/{name}"] = Each(keys, value_Q.tolist())
                numbers[f"{count}/{name}"] = mean(each[f"{count}/{name}"])
        return Findings(numbers, each=each)


def similarities(seen: Seen, view: str) -> Tensor:
    """Cosine of each image and the beginnings of its caption, [N, K] float64, on the host.

    One that is as long as the one before it is the same text, and rounding must not make it another.
    """
    found, slot = seen.found, seen.slots[view]
    image_N1E, length_NK = found.image_NE[:, None].double(), found.lengths_NK[:, slot]
    score_NK = (found.text_NKE[:, slot].double() * image_N1E).sum(2).cpu()
    for k in range(1, score_NK.shape[1]):
        same_N = length_NK[:, k] == length_NK[:, k - 1]
        score_NK[:, k] = torch.where(same_N, score_NK[:, k - 1], score_NK[:, k])
    return score_NK


def _verdict(score_QK: Tensor) -> tuple[str, Tensor]:
    count = score_QK.shape[1]
    if count <= FEW:
        return "rising", 100.0 * (score_QK.diff(dim=1) > 0).all(1)
    return "pearson", correlation(score_QK, torch.arange(count)[None])

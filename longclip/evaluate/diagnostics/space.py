"""Have embeddings collapsed, and how far are images from texts?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...captions import Policy, Whole
from ...tokens import Tokenizer
from ..judging import Each, Findings
from .geometry import effective_rank, mean_cosine, modality_gap
from .seen import Seen


@dataclass(frozen=True)
class Space:
    """The shape of the joint space; see `geometry` for what the measures are.

    `image_cosine`, `text_cosine`: mean cosine of two images, of two captions; near 1 after a collapse.
    `image_rank`, `text_rank`: dimensions that they fill. `gap`: distance between the means of both.
    `matched`, `unmatched`: mean cosine of an image with its own caption, and with another's.
    """

    def views(self, tokenizer: Tokenizer) -> Mapping[str, Policy]:
        return {"whole": Whole()}

    def read(self, seen: Seen) -> Findings:
        pairs = seen.pairs("whole")
        count, own = len(pairs.keys), Each(pairs.keys, pairs.cosine_Q.tolist())
        means = (feature_QE.mean(0, dtype=torch.float64) for feature_QE in (pairs.image_QE, pairs.text_QE))
        everything = float(torch.dot(*means)) * count**2
        numbers = {
            "image_cosine": mean_cosine(pairs.image_QE),
            "text_cosine": mean_cosine(pairs.text_QE),
            "image_rank": effective_rank(pairs.image_QE),
            "text_rank": effective_rank(pairs.text_QE),
            "gap": modality_gap(pairs.image_QE, pairs.text_QE),
            "matched": sum(own.values) / count,
            "unmatched": (everything - sum(own.values)) / max(count * (count - 1), 1),
        }
        return Findings(numbers, each={"matched": own})

"""Does the model look where a sentence points?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .. import metrics
from ..captions import Groups, Sentences
from ..types import UserError
from .judging import Each, Findings, Judged, to_device


@dataclass(frozen=True)
class Pointing:
    """Does the patch most like a sentence lie in the box that the sentence talks about?

    Reported beside it: what a patch drawn at random would score (`chance`). The boxes are fractions of the
    whole image, so the transform must not crop (square images, or resize_mode=squash).
    """

    split: str
    sentences: int = 40
    batch_size: int = 64

    def __call__(self, tower: torch.nn.Module, data: Judged) -> Findings:
        groups = Groups({"sentence": Sentences(self.sentences)}, seed=0, shuffle=False)
        keys, hits, chances = list[str](), list[float](), list[float]()
        for samples, batch in data.judge_batches(self.split, self.batch_size, groups):
            found = tower(to_device(batch, tower), groups.slots, frozenset({"patches"}))
            for b, sample in enumerate(samples):
                boxed = [(k, text.box) for k, text in enumerate(sample.texts) if text and text.box]
                if boxed:
                    places, boxes = zip(*boxed, strict=True)
                    patches_PE = F.normalize(found.patches_BPE[b].float(), dim=-1)
                    similarity_MP = found.text_BKE[b, list(places)] @ patches_PE.T
                    hit_M, chance_M = metrics.pointing(similarity_MP.cpu(), torch.tensor(boxes))
                    keys += [f"{sample.key}#{k}" for k in places]
                    hits += (100 * hit_M.float()).tolist()
                    chances += (100 * chance_M).tolist()
        if not hits:
            raise UserError(
                f"split {self.split!r} has no sentence with a box: pointing cannot be scored on it"
            )
        numbers = {"accuracy": sum(hits) / len(hits), "chance": sum(chances) / len(chances)}
        return Findings(numbers, each={"accuracy": Each(keys, hits)})

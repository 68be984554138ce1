"""Does the model look where a sentence points?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from .. import metrics
from ..captions import Groups, Sentences
from ..towers.image import has_patches
from ..types import Batch, Sample, UserError
from .judging import Each, Findings, Judged, to_device
from .sharing import collect_values, share


@dataclass(frozen=True)
class Pointing:
    """Does the patch most like a sentence lie in the box that the sentence talks about?

    Reported beside it: what a patch drawn at random would score (`chance`). Where the model is shown a part
    of the image, the part of the box that lies in it counts; sentences about what is cut off are left out.
    """

    split: str
    sentences: int = 40
    batch_size: int = 64

    def __call__(self, tower: Any, data: Judged) -> Findings:
        visual = tower.backbone.visual
        if not has_patches(visual):
            raise UserError(
                "pointing compares sentences with image patches, and the image tower of this model is a "
                f"{type(visual).__name__} without patch tokens in the joint space; judge it without "
                "pointing, or take a ViT such as ViT-B-16"
            )
        groups = Groups({"sentence": Sentences(self.sentences)}, seed=0, shuffle=False)
        batches = data.judge_batches(self.split, self.batch_size, groups)
        parts = [_pointed(tower, *batch, groups.slots) for batch in share(batches)]
        found = collect_values(parts, len(batches))
        if not found:
            raise UserError(
                f"split {self.split!r} has no sentence with a box: pointing cannot be scored on it"
            )
        keys, hits, chances = zip(*found, strict=True)
        numbers = {"accuracy": sum(hits) / len(hits), "chance": sum(chances) / len(chances)}
        return Findings(numbers, each={"accuracy": Each(keys, hits)})


def _pointed(
    tower: Any, samples: list[Sample], batch: Batch, slots: dict[str, slice]
) -> list[tuple[str, float, float]]:
    """Key, hit and chance of every sentence that has a box, in percent."""
    embedded = tower(to_device(batch, tower), slots, frozenset({"patches"}))
    found: list[tuple[str, float, float]] = []
    for b, sample in enumerate(samples):
        boxed = [(k, text.box) for k, text in enumerate(sample.texts) if text and text.box]
        if boxed:
            places, boxes = zip(*boxed, strict=True)
            patches_PE = F.normalize(embedded.patches_BPE[b].float(), dim=-1)
            similarity_MP = embedded.text_BKE[b, list(places)] @ patches_PE.T
            hit_M, chance_M = metrics.pointing(similarity_MP.cpu(), torch.tensor(boxes))
            keys = [f"{sample.key}#{k}" for k in places]
            found += zip(keys, (100 * hit_M.float()).tolist(), (100 * chance_M).tolist(), strict=True)
    return found

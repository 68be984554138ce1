"""Zero-shot retrieval of an evaluation set, under one or several views of its captions."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .. import metrics
from ..captions import Groups, Policy, Whole
from ..types import UserError
from .judging import Findings, Judged, encode, to_device

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retrieval:
    """Zero-shot retrieval of one split, under one or several views of its captions in one pass.

    Args:
        split: which evaluation set.
        views: name -> caption policy. Results are named `view/i2t_r1` and so on.
        batch_size: images encoded at once.
    """

    split: str
    views: Mapping[str, Policy] = field(default_factory=lambda: {"long": Whole()})
    batch_size: int = 128

    def __call__(self, tower: torch.nn.Module, data: Judged) -> Findings:
        groups = Groups(self.views, seed=0, shuffle=False)
        images, texts, masks, cut = [], [], [], 0
        for _, batch in data.judge_batches(self.split, self.batch_size, groups):
            batch = to_device(batch, tower)
            image_BE, text_BKE, mask_BK = encode(tower, batch)
            images.append(image_BE)
            texts.append(text_BKE)
            masks.append(mask_BK)
            cut += int((batch.dropped_BK > 0).sum())
        if cut:
            log.info("%s: %d captions are cut at the context length", self.split, cut)
        image_NE, text_NKE, mask_NK = torch.cat(images), torch.cat(texts), torch.cat(masks)
        numbers = {}
        for view, slot in groups.slots.items():
            owner_M = mask_NK[:, slot].nonzero()[:, 0]
            if len(owner_M) == 0:
                raise UserError(
                    f"split {self.split!r} has no caption for the view {view!r}: nothing to retrieve"
                )
            scores = metrics.retrieval(image_NE, text_NKE[:, slot][mask_NK[:, slot]], owner_M)
            numbers.update({f"{view}/{name}": value for name, value in scores.items()})
        return Findings(numbers)

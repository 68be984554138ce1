"""A model over batches -> (name, value): one path, in training and offline.

An evaluator is a callable `(tower, data) -> iterator of (name, value)`; a benchmark is a named evaluator
(`conf/benchmark/*.yaml`). Retrieval is zero-shot, both directions, with float32 scores, and a wrong item
that ties with the right one counts against the model (`metrics.ranks`). Percentages are 0 to 100.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from . import metrics
from .captions import Groups, Policy, Sentences, Whole
from .types import Batch, Sample, UserError

log = logging.getLogger(__name__)


class Judged(Protocol):
    """What holds the evaluation sets (`data.module.DataModule`)."""

    def judge_batches(
        self, split: str, batch_size: int, groups: Groups
    ) -> Iterator[tuple[list[Sample], Batch]]: ...


class Evaluator(Protocol):
    def __call__(self, tower: torch.nn.Module, data: Judged) -> Iterator[tuple[str, float]]: ...


@torch.no_grad()
def judge(tower: torch.nn.Module, data: Judged, benchmarks: Mapping[str, Evaluator]) -> dict[str, float]:
    """Run every benchmark; names come out as `benchmark/metric`. The tower's mode is restored."""
    was_training = tower.training
    tower.eval()
    try:
        return {
            f"{name}/{metric}": value
            for name, evaluator in benchmarks.items()
            for metric, value in evaluator(tower, data)
        }
    finally:
        tower.train(was_training)


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

    def __call__(self, tower: torch.nn.Module, data: Judged) -> Iterator[tuple[str, float]]:
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
        for view, slot in groups.slots.items():
            owner_M = mask_NK[:, slot].nonzero()[:, 0]
            if len(owner_M) == 0:
                raise UserError(
                    f"split {self.split!r} has no caption for the view {view!r}: nothing to retrieve"
                )
            scores = metrics.retrieval(image_NE, text_NKE[:, slot][mask_NK[:, slot]], owner_M)
            yield from ((f"{view}/{name}", value) for name, value in scores.items())


@dataclass(frozen=True)
class Pointing:
    """Does the patch most like a sentence lie in the box that the sentence talks about?

    Reported beside it: what a patch drawn at random would score (`chance`). The boxes are fractions of the
    whole image, so the transform must not crop (square images, or resize_mode=squash).
    """

    split: str
    sentences: int = 40
    batch_size: int = 64

    def __call__(self, tower: torch.nn.Module, data: Judged) -> Iterator[tuple[str, float]]:
        groups = Groups({"sentence": Sentences(self.sentences)}, seed=0, shuffle=False)
        hits, chances = [], []
        for samples, batch in data.judge_batches(self.split, self.batch_size, groups):
            found = tower(to_device(batch, tower), groups.slots, frozenset({"patches"}))
            for b, sample in enumerate(samples):
                boxed = [(k, text.box) for k, text in enumerate(sample.texts) if text and text.box]
                if boxed:
                    places, boxes = zip(*boxed, strict=True)
                    similarity_MP = found.text_BKE[b, list(places)] @ _unit(found.patches_BPE[b]).T
                    hit_M, chance_M = metrics.pointing(similarity_MP.cpu(), torch.tensor(boxes))
                    hits.append(hit_M)
                    chances.append(chance_M)
        if not hits:
            raise UserError(
                f"split {self.split!r} has no sentence with a box: pointing cannot be scored on it"
            )
        yield "accuracy", 100 * float(torch.cat(hits).float().mean())
        yield "chance", 100 * float(torch.cat(chances).float().mean())


def encode(tower: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """A batch -> (image_BE, text_BKE, mask_BK) on the device, whatever the recipe's groups."""
    found = tower(batch, {"all": slice(None)})
    return found.image_BE, found.text_BKE, found.mask_BK


def to_device(batch: Batch, tower: torch.nn.Module) -> Batch:
    """Pixels and tokens where the tower is; the lengths stay on the host."""
    device = next(tower.parameters()).device
    return batch._replace(pixels_BCHW=batch.pixels_BCHW.to(device), tokens_T=batch.tokens_T.to(device))


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.float(), dim=-1)

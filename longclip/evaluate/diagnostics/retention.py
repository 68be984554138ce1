"""What has a model kept of the short texts that it could read before it learned long ones?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ...captions import First, Groups, Policy
from ...data.module import transform_of
from ...models import load
from ...towers.clip import DualTower
from ...types import UserError
from ..features import features
from ..judging import Each, Findings, Judged, Split, batches, protocol
from .seen import Seen, mean, r1


@dataclass(frozen=True)
class Retention:
    """R@1 by a short caption, of the model and of the one it started from, each with its own preprocessing.

    `kept` is the model's mean R@1 of both directions in percent of the other's: above 100 it has gained; left
    out where the other finds nothing.
    `change_i2t` and `change_t2i` are differences in points.

    Args:
        split: which evaluation set, of the run or a `sets.PairSet`.
        reference: the model that training started from, as `models.load` takes it.
        view: the short caption.
        batch_size: images encoded at once.

    Raises UserError where no reference is named.
    """

    split: Split
    reference: str | None
    view: Policy = field(default_factory=First)
    batch_size: int = 128

    def __call__(self, tower: Any, data: Judged) -> Findings:
        if not self.reference:
            raise UserError(
                "retention compares with the model that training started from: say which, for example "
                "reference=ViT-B-16/openai"
            )
        groups = Groups({"short": self.view}, seed=0, shuffle=False)
        shown = batches(self.split, tower, data, self.batch_size, groups)
        own = Seen(features(tower, shown), groups.slots).hits("short")
        theirs = self._of_reference(data, groups, next(tower.parameters()).device)
        changes = {f"change_{name[:3]}": _less(own[name], theirs[name]) for name in own}
        each = {**own, **changes, **{f"reference/{name}": values for name, values in theirs.items()}}
        kept = {"kept": 100 * r1(own) / r1(theirs)} if r1(theirs) else {}
        numbers = {**kept, **{name: mean(values) for name, values in each.items()}}
        return Findings(numbers, protocol(self.split), each)

    def _of_reference(self, data: Judged, groups: Groups, device: torch.device) -> dict[str, Each]:
        assert self.reference is not None
        start = DualTower(load(self.reference)).to(device).eval()
        shown = batches(self.split, start, data, self.batch_size, groups)
        if isinstance(self.split, str):  # the run reads its sets for the model that is judged
            shown = shown.seen_by(start.tokenizer, transform_of(start.preprocess_cfg))
        return Seen(features(start, shown), groups.slots).hits("short")


def _less(own: Each, theirs: Each) -> Each:
    """By how much each query does better."""
    return Each(own.keys, [a - b for a, b in zip(own.values, theirs.values, strict=True)])

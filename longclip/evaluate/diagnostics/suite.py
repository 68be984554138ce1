"""Several diagnoses of one evaluation set in one pass over its images.

In: parts, each with the views of the captions that it needs. Out: their findings as `part/number`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ...captions import Groups, Policy
from ...tokens import Tokenizer
from ..features import features
from ..judging import Each, Findings, Judged, Split, batches, protocol
from .seen import Seen


class Part(Protocol):
    """One diagnosis."""

    def views(self, tokenizer: Tokenizer) -> Mapping[str, Policy]:
        """The caption policies that it looks at."""
        ...

    def read(self, seen: Seen) -> Findings:
        """What they tell; `seen` has them under the names of `views`."""
        ...


@dataclass(frozen=True)
class Diagnostics:
    """Diagnoses of one split, for one caption of each image: the first.

    Args:
        split: which evaluation set, of the run or a `sets.PairSet`.
        parts: by name. Views that several of them share are encoded once.
        batch_size: images encoded at once, each with the texts of all views.
    """

    split: Split
    parts: Mapping[str, Part]
    batch_size: int = 32

    def __call__(self, tower: Any, data: Judged) -> Findings:
        views = {name: part.views(tower.tokenizer) for name, part in self.parts.items()}
        distinct = _distinct(views)
        groups = Groups(distinct, seed=0, shuffle=False)
        found = features(tower, batches(self.split, tower, data, self.batch_size, groups))
        numbers, each = dict[str, float](), dict[str, Each]()
        for name, part in self.parts.items():
            slots = {view: groups.slots[_name(distinct, policy)] for view, policy in views[name].items()}
            told = part.read(Seen(found, slots))
            numbers |= {f"{name}/{number}": value for number, value in told.numbers.items()}
            each |= {f"{name}/{number}": values for number, values in told.each.items()}
        return Findings(numbers, protocol(self.split), each)


def _distinct(views: Mapping[str, Mapping[str, Policy]]) -> dict[str, Policy]:
    """Every policy once, as `part/view` of the first that wants it."""
    distinct: dict[str, Policy] = {}
    for part, wanted in views.items():
        for view, policy in wanted.items():
            if policy not in distinct.values():
                distinct[f"{part}/{view}"] = policy
    return distinct


def _name(distinct: Mapping[str, Policy], policy: Policy) -> str:
    return next(name for name, known in distinct.items() if known == policy)

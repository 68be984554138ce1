"""Policies that choose between captions by score, and between policies by chance or by schedule.

In: the captions of one image, a seeded source of randomness, the share of the run that is done. Out: texts.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, inf
from typing import ClassVar

from longclip.types import Caption, Text, UserError

from .policies import Policy, Sources, admitted, text

PATIENCE = 256
"""So many images without a single score, and a policy that goes by scores gives up: a few may have none."""


class _Unscored:
    """Tells images without a score from data without any; it counts in its own process."""

    def __init__(self) -> None:
        self.left: float = PATIENCE

    def meet(self, policy: str, scored: bool) -> None:
        """Of one image; raises UserError where none of the first has had a score."""
        self.left = inf if scored else self.left - 1
        if self.left <= 0:
            raise UserError(
                f"{policy} finds no score on any caption of the first {PATIENCE} images; join scores "
                "(data.sidecar.scores=COLUMN), or use Whole, which needs none."
            )


@dataclass(frozen=True)
class Best:
    """The whole caption with the highest score, of those that `source` admits: one per image.

    Scores come with the data or from a side-car (`data.sidecar.scores`); captions without one lose.
    Where no caption of an image has one, it is the first.

    Raises:
        UserError: none of the first `PATIENCE` images has a score.
    """

    source: Sources = None
    count: ClassVar[int] = 1
    _unscored: _Unscored = field(default_factory=_Unscored, init=False, repr=False, compare=False)

    def __call__(self, captions: Sequence[Caption], rng: random.Random, progress: float = 0.0) -> list[Text]:
        found = _scored("Best", captions, self.source, self._unscored)
        return [text(scored.sentences) for scored, _ in found[:1]]


@dataclass(frozen=True)
class Likely:
    """A whole caption drawn with probability ~ exp(score / temperature), among those that have a score.

    A low temperature shows the best one nearly always, a high one each equally often. Images without a score
    are treated as `Best` treats them.
    """

    temperature: float
    source: Sources = None
    count: ClassVar[int] = 1
    _unscored: _Unscored = field(default_factory=_Unscored, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"Likely.temperature is {self.temperature!r}; it must be a number above 0.")

    def __call__(self, captions: Sequence[Caption], rng: random.Random, progress: float = 0.0) -> list[Text]:
        found = _scored("Likely", captions, self.source, self._unscored)
        if not found:
            return []
        weights = [exp((score - found[0][1]) / self.temperature) for _, score in found]
        return [text(rng.choices(found, weights)[0][0].sentences)]


@dataclass(frozen=True)
class Mix:
    """One of several policies, drawn anew for each image and epoch: VeCLIP's mix of caption sources.

    A policy that has no text for an image is passed over, and the others share its probability. With `end`,
    the probabilities move from `start` to `end` linearly with the samples seen.

    Args:
        policies: by name.
        start: the relative probability of each.
        end: the same at the end of the run; None: as at its start.
    """

    policies: Mapping[str, Policy]
    start: Mapping[str, float]
    end: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for name, given in (("start", self.start), ("end", self.start if self.end is None else self.end)):
            right = set(given) == set(self.policies) and all(p >= 0 for p in given.values())
            if not right or not any(given.values()):
                raise UserError(
                    f"Mix.{name} is {dict(given)}; give each of "
                    f"{', '.join(self.policies) or 'its policies'} a probability of 0 or more, and one of "
                    "them more than 0."
                )

    @property
    def count(self) -> int:
        return max(policy.count for policy in self.policies.values())

    def __call__(
        self, captions: Sequence[Caption], rng: random.Random, progress: float = 0.0
    ) -> Sequence[Text | None]:
        end = self.start if self.end is None else self.end
        left = {name: (1 - progress) * p + progress * end[name] for name, p in self.start.items()}
        while any(left.values()):
            (name,) = rng.choices(list(left), list(left.values()))
            texts = self.policies[name](captions, rng, progress)
            if any(texts):
                return texts
            del left[name]
        return []


def _scored(
    policy: str, captions: Sequence[Caption], source: Sources, unscored: _Unscored
) -> list[tuple[Caption, float]]:
    """The admitted captions that have a score, with it, from the best on; the first where none has."""
    known = admitted(captions, source)
    if not known:
        return []
    found = [(caption, caption.score) for caption in known if caption.score is not None]
    unscored.meet(policy, bool(found))
    return sorted(found, key=lambda pair: -pair[1]) or [(known[0], 0.0)]

"""What evaluators are, what they find, and how all of them are run.

In: a tower, the evaluation data, named evaluators. Out: `Findings` for each; `flat` makes them one list of
names and numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from ..captions import Groups
from ..data.judging import JudgeBatches
from ..types import Batch


class Each(NamedTuple):
    """What a number is the mean of: one value for each query, pair or sentence."""

    keys: Sequence[str]
    values: Sequence[float]


class Ranked(NamedTuple):
    """Retrieval in full, for galleries: which image and text each query should have found, and what it did.

    Text m describes image `owners[m]`. Ranks begin at 1; queries of i2t are the images that have a text. The
    strongest wrong answer is -1 where nothing is wrong.
    """

    images: Sequence[str]  # keys
    texts: Sequence[str]  # as the model was shown them
    owners: Sequence[int]
    asked: Sequence[int]  # the images of the i2t queries
    i2t_ranks: Sequence[int]
    i2t_first: Sequence[int]  # the wrong text with the highest score
    t2i_ranks: Sequence[int]
    t2i_first: Sequence[int]  # the wrong image with the highest score
    picture: Callable[[int], bytes]  # the encoded image file of image n, read when it is asked for


@dataclass(frozen=True)
class Findings:
    """What an evaluator has to say.

    Attributes:
        numbers: name -> value, in the order in which people should read them.
        protocol: id of the protocol that made them comparable with others' numbers; "" for data of one's own.
        each: by the name of a number, what it is the mean of.
        ranked: by view, retrieval in full.
    """

    numbers: Mapping[str, float]
    protocol: str = ""
    each: Mapping[str, Each] = field(default_factory=dict)
    ranked: Mapping[str, Ranked] = field(default_factory=dict)


class Judged(Protocol):
    """What holds the evaluation sets (`data.module.DataModule`)."""

    def judge_batches(self, split: str, batch_size: int, groups: Groups) -> JudgeBatches: ...


class Set(Protocol):
    """An evaluation set that a run knows nothing of (`sets.PairSet`)."""

    @property
    def id(self) -> str:
        """The protocol's id, "" where it has none."""
        ...

    def batches(self, tower: Any, batch_size: int, groups: Groups) -> JudgeBatches: ...


Split = str | Set
"""An evaluation set: one of the run's own by its name, or one that brings its own images and texts."""


def batches(split: Split, tower: Any, data: Judged, batch_size: int, groups: Groups) -> JudgeBatches:
    """The batches of an evaluation set, whichever kind it is."""
    if isinstance(split, str):
        return data.judge_batches(split, batch_size, groups)
    return split.batches(tower, batch_size, groups)


def protocol(split: Split) -> str:
    """The id of its protocol; "" for data of one's own."""
    return "" if isinstance(split, str) else split.id


class Evaluator(Protocol):
    def __call__(self, tower: torch.nn.Module, data: Judged) -> Findings: ...


@torch.no_grad()
def examine(tower: torch.nn.Module, data: Judged, benchmarks: Mapping[str, Evaluator]) -> dict[str, Findings]:
    """Run every benchmark; the tower's mode is restored."""
    was_training = tower.training
    tower.eval()
    try:
        return {name: evaluator(tower, data) for name, evaluator in benchmarks.items()}
    finally:
        tower.train(was_training)


class Numbered(Protocol):
    """What was found, now (`Findings`) or kept from before."""

    @property
    def numbers(self) -> Mapping[str, float]: ...


def flat(findings: Mapping[str, Numbered]) -> dict[str, float]:
    """All numbers as `benchmark/number`."""
    return {
        f"{benchmark}/{name}": value
        for benchmark, found in findings.items()
        for name, value in found.numbers.items()
    }


def judge(tower: torch.nn.Module, data: Judged, benchmarks: Mapping[str, Evaluator]) -> dict[str, float]:
    """The numbers of every benchmark, by `benchmark/number`."""
    return flat(examine(tower, data, benchmarks))


def to_device(batch: Batch, tower: torch.nn.Module) -> Batch:
    """Pixels and tokens where the tower is; the lengths stay on the host."""
    device = next(tower.parameters()).device
    return batch._replace(pixels_BCHW=batch.pixels_BCHW.to(device), tokens_T=batch.tokens_T.to(device))

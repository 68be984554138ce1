"""How far one model's results are from another's, and how sure that is.

In: results as `eval.results` keeps them. Out: a `Delta` for every number that both have. Only what was judged
alike is compared: the same protocol, the same settings, the same items.

The intervals are paired bootstraps (Koehn 2004, Statistical Significance Tests for Machine Translation
Evaluation): images are drawn with replacement, the same for both models, each with all its texts, since
texts of one image are no independent evidence. Numbers that are no mean (a median rank) have no interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from longclip.evaluate import Each
from longclip.types import UserError

from .results import Result

Results = Mapping[str, Result]
LEVEL = 0.95
_HARMLESS = {"root", "batch_size"}  # settings that change no number
_UNSAID = {"scoring": "global"}  # as results were judged that do not say it


class Delta(NamedTuple):
    """How far a model's number is from the yardstick's."""

    yardstick: float
    value: float
    interval: tuple[float, float] | None = None

    @property
    def sure(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)

    def __str__(self) -> str:
        digits = 1 if max(abs(self.yardstick), abs(self.value)) >= 10 else 2  # as `report.tables.number`
        shown = f"{self.value - self.yardstick:+.{digits}f}"
        if self.interval:
            shown += f" [{self.interval[0]:+.{digits}f}, {self.interval[1]:+.{digits}f}]"
        return shown + (" *" if self.sure else "")


def compare(yardstick: Results, others: Results, resamples: int = 10_000) -> dict[str, Delta]:
    """`benchmark/number` -> difference, for all that both have.

    Raises:
        UserError: a benchmark of this name was not judged alike, or nothing is to be drawn.
    """
    if resamples < 1:
        raise UserError(f"an interval takes 1 draw or more, not {resamples}: --resamples 10000 is usual")
    return dict(_deltas(yardstick, others, resamples))


def _deltas(yardstick: Results, others: Results, resamples: int) -> Iterator[tuple[str, Delta]]:
    for benchmark, a in yardstick.items():
        if benchmark not in others:
            continue
        b = others[benchmark]
        check_alike(a, b)
        for number, value in a.numbers.items():
            if number in b.numbers:
                means = number in a.each and number in b.each
                bounds = interval(*_paired(a, b, number), resamples) if means else None
                yield f"{benchmark}/{number}", Delta(value, b.numbers[number], bounds)


def check_alike(a: Result, b: Result) -> None:
    """Raise UserError where two results of one name cannot be compared."""
    if a.protocol != b.protocol:
        ids = [result.protocol or "no protocol" for result in (a, b)]
        raise UserError(
            f"{a.benchmark} is {ids[0]} for {a.model} and {ids[1]} for {b.model}: numbers of different "
            "protocols do not compare; judge both with the same benchmark=..."
        )
    if a.settings is None or b.settings is None:
        return
    left, right = _settings(a.settings), _settings(b.settings)
    for key in dict.fromkeys([*left, *right]):
        if left.get(key) != right.get(key):
            raise UserError(
                f"{a.benchmark} was judged with {key}={left.get(key)} for {a.model} and {right.get(key)} for "
                f"{b.model}: judge both with the same settings"
            )


def interval(
    keys: Sequence[str], differences: Sequence[float], resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Bounds of the mean difference, by drawing images anew; what stands before # in a key is its image.

    Images that are alike in number of texts and sum of differences are drawn as one kind, by a multinomial:
    the same distribution in a fraction of the time, where there are few kinds (hits and misses).
    """
    _, image_N = np.unique([key.rpartition("#")[0] or key for key in keys], return_inverse=True)
    sums_I = np.bincount(image_N, weights=np.asarray(differences, dtype=np.float64))
    image_I2 = np.stack([sums_I, np.bincount(image_N).astype(np.float64)], 1)
    kinds_U2, counts_U = np.unique(image_I2, axis=0, return_counts=True)
    rng, count = np.random.default_rng(seed), len(image_I2)
    means = []
    for part in np.array_split(np.arange(resamples), max(1, count * resamples // 2**22)):
        if 16 * len(kinds_U2) < count:
            totals_R2 = rng.multinomial(count, counts_U / count, len(part)) @ kinds_U2
        else:
            totals_R2 = image_I2[rng.integers(count, size=(len(part), count))].sum(1)
        means.append(totals_R2[:, 0] / totals_R2[:, 1])
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _paired(a: Result, b: Result, number: str) -> tuple[Sequence[str], list[float]]:
    """The keys that both have, and by how much the second is better at each."""
    left, right = _sorted(a.each[number]), _sorted(b.each[number])
    keys = [key for key, _ in left]
    if keys != [key for key, _ in right]:
        odd = sorted({key for key, _ in left} ^ {key for key, _ in right}) or ["one that stands there twice"]
        raise UserError(
            f"{a.benchmark} was judged on {len(left)} items for {a.model} and on {len(right)} for {b.model}, "
            f"and {odd[0]!r} is not in both: judge both on the same data"
        )
    return keys, [theirs - ours for (_, ours), (_, theirs) in zip(left, right, strict=True)]


def _sorted(each: Each) -> list[tuple[str, float]]:
    return sorted(zip(each.keys, each.values, strict=True), key=lambda pair: pair[0])


def _settings(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key, without those that change no number."""
    if not isinstance(node, dict):
        return {prefix[:-1]: node}
    kept = (pair for pair in node.items() if pair[0] not in _HARMLESS and pair not in _UNSAID.items())
    return {name: leaf for key, value in kept for name, leaf in _settings(value, f"{prefix}{key}.").items()}

"""How much of a caption a model uses, how it fares with captions of each length, and what it never reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ...captions import Policy, Whole
from ...tokens import Tokenizer
from ..judging import Each, Findings
from .geometry import mean_cosine
from .seen import Seen, mean, r1

_NO_END = 2**31


@dataclass(frozen=True)
class EffectiveLength:
    """R@1 with every caption cut to some tokens: ids cut, end token put, as Long-CLIP measures (ECCV 2024).

    `N/shortened` is the share of captions longer than N tokens: where few are, a flat curve tells nothing
    about the model. `effective` is where the curve, drawn with straight lines, last crosses `share` of its
    value at the largest length: what follows adds hardly anything. Like the axis it is in tokens, start and
    end included.

    Args:
        lengths: rising.
        share: of the last value, above 0 and at most 1.
    """

    lengths: Sequence[int] = (20, 40, 77, 120, 248)
    share: float = 0.95

    def views(self, tokenizer: Tokenizer) -> Mapping[str, Policy]:
        return {"whole": Whole(), **{str(length): Whole(limit=length) for length in self.lengths}}

    def read(self, seen: Seen) -> Findings:
        tokens_Q = seen.pairs("whole").tokens_Q
        numbers, each, curve = dict[str, float](), dict[str, Each](), dict[int, float]()
        for length in self.lengths:
            found = seen.hits(str(length))
            curve[length] = r1(found)
            numbers |= {f"{length}/{name}": mean(values) for name, values in found.items()}
            numbers[f"{length}/shortened"] = 100 * _share(tokens_Q > length)
            each |= {f"{length}/{name}": values for name, values in found.items()}
        return Findings({"effective": crossing(curve, self.share), **numbers}, each=each)


def crossing(curve: Mapping[int, float], share: float) -> float:
    """Where a curve, followed back from its end, first falls below a share of its last value.

    >>> round(crossing({20: 10.0, 40: 20.0, 77: 40.0, 248: 40.0}, 0.9), 1)
    69.6
    """
    points = sorted(curve.items())
    wanted = share * points[-1][1]
    for (left, below), (right, above) in reversed(list(pairwise(points))):
        if below < wanted:
            return left + (right - left) * (wanted - below) / (above - below)
    return float(points[0][0])


@dataclass(frozen=True)
class ByLength:
    """Captions by their uncut length in tokens: how those of each kind are found among all, and how alike.

    For each kind: R@1 both ways, `similarity` (mean cosine of a caption and its image) and `text_cosine`
    (mean cosine of two captions of the kind: how far they have collapsed).

    Args:
        edges: rising; kinds are "1-20", "21-40", ..., "249-" for (20, 40, ..., 248). Empty ones are left out.
    """

    edges: Sequence[int] = (20, 40, 77, 120, 248)

    def views(self, tokenizer: Tokenizer) -> Mapping[str, Policy]:
        return {"whole": Whole()}

    def read(self, seen: Seen) -> Findings:
        pairs, found = seen.pairs("whole"), seen.hits("whole")
        values = {**found, "similarity": Each(pairs.keys, pairs.cosine_Q.tolist())}
        numbers, each = dict[str, float](), dict[str, Each]()
        for low, high in pairwise((0, *self.edges, _NO_END)):
            inside_Q = (low < pairs.tokens_Q) & (pairs.tokens_Q <= high)
            if not inside_Q.any():
                continue
            kind = f"{low + 1}-{high if high < _NO_END else ''}"
            own = {f"{kind}/{name}": _only(all_of_them, inside_Q) for name, all_of_them in values.items()}
            numbers |= {f"{kind}/captions": float(inside_Q.sum())}
            numbers |= {name: mean(values_of_kind) for name, values_of_kind in own.items()}
            numbers[f"{kind}/text_cosine"] = mean_cosine(pairs.text_QE.cpu()[inside_Q])
            each |= own
        return Findings(numbers, each=each)


@dataclass(frozen=True)
class Truncation:
    """What the context length takes: the share of `captions` that it cuts, and of all their `tokens`."""

    def views(self, tokenizer: Tokenizer) -> Mapping[str, Policy]:
        return {"whole": Whole()}

    def read(self, seen: Seen) -> Findings:
        pairs = seen.pairs("whole")
        tokens = float(pairs.dropped_Q.sum()) / float(pairs.tokens_Q.sum())
        return Findings({"captions": 100 * _share(pairs.dropped_Q > 0), "tokens": 100 * tokens})


def _share(which_Q: Tensor) -> float:
    return float(which_Q.double().mean())


def _only(each: Each, inside_Q: Tensor) -> Each:
    rows = inside_Q.nonzero()[:, 0].tolist()
    return Each([each.keys[row] for row in rows], [each.values[row] for row in rows])

"""What a run trains on: its sources behind one index.

In: `data.train`, a folder or several with weights. Out: records by one number, which counts through the
sources one after the other.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..types import Record, UserError
from .sidecars.joining import Join, Joined


@dataclass(frozen=True)
class Source:
    """A source of a mixture.

    Args:
        folder: of its shards.
        weight: how often each of its samples is shown relative to those of the others.
        sidecar: what to join to it; None: what is joined to all.
    """

    folder: str
    weight: float = 1.0
    sidecar: Join | None = None


def sources(train: str | Mapping[str, Any]) -> dict[str, Source]:
    """`data.train` -> sources by name: a folder is its own name.

    Raises:
        UserError: no source, a source without a folder, an unknown key, or a weight that is none.
    """
    form = "write data.train=FOLDER or data.train={NAME: {folder: FOLDER, weight: 1.0}, ...}"
    if isinstance(train, str):
        return {train: Source(train)}
    if not isinstance(train, Mapping):
        raise UserError(f"data.train is {train!r:.80}; {form}")
    found = {}
    for name, described in train.items():
        try:
            own = {"sidecar": Join(**described["sidecar"])} if described.get("sidecar") else {}
            source = Source(**{**described, **own})
            if not (isinstance(source.folder, str) and 0 < float(source.weight) < float("inf")):
                raise ValueError("a folder is a text, a weight a number above 0")
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"source {name!r} of data.train is {described!r} ({error}); {form}") from error
        found[name] = source
    if not found:
        raise UserError(f"data.train names no source; {form}")
    return found


class Corpus:
    """Several datasets behind one index, each joined with its side-cars.

    Args:
        parts: opened sources by name.
    """

    def __init__(self, parts: Mapping[str, Joined]) -> None:
        self.names, self.parts = list(parts), list(parts.values())
        self._ends = list(accumulate(len(part) for part in self.parts))
        self.starts = [0, *self._ends[:-1]]
        carried = {tuple(part.join.columns) for part in self.parts}
        if len(carried) > 1:
            listed = ", ".join(f"{name} {list(part.join.columns)}" for name, part in parts.items())
            raise UserError(
                f"the columns that batches carry differ between the sources ({listed}); "
                "give each the same data.sidecar.columns"
            )

    def __len__(self) -> int:
        return self._ends[-1]

    def record(self, index: int) -> Record:
        """The record of this number, with what the side-cars add to it."""
        part, place = self._locate(index)
        return part.record(place)

    def columns(self, index: int) -> dict[str, Tensor]:
        """What batches carry of its side-cars."""
        part, place = self._locate(index)
        return part.columns(place)

    def shard(self, index: int) -> str:
        """The tar that holds it."""
        part, place = self._locate(index)
        return part.data.shard(place)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each sample's longest stored caption, start and end included; 0 where not tokenised."""
        return np.concatenate([part.data.lengths for part in self.parts])

    def labels(self, column: str) -> NDArray[np.int64]:
        """A column of the side-cars as labels; -1 where a sample has none."""
        return np.concatenate([part.labels(column) for part in self.parts])

    def _locate(self, index: int) -> tuple[Joined, int]:
        number = bisect_right(self._ends, index)
        return self.parts[number], index - self.starts[number]

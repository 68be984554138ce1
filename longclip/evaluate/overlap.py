"""Which images of evaluation sets have been trained on.

In: images with their keys, and the datasets of a training. Out: of every set, the keys of those that training
has shown. COCO and SA-1B number their photos, and the number counts wherever a photo lies and however it was
encoded since. Other keys prove nothing, many sets count from 1: there the encoded images must be equal, too.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from ..data.faults import Damaged
from ..data.tars.dataset import Dataset
from .judging import Ranked

_NUMBERED = re.compile(r"(?:^|_)(\d{12}|sa_\d+)$")


def photo(key: str) -> tuple[str, bool]:
    """What a photo is called wherever it lies, and whether that is proof enough.

    >>> photo("coco_train2017_000000391895"), photo("my_dog_2")
    (('000000391895', True), ('my_dog_2', False))
    """
    found = _NUMBERED.search(key)
    return (found[1], True) if found else (key, False)


def overlap(sets: Mapping[str, Ranked], trained: Iterable[Dataset]) -> dict[str, list[str]]:
    """The keys of every set that were trained on. The indexes of `trained` are gone through once."""
    judged: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for name, shown in sets.items():
        for n, key in enumerate(shown.images):
            judged[photo(key)[0]].append((name, n))
    seen: dict[str, set[int]] = {name: set() for name in sets}
    for data in trained:
        for at, key in enumerate(data.keys()):
            called, proof = photo(key)
            for name, n in judged.get(called, ()):
                if proof or _same(data, at, sets[name], n):
                    seen[name].add(n)
    return {name: [sets[name].images[n] for n in sorted(numbers)] for name, numbers in seen.items()}


def _same(data: Dataset, at: int, shown: Ranked, n: int) -> bool:
    try:
        return data.record(at).image == shown.picture(n)
    except Damaged:
        return False

"""Is a model better at what it has often read? Retrieval by how frequent words are in the training captions.

In: an evaluation set and the training captions. Out: R@1 averaged over concepts of each frequency.

As in long-tailed recognition every concept counts the same, however many captions name it. A concept is a
word of three letters or more; words that nearly every image's captions hold ("the", "with") are none. Why
frequency matters: Udandarao et al. 2024, No "Zero-Shot" Without Exponential Data (arXiv 2404.04125).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import regex

from ...captions import Groups, Whole
from ...data.corpus import Corpus
from ...data.faults import Damaged
from ...data.judging import Records
from ...data.module import DataModule
from ...data.tars.dataset import Dataset
from ...types import UserError
from ..features import features
from ..judging import Each, Findings, Judged, Split, batches, protocol
from .seen import Seen, mean

log = logging.getLogger(__name__)

_WORD = regex.compile(r"\p{L}{3,}")


@dataclass(frozen=True)
class Concepts:
    """R@1 over the captions that name a concept, averaged over the concepts of each frequency.

    `unseen`: in no training caption; `tail`, `middle`, `head`: in those of a share of images below
    `edges[0]`, below `edges[1]`, above. A frequency without concepts is left out. The evaluation captions are
    the first of each image, whole, whatever the context length.

    Args:
        split: which evaluation set, of the run or a `sets.PairSet`.
        train: folder of the training shards; None: what the data trains on.
        edges: shares of the training images.
        common: what is in the captions of a larger share than this is no concept.
        sample: training images that are counted, evenly spaced; all where there are fewer.
        batch_size: images encoded at once.

    Raises UserError where there is no training data to count.
    """

    split: Split
    train: str | None = None
    edges: Sequence[float] = (0.001, 0.01)
    common: float = 0.5
    sample: int = 100_000
    batch_size: int = 128

    def __call__(self, tower: Any, data: Judged) -> Findings:
        shares = frequencies(self._trained_on(data), self.sample)
        groups = Groups({"whole": Whole()}, seed=0, shuffle=False)
        shown = batches(self.split, tower, data, self.batch_size, groups)
        hits = Seen(features(tower, shown), groups.slots).hits("whole")
        named = naming(shown.data)
        numbers, each = dict[str, float](), dict[str, Each]()
        for kind, words in self._by_frequency(named, shares).items():
            numbers[f"{kind}/concepts"] = float(len(words))
            weight_N = weights([named[word] for word in words], len(shown.data))
            for name, hit in hits.items():
                values = [w * value for w, value in zip(weight_N, hit.values, strict=True)]
                each[f"{kind}/{name}"] = Each(hit.keys, values)
                numbers[f"{kind}/{name}"] = mean(each[f"{kind}/{name}"])
        return Findings(numbers, protocol(self.split), each)

    def _trained_on(self, data: Judged) -> Dataset | Corpus:
        if self.train is not None:
            return Dataset(self.train)
        if not isinstance(data, DataModule):
            raise UserError(
                "concepts counts the words of training captions, and this data cannot be read by number: "
                "name a folder of shards with benchmark.concepts.train=FOLDER"
            )
        return data.corpus

    def _by_frequency(self, named: Iterable[str], shares: Mapping[str, float]) -> dict[str, list[str]]:
        middle, head = self.edges
        bounds = {"head": (head, self.common), "middle": (middle, head), "tail": (0.0, middle)}
        kinds = {
            kind: [word for word in sorted(named) if low <= shares.get(word, -1.0) < high]
            for kind, (low, high) in bounds.items()
        }
        kinds["unseen"] = [word for word in sorted(named) if word not in shares]
        return {kind: words for kind, words in kinds.items() if words}


@lru_cache(maxsize=1)  # judged again and again while training
def frequencies(data: Dataset | Corpus, sample: int) -> dict[str, float]:
    """Word -> share of the images whose captions hold it, among `sample` images evenly spaced."""
    rows = range(0, len(data), max(1, -(-len(data) // sample)))
    log.info("counting words in the captions of %s of %s training images", f"{len(rows):,}", f"{len(data):,}")
    counts, damaged = Counter[str](), 0
    for row in rows:
        try:
            captions = data.record(row).captions
        except Damaged:  # training passes them over, too
            damaged += 1
        else:
            counts.update(set[str]().union(*(concepts(caption.text) for caption in captions)))
    return {word: count / (len(rows) - damaged) for word, count in counts.items()}


def naming(data: Records) -> dict[str, list[int]]:
    """Word -> the images whose first caption holds it."""
    named: dict[str, list[int]] = {}
    for row in range(len(data)):
        for word in concepts(data.record(row).captions[0].text):
            named.setdefault(word, []).append(row)
    return named


def weights(named: Sequence[Sequence[int]], images: int) -> list[float]:
    """What makes a mean over images the mean over concepts of the mean over the images of each.

    So what is compared between models is images, of which two concepts may share many.

    >>> weights([[0], [0, 1]], 2)
    [1.5, 0.5]
    """
    weight_N = [0.0] * images
    for rows in named:
        for row in rows:
            weight_N[row] += images / (len(named) * len(rows))
    return weight_N


def concepts(text: str) -> set[str]:
    """The words of three letters or more, in small letters.

    >>> sorted(concepts("A red Fox; it's RED."))
    ['fox', 'red']
    """
    return set(_WORD.findall(text.lower()))

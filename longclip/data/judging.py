"""An evaluation set as batches, in stored order, as open_clip would show it.

In: records, caption groups, a transform. Out: batches by number, read and decoded when they are asked for,
so that many processes can each take some.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from ..captions import Groups, tokenise
from ..tokens import Tokenizer
from ..types import NO_IDS, Batch, Caption, Record, Sample
from .images import EvalTransform
from .loading import Located, collate, framed, pixels

THREADS = 8  # decoders and resizing let go of Python's lock


class Records(Located, Protocol):
    """What batches are made of (`tars.dataset.Dataset`, for one)."""

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    def __len__(self) -> int: ...


class JudgeBatches:
    """Pairs of (samples, `Batch`) by number; the last batch may be smaller.

    The samples are those of the batch, with the box of every text that has one, in fractions of what is shown
    of the image; a box outside of that is left out.
    """

    def __init__(self, data: Records, batch_size: int, groups: Groups, transform: EvalTransform) -> None:
        self.data, self.batch_size = data, batch_size
        self.transform = transform
        self.groups = groups.reading(data.tokenizer.ids) if data.tokenizer else groups

    def __len__(self) -> int:
        return -(-len(self.data) // self.batch_size)

    def __getitem__(self, number: int) -> tuple[list[Sample], Batch]:
        assert self.data.tokenizer is not None
        start = number * self.batch_size
        indices = range(start, min(start + self.batch_size, len(self.data)))
        records = [self.data.record(index) for index in indices]
        with ThreadPoolExecutor(THREADS) as pool:
            samples = list(pool.map(self._sample, indices, records))
        return samples, collate(samples, self.data.tokenizer)

    def __iter__(self) -> Iterator[tuple[list[Sample], Batch]]:
        return (self[number] for number in range(len(self)))

    def picture(self, index: int) -> bytes:
        """The encoded image of a record."""
        return self.data.record(index).image

    def seen_by(self, tokenizer: Tokenizer, transform: EvalTransform) -> JudgeBatches:
        """The same set as another model reads it."""
        return JudgeBatches(Retokenised(self.data, tokenizer), self.batch_size, self.groups, transform)

    def _sample(self, index: int, record: Record) -> Sample:
        image_CHW = pixels(self.data, index, record)
        texts = framed(self.groups.show(record.captions, record.key, epoch=0), image_CHW, self.transform)
        return Sample(record.key, self.transform(image_CHW), texts)


@dataclass(frozen=True)
class Retokenised:
    """Records with the ids of another tokenizer."""

    data: Records
    tokenizer: Tokenizer

    def __len__(self) -> int:
        return len(self.data)

    def record(self, index: int) -> Record:
        """The record of this number."""
        record = self.data.record(index)
        return record._replace(captions=tuple(map(self._anew, record.captions)))

    def shard(self, index: int) -> str:
        """The file that holds it."""
        return self.data.shard(index)

    def _anew(self, caption: Caption) -> Caption:
        bare = caption._replace(sentences=tuple(s._replace(ids=NO_IDS) for s in caption.sentences))
        return tokenise(bare, self.tokenizer)

"""From positions to batches: read, decode, augment, choose the captions, pack.

In: a dataset, an order, caption groups. Out: `Batch`es of uint8 pixels and packed tokens, the same for the
same position whatever the number of workers or processes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.utils.data
from torch import Tensor

from ..captions import Groups
from ..tokens import Tokenizer, pack
from ..types import Batch, Record, Sample, UserError
from .dataset import Dataset
from .images import Augment, EvalTransform, decode
from .order import Batches, Order


def picture(data: Dataset, index: int) -> tuple[Record, Tensor]:
    """A record and its decoded image, uint8 [3, H, W].

    Raises:
        UserError: the image is undecodable; says which, where and why.
    """
    record = data.record(index)
    try:
        return record, decode(record.image)
    except UserError as error:
        raise UserError(
            f"sample {record.key!r} in {data.shard(index)}: {error}; leave it out and make the shards again"
        ) from error


def collate(samples: Sequence[Sample], tokenizer: Tokenizer) -> Batch:
    """Samples of equal image size -> one batch: pixels stacked, captions packed end to end."""
    pixels_BCHW = torch.stack([sample.image_CHW for sample in samples])
    packed = pack([sample.texts for sample in samples], tokenizer)
    return Batch([sample.key for sample in samples], pixels_BCHW, *packed)


class Samples(torch.utils.data.Dataset[Sample]):
    """The samples of a run by position: a pure function of the position and the arguments.

    Args:
        data: records with ids.
        order: which record a position shows, and in which epoch.
        groups: fills the caption slots.
        transform: what every image goes through without `augment`.
        augment: random crops and the like instead, seeded by (seed, epoch, key).
        seed: of the run.
    """

    def __init__(
        self,
        data: Dataset,
        order: Order,
        groups: Groups,
        transform: EvalTransform,
        augment: Augment | None = None,
        seed: int = 0,
    ) -> None:
        self.data, self.order, self.groups = data, order, groups
        self.transform, self.augment, self.seed = transform, augment, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, position: int) -> Sample:
        epoch, index = self.order.at(position)
        record, image_CHW = picture(self.data, index)
        if self.augment is None:
            image_CHW = self.transform(image_CHW)
        else:
            rng = random.Random(f"{self.seed}/{epoch}/{record.key}")
            size, interpolation = self.transform.size, self.transform.interpolation
            image_CHW = self.augment(image_CHW, size, rng, interpolation)
        return Sample(record.key, image_CHW, self.groups.show(record.captions, record.key, epoch))


class Fetch(torch.utils.data.Dataset[Batch | UserError]):
    """Whole batches by their positions. A user's mistake is returned, not raised.

    An exception that leaves a worker comes back with a traceback for a text, and its text is all that a
    user sees; `Loader` raises it in the main process.
    """

    def __init__(self, samples: Samples, tokenizer: Tokenizer) -> None:
        self.samples, self.tokenizer = samples, tokenizer

    def __getitem__(self, positions: list[int]) -> Batch | UserError:
        try:
            return collate([self.samples[position] for position in positions], self.tokenizer)
        except UserError as error:
            return error


class Loader(torch.utils.data.DataLoader[Batch]):
    """Batches in order. Its length is that of the whole run, see `Batches`."""

    def __init__(self, samples: Samples, tokenizer: Tokenizer, batches: Batches, workers: int = 0) -> None:
        super().__init__(
            Fetch(samples, tokenizer),  # type: ignore[arg-type]
            batch_size=None,
            sampler=batches,
            collate_fn=_as_is,  # type: ignore[arg-type]
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the position is the training's. Lightning warns of loaders that have no such method."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `state_dict`."""


def _as_is(batch: Batch | UserError) -> Batch | UserError:
    return batch

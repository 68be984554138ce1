"""From shards to batches: what trains, and what judges.

In: folders of shards, caption groups, a tokenizer. Out: `Batch`es of uint8 pixels and packed tokens. The
only state is `DataModule.position`, the number of samples trained on: see `order`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.utils.data
from torch import Tensor

from .. import dist
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


class DataModule(lightning.LightningDataModule):
    """The data of a run: one folder of shards to train on, any number to judge on.

    Args:
        root: what the other folders are relative to.
        train: folder of the training shards.
        judge: folders of the evaluation sets, which are also their names.
        batch_size: images per step over all processes.
        samples: images to train on in all; whole batches only, so the last `samples % batch_size` are not.
        groups: caption slots of the recipe.
        tokenizer: of the model.
        preprocess: size, resize_mode and interpolation of the model's images, as open_clip names them.
        seed: of order and augmentation.
        workers: processes that decode; 0 decodes in the main process.
        augment: random crops and the like; None shows images as judging does.
        prepare: called as `prepare(root, tokenizer=tokenizer)` to make `root` where it is missing.
        block, window: see `Order`.

    Attributes:
        position: images trained on so far. A resumed training sets it before `train_dataloader`.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        train: str,
        judge: Sequence[str],
        batch_size: int,
        samples: int,
        groups: Groups,
        tokenizer: Tokenizer,
        preprocess: Mapping[str, Any],
        seed: int = 0,
        workers: int = 1,
        augment: Augment | None = None,
        prepare: Callable[..., object] | None = None,
        block: int = 32,
        window: int = 32,
    ) -> None:
        super().__init__()
        self.root, self.train, self.judge = Path(root), train, list(judge)
        self.batch_size, self.samples, self.workers = batch_size, samples, workers
        self.groups, self.tokenizer, self.seed = groups, tokenizer, seed
        self.transform, self.augment, self.prepare = _transform(preprocess), augment, prepare
        self.block, self.window = block, window
        self.position = 0
        self._opened: dict[str, Dataset] = {}

    @property
    def train_size(self) -> int:
        """Images of the training set, each shown once an epoch."""
        return len(self._open(self.train))

    def prepare_data(self) -> None:
        if self.prepare is not None:
            self.prepare(self.root, tokenizer=self.tokenizer)

    def setup(self, stage: str) -> None:
        """Open everything, so that a missing or torn folder is an error now and not at its first use."""
        for name in [self.train, *self.judge] if stage == "fit" else self.judge:
            self._open(name)

    def train_dataloader(self) -> Loader:
        """What is left of the run from `position` on: `len()` counts the steps before it, too."""
        samples = self._samples()
        before = self.trainer.global_step if self.trainer else self.position // self.batch_size
        batches = Batches(
            samples.order, self.batch_size, dist.rank(), dist.world(), self.position, self.samples, before
        )
        return Loader(samples, self.tokenizer, batches, self.workers)

    def probe(self, count: int) -> Batch:
        """The first images of the run as one batch."""
        samples = self._samples()
        return collate([samples[position] for position in range(count)], self.tokenizer)

    def judge_batches(
        self, split: str, batch_size: int, groups: Groups
    ) -> Iterator[tuple[list[Sample], Batch]]:
        """An evaluation set in stored order, as open_clip would show it; the last batch may be smaller.

        The samples are those of the batch, with the box of every text that has one, in fractions of the
        whole image: they fit the pixels where nothing was cropped.
        """
        data = self._open(split)
        for start in range(0, len(data), batch_size):
            samples = []
            for index in range(start, min(start + batch_size, len(data))):
                record, image_CHW = picture(data, index)
                texts = groups.show(record.captions, record.key, epoch=0)
                samples.append(Sample(record.key, self.transform(image_CHW), texts))
            yield samples, collate(samples, self.tokenizer)

    def _samples(self) -> Samples:
        data = self._open(self.train)
        order = Order(len(data), self.seed, self.block, self.window)
        return Samples(data, order, self.groups, self.transform, self.augment, self.seed)

    def _open(self, name: str) -> Dataset:
        if name not in self._opened:
            self._opened[name] = Dataset(self.root / name, self.tokenizer)
        return self._opened[name]


def _as_is(batch: Batch | UserError) -> Batch | UserError:
    return batch


def _transform(preprocess: Mapping[str, Any]) -> EvalTransform:
    size = preprocess["size"]
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise UserError(
            f"images of {size} pixels are not square, which longclip does not support; choose another model"
        )
    return EvalTransform(sides.pop(), preprocess["resize_mode"], preprocess["interpolation"])

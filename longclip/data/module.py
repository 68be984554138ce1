"""From shards to batches: what trains, and what judges.

In: folders of shards, caption groups, a tokenizer. Out: `Batch`es of uint8 pixels and packed tokens. The
only state is `DataModule.position`, the number of samples trained on: see `order`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning

from .. import dist
from ..captions import Groups
from ..tokens import Tokenizer
from ..types import Batch, Sample, UserError
from .dataset import Dataset
from .images import Augment, EvalTransform
from .loading import Loader, Samples, collate, picture
from .order import Batches, Order


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


def _transform(preprocess: Mapping[str, Any]) -> EvalTransform:
    size = preprocess["size"]
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise UserError(
            f"images of {size} pixels are not square, which longclip does not support; choose another model"
        )
    return EvalTransform(sides.pop(), preprocess["resize_mode"], preprocess["interpolation"])

"""The data of a run that reads tars from front to back: what `DataModule` is for shards with an index.

In: addresses of tars as img2dataset and webdataset make them. Out: the same `Batch`es. It promises less,
and says so when it starts; `longclip shards` makes of the same tars what promises everything.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.utils.data

from ... import dist
from ...captions import Groups
from ...curriculum import Curriculum
from ...tokens import Tokenizer
from ...types import Batch, UserError
from ..faults import Ledger
from ..images import Augment
from ..judging import JudgeBatches
from ..module import SourceReport, transform_of
from ..plans.plan import RANDOM, Plan
from ..tars.dataset import Dataset
from ..tars.retry import shown
from ..tars.storage import Storage, local_path, system_of, within
from ..watching import watched
from .streaming import Streamed, Tars, View

log = logging.getLogger(__name__)

NAME = "stream"


class StreamModule(lightning.LightningDataModule):
    """Tars to train on, read from front to back, and any number of sets of shards to judge on.

    Args:
        tars: which, and what to take from them.
        root: what the folders of `judge` are relative to.
        judge: folders of evaluation sets as `longclip shards` makes them.
        plan: its batches must be random and its `tokens` None; `epoch` is the number of samples in the tars,
            for the banner alone.
        groups, tokenizer, preprocess, curriculum, workers, augment, storage, max_faults: see `DataModule`.

    Attributes:
        position: images trained on so far.
        ledger: counts the samples shown and left out since this start.
    """

    def __init__(
        self,
        *,
        tars: Tars,
        root: str | Path,
        judge: Sequence[str],
        plan: Plan,
        groups: Groups,
        tokenizer: Tokenizer,
        preprocess: Mapping[str, Any],
        curriculum: Curriculum | None = None,
        workers: int = 1,
        augment: Augment | None = None,
        storage: Storage | None = None,
        max_faults: float = 0.001,
    ) -> None:
        super().__init__()
        self.storage, self.ledger = storage or Storage(), Ledger(max_faults)
        self.tars, self.urls = tars, tars.expanded
        self.curriculum = curriculum or Curriculum()
        self.view = View(
            groups.reading(tokenizer.ids), tokenizer, transform_of(preprocess), augment, self.curriculum
        )
        self.root, self.judge, self.plan, self.workers = root, list(judge), plan, workers
        self.position = self._steps = 0
        if plan.batches != RANDOM or plan.tokens is not None:
            raise UserError(
                "data=stream cannot compose batches (data.plan.batches, data.plan.tokens): nobody knows what "
                "its tars hold; make shards of them (longclip shards ...)"
            )

    @property
    def epoch_size(self) -> int:
        """Samples of an epoch, as far as the user told."""
        return self.plan.epoch or self.plan.samples

    def setup(self, stage: str) -> None:
        for name in self.judge:
            self._open(name)

    def describe(self) -> str:
        """What is read, and from where, in a few words."""
        return f"{len(self.urls):,} tars from front to back, the first one {shown(self.urls[0])}"

    def report(self) -> list[SourceReport]:
        """What the run makes of its only source."""
        passes = self.plan.samples / self.epoch_size
        return [SourceReport(NAME, self.epoch_size, self.epoch_size, 1.0, self.epoch_size, passes, {})]

    def shown(self, position: int) -> dict[str, int]:
        """Samples of each source before a position."""
        return {NAME: position}

    def signature(self) -> dict[str, object]:
        """Nothing: no order is promised."""
        return {}

    def resume(self, position: int, steps: int, signature: Mapping[str, object] | None = None) -> int:
        """Go on behind so many samples and steps; returns how many steps are left."""
        self.position, self._steps = position, steps
        return self._streamed().left

    def train_dataloader(self) -> StreamLoader:
        """What is left of the run from `position` on."""
        self._check_streams()
        if local_path(self.urls[0]) is None:
            system_of(self.urls[0])  # imported once, before the workers are, and an error now if it cannot be
        if dist.rank() == 0:
            log.info("%s", self.promises())
        return StreamLoader(self._streamed(), self.workers, self._steps, self.ledger)

    def probe(self, count: int) -> Batch:
        """The first images of the first stream as one batch, whole and not shuffled."""
        one = Plan(samples=count, batch_size=count, seed=self.plan.seed)
        unshuffled, whole = replace(self.tars, shuffle=0), replace(self.view, curriculum=Curriculum())
        (batch,) = islice(Streamed(unshuffled, self.storage, whole, one, 0, 0, 1), 1)
        if batch.fault is not None:
            raise UserError(batch.fault)
        return batch

    def judge_batches(self, split: str, batch_size: int, groups: Groups) -> JudgeBatches:
        """See `DataModule.judge_batches`."""
        return JudgeBatches(self._open(split), batch_size, groups, self.view.transform)

    def promises(self) -> str:
        """What this way of reading cannot promise, in plain words."""
        tars, streams = len(self.urls), self._streams()
        uneven = f", and {tars} tars do not divide evenly" if tars % streams else ""
        return (
            f"data=stream reads {tars:,} tars in {streams} streams (processes x workers). It cannot promise\n"
            "  - every sample exactly once an epoch: each stream goes through whole tars at its own pace"
            f"{uneven};\n"
            "  - to resume where it stopped: a resumed run starts the tars anew, in another order;\n"
            "  - the same batches with another number of processes or workers;\n"
            f"  - a thorough shuffle: samples are mixed within {self.tars.shuffle:,} neighbours;\n"
            "  - to notice what a tar never held: without an index only damage is seen.\n"
            "It does promise every process as many batches as the others. Shards that promise all of this: "
            "longclip shards"
        )

    def _streams(self) -> int:
        return dist.world() * max(1, self.workers)

    def _check_streams(self) -> None:
        tars, world = len(self.urls), dist.world()
        if tars < self._streams():
            way = f"set data.workers={tars // world}" if tars >= world else "use fewer processes"
            raise UserError(
                f"{tars} tars cannot feed {world} processes x {self.workers} workers, each with its own; "
                f"{way}, or name more tars in data.tars.urls"
            )

    def _streamed(self) -> Streamed:
        if self.plan.batch_size % dist.world():
            raise UserError(
                f"batch_size={self.plan.batch_size} counts the samples of all processes and must be a "
                f"multiple of their number, {dist.world()}"
            )
        return Streamed(
            self.tars, self.storage, self.view, self.plan, self.position, dist.rank(), dist.world()
        )

    def _open(self, name: str) -> Dataset:
        return Dataset(within(self.root, name), self.view.tokenizer, self.storage)


class StreamLoader(torch.utils.data.DataLoader[Batch]):
    """Batches of all workers in turn. Its length is that of the whole run, see `batching.Batches`."""

    def __init__(self, streamed: Streamed, workers: int, before: int, ledger: Ledger) -> None:
        self.streamed, self.before, self.ledger = streamed, before, ledger
        super().__init__(
            streamed,
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def __len__(self) -> int:
        return self.before + self.streamed.left

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        sizes = repeat(self.streamed.size, self.streamed.left)
        stand_in = self.streamed.view.blank
        return watched(super().__iter__, sizes, stand_in, self.num_workers, self.ledger)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the position is the training's. Lightning warns of loaders that have no such method."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `state_dict`."""

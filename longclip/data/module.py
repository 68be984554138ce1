"""From shards to batches: what trains, and what judges.

In: folders of shards, caption groups, a tokenizer. Out: `Batch`es of uint8 pixels and packed tokens. The
only state is `DataModule.position`, the number of samples trained on: see `order`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import lightning

from ..captions import Groups
from ..curriculum import Curriculum
from ..tokens import Tokenizer
from ..types import Batch, UserError
from .corpus import Corpus, sources
from .faults import Ledger
from .images import Augment, EvalTransform
from .judging import JudgeBatches
from .loading import Loader, Samples, collate
from .plans.batching import Batches
from .plans.mixture import Mixture
from .plans.order import Stream
from .plans.plan import Plan
from .sidecars.joining import Join, Joined, carrying
from .tars.dataset import Dataset
from .tars.retry import shown
from .tars.storage import Storage, within

log = logging.getLogger(__name__)


class SourceReport(NamedTuple):
    """What a run makes of one source."""

    name: str
    samples: int  # stored
    kept: int  # of them, after `data.sidecar.filter`
    weight: float
    epoch: int  # shown in an epoch
    passes: float  # over those kept, in the whole run
    joined: dict[str, float]  # side-car -> share of the samples that it knows


class DataModule(lightning.LightningDataModule):
    """The data of a run: one or several sources to train on, any number of sets to judge on.

    Args:
        root: what the other folders are relative to, a path or a URL.
        train: folder of the training shards, or several: {NAME: {folder: ..., weight: ..., sidecar: ...}}.
        judge: folders of the evaluation sets, which are also their names.
        plan: how much of it is shown, in which order and batches.
        groups: caption slots of the recipe; None where nothing is trained.
        tokenizer: of the model.
        preprocess: size, resize_mode and interpolation of the model's images, as open_clip names them.
        curriculum: image side and caption length while training, never when judging.
        sidecar: what else is known of the training samples.
        workers: processes that decode; 0 decodes in the main process.
        augment: random crops and the like; None shows images as judging does.
        prepare: called as `prepare(root, tokenizer=tokenizer)` to make `root` where it is missing.
        storage: how URLs are read.
        max_faults: share of the samples that may be damaged, and replaced by others, before the run stops.
        cached: a column of side-cars that stands for the training images, which are then neither decoded nor
            augmented (all but those of the first batch, by which the towers prove it).

    Attributes:
        position: images trained on so far, see `resume`.
        ledger: counts the samples shown and replaced since this start.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        train: str | Mapping[str, Any],
        judge: Sequence[str],
        plan: Plan,
        groups: Groups | None,
        tokenizer: Tokenizer,
        preprocess: Mapping[str, Any],
        curriculum: Curriculum | None = None,
        sidecar: Join | None = None,
        workers: int = 1,
        augment: Augment | None = None,
        prepare: Callable[..., object] | None = None,
        storage: Storage | None = None,
        max_faults: float = 0.001,
        cached: str | None = None,
    ) -> None:
        super().__init__()
        self.storage, self.ledger = storage or Storage(), Ledger(max_faults)
        self.root, self.sources, self.judge = root, sources(train), list(judge)
        self.plan, self.workers, self.sidecar = plan, workers, sidecar or Join()
        self.groups, self.tokenizer = groups and groups.reading(tokenizer.ids), tokenizer
        self.transform, self.augment, self.prepare = transform_of(preprocess), augment, prepare
        self.curriculum, self.cached = curriculum or Curriculum(), cached
        if cached is not None:
            self.augment = None
            self._check_curriculum(cached)
        self.position = self._steps = 0
        self._opened: dict[str, Dataset] = {}

    @cached_property
    def corpus(self) -> Corpus:
        """The training data."""
        joins = {
            name: carrying(source.sidecar or self.sidecar, self.cached)
            for name, source in self.sources.items()
        }
        return Corpus({name: Joined(self._open(self.sources[name].folder), j) for name, j in joins.items()})

    @cached_property
    def mixture(self) -> Mixture:
        """The sources in one stream."""
        return self.plan.mixture(self.sources, self.corpus)

    @property
    def epoch_size(self) -> int:
        """Samples of an epoch."""
        return self.mixture.samples

    def report(self) -> list[SourceReport]:
        """What the run makes of each source."""
        epochs = self.plan.samples / self.epoch_size
        rows = zip(self.corpus.names, self.corpus.parts, self.mixture.parts, strict=True)
        return [
            SourceReport(
                name,
                len(data),
                data.choices,
                self.sources[name].weight,
                part.epoch,
                epochs * part.epoch / data.choices,
                data.joined,
            )
            for name, data, part in rows
        ]

    def describe(self) -> str:
        """What is read, and from where, in a few words."""
        stands = f", not decoded or augmented: {self.cached} stands for them" if self.cached else ""
        return f"{len(self.corpus):,} images in {shown(str(self.root))}{stands}"

    def shown(self, position: int) -> dict[str, int]:
        """Samples of each source before a position; composed batches make it a matter of their pool."""
        return self.mixture.shown(position)

    def signature(self) -> dict[str, object]:
        """What the meaning of a position depends on, as plain values."""
        sizes = {report.name: [report.kept, report.epoch] for report in self.report()}
        return {**self.plan.signature(), "sources": sizes, **self._choice}

    @cached_property
    def _choice(self) -> dict[str, object]:
        """Which samples, told by checksums: over all of them, so not anew for every checkpoint."""
        parts = zip(self.corpus.names, self.corpus.parts, strict=True)
        return {"chosen": {name: part.checksum for name, part in parts}, **self.plan.arranged(self.corpus)}

    def resume(self, position: int, steps: int, signature: Mapping[str, object] | None = None) -> int:
        """Go on from a position, reached in so many steps; returns how many steps are left.

        Args:
            signature: of the run that reached it: where it is another, a warning says that samples will
                come twice or not at all in this epoch.
        """
        own, old = self.signature(), signature or self.signature()
        changed = [
            f"{name} {old[name]} -> {value}"
            for name, value in own.items()
            if name in old and old[name] != value  # older checkpoints say less
        ]
        if changed:
            log.warning(
                "the order of samples is not that of the checkpoint (%s): until the end of this epoch some "
                "will come twice and others not at all",
                ", ".join(changed),
            )
        self.position, self._steps = position, steps
        return self._batches().left

    def prepare_data(self) -> None:
        if self.prepare is not None:
            self.prepare(Path(self.root), tokenizer=self.tokenizer)

    def setup(self, stage: str) -> None:
        """Open everything, so that a missing or torn folder is an error now and not at its first use."""
        for name in self.judge:
            self._open(name)
        if stage == "fit":
            _ = self.mixture

    def train_dataloader(self) -> Loader:
        """What is left of the run from `position` on: `len()` counts the steps before it, too."""
        self.ledger.size = len(self.corpus)
        batches = self._batches()
        return Loader(self._samples(), self.tokenizer, batches, self.curriculum, self.workers, self.ledger)

    def probe(self, count: int) -> Batch:
        """The first images of the run as one batch, whole, whatever the curriculum."""
        samples = self._samples()
        return collate([samples.or_other(position, []) for position in range(count)], self.tokenizer)

    def judge_batches(self, split: str, batch_size: int, groups: Groups) -> JudgeBatches:
        """An evaluation set in stored order, as open_clip would show it."""
        return JudgeBatches(self._open(split), batch_size, groups, self.transform)

    def _samples(self) -> Samples:
        assert self.groups is not None, "these data were opened to judge with"
        shown_by = self.transform, self.augment
        return Samples(self.corpus, self._stream, self.groups, *shown_by, self.plan, self.cached)

    def _batches(self) -> Batches:
        return self.plan.cut(self._stream, self.corpus, self.position, self._steps)

    @cached_property
    def _stream(self) -> Stream:
        return self.plan.stream(self.mixture, self.corpus)

    def _check_curriculum(self, cached: str) -> None:
        stages = [name for name in ("image_size", "patch_dropout") if getattr(self.curriculum, name)]
        if stages:
            raise UserError(
                f"curriculum.{stages[0]} changes what the image tower sees, and with "
                f"model.cached.image={cached} it sees nothing: set curriculum.{stages[0]}=null"
            )

    def _open(self, name: str) -> Dataset:
        if name not in self._opened:
            self._opened[name] = Dataset(within(self.root, name), self.tokenizer, self.storage)
        return self._opened[name]


def transform_of(preprocess: Mapping[str, Any]) -> EvalTransform:
    """open_clip's preprocessing for a model; `UserError` where its images are not square."""
    size = preprocess["size"]
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise UserError(
            f"images of {size} pixels are not square, which longclip does not support; choose another model"
        )
    return EvalTransform(sides.pop(), preprocess["resize_mode"], preprocess["interpolation"])

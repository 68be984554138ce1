"""From positions to batches: read, decode, augment, choose the captions, pack.

In: a dataset, an order, caption groups. Out: `Batch`es of uint8 pixels and packed tokens, the same for the
same position whatever the number of workers or processes. A damaged sample is replaced by another.
"""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.utils.data
from torch import Tensor
from torch.utils.data import default_collate

from .. import dist
from ..captions import Groups
from ..tokens import Tokenizer, pack
from ..types import Batch, Record, Sample, Skip, Text, UserError
from .batching import Batches
from .corpus import Corpus
from .dataset import Dataset
from .faults import Damaged, Ledger, Reason
from .images import Augment, EvalTransform, decode
from .order import Stream
from .plan import Plan

GOLDEN = 0.618  # of the data: how far away a sample's stand-in lies in the stream
OTHERS = 8  # stand-ins that are tried


def picture(data: Dataset | Corpus, index: int) -> tuple[Record, Tensor]:
    """A record and its decoded image, uint8 [3, H, W].

    Raises:
        Damaged: the record is damaged or its image undecodable; says which, where and why.
    """
    record = data.record(index)
    try:
        return record, decode(record.image)
    except UserError as error:
        reason = Reason.LARGE if "too large" in str(error) else Reason.IMAGE
        raise Damaged(
            f"sample {record.key!r} in {data.shard(index)}: {error}; leave it out and make the shards again",
            reason,
        ) from error


def collate(samples: Sequence[Sample], tokenizer: Tokenizer) -> Batch:
    """Samples of equal image size -> one batch: pixels stacked, captions packed end to end.

    The pixels stay channels last in memory, as decoders make them; a worker puts them where the main
    process reads them, too.
    """
    pixels_BHWC = default_collate([sample.image_CHW.permute(1, 2, 0) for sample in samples])
    pixels_BCHW = pixels_BHWC.permute(0, 3, 1, 2)
    packed = pack([sample.texts for sample in samples], tokenizer)
    columns = {name: torch.stack([sample.columns[name] for sample in samples]) for name in samples[0].columns}
    return Batch([sample.key for sample in samples], pixels_BCHW, *packed, columns=columns)


class Samples(torch.utils.data.Dataset[Sample]):
    """The samples of a run by position: a pure function of the position and the arguments.

    Args:
        data: records with ids.
        order: which record a position shows, and in which pass over its source.
        groups: fills the caption slots.
        transform: what every image goes through without `augment`.
        augment: random crops and the like instead, seeded by (seed, pass, key).
        plan: seed and length of the run.
    """

    def __init__(
        self,
        data: Corpus,
        order: Stream,
        groups: Groups,
        transform: EvalTransform,
        augment: Augment | None,
        plan: Plan,
    ) -> None:
        self.data, self.order, self.groups = data, order, groups
        self.transform, self.augment, self.plan = transform, augment, plan

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, position: int) -> Sample:
        """The sample of a position; raises `Damaged` where it cannot be used."""
        epoch, index = self.order.at(position)
        record, image_CHW = picture(self.data, index)
        if self.augment is None:
            image_CHW = self.transform(image_CHW)
        else:
            rng = random.Random(f"{self.plan.seed}/{epoch}/{record.key}")
            size, interpolation = self.transform.size, self.transform.interpolation
            image_CHW = self.augment(image_CHW, size, rng, interpolation)
        texts = self.groups.show(record.captions, record.key, epoch, min(1.0, position / self.plan.samples))
        return Sample(record.key, image_CHW, texts, self.data.columns(index))

    def or_other(self, position: int, skips: list[Skip]) -> Sample:
        """The sample of a position or, where it is damaged, the next good one of a fixed row of others.

        The others are far away in the stream, so that none of them is in the same batch, and a function
        of the position, so that workers, processes and a resume change nothing.

        Raises:
            UserError: the others are damaged, too, so something else is wrong.
        """
        stride = max(1, round(len(self) * GOLDEN))
        for other in range(position, position + OTHERS * stride, stride):
            try:
                return self[other]
            except Damaged as error:
                skips.append(Skip(error.reason, str(error)))
        raise UserError(f"{OTHERS} samples in a row cannot be used; the last one: {skips[-1].text}")


class Fetch(torch.utils.data.Dataset[Batch]):
    """Whole batches by their positions. A user's mistake is a batch with a `fault`, not raised.

    An exception that leaves a worker comes back with a traceback for a text, and its text is all that a
    user sees; `Loader` raises it in the main process.
    """

    def __init__(self, samples: Samples, tokenizer: Tokenizer) -> None:
        self.samples, self.tokenizer = samples, tokenizer

    def __getitem__(self, positions: list[int]) -> Batch:
        skips: list[Skip] = []
        try:
            samples = [self.samples.or_other(position, skips) for position in positions]
            return collate(samples, self.tokenizer)._replace(skips=skips)
        except UserError as error:
            return self.blank(len(positions), str(error))._replace(skips=skips)

    def blank(self, count: int, fault: str) -> Batch:
        """What stands in for a batch that this process cannot have: grey images without words."""
        size = self.samples.transform.size
        image_CHW = torch.zeros(3, size, size, dtype=torch.uint8)
        known = self.samples.data.columns(0).items()
        columns = {name: torch.full_like(value, torch.nan) for name, value in known}
        sample = Sample("", image_CHW, (Text(()),) * self.samples.groups.count, columns)
        return collate([sample] * count, self.tokenizer)._replace(fault=fault)


class Loader(torch.utils.data.DataLoader[Batch]):
    """Batches in order. Its length is that of the whole run, see `Batches`.

    Where it cannot go on, a single process raises a `UserError`. One of several gets a last, blank batch
    with its `fault`, and the training step stops all of them together: if one left alone, the others
    would wait for it in their next collective.

    Args:
        ledger: counts what was seen and left out.
    """

    def __init__(
        self,
        samples: Samples,
        tokenizer: Tokenizer,
        batches: Batches,
        workers: int = 0,
        ledger: Ledger | None = None,
    ) -> None:
        self.fetch, self.ledger = Fetch(samples, tokenizer), ledger
        super().__init__(
            self.fetch,
            batch_size=None,
            sampler=batches,
            collate_fn=_as_is,  # type: ignore[arg-type]
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        arriving = _quietly(super().__iter__)
        for positions in self.sampler:
            try:
                batch = next(arriving)
            except (RuntimeError, EOFError, OSError) as error:
                if not self.num_workers:
                    raise
                batch = self.fetch.blank(len(positions), _killed(error))
            if batch.fault is not None and dist.world() == 1:
                raise UserError(batch.fault)
            if self.ledger is not None:
                self.ledger.add(len(batch.keys), batch.skips)
            yield batch
            if batch.fault is not None:
                return

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the position is the training's. Lightning warns of loaders that have no such method."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `state_dict`."""


def _as_is(batch: Batch) -> Batch:
    return batch


def _quietly(start: Callable[[], Iterator[Batch]]) -> Iterator[Batch]:
    """Start workers without torch's signal handler, which raises wherever the main program happens to be.

    A dead worker is then found where its batch is fetched, a few seconds later, by torch as well.
    """
    if threading.current_thread() is not threading.main_thread():
        return start()
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        return start()
    finally:
        signal.signal(signal.SIGCHLD, handler)


def _killed(error: Exception) -> str:
    """The sentence for a worker that died; any other error goes on.

    Depending on what it did when it died, torch finds it missing, or a pipe to it is broken.
    """
    text = str(error)
    if text.startswith("Caught ") or (isinstance(error, RuntimeError) and "DataLoader worker" not in text):
        raise error
    found = text.splitlines()[0] if text else type(error).__name__
    return (
        f"a process that loads data was killed ({found}), most often because memory or /dev/shm ran out (see "
        "dmesg); lower data.workers or give the job more memory, then go on with resume=auto"
    )

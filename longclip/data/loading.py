"""From positions to batches: read, decode, augment, choose the captions, pack.

In: a dataset, an order, caption groups. Out: `Batch`es of uint8 pixels and packed tokens, the same for the
same position whatever the number of workers or processes. A damaged sample is replaced by another.
"""

from __future__ import annotations

import copy
import gc
import math
import random
import signal
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.utils.data
from torch import Tensor
from torch.utils.data import default_collate

from ..captions import Groups
from ..curriculum import Curriculum
from ..tokens import Tokenizer, pack
from ..types import NO_IDS, Batch, Box, Record, Sample, Skip, Text, UserError
from .corpus import Corpus
from .faults import Damaged, Ledger, Reason
from .images import Augment, EvalTransform, decode, inside
from .plans.batching import Batches
from .plans.order import Stream
from .plans.plan import Plan
from .watching import watched

GOLDEN = 0.618  # of an epoch: how far away a sample's stand-in lies
OTHERS = 8  # stand-ins that are tried
NOWHERE = (math.nan,) * 4  # the box of a text without
UNSEEN = torch.empty(3, 0, 0, dtype=torch.uint8)  # an image that is not decoded


class Located(Protocol):
    """What knows where its records lie."""

    def record(self, index: int) -> Record: ...

    def shard(self, index: int) -> str: ...


def picture(data: Located, index: int) -> tuple[Record, Tensor]:
    """A record and its decoded image, uint8 [3, H, W].

    Raises:
        Damaged: the record is damaged or its image undecodable; says which, where and why.
    """
    record = data.record(index)
    return record, pixels(data, index, record)


def pixels(data: Located, index: int, record: Record) -> Tensor:
    """The decoded image of a record that is read already, as `picture`."""
    try:
        return decoded(record.image)
    except Damaged as error:
        raise Damaged(
            f"sample {record.key!r} in {data.shard(index)}: {error}; leave it out or get it again",
            error.reason,
        ) from error


def decoded(image: bytes) -> Tensor:
    """What `images.decode` makes of it; where it cannot, the `Damaged` tells the reason alone."""
    try:
        return decode(image)
    except UserError as error:
        reason = Reason.LARGE if "too large" in str(error) else Reason.IMAGE
        raise Damaged(str(error), reason) from error


def seeding(seed: int, epoch: int, key: str) -> str:
    """The words that seed how an image is shown: others than those of its captions (`captions.Groups`)."""
    return f"{seed}/{epoch}/{key}//image"


def view(image_CHW: Tensor, transform: EvalTransform, augment: Augment | None, words: str) -> Tensor:
    """An image as it is shown: as judging shows it or, where there is an `augment`, as `words` seed it."""
    if augment is None:
        return transform(image_CHW)
    return augment(image_CHW, transform.size, random.Random(words), transform.interpolation)


def window(image_CHW: Tensor, transform: EvalTransform, augment: Augment | None, words: str) -> Box:
    """What of the image that is, as fractions of it (`images.inside`)."""
    height, width = image_CHW.shape[1:]
    if augment is None:
        return transform.window(height, width)
    return augment.window(height, width, random.Random(words))


def draw(words: str) -> int:
    """A number that `words` seed, another one than what they decide about the view."""
    return random.Random(f"{words}/draw").getrandbits(62)


def framed(
    texts: tuple[Text | None, ...],
    image_CHW: Tensor,
    transform: EvalTransform,
    augment: Augment | None = None,
    words: str = "",
) -> tuple[Text | None, ...]:
    """The texts with their boxes in fractions of what `view` shows of this image."""
    if not any(text and text.box for text in texts):
        return texts
    shown = window(image_CHW, transform, augment, words)
    return tuple(text and text._replace(box=inside(text.box, shown)) for text in texts)


def collate(samples: Sequence[Sample], tokenizer: Tokenizer, limit: int | None = None) -> Batch:
    """Samples of equal image size -> one batch: pixels stacked, captions (cut at `limit`) packed end to end.

    The pixels stay channels last in memory, as decoders make them; a worker puts them where the main
    process reads them, too.
    """
    pixels_BHWC = default_collate([sample.image_CHW.permute(1, 2, 0) for sample in samples])
    pixels_BCHW = pixels_BHWC.permute(0, 3, 1, 2)
    packed = pack([sample.texts for sample in samples], tokenizer, limit)
    columns = {name: torch.stack([sample.columns[name] for sample in samples]) for name in samples[0].columns}
    return Batch(
        [sample.key for sample in samples],
        pixels_BCHW,
        *packed,
        columns=columns,
        boxes_BK4=_boxes([sample.texts for sample in samples]),
        weights_BK=_weights([sample.texts for sample in samples]),
        draws_B=torch.tensor([sample.draw for sample in samples]),
    )


def _boxes(texts: Sequence[Sequence[Text | None]]) -> Tensor | None:
    if not any(text and text.box for row in texts for text in row):
        return None
    return torch.tensor([[text.box if text and text.box else NOWHERE for text in row] for row in texts])


def _weights(texts: Sequence[Sequence[Text | None]]) -> Tensor | None:
    if all(text is None or text.weight == 1 for row in texts for text in row):
        return None
    return torch.tensor([[text.weight if text else 0.0 for text in row] for row in texts])


class Samples(torch.utils.data.Dataset[Sample]):
    """The samples of a run by position: a pure function of the position and the arguments.

    Args:
        data: records with ids.
        order: which record a position shows, and in which pass over its source.
        groups: fills the caption slots.
        transform: what every image goes through without `augment`.
        augment: random crops and the like instead, seeded by (seed, pass, key).
        plan: seed and length of the run.
        cached: a column of `data` that stands for the images: these are not decoded, and a sample without
            its vector cannot be used.
    """

    def __init__(
        self,
        data: Corpus,
        order: Stream,
        groups: Groups,
        transform: EvalTransform,
        augment: Augment | None,
        plan: Plan,
        cached: str | None = None,
    ) -> None:
        self.data, self.order, self.groups = data, order, groups
        self.transform, self.augment, self.plan = transform, augment, plan
        self.cached, self.decoding = cached, cached is None

    def __len__(self) -> int:
        return len(self.data)

    def sized(self, size: int | None) -> Samples:
        """The same samples with images of another side; None: of the model's own."""
        other = copy.copy(self)
        other.transform = self.transform.sized(size)
        return other

    def decoded(self) -> Samples:
        """The same samples with their images, whatever stands for these."""
        other = copy.copy(self)
        other.decoding = True
        return other

    def __getitem__(self, position: int) -> Sample:
        """The sample of a position; raises `Damaged` where it cannot be used."""
        epoch, index = self.order.at(position)
        record = self.data.record(index)
        image_CHW = pixels(self.data, index, record) if self.decoding else UNSEEN
        words = seeding(self.plan.seed, epoch, record.key)
        texts = self.groups.show(record.captions, record.key, epoch, min(1.0, position / self.plan.samples))
        columns = self.data.columns(index)
        if self.cached is not None:
            check_stored(self.cached, columns, record.key)
        if self.decoding:
            seen = self.transform, self.augment, words
            texts, image_CHW = framed(texts, image_CHW, *seen), view(image_CHW, *seen)
        else:
            texts = tuple(text and text._replace(box=None) for text in texts)  # in a frame that is not known
        return Sample(record.key, image_CHW, texts, columns, draw(words))

    def or_other(self, position: int, skips: list[Skip]) -> Sample:
        """The sample of a position or, where it is damaged, the next good one of a fixed row of others.

        The others are of the same epoch and a function of the position, so that workers, processes and a
        resume change nothing. They are spread over it, so that one is seldom in the same batch; where an
        epoch is a few batches, or most samples are damaged, an image may come twice in one.

        Raises:
            UserError: the others are damaged, too, so something else is wrong.
        """
        epoch = self.order.samples
        start, place = position - position % epoch, position % epoch
        for number in range(OTHERS):
            try:
                return self[start + (place + round(number * GOLDEN * epoch)) % epoch]
            except Damaged as error:
                skips.append(Skip(error.reason, str(error)))
        raise UserError(f"{OTHERS} samples in a row cannot be used; the last one: {skips[-1].text}")


def check_stored(name: str, columns: dict[str, Tensor], key: str) -> None:
    """Raise `Damaged` where a sample has no vector to stand for its image."""
    if not columns[name].isfinite().all():
        raise Damaged(
            f"sample {key!r} has no finite vector in the column {name!r}, which stands for its image; embed "
            "its shard again",
            Reason.VECTOR,
        )


class Fetch(torch.utils.data.Dataset[Batch]):
    """Whole batches by their positions. A user's mistake is a batch with a `fault`, not raised.

    An exception that leaves a worker comes back with a traceback for a text, and its text is all that a
    user sees; `Loader` raises it in the main process.
    """

    def __init__(
        self, samples: Samples, tokenizer: Tokenizer, curriculum: Curriculum, rank: int, first: int = 0
    ) -> None:
        self.samples, self.tokenizer = samples, tokenizer
        self.curriculum, self.rank, self.first = curriculum, rank, first

    def __getitem__(self, positions: list[int]) -> Batch:
        skips: list[Skip] = []
        # Every rank has an equal slice: where the global batch begins, and so its stage, is arithmetic.
        begin = positions[0] - self.rank * len(positions)
        stage = self.curriculum.at(begin)
        try:
            shown = self.samples.sized(stage.image_size)
            if begin == self.first:  # proves that what stands for the images is what the tower says of them
                shown = shown.decoded()
            samples = [shown.or_other(position, skips) for position in positions]
            return collate(samples, self.tokenizer, stage.context_length)._replace(skips=skips)
        except UserError as error:
            return self.blank(len(positions), str(error))._replace(skips=skips)

    def blank(self, count: int, fault: str) -> Batch:
        """What stands in for a batch that this process cannot have."""
        known = self.samples.data.columns(0).items()
        columns = {name: torch.full_like(value, torch.nan) for name, value in known}
        slots, size = self.samples.groups.count, self.samples.transform.size * (self.samples.cached is None)
        return blank(count, slots, size, self.tokenizer, columns)._replace(fault=fault)


def blank(
    count: int, slots: int, size: int, tokenizer: Tokenizer, columns: dict[str, Tensor] | None = None
) -> Batch:
    """A batch of black images without words: nothing to learn from, but of the right shape."""
    image_CHW = torch.zeros(3, size, size, dtype=torch.uint8)
    return collate([Sample("", image_CHW, (Text(NO_IDS),) * slots, columns or {})] * count, tokenizer)


class Loader(torch.utils.data.DataLoader[Batch]):
    """Batches in order. Its length is that of the whole run, see `Batches`.

    Where it cannot go on, see `watching`.

    Args:
        curriculum: image side and caption length of every batch.
        ledger: counts what was seen and left out.
    """

    def __init__(
        self,
        samples: Samples,
        tokenizer: Tokenizer,
        batches: Batches,
        curriculum: Curriculum,
        workers: int = 0,
        ledger: Ledger | None = None,
    ) -> None:
        self.fetch = Fetch(samples, tokenizer, curriculum, batches.rank, batches.start)
        self.ledger = ledger
        super().__init__(
            self.fetch,
            batch_size=None,
            sampler=batches,
            collate_fn=_as_is,  # type: ignore[arg-type]
            num_workers=workers,
            worker_init_fn=_spare,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        sizes = (len(positions) for positions in self.sampler)
        return watched(super().__iter__, sizes, self.fetch.blank, self.num_workers, self.ledger)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the position is the training's. Lightning warns of loaders that have no such method."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `state_dict`."""


def _as_is(batch: Batch) -> Batch:
    return batch


def _spare(worker: int) -> None:
    # What a worker inherits is never collected: marking it would copy 120 MiB that it only shares.
    gc.freeze()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # SLURM may signal every process of a step:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the one that trains answers (`stopping`)

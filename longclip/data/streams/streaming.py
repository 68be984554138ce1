"""Batches from tars that are read from front to back, without an index.

In: addresses of tars as webdataset and img2dataset write them, and where in them captions are. Out:
`Batch`es. Every worker of every process is a stream of its own, which takes whole tars, pass after pass
in another order, and shuffles samples within a buffer. A stream never ends, so that all processes have
equally many batches, whatever they found in their tars.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

import braceexpand
import torch.utils.data

from ...captions import Groups
from ...captions import parse as caption
from ...curriculum import Curriculum
from ...tokens import Tokenizer
from ...types import Batch, Caption, Sample, Skip, UserError
from .. import loading
from ..faults import Damaged, Reason
from ..images import Augment, EvalTransform
from ..loading import blank, collate
from ..plans.plan import Plan
from ..tars.retry import shown
from ..tars.storage import Storage, local_path
from .tape import Members, samples

IMAGES = ("jpg", "jpeg", "png", "webp")
BARREN = 3  # passes without a sample that a stream goes through before it gives up
LOST = 100  # samples that a batch may lose, and as many as it has


@dataclass(frozen=True)
class Tars:
    """What to read, and what to take from it.

    Args:
        urls: of the tars: addresses, in which braces are written out (http://host/{00000..00099}.tar), or
            local folders of tars.
        captions: source -> where its captions are: "txt" is a member, "json.a.b" a value in the json member,
            a text or a list of texts.
        shuffle: samples that a stream holds back to shuffle; they are in memory, encoded.
        splitter: what finds sentences (`captions.split`).

    Raises:
        UserError: there is no tar, or an address would run a program.
    """

    urls: str | Sequence[str]
    captions: Mapping[str, str]
    shuffle: int = 1000
    splitter: str = "syntok"

    @cached_property
    def expanded(self) -> tuple[str, ...]:
        """Every tar by its address."""
        given = [self.urls] if isinstance(self.urls, str) else self.urls
        found = [tar for part in given for url in braceexpand.braceexpand(part) for tar in _tars(url)]
        if not found:
            raise UserError(
                f"data.tars.urls={self.urls} names no tar; give addresses like http://host/{{00000..00099}}.tar"
            )
        return tuple(found)

    def texts(self, found: Members, tokenizer: Tokenizer) -> tuple[Caption, ...]:
        """The captions of a sample, split and tokenised.

        Raises:
            Damaged: there is none, or the json is none.
        """
        captions = []
        for source, place in self.captions.items():
            member, _, path = place.partition(".")
            value: Any = found.members.get(member, b"")
            try:
                value = _looked_up(json.loads(value or b"{}"), path) if path else value.decode()
            except (ValueError, RecursionError) as error:
                raise Damaged(f"its {member} cannot be read ({error!s:.80})", Reason.JSON) from error
            for text in value if isinstance(value, list) else [value]:
                with suppress(UserError):  # nothing but spaces, or no text at all
                    captions.append(caption(text, source, tokenizer, self.splitter))
        if not captions:
            where = ", ".join(self.captions.values())
            raise Damaged(f"no caption in {where} (members: {sorted(found.members)})", Reason.CAPTION)
        return tuple(captions)


@dataclass(frozen=True)
class View:
    """What becomes of a sample."""

    groups: Groups
    tokenizer: Tokenizer
    transform: EvalTransform
    augment: Augment | None
    curriculum: Curriculum

    def blank(self, size: int, fault: str) -> Batch:
        """What stands in for a batch that this process cannot have."""
        batch = blank(size, self.groups.count, self.transform.size, self.tokenizer)
        return batch._replace(fault=fault)


class Streamed(torch.utils.data.IterableDataset[Batch]):
    """This process's batches, shared among its workers; the same for the same arguments.

    Args:
        position: images trained on before; another position is another order of the tars.
        rank, world: this process, and how many there are.
    """

    def __init__(
        self, tars: Tars, storage: Storage, view: View, plan: Plan, position: int, rank: int, world: int
    ) -> None:
        self.tars, self.storage = tars, storage
        self.view, self.plan, self.position = view, plan, position
        self.rank, self.world = rank, world
        self.size = plan.batch_size // world
        self.left = max(0, plan.samples - position) // plan.batch_size

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        found = self.found(self.rank * workers + number, self.world * workers)
        for step in range(number, self.left, workers):
            skips: list[Skip] = []
            position = self.position + step * self.plan.batch_size
            progress = min(1.0, position / self.plan.samples)
            stage = self.view.curriculum.at(position)
            transform = self.view.transform.sized(stage.image_size)
            try:
                shown = [self._next(found, transform, progress, skips) for _ in range(self.size)]
                batch = collate(shown, self.view.tokenizer, stage.context_length)
            except UserError as error:
                yield self.view.blank(self.size, str(error))._replace(skips=skips)
                return
            yield batch._replace(skips=skips)

    def found(self, number: int, streams: int) -> Iterator[tuple[int, Members | Damaged]]:
        """(pass, sample) of one stream, shuffled, without end."""
        rng = random.Random(f"{self.plan.seed}/{self.position}/{number}")
        held: list[tuple[int, Members | Damaged]] = []
        for item in self._passes(number, streams):
            if len(held) < self.tars.shuffle:
                held.append(item)
                continue
            place = rng.randrange(len(held) + 1)
            if place < len(held):
                held[place], item = item, held[place]
            yield item

    def _passes(self, number: int, streams: int) -> Iterator[tuple[int, Members | Damaged]]:
        barren = 0  # passes in a row that brought nothing
        for epoch in count():
            urls, barren = list(self.tars.expanded), barren + 1
            random.Random(f"{self.plan.seed}/{self.position}/{epoch}").shuffle(urls)
            for url in urls[number::streams]:
                for found in samples(url, self.storage):
                    barren = 0 if isinstance(found, Members) else barren
                    yield epoch, found
            if barren == BARREN:
                raise UserError(
                    f"tar after tar holds no sample, such as {shown(urls[number])}; look into it: tar tf FILE"
                )

    def _next(
        self,
        found: Iterator[tuple[int, Members | Damaged]],
        transform: EvalTransform,
        progress: float,
        skips: list[Skip],
    ) -> Sample:
        """The next sample that can be used; the others are counted."""
        while True:
            epoch, item = next(found)
            try:
                if isinstance(item, Damaged):
                    raise item
                return self._sample(item, transform, epoch, progress)
            except Damaged as error:
                skips.append(Skip(error.reason, str(error)))
                if len(skips) > LOST + self.size:
                    raise UserError(
                        f"{len(skips)} samples were no good for a batch of {self.size}; the last one: {error}"
                    ) from error

    def _sample(self, found: Members, transform: EvalTransform, epoch: int, progress: float) -> Sample:
        content = next((found.members[kind] for kind in IMAGES if kind in found.members), None)
        try:
            if content is None:
                raise Damaged(f"no image among its members {sorted(found.members)}", Reason.MEMBER)
            captions = self.tars.texts(found, self.view.tokenizer)
            image_CHW = loading.decoded(content)
        except Damaged as error:
            raise Damaged(f"sample {found.key!r}: {error}", error.reason) from error
        seen = transform, self.view.augment, loading.seeding(self.plan.seed, epoch, found.key)
        texts = self.view.groups.show(captions, found.key, epoch, progress)
        texts = loading.framed(texts, image_CHW, *seen)
        return Sample(found.key, loading.view(image_CHW, *seen), texts, draw=loading.draw(seen[-1]))


def _tars(url: str) -> list[str]:
    if url.startswith("pipe:"):
        raise UserError("data.tars.urls has a pipe: address, which runs a program; give the files themselves")
    folder = local_path(url)
    inside = folder is not None and folder.is_dir()
    return [str(tar) for tar in sorted(folder.glob("*.tar"))] if folder is not None and inside else [url]


def _looked_up(value: Any, path: str) -> Any:
    """A value of nested objects by its path; None where there is none."""
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value

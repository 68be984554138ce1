"""Published sets of images and texts, read as they come, and the protocol that each is judged by.

In: a folder and its description (`conf/benchmark/*.yaml`), which names a layout of `longclip shards` or has
one. Out: retrieval on it, or a sentence that says what of the set is missing.

One name often stands for several protocols whose numbers cannot be compared: they take other fields, splits,
cleanings or crops. So a result carries an id made of all of these.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

from ..captions import Groups, Policy, Whole, parse
from ..data import images
from ..data.converting.layouts import Fault, Layout, Source, load, mapping
from ..data.converting.layouts.files import Place, Unusable
from ..data.judging import JudgeBatches
from ..tokens import Tokenizer
from ..types import Record, UserError
from .judging import Findings, Judged
from .retrieval import Retrieval
from .showing import absent, check_keys, check_whole, opened, transform_for

log = logging.getLogger(__name__)

NAMED = 5  # keys that a sentence lists

CLEAN: dict[str, Callable[[str], str]] = {
    "first_line": lambda text: text.partition("\n")[0],
    "rejoin": lambda text: ". ".join(part.strip() for part in re.split(r"\n|</s>|[.]", text) if part.strip()),
    "lower": str.lower,
}
"""What protocols do to a text before it is tokenised. `rejoin`: LoTLIP's, which drops the last full stop."""


@dataclass(frozen=True)
class Expected:
    """What the published set has; None is not checked."""

    images: int | None = None
    texts: int | None = None
    keys: str | None = None  # SHA-256 of the sorted keys, one a line


class Pair(NamedTuple):
    """An image and its texts."""

    key: str
    where: str  # listing and line
    image: Place | bytes
    texts: list[tuple[str, str]]  # source, text


@dataclass(frozen=True)
class PairSet:
    """Retrieval on a published set, or on a folder of one's own; other evaluators take it as their `split`.

    Args:
        root: the folder that holds it.
        protocol: the first part of the protocol's id; "" for a folder of one's own.
        tree: what is expected in the folder, shown where it is missing.
        layout: name of a layout (`longclip shards --layout`), or what such a YAML says. Entries of one key
            are one image with several texts; those that lack an `optional` text are no part of the set.
        views: name -> caption policy, as in `Retrieval`.
        take: a split by its name, or the first so many entries; None: all.
        expected: counts and checksum; None judges what there is, without a protocol.
        clean: names of `CLEAN`, in order.
        resize_mode: "shortest" (crop), "squash" or "longest" (pad); None: as the model was made.
        batch_size: images encoded at once.
        scoring: as in `Retrieval`.
    """

    root: str
    protocol: str = ""
    tree: str = ""
    layout: str | Mapping[str, Any] = "jsonl"
    views: Mapping[str, Policy] = field(default_factory=lambda: {"long": Whole()})
    take: str | int | None = None
    expected: Mapping[str, Any] | None = None
    clean: Sequence[str] = ()
    resize_mode: str | None = None
    batch_size: int = 128
    scoring: str = "global"

    def __post_init__(self) -> None:
        unknown = [name for name in self.clean if name not in CLEAN]
        if unknown:
            raise UserError(f"clean has {unknown[0]!r}; choose from {', '.join(CLEAN)}")

    def __call__(self, tower: Any, data: Judged) -> Findings:
        return Retrieval(self, self.views, self.batch_size, self.scoring)(tower, data)

    def __str__(self) -> str:
        return self.root

    @property
    def id(self) -> str:
        """The protocol: set, cleaning, and how images are made square where the model does not decide."""
        if self.expected is None or not self.protocol:
            return ""
        return "/".join([self.protocol, "+".join(self.clean) or "raw", *filter(None, [self.resize_mode])])

    def batches(self, tower: Any, batch_size: int, groups: Groups) -> JudgeBatches:
        """The set as a tower reads it."""
        records = _Records(self.pairs, tower.tokenizer)
        return JudgeBatches(records, batch_size, groups, transform_for(tower, self.resize_mode))

    @cached_property
    def pairs(self) -> list[Pair]:
        """All of the set, checked; the images are not read yet.

        Raises:
            UserError: the set is missing, or is not what is expected.
        """
        found: dict[str, Pair] = {}
        faults: list[Fault] = []
        for pair in self._read():
            if isinstance(pair, Fault):
                faults.append(pair)
            elif pair.key in found:
                found[pair.key].texts.extend(pair.texts)
            else:
                found[pair.key] = pair
        self._check(list(found.values()), faults)
        return list(found.values())

    def _read(self) -> Iterator[Pair | Fault]:
        layout = self._layout
        optional = bool(layout.captions) and all(rule.optional for rule in layout.captions)
        first = self.take if isinstance(self.take, int) else None
        for entry in islice(self._source(layout), first):
            if isinstance(self.take, str) and entry.split not in (self.take, ""):
                continue
            if isinstance(entry, Fault):
                yield entry
                continue
            texts = [(source, text) for source, raw in entry.captions if (text := self._cleaned(raw))]
            if texts:
                yield Pair(entry.key, entry.where, entry.image, texts)
            elif not optional:
                yield Fault(entry.number, entry.where, entry.key, "caption is empty")

    @property
    def _layout(self) -> Layout:
        if isinstance(self.layout, str):
            return load(self.layout)
        return mapping.parse({"about": self.protocol, **self.layout}, f"the layout of {self.protocol}")

    def _source(self, layout: Layout) -> Source:
        opened(self.root, self.tree)
        try:
            return Source(self.root, layout, follow_links=True)
        except UserError as error:
            raise UserError(absent(self.root, f"has none of {', '.join(layout.files)}", self.tree)) from error

    def _cleaned(self, text: str) -> str:
        for name in self.clean:
            text = CLEAN[name](text)
        return text.strip()

    def _check(self, pairs: list[Pair], faults: list[Fault]) -> None:
        expected = Expected(**(self.expected or {}))
        told, texts = list(_told(faults)), sum(len(pair.texts) for pair in pairs)
        kind = "pairs" if expected.texts in (None, expected.images) else "images"
        check_whole(self.root, kind, len(pairs), expected.images, told)
        check_whole(self.root, "texts", texts, expected.texts, told)
        check_keys(self.root, (pair.key for pair in pairs), expected.keys)
        log.info("%s: %d images, %d texts", self, len(pairs), texts)


def _told(faults: Sequence[Fault]) -> Iterator[str]:
    """Faults by their reason, such as "captions 592, 17 empty"."""
    by_reason: dict[str, list[str]] = {}
    for fault in faults:
        by_reason.setdefault(fault.reason, []).append(fault.key or fault.where)
    for reason, keys in by_reason.items():
        what, _, state = reason.partition(" is ")
        more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
        listed = ", ".join(keys[:NAMED]) + more
        yield f"{what}s {listed} {state}" if state else f"{reason}: {listed}"


@dataclass(frozen=True)
class _Records:
    """The pairs as records: images read and texts tokenised when they are asked for."""

    pairs: Sequence[Pair]
    tokenizer: Tokenizer

    def __len__(self) -> int:
        return len(self.pairs)

    def record(self, index: int) -> Record:
        pair = self.pairs[index]
        try:
            image = pair.image if isinstance(pair.image, bytes) else pair.image.read()
            extension = images.extension(image)
        except (Unusable, UserError) as error:
            raise UserError(f"the image of {pair.key} ({pair.where}) cannot be read: {error}") from error
        captions = [parse(text, source, self.tokenizer, where=pair.where) for source, text in pair.texts]
        return Record(pair.key, image, extension, tuple(captions))

    def shard(self, index: int) -> str:
        return self.pairs[index].where

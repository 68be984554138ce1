"""How a run goes through its data: how much, in which order, in which batches.

In: the values of `data.plan` in YAML, and the sources. Out: a `Mixture`, a `Stream` of composed batches, and
the cut into this process's batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from ... import dist
from ...types import UserError
from ..corpus import Corpus, Source
from .batching import Batches, Budget
from .composing import Arrange, Balanced, Composed, Grouped, Similar
from .mixture import Mixture, Part
from .order import Order, Stream

RANDOM, SIMILAR, BALANCED = "random", "similar", "balanced"
BY_RULE = (RANDOM, SIMILAR, BALANCED)
"""How batches are composed without labels."""


@dataclass(frozen=True)
class Plan:
    """The order and the batches of a run.

    Args:
        samples: images to train on in all; whole batches only, so the last `samples % batch_size` are not.
        batch_size: images a step over all processes.
        seed: of order and augmentation.
        epoch: samples of an epoch, shared out by the weights of the sources; None: each source shows
            `weight` times its samples.
        block, window: see `Order`.
        batches: how batches are composed: "random"; "similar" puts captions of about one length together;
            "balanced" gives every batch and every process about the same number of tokens; any other word is
            a column of labels in a side-car, and batches come from one label each.
        share: of a batch that comes from one label.
        pool: batches that are composed together; the more, the purer, and the less random.
        tokens: at most so many tokens a step, counting each image's longest caption; a step then has
            `batch_size` images or fewer. None: no bound.
    """

    samples: int
    batch_size: int
    seed: int = 0
    epoch: int | None = None
    block: int = 32
    window: int = 32
    batches: str = RANDOM
    share: float = 1.0
    pool: int = 64
    tokens: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"data.plan.share is {self.share}; it is a share of a batch, above 0 and up to 1")
        if self.tokens is not None and self.tokens < 1:
            raise UserError(f"data.plan.tokens is {self.tokens}; it must be 1 or more, or null for no bound")

    def mixture(self, sources: Mapping[str, Source], corpus: Corpus) -> Mixture:
        """All sources in one stream."""
        counts = self._counts(sources, corpus)
        parts = []
        for name, data, start in zip(corpus.names, corpus.parts, corpus.starts, strict=True):
            # A lone source is seeded as the run is; of several, each by its name, whatever the others are.
            seed = self.seed if len(sources) == 1 else self.seed ^ crc32(name.encode()) << 32
            order = Order(data.choices, seed, self.block, self.window)
            parts.append(Part(name, order, start, counts[name], data.kept, data.shares))
        return Mixture(parts, self.seed)

    def stream(self, mixture: Mixture, corpus: Corpus) -> Stream:
        """The mixture in the order of its batches."""
        arrange: Arrange
        if self.batches == RANDOM:
            return mixture
        if self.batches == SIMILAR:
            arrange = Similar(_lengths(corpus))
        elif self.batches == BALANCED:
            arrange = Balanced(_lengths(corpus))
        else:
            arrange = Grouped(corpus.labels(self.batches), self.batch_size, self.share)
        return Composed(mixture, arrange, self.batch_size, self.pool, self.seed)

    def cut(self, stream: Stream, corpus: Corpus, position: int, before: int) -> Batches:
        """This process's batches from a position on, `before` steps having been taken."""
        budget = None if self.tokens is None else Budget(self.tokens, _lengths(corpus))
        rank, world = dist.rank(), dist.world()
        return Batches(stream, self.batch_size, rank, world, position, self.samples, before, budget)

    def signature(self) -> dict[str, object]:
        """What the sample at a position depends on. The batch size only where batches are composed."""
        free = {"samples", "tokens"} | ({"batch_size", "pool", "share"} if self.batches == RANDOM else set())
        return {name: value for name, value in asdict(self).items() if name not in free}

    def arranged(self, corpus: Corpus) -> dict[str, object]:
        """What composed batches depend on besides, as plain values: the column that they are composed by."""
        if self.batches in BY_RULE:
            return {}
        return {"labels": crc32(corpus.labels(self.batches).tobytes())}

    def _counts(self, sources: Mapping[str, Source], corpus: Corpus) -> dict[str, int]:
        """Samples that an epoch shows of each source; their sum is `epoch`, where that is given."""
        wanted = np.array(
            [sources[n].weight * p.choices for n, p in zip(corpus.names, corpus.parts, strict=True)]
        )
        counts = np.maximum(np.rint(wanted), 1).astype(np.int64)
        if self.epoch is not None:
            exact = self.epoch * wanted / wanted.sum()
            counts = np.floor(exact).astype(np.int64)
            counts[np.argsort(counts - exact, kind="stable")[: self.epoch - counts.sum()]] += 1
        few = [name for name, count in zip(corpus.names, counts, strict=True) if count < 1]
        if few:
            raise UserError(
                f"data.plan.epoch={self.epoch} samples leave none for {', '.join(few)}; "
                "give a larger epoch or a larger weight"
            )
        return dict(zip(corpus.names, counts.tolist(), strict=True))


def _lengths(corpus: Corpus) -> NDArray[np.int32]:
    lengths = corpus.lengths
    if not lengths.all():
        raise UserError(
            f"{int((lengths == 0).sum()):,} of {len(lengths):,} training samples tell no number of tokens, "
            "which data.plan.tokens and data.plan.batches need; make the shards again with the model's "
            "tokenizer (longclip shards ... --model NAME)"
        )
    return lengths

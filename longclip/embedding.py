"""Teacher embeddings: what a model makes of a folder of shards -> a side-car that training joins by key.

    report = embed("ViT-L-14/openai", Path("datasets/mine/train"), Path("datasets/mine/teacher"))

In: any model that opens, shards. Out: a column of image embeddings, one of caption embeddings for each source
of captions, and the temperature that the model compares them at. Or images alone, for a run whose image tower
stays as it is (`towers.cached`). Images are read and decoded by threads ahead of the model; a damaged one is
left out, as training leaves it out.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import models
from .captions import Groups, Whole
from .captions.policies import admitted
from .data.faults import Damaged
from .data.images import EvalTransform
from .data.loading import pixels
from .data.module import transform_of
from .data.sidecars.table import Row
from .data.sidecars.writer import Encoder, SidecarReport, write_rows
from .data.tars.dataset import Dataset
from .data.tars.retry import shown
from .tokens import pack
from .towers.answers import embed_texts
from .towers.cached import encode_unprojected
from .towers.clip import DualTower
from .types import Record, Sample, UserError

THREADS = 8  # decoders and resizing let go of Python's lock
AHEAD = 3  # batches under way
LOOK = 256  # images at the beginning that tell which sources there are


class EmbedReport(NamedTuple):
    """What was written, and what a recipe has to know of it."""

    written: SidecarReport
    image: str  # the column of image embeddings
    texts: list[str]  # those of caption embeddings
    scale: float  # the model's exp(logit_scale)
    context_length: int  # of the model, in tokens: what lies beyond was not read
    damaged: int  # images left out


def embed(
    model: str,
    shards: str,
    out: Path,
    progress: Callable[[int, int], object] = lambda done, total: None,
    *,
    name: str = "teacher",
    sources: Sequence[str] = (),
    device: str | None = None,
    batch_size: int = 64,
    images_only: bool = False,
    before_projection: bool = False,
) -> EmbedReport:
    """Write a side-car of one model's embeddings, L2-normalised float32.

    Args:
        model: whatever `models.load` takes.
        shards: a folder of them, a path or a URL.
        out: the folder to make.
        progress: called as (done, total) after every batch.
        name: of the columns: NAME_image, NAME_text, or NAME_text_SOURCE where there are several sources.
        sources: whose captions are embedded; none: the one that an image has. "llama3.1" gives the column
            NAME_text_llama3_1.
        device: torch's name; None: a GPU where there is one.
        images_only: no captions, whatever there are.
        before_projection: images only, as the last matrix of their tower meets them: NAME_unprojected in the
            place of NAME_image, not normalised.

    Raises:
        UserError: no such model, shards or source; the folder exists; a column's name is no file's; an image
            has several captions that a column could hold; the image tower has no such matrix.
    """
    tower = (
        DualTower(models.load(model)).to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    )
    data = Dataset(shards, tower.tokenizer)
    columns = _columns(name, sources)
    if images_only or before_projection:
        if sources:
            raise UserError(
                f"--source {sources[0]} names captions, and only images are asked for: leave it out"
            )
        columns = {}
    look = _Look(tower, f"{name}_{'unprojected' if before_projection else 'image'}", before_projection)
    reader = _Reader(data, columns, transform_of(tower.preprocess_cfg))
    reader.check_sources()
    kinds = dict.fromkeys([look.column, *columns], "vector")
    encoder = Encoder(shown(data.url), "key", kinds, tower.tokenizer, "syntok")
    written = write_rows(_rows(look, reader, batch_size, progress), out, encoder)
    scale = float(tower.backbone.logit_scale.detach().exp())
    context, damaged = tower.context_length, len(data) - written.rows
    return EmbedReport(written, look.column, list(columns), scale, context, damaged)


def _columns(name: str, sources: Sequence[str]) -> dict[str, str | None]:
    """The columns of captions, each with its source; what cannot stand in a file's name becomes a "_"."""
    if len(sources) < 2:
        return {f"{name}_text": sources[0] if sources else None}
    columns: dict[str, str | None] = {}
    for source in sources:
        column = f"{name}_text_{re.sub(r'[^A-Za-z0-9_-]', '_', source)}"
        if column in columns:
            raise UserError(
                f"--source {columns[column]} and --source {source} make one column, {column}: name each "
                "once, or embed them one after the other with another --name"
            )
        columns[column] = source
    return columns


class _Look(NamedTuple):
    """How a model sees images."""

    tower: DualTower
    column: str
    before_projection: bool

    def __call__(self, pixels_BCHW: Tensor) -> Tensor:
        if not self.before_projection:
            return self.tower.encode_image(pixels_BCHW)
        visual = self.tower.backbone.visual
        return encode_unprojected(visual, self.tower.normalise(pixels_BCHW)).float()


class _Reader:
    """Samples with a caption slot for each column of `sources`; None there: whoever wrote it."""

    def __init__(self, data: Dataset, sources: dict[str, str | None], transform: EvalTransform) -> None:
        self.data, self.sources, self.transform = data, sources, transform
        policies = {column: Whole(source) for column, source in sources.items()}
        self.groups = Groups(policies, seed=0, shuffle=False) if policies else None

    def check_sources(self) -> None:
        """Raise UserError where a source has written nothing: a misspelt name would show after hours."""
        first = [self._record(index) for index in range(min(len(self.data), LOOK))]
        there = {caption.source for record in first if record for caption in record.captions}
        missing = [source for source in self.sources.values() if source and source not in there]
        if missing:
            raise UserError(
                f"none of the first {len(first)} images has a caption of the source {missing[0]!r}; theirs "
                f"are of {', '.join(sorted(there)) or 'nobody'}: name one of these (--source NAME)"
            )

    def ahead(self, batch_size: int) -> Iterator[list[Sample | None]]:
        """Batches in order, with None for what is damaged."""
        waiting: deque[list[Future[Sample | None]]] = deque()
        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, len(self.data), batch_size):
                indices = range(start, min(start + batch_size, len(self.data)))
                waiting.append([pool.submit(self._sample, index, self._record(index)) for index in indices])
                if len(waiting) == AHEAD:
                    yield [coming.result() for coming in waiting.popleft()]
            for batch in waiting:
                yield [coming.result() for coming in batch]

    def _record(self, index: int) -> Record | None:
        try:
            record = self.data.record(index)
        except Damaged:
            return None
        for source in self.sources.values():
            found = admitted(record.captions, source)
            if len(found) > 1:
                raise UserError(
                    f"sample {record.key!r} has {len(found)} captions "
                    f"({', '.join(dict.fromkeys(caption.source for caption in found))}), and training shows "
                    "another one each epoch, so that no stored embedding could belong to it: name a source "
                    "that wrote one (--source NAME) and show that one (longclip.captions.Source)"
                )
        return record

    def _sample(self, index: int, record: Record | None) -> Sample | None:
        if record is None:
            return None
        try:
            image_CHW = self.transform(pixels(self.data, index, record))
        except Damaged:
            return None
        texts = self.groups.show(record.captions, record.key, epoch=0) if self.groups else ()
        return Sample(record.key, image_CHW, texts)


def _rows(
    look: _Look, reader: _Reader, batch_size: int, progress: Callable[[int, int], object]
) -> Iterator[Row]:
    """Of each sample that can be used, its key and embeddings; None where there is no caption."""
    done, total = 0, len(reader.data)
    for batch in reader.ahead(batch_size):
        done += len(batch)
        samples = [sample for sample in batch if sample is not None]
        yield from _embedded(look, samples, list(reader.sources)) if samples else ()
        progress(done, total)


@torch.no_grad()
def _embedded(look: _Look, samples: Sequence[Sample], columns: Sequence[str]) -> list[Row]:
    image_BF = look(torch.stack([sample.image_CHW for sample in samples])).cpu()
    text_BKE, mask_BK = _texts(look.tower, samples) if columns else (torch.zeros(0), torch.zeros(0))
    if not image_BF.isfinite().all() or not text_BKE.isfinite().all():
        raise UserError("the model's embeddings are not finite: it diverged; take an earlier checkpoint")
    rows: list[Row] = []
    for b, sample in enumerate(samples):
        texts = {c: text_BKE[b, k].numpy() if mask_BK[b, k] else None for k, c in enumerate(columns)}
        rows.append((b, {"key": sample.key, look.column: image_BF[b].numpy(), **texts}))
    return rows


def _texts(tower: DualTower, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """text_BKE and mask_BK of their captions, on the host."""
    packed = pack([sample.texts for sample in samples], tower.tokenizer)
    tokens_T = packed.tokens_T.to(tower.backbone.logit_scale.device)
    text_BKE = embed_texts(tower, tokens_T, packed.lengths_BK.numpy(), frozenset()).text_BKE
    return text_BKE.cpu(), packed.lengths_BK > 0

"""A folder of pictures -> one embedding for each; only what is new or changed is embedded.

In: a folder, a tower, where embeddings are kept. Out: an `Index`. Pictures are read and decoded by threads
ahead of the model; what is done is kept every `PART` pictures, so that a killed run goes on there.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.images import EvalTransform, decode
from ..towers.clip import DualTower
from ..types import UserError
from .folder import File, Found
from .store import Store, Vector

PART = 128  # pictures
LARGEST = 2**29  # bytes; no picture that could be decoded is larger


class Index(NamedTuple):
    """A folder that can be searched."""

    root: Path
    files: list[File]
    image_NE: Tensor  # L2-normalised float32, on the host
    damaged: dict[File, str]  # why
    passed_over: Counter[str]  # files that are no pictures, by kind
    embedded: int  # pictures that were new or had changed
    gone: int  # embeddings of pictures that are no longer there or have changed

    def path(self, number: int) -> Path:
        return self.root / self.files[number].path


class Embedded(NamedTuple):
    """A batch of pictures: the embeddings of the good ones, and why the others have none."""

    vectors: dict[File, Vector]
    damaged: dict[File, str]


@dataclass(frozen=True)
class Embedder:
    """How pictures become embeddings."""

    tower: DualTower  # in eval mode
    transform: EvalTransform
    batch_size: int = 32
    workers: int = 2

    def embed(self, root: Path, files: Sequence[File]) -> Iterator[Embedded]:
        """Batch by batch, in order."""
        for batch in self._read_ahead(root, files):
            pixels = {file: image for file, image in batch.items() if isinstance(image, Tensor)}
            damaged = {file: image for file, image in batch.items() if isinstance(image, str)}
            yield Embedded(self._encode(pixels) if pixels else {}, damaged)

    @torch.no_grad()
    def _encode(self, pixels: dict[File, Tensor]) -> dict[File, Vector]:
        image_BE = self.tower.encode_image(torch.stack(list(pixels.values()))).cpu()
        if not image_BE.isfinite().all():
            raise UserError("the model's embeddings are not finite: it diverged; take an earlier checkpoint")
        return dict(zip(pixels, image_BE.numpy(), strict=True))

    def _read_ahead(self, root: Path, files: Sequence[File]) -> Iterator[dict[File, Tensor | str]]:
        """Batches in order, of which two more are under way."""
        waiting: deque[dict[File, Future[Tensor | str]]] = deque()
        with ThreadPoolExecutor(self.workers) as pool:
            for start in range(0, len(files), self.batch_size):
                batch = files[start : start + self.batch_size]
                waiting.append({file: pool.submit(self._pixels, root / file.path) for file in batch})
                if len(waiting) > 2:
                    yield _done(waiting.popleft())
            while waiting:
                yield _done(waiting.popleft())

    def _pixels(self, path: Path) -> Tensor | str:
        """A picture as the model sees it, or why there is none."""
        try:
            return self.transform(picture(path))
        except UserError as error:
            return str(error)


def picture(path: Path) -> Tensor:
    """The decoded file, uint8 [3, H, W]. Raises UserError with the reason alone."""
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"file is larger than {LARGEST / 2**20:.0f} MiB")
        return decode(path.read_bytes())
    except OSError as error:
        raise UserError(f"file cannot be read: {error.strerror}") from error


def build(found: Found, embedder: Embedder, store: Store, progress: Callable[[int, int], object]) -> Index:
    """Embed what is not known yet; `progress(done, total)` is called after every batch.

    Raises:
        UserError: no picture can be read, or there is no place to keep embeddings.
    """
    known = store.read()
    fresh = [file for file in found.pictures if file not in known]
    gone = len(known.keys() - set(found.pictures))
    damaged: dict[File, str] = {}
    done = 0
    for vectors, reasons in _kept(embedder.embed(found.root, fresh), store):
        known |= vectors
        damaged |= reasons
        done += len(vectors) + len(reasons)
        progress(done, len(fresh))
    vectors = {file: known[file] for file in found.pictures if file in known}
    if done > len(damaged) or gone:
        store.replace(vectors)
    if not vectors:
        file, why = next(iter(damaged.items()))
        raise UserError(
            f"none of {len(damaged):,} pictures in {found.root} can be read, first {file.shown}: {why}"
        )
    image_NE = torch.from_numpy(np.stack(list(vectors.values())))
    return Index(found.root, list(vectors), image_NE, damaged, found.passed_over, done - len(damaged), gone)


def _kept(batches: Iterator[Embedded], store: Store) -> Iterator[Embedded]:
    """The same batches, written to the store whenever there are enough for a part."""
    unsaved: dict[File, Vector] = {}
    for batch in batches:
        unsaved |= batch.vectors
        if len(unsaved) >= PART:
            store.add(unsaved)
            unsaved = {}
        yield batch


def _done(batch: dict[File, Future[Tensor | str]]) -> dict[File, Tensor | str]:
    return {file: future.result() for file, future in batch.items()}

"""Run a module's towers and terms on fake tensors: shapes, dtypes and autograd as they are, no content.

In: a `LongClip` made under `with torch.device("meta")`, lengths of captions. Out: `Counts` of its parts. The
code that runs is the one that trains, so what is counted follows it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..objectives.term import Term
from ..towers.answers import embed_images, embed_masked, embed_texts, recalled
from ..towers.chunks import Chunk
from ..towers.experts import overheard, summed
from ..towers.image import grid
from ..towers.start import cut
from ..training import LongClip
from ..types import Embeddings, Words
from .counting import Counts, Line, count, line

IMAGES = 2
"""Towers are counted at so many images and at twice as many; everything in them is linear in images."""

LOSS_IMAGES = 4096
"""A loss is counted for so many images at most; memory goes on linearly from there, FLOPs squared."""


class Pretence:
    """A module on fake tensors.

    Args:
        module: becomes fake.
        lengths_BK: of some images' captions; real.
        precision: as Lightning names it.
    """

    def __init__(self, module: LongClip, lengths_BK: NDArray[np.int32], precision: str) -> None:
        self.module, self.tower, self.lengths_BK = module, module.tower.train(), lengths_BK
        self.precision, self.needs = precision, module.needs
        self.size = int(np.max(self.tower.preprocess_cfg["size"]))
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake:
            for part in (module, *self.tower.start):
                part._apply(lambda x: torch.empty_like(x, device="cpu"))

    @property
    def pixels(self) -> int:
        """Bytes of one image, or of what stands for it."""
        column = self.tower.cached
        return 3 * self.size**2 if column is None else 4 * column.width

    def parameters(self) -> tuple[int, int, int]:
        """Bytes of all parameters, of those that train, and of the largest of these."""
        trained = [_bytes(p) for p in self.module.parameters() if p.requires_grad]
        every = [_bytes(p) for part in (self.module, *self.tower.start) for p in part.parameters()]
        return sum(every), sum(trained), max(trained)

    def towers(self, checkpointing: bool) -> tuple[Line, Line]:
        """Image tower and text tower by images; the gradients of parameters are not in the peaks."""
        before = self.tower.grad_checkpointing
        self.tower.backbone.set_grad_checkpointing(checkpointing)
        tokens_B = self.lengths_BK.sum(1)
        typical_BK = self.lengths_BK[np.argsort(abs(tokens_B - tokens_B.mean()), kind="stable")[:IMAGES]]
        more = float(tokens_B.mean() / typical_BK.sum(1).mean())
        image = line(lambda images: self._counted(lambda: list(self._images(images).values())), IMAGES)
        slots = typical_BK.shape[1]
        text = line(
            lambda images: self._counted(
                lambda: list(self._texts(np.resize(typical_BK, (images, slots))).values())
            ),
            len(typical_BK),
        )
        self.tower.backbone.set_grad_checkpointing(before)
        return image, Line(text.fixed, text.each * more)

    def loss(self, local: int, world: int) -> tuple[Counts, int]:
        """All terms on the batch of `world` processes, and the bytes of this one's embeddings."""
        images = min(local, max(LOSS_IMAGES // world, 2))
        found, more = self._embeddings(images, world), local / images
        terms, weights = self.module.terms.items(), self.module.weights
        with self.fake:
            counts = count(lambda: [weights[name] * term(found).value for name, term in terms])
        self.module.zero_grad(set_to_none=True)
        counts = Counts(
            counts.forward * more**2, counts.flops * more**2, counts.saved * more, counts.peak * more
        )
        leaves = [found.image_BE, found.text_BKE, found.patches_BPE, found.masked_BE]
        leaves += [found.corners_BKME, found.words and found.words.states_TE]
        return counts, round(more * sum(_bytes(leaf) for leaf in leaves if leaf is not None))

    def _counted(self, forward: Callable[[], list[Tensor]]) -> Counts:
        with self.fake:
            counts = count(forward)
        grown = sum(_bytes(p.grad) for p in self.tower.parameters() if p.grad is not None)
        self.tower.zero_grad(set_to_none=True)
        return counts._replace(peak=counts.peak - grown)

    def _images(self, images: int) -> dict[str, Tensor]:
        """What terms read of the image tower, by its name in `Embeddings`."""
        with self._autocast():
            stored_BF = self._stored(images)
            image_BE, patches_BPE = embed_images(
                self.tower, self._pixels(images), self.needs, stored_BF=stored_BF
            )
            found = {"image_BE": image_BE}
            if patches_BPE is not None:
                found["patches_BPE"] = patches_BPE
            for start in self.tower.start:
                with torch.no_grad():
                    embed_images(start, self._pixels(images), frozenset(), stored_BF=stored_BF)
            if "masked" in self.needs:
                draws_B = np.zeros(images, np.int64)
                found["masked_BE"] = embed_masked(self.tower, self._pixels(images), draws_B)
            return found

    def _pixels(self, images: int) -> Tensor:
        return torch.empty(images, 3, self.size, self.size, dtype=torch.uint8)

    def _stored(self, images: int) -> Tensor | None:
        """What stands for images, where something does."""
        column = self.tower.cached
        return None if column is None else torch.empty(images, column.width)

    def _texts(self, lengths_BK: NDArray[np.int32]) -> dict[str, Tensor]:
        """The same of the text tower."""
        tokens_T = torch.zeros(int(lengths_BK.sum()), dtype=torch.int32)
        with self._autocast():
            made = embed_texts(self.tower, tokens_T, lengths_BK, self.needs)
            for start in self.tower.start:
                read_K = recalled(self.tower, self.module.slots, lengths_BK.shape[1])
                part = Chunk(torch.empty(0), tokens_T, lengths_BK, np.zeros(0, np.int64))
                shown = cut(part, start.tokenizer, read_K)
                with torch.no_grad():
                    embed_texts(start, shown.tokens_T, shown.lengths_BK, frozenset())
            return {name: x for name, x in made._asdict().items() if x is not None}

    def _embeddings(self, images: int, world: int) -> Embeddings:
        """Leaves of the shapes that the towers give, with a gradient where the towers have one."""
        lengths_BK = np.resize(self.lengths_BK, (images, self.lengths_BK.shape[1]))
        with self.fake, overheard(self.tower.backbone, "routing" in self.needs) as heard:
            seen = {name: _leaf(x, images) for name, x in self._images(IMAGES).items()}
            patches_BPE = seen.get("patches_BPE")
            read = self._texts(lengths_BK[:IMAGES])
            words_TE = read.pop("words_TE", None)
            read, routing_A2N = {name: _leaf(x, images) for name, x in read.items()}, summed(heard)
            made = Embeddings(
                image_BE=seen["image_BE"],
                text_BKE=read["text_BKE"],
                mask_BK=torch.from_numpy(lengths_BK > 0),
                slots=self.module.slots,
                scale=self.tower.backbone.logit_scale.float().exp().squeeze(),
                gather=lambda x: x.repeat(world, *[1] * (x.ndim - 1)) if world > 1 else x,
                patches_BPE=patches_BPE,
                masked_BE=seen.get("masked_BE"),
                grid=None
                if patches_BPE is None
                else grid(self.tower.backbone.visual, self._pixels(0), patches_BPE),
                words=None if words_TE is None else Words(_leaf(words_TE, int(lengths_BK.sum())), lengths_BK),
                corners_BKME=read.get("corners_BKME"),
                routing_A2N=None if routing_A2N is None else _leaf(routing_A2N, len(routing_A2N)),
                boxes_BK4=torch.empty(*lengths_BK.shape, 4),
                weights_BK=torch.empty(lengths_BK.shape),
                columns=self._columns(images),
            )
            return replace(made, start=replace(made)) if self.tower.start else made

    def _columns(self, images: int) -> dict[str, Tensor]:
        """What the terms read of side-cars; a vector of any length gets that of the embeddings."""
        width, terms = self.tower.model_cfg["embed_dim"], cast("list[Term]", self.module.terms.values())
        asked = {name: size for term in terms for name, size in term.columns.items()}
        return {
            name: torch.empty((images,) if size == 0 else (images, size or width))
            for name, size in asked.items()
        }

    def _autocast(self) -> AbstractContextManager[object]:
        if not self.precision.endswith("-mixed"):
            return nullcontext()
        dtype = torch.bfloat16 if self.precision.startswith("bf16") else torch.float16
        return torch.autocast("cpu", dtype=dtype, cache_enabled=False)


def _leaf(x: Tensor, rows: int) -> Tensor:
    return x.new_empty(rows, *x.shape[1:]).requires_grad_(x.requires_grad)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()

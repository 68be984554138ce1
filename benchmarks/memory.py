"""P13: memory of a batch encoded in chunks, against the memory of one chunk's batch.

Peaks are counted on fake tensors (shapes without content): the real code of a whole training step, forward,
loss and backward, at ViT-B/16's full shapes, which no small machine could hold. Gradients are compared for
real on a smaller model. The chunks keep nothing but embeddings, so the batch may grow as it likes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from longclip.objectives import Contrastive
from longclip.optim import AdamW
from longclip.planner.counting import count
from longclip.towers.answers import embed
from longclip.towers.chunks import Chunk, chunks
from longclip.towers.clip import DualTower
from longclip.towers.pretrained import build
from longclip.training import LongClip
from longclip.types import Batch

from .lengths import SUBS, synthetic
from .measures import Row, at_most, fewer

CHUNK = 32
SLOTS = {"sub": slice(0, SUBS), "long": slice(SUBS, SUBS + 1)}


def rows(quick: bool, folder: Path) -> list[Row]:
    architecture, images = ("ViT-scenes", 64) if quick else ("ViT-B-16", 512)
    whole, parts = peak(architecture, CHUNK, None), peak(architecture, images, CHUNK)
    label = f"{architecture}, {images} images in chunks of {CHUNK}"
    error = gradient_error(16 if quick else 64, 4 if quick else CHUNK // 2)
    return [
        at_most("P13.peak", f"{label}: peak over that of {CHUNK} images at once", parts / whole, 1.15, "1"),
        fewer(
            "P13.whole", f"{label}: peak, bytes; baseline: at once", parts, peak(architecture, images, None)
        ),
        at_most("P13.gradients", "relative difference (norms) of the worst gradient", error, 1e-5, "0"),
    ]


def peak(architecture: str, images: int, micro_batch: int | None) -> float:
    """The most bytes alive in a step beside the parameters and the batch."""
    with torch.device("meta"):
        module = _module(architecture)
    # Each image's captions are those of the first: what lengths there are is not what is measured.
    parts = list(chunks(_batch(module, np.repeat(synthetic(1, 0), images, axis=0)), micro_batch))
    with FakeTensorMode(allow_non_fake_inputs=True):
        module._apply(lambda x: torch.empty_like(x, device="cpu"))
        return count(lambda: [_loss(module, parts)]).peak


def gradient_error(images: int, micro_batch: int) -> float:
    """Gradients of a small model in chunks against those of the whole batch, float32."""
    torch.manual_seed(0)
    module = _module("ViT-scenes")
    batch = _batch(module, synthetic(images, 0))

    def gradients(size: int | None) -> dict[str, Tensor]:
        module.zero_grad()
        _loss(module, list(chunks(batch, size))).backward()
        return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}

    whole, parts = gradients(None), gradients(micro_batch)
    return max(float((parts[name] - grad).norm() / grad.norm()) for name, grad in whole.items())


def _loss(module: LongClip, parts: list[Chunk]) -> Tensor:
    embeddings = embed(module.tower, parts, module.slots, module.needs)
    return torch.stack([term(embeddings).value for term in module.terms.values()]).sum()


def _module(architecture: str) -> LongClip:
    terms = {name: Contrastive(name) for name in SLOTS}
    tower = DualTower(build(architecture, None, 248))
    return LongClip(tower, terms, SLOTS, AdamW(lr=1e-3, warmup=0, samples=1), seed=0)


def _batch(module: LongClip, lengths_BK: np.ndarray) -> Batch:
    lengths = torch.from_numpy(lengths_BK.astype(np.int32))
    images, size = len(lengths), module.tower.preprocess_cfg["size"]
    pixels = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8)
    tokens = torch.randint(0, 49000, (int(lengths.sum()),), dtype=torch.int32)
    return Batch([""] * images, pixels, tokens, lengths, torch.zeros_like(lengths), int(lengths.max()))

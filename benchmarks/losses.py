"""The contrastive losses in tiles beside dense autograd: peak memory, time, and growth (P7, P8).

    python -m benchmarks --only losses

Dense is open_clip's own loss, one call for every caption slot; and, since that makes every score twice on
one process, the same with one matrix a slot ("lean"). Bytes include the gradients of what goes in, which
every form has to hand back. Each job is forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy, normalize

from longclip.objectives.contrastive import info_nce
from longclip.objectives.sigmoid import pairwise_sigmoid

from .measures import Job, Row, at_most, fewer, peak_bytes, seconds

WIDTH = 512
LossOf = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(image_BE, text_BKE, scale) -> loss"""

BIAS = torch.tensor(-10.0)


def rows(quick: bool, folder: Path) -> list[Row]:
    small = 64 if quick else 1
    found = []
    for images, slots in ((8192 // small, 1), (4096 // small, 8)):
        shape = f"B={images} K={slots}"
        dense = {"open_clip": _each_slot(ClipLoss()), "lean": _each_slot(_lean)}
        found += _beside(f"P7.{slots}", f"InfoNCE, {shape}:", tiled, dense, images, slots)
    images = 8192 // small
    dense = {"open_clip": _each_slot(lambda image, text, scale: SigLipLoss()(image, text, scale, BIAS))}
    found += _beside("P7.sigmoid", f"sigmoid loss, B={images} K=1:", tiled_sigmoid, dense, images, 1)
    found += [_growth(4096 // small, 1), _growth(2048 // small, 8)]
    return [*found, *(_curve(count // small) for count in (512, 1024, 2048, 4096))]


def tiled(image_BE: Tensor, text_BKE: Tensor, scale: Tensor) -> Tensor:
    """Ours, with all captions present."""
    return info_nce(image_BE, text_BKE, torch.ones(text_BKE.shape[:2], dtype=torch.bool), scale)[0]


def tiled_sigmoid(image_BE: Tensor, text_BKE: Tensor, scale: Tensor) -> Tensor:
    """Ours, with all captions present."""
    mask_BK = torch.ones(text_BKE.shape[:2], dtype=torch.bool)
    return pairwise_sigmoid(image_BE, text_BKE, mask_BK, scale, BIAS) / len(image_BE)


def _lean(image_BE: Tensor, text_BE: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss with one matrix for both directions."""
    logits_BB, own_B = scale * image_BE @ text_BE.T, torch.arange(len(image_BE))
    return (cross_entropy(logits_BB, own_B) + cross_entropy(logits_BB.T, own_B)) / 2


def _each_slot(loss: LossOf) -> LossOf:
    """The mean over slots of a loss for one caption an image."""

    def mean(image_BE: Tensor, text_BKE: Tensor, scale: Tensor) -> Tensor:
        return torch.stack([loss(image_BE, text_BE, scale) for text_BE in text_BKE.unbind(1)]).mean()

    return mean


def _beside(id: str, what: str, ours: LossOf, dense: dict[str, LossOf], images: int, slots: int) -> list[Row]:
    """Memory and time beside open_clip's, which the goals are about, and the others for information."""
    jobs = {name: _both_passes(loss, images, slots) for name, loss in {"ours": ours, **dense}.items()}
    peaks = {name: peak_bytes(job) for name, job in jobs.items()}
    times = seconds(jobs, rounds=2)
    gradients = 4 * images * (1 + slots) * WIDTH
    limit = f"{gradients / 1e6:.0f} M of gradients"
    found = []
    for name in dense:
        suffix, least = ("", (10.0, 1.0)) if name == "open_clip" else (f".{name}", (None, None))
        bytes, took = ((measured["ours"], measured[name]) for measured in (peaks, times))
        found += [
            fewer(f"{id}.memory{suffix}", f"{what} peak bytes", *bytes, least[0], limit),
            fewer(f"{id}.time{suffix}", f"{what} CPU seconds", *took, least[1]),
        ]
    return found


def _growth(images: int, slots: int) -> Row:
    once, twice = (peak_bytes(_both_passes(tiled, count, slots)) for count in (images, 2 * images))
    what = f"InfoNCE, K={slots}: times the peak bytes when B={images} doubles"
    return at_most(f"P8.{slots}", what, twice / once, 2.1, "2")


def _curve(images: int, slots: int = 8) -> Row:
    """Dense autograd on fake tensors, which have shapes and no numbers: peaks are the same."""
    ours = peak_bytes(_both_passes(tiled, images, slots))
    with FakeTensorMode():
        dense = peak_bytes(_both_passes(_each_slot(ClipLoss()), images, slots))
    return fewer(f"P8.at.{images}", f"InfoNCE, B={images} K={slots}: peak bytes", ours, dense)


def _both_passes(loss: LossOf, images: int, slots: int) -> Job:
    random = torch.Generator().manual_seed(0)
    image_BE = normalize(torch.randn(images, WIDTH, generator=random), dim=-1).requires_grad_()
    text_BKE = normalize(torch.randn(images, slots, WIDTH, generator=random), dim=-1).requires_grad_()
    scale = torch.tensor(100.0, requires_grad=True)
    return lambda: torch.autograd.grad(loss(image_BE, text_BKE, scale), (image_BE, text_BKE, scale))

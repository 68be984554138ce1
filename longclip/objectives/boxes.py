"""Boxes over a grid of patches: what of the image each patch shows of them, and how boxes overlap.

In: boxes as fractions of the image, left, top, right, bottom; NaN where unknown. Out: how a box spreads over
patches, which is both a way to pool them and the truth that grouping weights can be held against.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from longclip import dist
from longclip.types import Embeddings, UserError

log = logging.getLogger(__name__)

PATIENCE = 1024
"""So many images without a single box, and a term that needs boxes gives up: sparse data have some then."""
EARLY = 64
"""So many, and it says so: a run may be shorter."""


def known(boxes_BK4: Tensor, mask_BK: Tensor) -> Tensor:
    """Which captions exist and have a box with an area, [B, K] bool; a crop may leave a mere line of one."""
    left, top, right, bottom = boxes_BK4.unbind(-1)
    return mask_BK & (left < right) & (top < bottom)  # nothing is less than NaN


def cover(boxes_BK4: Tensor, grid: tuple[int, int]) -> Tensor:
    """The share of each box that every patch shows, row by row, [B, K, P]: sums to 1; zeros without a box.

        c_p = area(box and patch p) / area(box)

    A mean of patches with these weights is the integral of the feature map over the box, each patch being
    constant: RoIAlign (He et al. 2017) to 1 x 1 without its bilinear blur, and exact for boxes of any size.
    """
    left, top, right, bottom = boxes_BK4.nan_to_num(0).unbind(-1)
    down_BKh, across_BKw = _shares(top, bottom, grid[0]), _shares(left, right, grid[1])
    return (down_BKh[..., :, None] * across_BKw[..., None, :]).flatten(-2)


def _shares(low_BK: Tensor, high_BK: Tensor, cells: int) -> Tensor:
    """The share of each interval that lies in every one of `cells` equal parts of [0, 1]."""
    edge = torch.arange(cells + 1, device=low_BK.device, dtype=low_BK.dtype) / cells
    low_BKc = low_BK[..., None].maximum(edge[:-1])
    inside_BKc = (high_BK[..., None].minimum(edge[1:]) - low_BKc).clamp_min(0)
    return inside_BKc / inside_BKc.sum(-1, keepdim=True).clamp_min(torch.finfo(low_BK.dtype).tiny)


def iou(one_X4: Tensor, other_X4: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union, and its generalisation that still tells boxes apart from boxes far apart.

        IoU = |A and B| / |A or B|;   GIoU = IoU - (|C| - |A or B|) / |C|,   C the smallest box around both

    Rezatofighi et al. 2019. Shapes broadcast up to the last axis. In [0, 1] and [-1, 1]; 0 without any area.
    """
    one_low_X2, one_high_X2 = one_X4.split(2, -1)
    low_X2, high_X2 = other_X4.split(2, -1)
    both_X = _area(one_low_X2.maximum(low_X2), one_high_X2.minimum(high_X2))
    around_X = _area(one_low_X2.minimum(low_X2), one_high_X2.maximum(high_X2))
    either_X = _area(one_low_X2, one_high_X2) + _area(low_X2, high_X2) - both_X
    tiny = torch.finfo(one_X4.dtype).tiny
    iou_X = both_X / either_X.clamp_min(tiny)
    return iou_X, iou_X - (around_X - either_X) / around_X.clamp_min(tiny)


def _area(low_X2: Tensor, high_X2: Tensor) -> Tensor:
    width_X, height_X = (high_X2 - low_X2).clamp_min(0).unbind(-1)
    return width_X * height_X


def centred(boxes_X4: Tensor) -> Tensor:
    """Left, top, right, bottom -> middle across, middle down, width, height."""
    low_X2, high_X2 = boxes_X4.split(2, -1)
    return torch.cat([(low_X2 + high_X2) / 2, high_X2 - low_X2], -1)


def corners(centred_X4: Tensor) -> Tensor:
    """The way back."""
    middle_X2, size_X2 = centred_X4.split(2, -1)
    return torch.cat([middle_X2 - size_X2 / 2, middle_X2 + size_X2 / 2], -1)


def places(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Middle and size of every patch as fractions of the image, row by row, [P, 4]."""
    down, across = grid
    y_P = ((torch.arange(down, device=device) + 0.5) / down).repeat_interleave(across)
    x_P = ((torch.arange(across, device=device) + 0.5) / across).repeat(down)
    return torch.stack([x_P, y_P, torch.full_like(x_P, 1 / across), torch.full_like(y_P, 1 / down)], -1)


def grid_of(embeddings: Embeddings) -> tuple[int, int]:
    """Patches down and across.

    Raises:
        UserError: some were left out, so that those there have no places.
    """
    if embeddings.grid is None:
        raise UserError(
            "this recipe looks for boxes among the patches of an image, and patch dropout takes patches out "
            "of their places; train it with model.backbone.patch_dropout=0 curriculum.patch_dropout=null"
        )
    return embeddings.grid


class Expected:
    """Says that there are no boxes where none ever comes: such a term would train nothing, without a word."""

    def __init__(self) -> None:
        self._without = 0  # images, until one has a box

    def check(self, embeddings: Embeddings) -> None:
        """Of all processes together, which agree. Costs nothing once a box was seen.

        Raises:
            UserError: no image of the run has had a box so far, and it had time.
        """
        if self._without >= PATIENCE:
            return
        if dist.anywhere(embeddings.boxes_BK4 is not None, embeddings.image_BE.device):
            self._without = PATIENCE
            return
        before, self._without = self._without, self._without + len(embeddings.image_BE) * dist.world()
        if self._without >= PATIENCE:
            raise UserError(
                f"this recipe learns from boxes, and no caption of the first {PATIENCE:,} images has one: "
                "give sentences boxes when writing the shards (docs/data.md, boxes), see that the policy"
                " shows sentences (longclip.captions.Sentences), or take recipe=dreamlip, which needs none"
            )
        if before < EARLY <= self._without and dist.rank() == 0:
            log.warning(
                "no caption of the first %d images has a box, and this recipe learns from boxes: one of its "
                "terms trains nothing until one comes, and the run ends where the first %d have none",
                self._without,
                PATIENCE,
            )

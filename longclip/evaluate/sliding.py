"""From patches to pixels: which of some names fits every pixel of a picture best.

In: a tower, a picture, features of names. Out: a map of cosines for each name, and a map of classes. The
protocol is SCLIP's (Wang et al. 2023, arXiv 2312.01597) without its refinements (PAMR, least areas): the
shorter side is resized, windows slide over the picture, and what patches score is enlarged bilinearly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.module import transform_of
from ..towers.asking import ask
from ..towers.dense import attending
from ..types import UserError

if TYPE_CHECKING:
    from ..towers.clip import DualTower

QUERIES = 32  # maps enlarged at once: they have the size of the mask


class Windows(NamedTuple):
    """What of a picture is looked at, in pixels; None: by the side S of the model's own images."""

    side: int | None = None  # of the picture's shorter side, first resized to this; None: 3/2 S
    size: int | None = None  # of a window; None: S
    stride: int | None = None  # from window to window; None: S/2

    def of(self, tower: DualTower) -> Sizes:
        """The same in numbers.

        Raises:
            UserError: windows of these sizes cannot slide over pictures of this side, or have half patches.
        """
        own, patch = transform_of(tower.preprocess_cfg).size, tower.backbone.visual.patch_size[0]
        size = self.size or own
        found = Sizes(self.side or 3 * own // 2, size, self.stride or size // 2)
        if size % patch or not 0 < found.stride <= size <= found.side:
            raise UserError(
                f"windows has side={found.side}, size={size} and stride={found.stride}; size is a multiple "
                f"of the model's patches ({patch}) and at most side, stride is at most size"
            )
        return found


class Sizes(NamedTuple):
    side: int
    size: int
    stride: int


class Background(NamedTuple):
    """When a pixel is of class 0 although another name fits it best.

    The probability of a name is the softmax over all names of `scale` times the cosines; where that of the
    best one is below `threshold`, the pixel is background.
    """

    threshold: float = 0.0
    scale: float = 40.0


def similarities(
    tower: DualTower, image_CHW: Tensor, query_QE: Tensor, sizes: Sizes, attention: str
) -> Tensor:
    """Cosines of every pixel of the resized picture with every name, [Q, h, w]: the mean over its windows.

    Args:
        image_CHW: uint8.
        query_QE: L2-normalised.
        attention: see `towers.dense`.
    """
    image_CHW = _resized(image_CHW, sizes.side)
    height, width = image_CHW.shape[1:]
    size = sizes.size
    places = [(y, x) for y in starts(height, size, sizes.stride) for x in starts(width, size, sizes.stride)]
    pixels_BCHW = torch.stack([image_CHW[:, y : y + size, x : x + size] for y, x in places])
    # In one call: all processes call the model equally often, see `sharing.share`.
    with attending(tower.backbone.visual, attention):
        patches_BPE = ask(tower, pixels_BCHW, needs=frozenset({"patches"}))[0].patches_BPE
    assert patches_BPE is not None, "asked for"
    score_BPQ = F.normalize(patches_BPE.float(), dim=-1) @ query_QE.to(patches_BPE.device).T
    down = size // tower.backbone.visual.patch_size[0]
    total_QHW = score_BPQ.new_zeros(len(query_QE), height, width)
    times_HW = score_BPQ.new_zeros(height, width)
    for (y, x), score_PQ in zip(places, score_BPQ, strict=True):
        map_1QYX = score_PQ.T.unflatten(1, (down, -1))[None]
        total_QHW[:, y : y + size, x : x + size] += F.interpolate(map_1QYX, (size, size), mode="bilinear")[0]
        times_HW[y : y + size, x : x + size] += 1
    return total_QHW / times_HW


def starts(length: int, size: int, stride: int) -> list[int]:
    """Where windows begin, so that they cover everything; the last one is moved back to end with the picture.

    >>> starts(500, 224, 112)
    [0, 112, 224, 276]
    """
    count = max(length - size + stride - 1, 0) // stride + 1
    return [min(number * stride, length - size) for number in range(count)]


def decide(
    cosine_QHW: Tensor, class_Q: Tensor, shape: tuple[int, int], background: Background = Background()
) -> Tensor:
    """The class of every pixel, [H, W] of `shape`: that of the name with the highest cosine, enlarged to it.

    class_Q: the class of each name; a class may have several.
    """
    best_HW = cosine_QHW.new_full(shape, -torch.inf)
    total_HW, class_HW = best_HW.clone(), torch.zeros(shape, dtype=torch.long, device=cosine_QHW.device)
    class_Q = class_Q.to(cosine_QHW.device)
    for part_QHW, own_Q in zip(cosine_QHW.split(QUERIES), class_Q.split(QUERIES), strict=True):
        map_QHW = F.interpolate(part_QHW[None], shape, mode="bilinear")[0]
        high_HW, where_HW = map_QHW.max(0)
        class_HW = torch.where(high_HW > best_HW, own_Q[where_HW], class_HW)
        best_HW = torch.maximum(high_HW, best_HW)
        total_HW = torch.logaddexp(total_HW, (background.scale * map_QHW).logsumexp(0))
    probability_HW = (background.scale * best_HW - total_HW).exp()
    return class_HW.masked_fill(probability_HW < background.threshold, 0)


def _resized(image_CHW: Tensor, side: int) -> Tensor:
    height, width = image_CHW.shape[1:]
    scale = side / min(height, width)
    shape = (int(height * scale + 0.5), int(width * scale + 0.5))
    return F.interpolate(image_CHW[None], shape, mode="bilinear", antialias=True)[0]

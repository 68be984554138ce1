"""A glimpse of an image: most of its patches hidden, others for every sample and epoch.

In: normalised pixels and a number of each image's own. Out: `masked_BE`, not normalised. Which patches are
hidden follows from that number, so that it is the same on any number of processes, in chunks and after a
resume. Fix-CLIP (Wang et al. 2025, arXiv 2507.10095) shows them to short captions, whole images to long ones.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from ..types import UserError
from .image import placed, shown, some


class Glimpse(NamedTuple):
    """How little is seen.

    `hidden` is the share of the patches. `replace` puts one learnable token, zero at first, in their place
    (Fix-CLIP), which costs as much as a whole image; without it they are left out, as by FLIP (Li et al.
    2023, arXiv 2212.00794), and the cost is about the share that is seen.
    """

    hidden: float = 0.75
    replace: bool = True


def check_glimpses(visual: nn.Module, glimpse: Glimpse) -> None:
    """Raise UserError where this tower cannot hide patches, or not so many."""
    if not isinstance(visual, VisionTransformer):
        raise UserError(
            "a term of this recipe hides patches of images, which needs a ViT of open_clip's own, and the "
            f"image tower is a {type(visual).__name__}; choose model.backbone.architecture=ViT-B-16"
        )
    if not 0 <= glimpse.hidden < 1:
        raise UserError(
            f"model.glimpse.hidden is {glimpse.hidden}; it is a share of the patches, 0 or more and below 1"
        )


def encode_glimpse(
    visual: VisionTransformer,
    pixels_BCHW: Tensor,
    draws_B: NDArray[np.int64],
    hidden: float,
    token_D: Tensor | None,
) -> Tensor:
    """Normalised pixels -> masked_BE, with `token_D` in the place of the hidden patches or without them."""
    map_BDHW = visual.conv1(pixels_BCHW)
    patches = map_BDHW[0, 0].numel()
    count = max(1, round((1 - hidden) * patches))
    seen_BQ = some(draws_B, patches, count).to(map_BDHW.device, non_blocking=True)
    if token_D is not None:
        hidden_BP = torch.ones(len(seen_BQ), patches, dtype=torch.bool, device=seen_BQ.device)
        hidden_B1HW = hidden_BP.scatter(1, seen_BQ, False).view_as(map_BDHW[:, 0])[:, None]
        map_BDHW = torch.where(hidden_B1HW, token_D[:, None, None].to(map_BDHW.dtype), map_BDHW)
    tokens_BPD = placed(visual, map_BDHW)
    if token_D is None:
        tokens_BPD = shown(tokens_BPD, seen_BQ)
    pooled_BD, _ = visual._pool(visual.transformer(visual.ln_pre(tokens_BPD)))
    return pooled_BD if visual.proj is None else pooled_BD @ visual.proj

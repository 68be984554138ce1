"""The image tower: pixels -> `image_BE` and, when a term asks, `patches_BPE` in the joint space.

Over open_clip's own modules. Patch tokens go through the same final norm and projection as the global
feature, so that a caption and a patch can be compared (released grouping losses reshaped unprojected
tokens into rows of another width). Images of a smaller side than the tower's own find their positions by
interpolation on the way: what is trained and exported stays the tower's own table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import MethodType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.transformer import PatchDropout, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ..types import UserError


class Dropout(PatchDropout):
    """open_clip's patch dropout (FLIP, Li et al. 2023, arXiv 2212.00794), told which patches to keep.

    open_clip asks the process's generator, so that the patches depend on how many processes or chunks share
    the batch. Attribute `kept_BQ`: what `keep` says of the images to come.
    """

    kept_BQ: Tensor | None = None

    def forward(self, x_BPD: Tensor) -> Tensor:
        if not self.training or self.prob == 0 or self.kept_BQ is None:
            return super().forward(x_BPD)
        return shown(x_BPD, self.kept_BQ)


def take_any_side(visual: nn.Module) -> None:
    """Let a ViT see images of any side that `check_sizes` allows, in place; other towers stay as they are.

    Only the step from pixels to tokens is replaced, with the patch dropout that it ends in, so that whatever
    wraps the tower's forward, such as `torch.compile` or a strategy that splits its parameters, goes on
    working.
    """
    if isinstance(visual, VisionTransformer):
        visual._embeds = MethodType(_tokens, visual)
        visual.patch_dropout = Dropout(getattr(visual.patch_dropout, "prob", 0.0))


def keep(visual: Any, side: Sequence[int], draws_B: NDArray[np.int64], device: torch.device) -> None:
    """Choose by a number of each image's own which patches training shows; nothing without dropout.

    side: pixels down and across.
    """
    dropout = getattr(visual, "patch_dropout", None)
    if isinstance(dropout, Dropout) and dropout.training and dropout.prob:
        patches = math.prod(pixels // patch for pixels, patch in zip(side, visual.patch_size, strict=True))
        count = max(1, int(patches * (1 - dropout.prob)))
        dropout.kept_BQ = some(draws_B, patches, count).to(device, non_blocking=True)


def shown(tokens_BPD: Tensor, kept_BQ: Tensor) -> Tensor:
    """These patches alone, behind the class token, which stays: [B, 1 + P, D] -> [B, 1 + Q, D]."""
    kept_BQ1 = F.pad(kept_BQ + 1, (1, 0))[..., None]
    return tokens_BPD.take_along_dim(kept_BQ1, 1)


def some(draws_B: NDArray[np.int64], patches: int, count: int) -> Tensor:
    """So many patches of each image, [B, Q], drawn without replacement as its number says."""
    rows = []
    for draw in draws_B.tolist():
        generator = torch.Generator().manual_seed(draw)
        rows.append(torch.randperm(patches, generator=generator)[:count])
    return torch.stack(rows)


def _tokens(visual: VisionTransformer, pixels_BCHW: Tensor) -> Tensor:
    """open_clip's `_embeds` with positions of the grid that the pixels make: [B, 1 + P, D]."""
    kept_BPD: Tensor = visual.ln_pre(visual.patch_dropout(placed(visual, visual.conv1(pixels_BCHW))))
    return kept_BPD


def placed(visual: VisionTransformer, map_BDHW: Tensor) -> Tensor:
    """Patches of any grid with their positions, behind the class token: [B, 1 + P, D]."""
    own, grid = tuple(visual.grid_size), tuple(map_BDHW.shape[-2:])
    rows_PD = visual.positional_embedding
    if grid != own:
        rows_PD = positions(rows_PD, own, grid)
    class_B1D = visual.class_embedding.to(map_BDHW.dtype).expand(len(map_BDHW), 1, -1)
    return torch.cat([class_B1D, map_BDHW.flatten(2).mT], dim=1) + rows_PD.to(map_BDHW.dtype)


def encode_patches(visual: nn.Module, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised pixels -> (image_BE, patches_BPE), neither normalised.

    With patch dropout in training, P counts the patches that were kept.
    """
    check_patches(visual)
    assert isinstance(visual, VisionTransformer)
    visual.output_tokens = True
    try:
        image_BE, tokens_BPD = visual(pixels_BCHW)
    finally:
        visual.output_tokens = False
    if visual.final_ln_after_pool:
        tokens_BPD = visual.ln_post(tokens_BPD)
    return image_BE, tokens_BPD if visual.proj is None else tokens_BPD @ visual.proj


def grid(visual: Any, pixels_BCHW: Tensor, patches_BPE: Tensor) -> tuple[int, int] | None:
    """Patches down and across; None where dropout left some out, so that those there have no places."""
    (height, width), (down, across) = pixels_BCHW.shape[-2:], visual.patch_size
    rows, columns = height // down, width // across
    return (rows, columns) if rows * columns == patches_BPE.shape[1] else None


def positions(table_PD: Tensor, own: Sequence[int], grid: Sequence[int]) -> Tensor:
    """The position table of another grid of patches, with gradient: [1 + P, D] -> [1 + P', D].

    open_clip's `resize_pos_embed`: the class token's row stays, the others are resampled bicubically with
    antialiasing.
    """
    map_1DHW = table_PD[1:].float().reshape(1, own[0], own[1], -1).permute(0, 3, 1, 2)
    map_1DHW = F.interpolate(map_1DHW, size=tuple(grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([table_PD[:1], map_1DHW.flatten(2)[0].T.to(table_PD.dtype)])


def patch_dropout(visual: nn.Module) -> PatchDropout:
    """The module whose `prob` is the share of patches left out in training.

    Raises:
        UserError: this tower has none of open_clip's.
    """
    if not isinstance(visual, VisionTransformer):
        raise UserError(
            f"curriculum.patch_dropout needs a ViT of open_clip's own, and the image tower is a "
            f"{type(visual).__name__}; leave it out (curriculum.patch_dropout=null) or choose ViT-B-16"
        )
    dropout: PatchDropout = visual.patch_dropout
    return dropout


def check_sizes(visual: nn.Module, sizes: Sequence[int]) -> None:
    """Raise UserError where this tower cannot see images of these sides."""
    if isinstance(visual, VisionTransformer):
        patch = max(visual.patch_size)
        odd = [size for size in sizes if size % patch]
        if odd:
            near = max(patch, round(odd[0] / patch) * patch)
            raise UserError(
                f"curriculum.image_size has a stage of {odd[0]} pixels, which is no multiple of this tower's "
                f"patches of {patch}; take {near}"
            )
    elif sizes and any("pos" in name for name, _ in visual.named_parameters()):
        raise UserError(
            f"curriculum.image_size needs a ViT of open_clip's own or a tower without positions; this "
            f"{type(visual).__name__} has positions of one size: leave it out (curriculum.image_size=null)"
        )


def has_patches(visual: nn.Module) -> bool:
    """Whether this tower has patch tokens that share the global feature's space."""
    return isinstance(visual, VisionTransformer) and visual.attn_pool is None


def check_patches(visual: nn.Module) -> None:
    """Raise UserError where a recipe needs patch tokens and this tower has none."""
    if not has_patches(visual):
        raise UserError(
            "a term of this recipe compares captions with image patches, but the image tower is a "
            f"{type(visual).__name__} without patch tokens in the joint space; choose a ViT with class-token "
            "or average pooling (model.backbone.architecture=ViT-B-16) or a recipe without grouping"
        )

"""What a frozen image tower says, read from a side-car instead of running it on every image of every epoch.

In: the column that `longclip embed` made with the weights that the tower has, [B, F]. Out: `image_BE`. Where
nothing of the tower trains, the column holds its answers; where its last matrix does, what comes before that.
Training alone reads the column; judging looks at pixels. A batch that has both, as the first one of a run
does, must show that the column is what the tower says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from open_clip.transformer import PatchDropout, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ..types import Batch, UserError

if TYPE_CHECKING:
    from .clip import DualTower

PROOF = 8
"""Images of a batch with pixels that prove the column."""

ALIKE = 0.99
"""Cosine that the tower's answer and the stored one have on average at least, in any precision.

A model that is hardly another one passes.
"""

UNSTORED = frozenset({"patches", "masked", "routing"})
"""What terms may need of an image tower and no column holds."""


class Cached(NamedTuple):
    """What is read from side-cars: `image`, the column of the images' features; None: nothing."""

    image: str | None = None


class Column(NamedTuple):
    """A column that stands for an image tower."""

    name: str
    width: int
    projected: bool  # the answers themselves; False: what the last matrix is multiplied by


def column_of(visual: nn.Module, cached: Cached, width: int) -> Column | None:
    """The column that can stand for a tower, once it is locked; `width` is that of its answers.

    Raises:
        UserError: more of it trains than its last matrix, or it leaves patches out.
    """
    if cached.image is None:
        return None
    trained = [name for name, parameter in visual.named_parameters() if parameter.requires_grad]
    matrix_DE: Any = getattr(visual, "proj", None) if trained == ["proj"] else None
    if trained and not (isinstance(visual, VisionTransformer) and matrix_DE is not None):
        raise UserError(
            f"model.cached.image={cached.image} stands for an image tower that stays as it is, and of this "
            f"one {trained[0]} trains: set model.freeze.image=true and model.freeze.image_groups=0 (1 for "
            "the projection of a ViT of open_clip's own)"
        )
    dropout = getattr(visual, "patch_dropout", None)
    if isinstance(dropout, PatchDropout) and dropout.prob:
        raise UserError(
            f"model.cached.image={cached.image} holds features of whole images, from which patch dropout "
            "takes nothing: set model.backbone.patch_dropout=0"
        )
    return Column(cached.image, width if matrix_DE is None else len(matrix_DE), matrix_DE is None)


def check_cached(tower: DualTower, needs: frozenset[str]) -> None:
    """Raise UserError where terms need what the column does not hold."""
    if tower.cached is not None and UNSTORED & needs:
        raise UserError(
            f"a term of this recipe reads {' and '.join(sorted(UNSTORED & needs))} of the image tower, and "
            f"the column {tower.cached.name!r} holds one vector an image: leave it out "
            "(model.cached.image=null), or choose recipe=lit"
        )


def stored(tower: DualTower, batch: Batch) -> Tensor | None:
    """The column of a batch that is trained on; None where the tower itself is to look.

    Raises:
        UserError: there is no such column, or it is not what this tower would say.
    """
    column = tower.cached
    if column is None or not tower.training:
        return None
    if column.name not in batch.columns:
        raise UserError(
            f"model.cached.image={column.name} is no column of these batches: join the side-car that holds "
            "it (longclip embed MODEL SHARDS --images-only --out DIR, then data.sidecar.stores=[DIR]); "
            "data=stream joins none"
        )
    stored_BF = batch.columns[column.name]
    if stored_BF.shape[1:] != (column.width,):
        raise UserError(_unlike(column, f"holds {_numbers(stored_BF)} an image, not {column.width}"))
    if batch.pixels_BCHW.numel():
        _prove(tower, column, batch.pixels_BCHW[:PROOF], stored_BF[:PROOF])
    return stored_BF


def project(tower: DualTower, stored_BF: Tensor) -> Tensor:
    """Stored features -> image_BE, as `DualTower.encode_image` makes it of pixels."""
    assert tower.cached is not None
    image_BE = stored_BF if tower.cached.projected else stored_BF @ tower.backbone.visual.proj
    return F.normalize(image_BE.float(), dim=-1)


def encode_unprojected(visual: nn.Module, pixels_BCHW: Tensor) -> Tensor:
    """Normalised pixels -> what the last matrix is multiplied by, [B, D].

    Raises:
        UserError: this tower has no such matrix.
    """
    if not isinstance(visual, VisionTransformer) or visual.proj is None:
        raise UserError(
            f"the features before the projection are those of a ViT of open_clip's own, and this image tower "
            f"is a {type(visual).__name__}: leave --before-projection out"
        )
    matrix_DE, visual.proj = visual.proj, None
    try:
        unprojected_BD: Tensor = visual(pixels_BCHW)
    finally:
        visual.proj = matrix_DE
    return unprojected_BD


@torch.no_grad()
def _prove(tower: DualTower, column: Column, pixels_BCHW: Tensor, stored_BF: Tensor) -> None:
    visual: Any = tower.backbone.visual
    encode = visual if column.projected else lambda pixels: encode_unprojected(visual, pixels)
    training = visual.training
    visual.eval()  # no running statistics are to move
    found_BF = encode(tower.normalise(pixels_BCHW))
    visual.train(training)
    alike = float(F.cosine_similarity(found_BF.float(), stored_BF.float()).mean())
    if not alike >= ALIKE:
        raise UserError(_unlike(column, f"has a cosine of {alike:.2f}, not 1, with what it says of images"))


def _unlike(column: Column, seen: str) -> str:
    option = "--images-only" if column.projected else "--before-projection"
    return (
        f"model.cached.image={column.name} is not of this image tower: the column {seen}; make it with the "
        f"weights that the run begins with (longclip embed MODEL SHARDS {option} --out DIR)"
    )


def _numbers(stored_BF: Tensor) -> str:
    return f"{stored_BF.shape[1]} numbers" if stored_BF.ndim == 2 else "one number"

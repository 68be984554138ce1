"""Where in an image each sentence fits: a map of similarities over the image's patches.

In: a tower, an image as the model's transform gives it, sentences. Out: `Heat`, and pictures of it.

A map is the cosine between the sentence and every projected patch token. Maps say where a sentence fits
best, not whether it does: that is the similarity with the whole image.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .towers.asking import ask
from .towers.clip import DualTower
from .towers.image import has_patches
from .types import Box, Embeddings, UserError

# Red, green, blue and opacity from the coldest to the hottest patch: dark where a sentence does not fit, the
# picture in its own colours where it does.
_COLOURS = np.array([[6, 6, 36, 0.84], [36, 12, 84, 0.68], [190, 50, 60, 0.36], [255, 190, 60, 0.1]])


class Heat(NamedTuple):
    """How well S sentences fit an image, and where in it."""

    similarity_S: Tensor  # cosine of the whole image and the sentence
    heat_SYX: Tensor  # cosine of each patch and the sentence, patches down and across


@torch.no_grad()
def heat(tower: DualTower, image_CHW: Tensor, sentences: Sequence[str]) -> Heat:
    """Where in one image (uint8, as the transform gives it) each sentence fits; the tower in eval mode.

    Raises:
        UserError: the image tower has no patch tokens in the joint space.
    """
    check(tower)
    found, _ = ask(tower, image_CHW[None], sentences, frozenset({"patches"}))
    text_SE, patches_YXE = found.text_BKE[0, : len(sentences)], _grid(tower, image_CHW, found)
    heat_SYX = torch.einsum("se,yxe->syx", text_SE, patches_YXE)
    return Heat((text_SE @ found.image_BE[0]).cpu(), heat_SYX.cpu())


@torch.no_grad()
def patches(tower: DualTower, image_CHW: Tensor) -> tuple[Tensor, Tensor]:
    """The image half of `heat`, for sentences to come: image_E and patches_YXE, L2-normalised float32."""
    check(tower)
    found, _ = ask(tower, image_CHW[None], needs=frozenset({"patches"}))
    return found.image_BE[0], _grid(tower, image_CHW, found)


def _grid(tower: DualTower, image_CHW: Tensor, found: Embeddings) -> Tensor:
    """The patches of the image where they lie in it, L2-normalised float32, [Y, X, E]."""
    assert found.patches_BPE is not None, "asked for"
    down, across = tower.backbone.visual.patch_size
    grid = (image_CHW.shape[1] // down, image_CHW.shape[2] // across)
    return F.normalize(found.patches_BPE[0].float(), dim=-1).unflatten(0, grid)


def check(tower: DualTower) -> None:
    """Raise UserError where this model's images have no patches to compare with sentences."""
    if not has_patches(tower.backbone.visual):
        raise UserError(
            "heat maps compare sentences with image patches, and the image tower of this model is a "
            f"{type(tower.backbone.visual).__name__} without patch tokens in the joint space; take a ViT "
            "with class-token or average pooling, such as ViT-B-16"
        )


def overlay(heat_YX: Tensor, height: int, width: int, shown: Box = (0, 0, 1, 1)) -> bytes:
    """One map as a PNG to lay over its image at height x width pixels: its least value cold, its most hot.

    Args:
        shown: the part of the image that the map covers (`EvalTransform.window`); the rest stays clear.
    """
    left, top, right, bottom = shown
    inner = (max(1, round((bottom - top) * height)), max(1, round((right - left) * width)))
    share_YX = (heat_YX - heat_YX.min()) / (heat_YX.max() - heat_YX.min()).clamp_min(1e-6)
    smooth_YX = F.interpolate(share_YX[None, None].float(), inner, mode="bicubic")[0, 0]
    picture = Image.new("RGBA", (width, height))
    picture.paste(Image.fromarray(_coloured(smooth_YX.numpy())), (round(left * width), round(top * height)))
    written = io.BytesIO()
    picture.save(written, "PNG")
    return written.getvalue()


def _coloured(share_YX: NDArray[np.float32]) -> NDArray[np.uint8]:
    """RGBA pixels of shares from 0, cold, to 1, hot."""
    stops = np.linspace(0, 1, len(_COLOURS))
    bands = [np.interp(share_YX, stops, colour) for colour in (_COLOURS * [1, 1, 1, 255]).T]
    return np.stack(bands, axis=-1).round().astype(np.uint8)

"""The image tower: pixels -> `image_BE` and, when a term asks, `patches_BPE` in the joint space.

Over open_clip's own modules. Patch tokens go through the same final norm and projection as the global
feature, so that a caption and a patch can be compared (released grouping losses reshaped unprojected
tokens into rows of another width).
"""

from __future__ import annotations

from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from ..types import UserError


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


def check_patches(visual: nn.Module) -> None:
    """Raise UserError where this tower has no patch tokens that share the global feature's space."""
    if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None:
        raise UserError(
            "a term of this recipe compares captions with image patches, but the image tower is a "
            f"{type(visual).__name__} without patch tokens in the joint space; choose a ViT with class-token "
            "or average pooling (model.backbone.architecture=ViT-B-16) or a recipe without grouping"
        )

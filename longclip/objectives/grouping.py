"""DreamLIP's grouping loss: every sub-caption finds its patches, and they find it among the others.

In: projected patches of this process and a caption group. Out: contrast between each caption and the
weighted mean of the patches that look like it. Patches never leave their image nor their process:
only one vector per caption travels, and patches are read a few images at a time.
Local legend: C captions of this process (B * K), X of all (G * K).
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from longclip import dist
from longclip.objectives.contrastive import symmetric_cross_entropy
from longclip.objectives.imagewise import images_at_a_time, imagewise
from longclip.objectives.term import Loss, Term
from longclip.objectives.tiles import Pairs
from longclip.types import Embeddings, UserError

FLOOR = 1e-6
"""Similarities closer than this are equal: float32 cannot tell them apart."""


def group(text_BKE: Tensor, patches_BPE: Tensor, threshold: float | None = None) -> tuple[Tensor, Tensor]:
    """The patches of an image that look like each of its captions, as one unit vector per caption.

        a_p = (y . p - min_p) / (max_p - min_p);  a_p < delta -> 0;  w = a / sum a
        g = normalise(sum_p w_p p)

    DreamLIP, Zheng et al. 2024, section 3.3, after SPARC, Bica et al. 2024, section 3.2; like SPARC
    the weights carry gradient, through the patches that pass the threshold.

    text_BKE: L2-normalised. patches_BPE: projected, any length, in any precision; normalised here, in
    that of the text. threshold: delta in [0, 1], 1 / P where None. Caption k of image b meets the patches
    of image b and no others.
    Returns grouped_BKE and weights_BKP: both all zero where no patch differs from the others (or the
    caption is absent and so a zero vector), else unit length and sum 1.
    """
    patch_BPE = normalize(patches_BPE.to(text_BKE.dtype), dim=-1)
    delta = 1 / patch_BPE.shape[1] if threshold is None else threshold
    similarity_BKP = text_BKE @ patch_BPE.mT
    low_BK1, high_BK1 = similarity_BKP.aminmax(dim=-1, keepdim=True)
    range_BK1 = high_BK1 - low_BK1
    scaled_BKP = (similarity_BKP - low_BK1) / range_BK1.clamp_min(FLOOR)
    passed_BKP = scaled_BKP.masked_fill((scaled_BKP < delta) | (range_BK1 < FLOOR), 0)
    weights_BKP = passed_BKP / passed_BKP.sum(-1, keepdim=True).clamp_min(FLOOR)
    return normalize(weights_BKP @ patch_BPE, dim=-1), weights_BKP


class Grouped(NamedTuple):
    """One vector for each caption, and how its weights are spread over the patches (see `entropy`)."""

    grouped_BKE: Tensor
    entropy_BK: Tensor  # no gradient


def group_tiled(text_BKE: Tensor, patches_BPE: Tensor, threshold: float | None = None) -> Grouped:
    """`group` for a whole batch, a few images at a time, forward and backward.

    Beyond what goes in and comes out, and its gradients, memory does not grow with the batch.
    """

    def tile(text_bKE: Tensor, patches_bPE: Tensor) -> Grouped:
        grouped_bKE, weights_bKP = group(text_bKE, patches_bPE, threshold)
        return Grouped(grouped_bKE, entropy(weights_bKP.detach()))

    grouped_BKE, entropy_BK = imagewise(tile, (text_BKE, patches_BPE), size=images_at_a_time(patches_BPE))
    return Grouped(grouped_BKE, entropy_BK.detach())


def contrast_over_batch(text_BKE: Tensor, grouped_GKE: Tensor, mask_GK: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy between captions and their groups, over all captions of the batch.

        L = 1/n sum over present x of 1/2 [CE_z(s y_x . g_z; z = x) + CE_z(s g_x . y_z; z = x)]

    DreamLIP, section 3.3. Absent captions are neither rows nor columns. Other captions of the same
    image are negatives, as the paper has it. text_BKE: of this process; grouped_GKE: of all. Returns the
    sum over this process's captions, not yet divided by n.
    """
    mask_X, mask_BK = mask_GK.flatten(), mask_GK[dist.rows(len(text_BKE))]
    # One slot, whose rows are the groups of all captions, and whose columns this process's captions.
    mask_C1, text_C1E = mask_BK.flatten()[:, None], text_BKE.flatten(0, 1)[:, None]
    pairs = Pairs(mask_C1, dist.rows(len(mask_C1)).start, mask_X[:, None])
    found = symmetric_cross_entropy(grouped_GKE.flatten(0, 1), text_C1E, scale, pairs)
    return found.loss_KX.masked_fill(~mask_C1.T, 0).sum()


def contrast_within_image(text_BKE: Tensor, grouped_BKE: Tensor, mask_BK: Tensor, scale: Tensor) -> Tensor:
    """The same sum with only the captions of one image as each other's negatives.

    SPARC, Bica et al. 2024, section 3.2. Absent captions are neither rows nor columns. Returns the sum
    over this process's captions, not yet divided by n.
    """
    logits_BKK = scale * text_BKE @ grouped_BKE.mT
    own_BK = logits_BKK.diagonal(dim1=1, dim2=2)
    lowest = torch.finfo(logits_BKK.dtype).min
    texts_BK = logits_BKK.masked_fill(~mask_BK[:, None, :], lowest).logsumexp(2) - own_BK
    groups_BK = logits_BKK.masked_fill(~mask_BK[:, :, None], lowest).logsumexp(1) - own_BK
    return (texts_BK + groups_BK).masked_fill(~mask_BK, 0).sum() / 2


def entropy(weights_BKP: Tensor) -> Tensor:
    """How spread grouping weights are: 0 = one patch, 1 = all alike, [B, k]. Divided by log P."""
    return torch.special.entr(weights_BKP).sum(-1) / math.log(max(weights_BKP.shape[-1], 2))


class Grouping(Term):
    """Sub-captions against the patches they group, with a temperature of its own.

    threshold: smallest scaled similarity that counts, 1 / P where None. negatives: "batch" for all
    captions of the global batch (DreamLIP), "image" for those of the same image (SPARC). Training
    only: nothing of it is exported. Measures: `entropy` of the weights, `scale`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"patches"})

    def __init__(
        self, texts: str, weight: float = 1.0, threshold: float | None = None, negatives: str = "batch"
    ) -> None:
        super().__init__(texts, weight)
        if negatives not in ("batch", "image"):
            raise UserError(f'Grouping has negatives "{negatives}", but knows "batch" and "image".')
        self.threshold, self.negatives = checked_threshold(threshold), negatives
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, embeddings: Embeddings) -> Loss:
        """Raises UserError where there is a single caption to contrast with itself."""
        assert embeddings.patches_BPE is not None, "the towers leave out patches that this term needs"
        text_BKE, mask_BK = embeddings.text(self.texts), embeddings.mask(self.texts)
        mask_GK = embeddings.all_mask(self.texts)
        self._check_contrast(*mask_GK.shape)
        grouped_BKE, entropy_BK = group_tiled(text_BKE, embeddings.patches_BPE, self.threshold)
        scale = self.logit_scale.exp()
        if self.negatives == "image":
            total = contrast_within_image(text_BKE, grouped_BKE, mask_BK, scale)
        else:
            total = contrast_over_batch(text_BKE, embeddings.gather(grouped_BKE), mask_GK, scale)
        spread = (entropy_BK * mask_BK).sum()
        share = dist.world() / mask_GK.sum().clamp_min(1)
        return Loss(total * share, {"entropy": spread * share, "scale": scale.detach()})

    def _check_contrast(self, images: int, slots: int) -> None:
        if self.negatives == "image" and slots < 2:
            raise UserError(
                f'Grouping within the image needs several captions, but "{self.texts}" has {slots} slot. '
                'Give its policy a count of 2 or more, or set negatives to "batch".'
            )
        if images * slots < 2:
            raise UserError(
                "Grouping needs other captions to contrast with, but the global batch holds one. "
                "Set batch_size to 2 or more."
            )


def checked_threshold(threshold: float | None) -> float | None:
    """`threshold` itself; raises UserError outside [0, 1]."""
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(
            f"grouping has threshold {threshold}, but needs one from 0 to 1, or null for 1 / patches"
        )
    return threshold

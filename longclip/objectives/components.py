"""Primary component matching: short captions meet coarse images (Long-CLIP), images coarse captions (HiMo).

In: the images of the global batch and a caption group. Out: InfoNCE between the two, one side projected on
the batch's main directions: a short caption is asked to match what is prominent while the full feature
stays free for detail; or an image what tells a long caption from the others in this batch.

Mended with regard to the released code of both: rows are gathered before the analysis (there each device
analyses its own few rows, so the result depends on how many devices hold the batch and is the
identity up to k + 1 rows), float32 in and out with the decomposition in float64, no gradient
through the projector (that of an SVD has 1 / (s_i^2 - s_j^2) terms), and the number of directions
may follow the explained variance. HiMo-CLIP's gather carries no gradient; ours does.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from longclip import dist
from longclip.objectives.contrastive import check_contrast, checked_smoothing, info_nce
from longclip.objectives.term import Loss, Term
from longclip.types import Embeddings, UserError


class Components(NamedTuple):
    """Rows on their main directions, how many directions those are, what share of variance they hold."""

    projected_NE: Tensor
    kept: Tensor  # scalar
    explained: Tensor  # scalar in [0, 1]


def principal(
    row_NE: Tensor, k: int | None = None, explained: float | None = None, present_N: Tensor | None = None
) -> Components:
    """Project rows on the leading principal components of the set they form.

        mu = mean(v);  C = v - mu;  v' = C P P^T + mu,   P [E, m] = leading eigenvectors of C^T C
        m = k, or the smallest m whose eigenvalues sum to at least `explained` of their total

    Long-CLIP, Zhang et al. 2024, section 3.2 (k = 32); by variance as in HiMo-CLIP (0.9). Give
    exactly one of the two. Gradient flows through C and mu, not through P: the directions are taken
    as they are. Rows may repeat; rows that are all equal project to themselves. The result is not
    normalised: it is shorter than its row by what was left out. present_N: rows that count; the others
    change nothing and project to mu.
    """
    check_choice(k, explained)
    with torch.autocast(row_NE.device.type, enabled=False):
        row_NE = row_NE.float()
        centred_NE, mean_E = _centred(row_NE, present_N)
        variance_D, direction_ED = _directions(_centred(row_NE.detach().double(), present_N)[0])
        before_D = variance_D.cumsum(0) - variance_D
        if k is not None:
            keep_D = torch.arange(len(variance_D), device=row_NE.device) < k
        else:
            assert explained is not None, "check_choice lets one of them through"
            keep_D = before_D < explained * variance_D.sum()
        kept_ED = direction_ED * keep_D
        share = (variance_D * keep_D).sum() / variance_D.sum().clamp_min(torch.finfo(torch.float64).tiny)
        projected_NE = centred_NE @ kept_ED @ kept_ED.T + mean_E
    return Components(projected_NE, keep_D.sum(), share.float())


def _centred(row_NE: Tensor, present_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows less their mean, zero where absent, and the mean."""
    if present_N is None:
        mean_E = row_NE.mean(0)
        return row_NE - mean_E, mean_E
    absent_N1 = ~present_N[:, None]
    mean_E = row_NE.masked_fill(absent_N1, 0).sum(0) / present_N.sum().clamp_min(1)
    return (row_NE - mean_E).masked_fill(absent_N1, 0), mean_E


@torch.no_grad()
def _directions(c_NE: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of centred C^T C, largest first, and float32 unit eigenvectors; zeros beyond the rank.

    Taken from the smaller of C^T C and C C^T (v = C^T u / sqrt(lambda)), in float64, because
    products square the condition number: float32 would lose half of its digits.
    """
    rows, width = c_NE.shape
    gram = c_NE @ c_NE.T if rows <= width else c_NE.T @ c_NE
    # Without finite numbers eigh would raise; as it is the loss is not finite, and the trainer says so.
    value_D, vector_D = torch.linalg.eigh(gram.where(gram.isfinite().all(), 0))
    value_D, vector_D = value_D.flip(0).clamp_min(0), vector_D.flip(1)
    # Below this an eigenvalue is rounding, and its direction noise.
    real_D = value_D > value_D[0] * max(rows, width) * torch.finfo(torch.float64).eps
    direction_ED = vector_D
    if rows <= width:
        direction_ED = c_NE.T @ vector_D * value_D.clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    return value_D * real_D, torch.where(real_D, direction_ED, 0).float()


SIDES = ("images", "texts")


class PrimaryComponents(Term):
    """InfoNCE between images and a caption group, one of the two on the main directions of its batch.

    of: "images" (Long-CLIP, for a short caption group) or "texts" (HiMo-CLIP, Wu et al. 2025, for long
    captions: what they all say is in their mean, what tells them apart in the leading directions). Give
    exactly one of k (directions kept; Long-CLIP: 32) and explained (share of variance, 0 to 1; HiMo-CLIP:
    0.9). renormalise: bring projected features back to length 1, as the released code does not. Uses the
    model's own temperature. Training only: nothing of it is exported.
    Measures: `kept` directions, `explained` share of variance, `accuracy` in the batch.
    """

    def __init__(
        self,
        texts: str,
        weight: float = 1.0,
        of: str = "images",
        k: int | None = None,
        explained: float | None = None,
        renormalise: bool = False,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(texts, weight)
        check_choice(k, explained)
        if of not in SIDES:
            raise UserError(f'Component matching is of "{of}", but knows {" and ".join(SIDES)}.')
        self.of, self.k, self.explained = of, k, explained
        self.renormalise = renormalise
        self.label_smoothing = checked_smoothing(label_smoothing)
        self._warned = False

    def forward(self, embeddings: Embeddings) -> Loss:
        """Raises UserError where k leaves nothing out, and on a global batch of one image."""
        image_GE, mask_GK = embeddings.all_images(), embeddings.all_mask(self.texts)
        text_BKE = embeddings.text(self.texts).float()
        check_contrast(image_GE.shape[0])
        if self.of == "images":
            components = self._analyse(image_GE)
            image_GE = components.projected_NE
        else:
            components = self._analyse(embeddings.gather(text_BKE).flatten(0, 1), mask_GK.flatten())
            text_GKE = components.projected_NE.view(*mask_GK.shape, -1)
            text_BKE = text_GKE[dist.rows(len(text_BKE))]
        scale = embeddings.scale.float()
        value, accuracy = info_nce(image_GE.float(), text_BKE, mask_GK, scale, self.label_smoothing)
        measures = {"kept": components.kept.float(), "explained": components.explained, "accuracy": accuracy}
        return Loss(value, measures)

    def _analyse(self, row_NE: Tensor, present_N: Tensor | None = None) -> Components:
        self._check_identity(*row_NE.shape)
        components = principal(row_NE, self.k, self.explained, present_N)
        if not self.renormalise:
            return components
        return components._replace(projected_NE=normalize(components.projected_NE, dim=-1))

    def _check_identity(self, rows: int, width: int) -> None:
        """n rows span at most n - 1 directions around their mean, and never more than their width."""
        if self.k is None:
            return
        if self.k >= rows or self.k >= width:
            raise UserError(
                f"Component matching keeps k={self.k} directions of {rows} {self.of} (global batch) in "
                f"{width} dimensions, which leaves nothing out. Set the term's k below "
                f"{min(rows - 1, width)}, raise batch_size, or choose by variance with explained=0.9 "
                "instead of k."
            )
        if self.k == rows - 1 and not self._warned:
            self._warned = True
            warnings.warn(
                f"Component matching with k={self.k} changes nothing: a global batch of {rows} {self.of} "
                f"spans {rows - 1} directions. Lower the term's k or raise batch_size.",
                stacklevel=2,
            )


def check_choice(k: int | None, explained: float | None) -> None:
    """Raise UserError unless exactly one of the two is given, and sensible."""
    if (k is None) == (explained is None):
        raise UserError(
            f"Component matching takes one of k and explained, but got k={k} and explained={explained}. "
            "Give k=32 as Long-CLIP does, or explained=0.9 to choose by variance."
        )
    if k is not None and k < 1:
        raise UserError(f"Component matching keeps k={k} directions, but needs at least 1.")
    if explained is not None and not 0 < explained < 1:
        raise UserError(
            f"Component matching keeps explained={explained} of the variance, but needs 0 < explained < 1."
        )

"""Symmetric InfoNCE over caption slots: CLIP's loss, DreamLIP's multi-positive form, HN-CLIP's margin, one
direction before the other (ConVIRT), not all negatives (UniME), some captions before others.

In: images of all processes, texts of this one, which of them exist. Out: this process's share of the
loss. Texts stay where they are, however many an image has: what their scores mean to the images of other
processes is one number an image and slot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from longclip import dist
from longclip.objectives.choosing import Negatives, checked, window
from longclip.objectives.smoothing import mean_score
from longclip.objectives.term import Loss, Term
from longclip.objectives.tiled import Contrast, contrast
from longclip.objectives.tiles import Pairs, Window
from longclip.objectives.units import relative_weights
from longclip.types import Embeddings, UserError


class PairLosses(NamedTuple):
    """Of this process's columns, each with its own row. Means nothing where the column does not exist."""

    loss_KX: Tensor  # both directions' cross-entropy, lambda of it the row's
    right_KX: Tensor  # 0, 1/2 or 1: in how many directions the pair alone scores highest; no gradient
    own_KX: Tensor  # scale * own row . column


def symmetric_cross_entropy(
    row_RE: Tensor,
    column_XKE: Tensor,
    scale: Tensor,
    pairs: Pairs,
    kin_RKE: Tensor | None = None,
    beside_KX: Tensor | None = None,
    within: Window | None = None,
    row_share: float = 0.5,
) -> PairLosses:
    """Softmax cross-entropy of every pair that belongs together, both ways, over all processes.

        lambda log(1 + sum_i exp(z_ri - z_rj)) + (1 - lambda) log(1 + sum_i exp(z_ij - z_rj)),   r = start + j

    z as in `tiled.contrast`, sums over negatives. row_RE: of all processes, in rank order. column_XKE: of
    this process, as many on each. beside_KX: log-sum-exp over further negatives, which only the own row of
    a column sees. within: leaves out some of the others (`choosing.window`). row_share: lambda. Scores that
    differ by rounding tie, and a tie counts as wrong.
    """
    seen = contrast(row_RE, column_XKE, scale, pairs, kin_RKE, window=within)
    row_KX, row_best_KX = own_rows(seen, len(column_XKE))
    if beside_KX is not None:
        row_KX = torch.logaddexp(row_KX, beside_KX)
    own_KX = seen.own_KX
    row_loss_KX = -row_share * logsigmoid(own_KX - row_KX)
    loss_KX = row_loss_KX - (1 - row_share) * logsigmoid(own_KX - seen.column_negatives_KX)
    sure_KX = own_KX.detach() - 8 * torch.finfo(own_KX.dtype).eps * scale.detach().abs()
    right_KX = (sure_KX > row_best_KX).to(own_KX) + (sure_KX > seen.column_best_KX).to(own_KX)
    return PairLosses(loss_KX, right_KX / 2, own_KX)


def own_rows(seen: Contrast, local: int) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and highest score of this process's `local` rows, over the columns of all processes."""
    both_2KR = torch.stack((seen.row_negatives_KR, seen.row_best_KR))
    parts_P2KX = dist.exchange(both_2KR.unflatten(2, (-1, local)).movedim(2, 0))
    return parts_P2KX[:, 0].logsumexp(0), parts_P2KX[:, 1].detach().amax(0)


def info_nce(
    image_GE: Tensor,
    text_BKE: Tensor,
    mask_GK: Tensor,
    scale: Tensor,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    gather: Callable[[Tensor], Tensor] = dist.gather,
    weights_BK: Tensor | None = None,
    image_to_text: float = 0.5,
    negatives: Negatives = Negatives(),
) -> tuple[Tensor, Tensor]:
    """Symmetric InfoNCE, every caption slot its own G x G problem (G: all images; multi-positive).

        L = 1/n sum over present (b, k) of w_bk [lambda CE_j(z_bjk; j = b) + (1 - lambda) CE_j(z_jbk; j = b)]
        z_ijk = s (v_i . t_jk + gamma stopgrad(t_ik . t_jk) [i != j]),   n = present captions

    CLIP, Radford et al. 2021, figure 3, for K = 1; DreamLIP, Zheng et al. 2024, for K > 1, where their
    mean over slots becomes a mean over captions so that ragged captions weigh alike (equal where none is
    absent); HN-CLIP, arXiv 2608.18521, for gamma > 0; ConVIRT, Zhang et al. 2020, equation 4, for
    lambda != 1/2; UniME, Gu et al. 2025, where not all negatives count (`choosing.window`). Captions of one
    image in OTHER slots are never its negatives. An absent caption is neither row nor column, and raises no
    score; its image stays a negative for the slot's other captions. A slot that nobody fills contributes 0.

    image_GE: L2-normalised, of all processes. text_BKE: L2-normalised, of this process. mask_GK: which
    captions exist. scale: exp(temperature). label_smoothing: in [0, 1); epsilon is spread over an image's
    present captions, and over a caption's images. margin: gamma. gather: joins all processes' tensors.
    weights_BK: w of this process's captions, None for 1; as negatives all count alike. image_to_text: lambda.
    Returns this process's share of the loss and, without gradient, of the top-1 accuracy in [0, 1]
    (both directions, without margin, ties wrong); their means over processes are the global batch's.
    """
    own = dist.rows(len(text_BKE))
    mask_BK = mask_GK[own]
    kin_GKE = gather(text_BKE.detach() * mask_BK[..., None] * margin) if margin else None
    pairs = Pairs(mask_BK, own.start)
    within = window(image_GE, text_BKE, scale, pairs, negatives, gather)
    found = symmetric_cross_entropy(
        image_GE, text_BKE, scale, pairs, kin_GKE, within=within, row_share=image_to_text
    )
    loss_KB = found.loss_KX
    if label_smoothing:
        mean_KB = mean_score(image_GE, text_BKE * mask_BK[..., None], mask_GK.sum(0), margin, image_to_text)
        loss_KB = loss_KB + label_smoothing * (found.own_KX - scale * mean_KB)
    if weights_BK is not None:
        loss_KB = loss_KB * weights_BK.T
    captions = mask_GK.sum().clamp_min(1)
    loss, right = (x.masked_fill(~mask_BK.T, 0).sum() for x in (loss_KB, found.right_KX))
    return loss * dist.world() / captions, right * dist.world() / captions


class Contrastive(Term):
    """CLIP's loss between images and one caption group, multi-positive where it has several slots.

    Uses the model's own temperature. label_smoothing: in [0, 1); Long-CLIP trains with 0.1. margin: how
    much the likeness of two captions, a cosine, raises their score with each other's image; HN-CLIP's
    gamma, 0.5 there. image_to_text: the share of the direction in which an image looks for its caption;
    ConVIRT's lambda, 0.75 there. weighted: captions count by their weight (`Text.weight`), relative to the
    mean weight of the batch. false_above: negatives that score more than this (a cosine) above the pair
    itself are taken for true and left out; UniME's beta, 0.1 there. hardest: of the negatives, so many that
    score highest; 8 there. Measure: `accuracy`, the in-batch top-1 of both directions among all.
    """

    def __init__(
        self,
        texts: str,
        weight: float = 1.0,
        label_smoothing: float = 0.0,
        margin: float = 0.0,
        image_to_text: float = 0.5,
        weighted: bool = False,
        false_above: float | None = None,
        hardest: int | None = None,
    ) -> None:
        super().__init__(texts, weight)
        self.label_smoothing = checked_smoothing(label_smoothing)
        if margin < 0:
            raise UserError(f"margin is {margin}, but must be at least 0; HN-CLIP's is 0.5.")
        if not 0 <= image_to_text <= 1:
            raise UserError(f"image_to_text is {image_to_text}, but must be from 0 to 1; 0.5 is symmetric.")
        self.margin, self.image_to_text, self.weighted = margin, image_to_text, weighted
        self.negatives = checked(Negatives(false_above, hardest), label_smoothing)

    def forward(self, embeddings: Embeddings) -> Loss:
        """Raises UserError on a global batch of one image, which has nothing to contrast."""
        image_GE = embeddings.all_images().float()
        check_contrast(len(image_GE))
        value, accuracy = info_nce(
            image_GE,
            embeddings.text(self.texts).float(),
            embeddings.all_mask(self.texts),
            embeddings.scale.float(),
            self.label_smoothing,
            self.margin,
            embeddings.gather,
            relative_weights(embeddings, self.texts) if self.weighted else None,
            self.image_to_text,
            self.negatives,
        )
        return Loss(value, {"accuracy": accuracy})


def check_contrast(images: int) -> None:
    """Raise UserError where the global batch holds fewer than two images."""
    if images < 2:
        raise UserError(
            f"A contrastive loss needs other images to contrast with, but the global batch holds {images}. "
            "Set batch_size to 2 or more."
        )


def checked_smoothing(label_smoothing: float) -> float:
    """`label_smoothing` itself; raises UserError outside [0, 1)."""
    if not 0 <= label_smoothing < 1:
        raise UserError(f"label_smoothing is {label_smoothing}, but must be at least 0 and below 1.")
    return label_smoothing

"""Symmetric InfoNCE over caption slots: CLIP's loss, and DreamLIP's multi-positive form of it.

In: images and texts of the global batch and which rows are this process's. Out: this process's share
of the loss. Local legend: G rows of the global batch, R local rows, X columns of a softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longclip import dist
from longclip.objectives.term import Loss, Term
from longclip.types import Embeddings, UserError

Result = TypeVar("Result")


class RowLosses(NamedTuple):
    """Cross-entropy of every row, and whether its right column alone scores highest."""

    loss_R: Tensor
    right_R: Tensor  # float 0 or 1, no gradient


def cross_entropy(
    row_RE: Tensor,
    column_XE: Tensor,
    mask_X: Tensor,
    target_R: Tensor,
    scale: Tensor,
    label_smoothing: float = 0.0,
) -> RowLosses:
    """Softmax cross-entropy of `scale * row . column` over the columns where `mask_X` is True.

    As `torch.nn.functional.cross_entropy` on the valid columns alone, label smoothing included
    (epsilon is spread over the valid ones). Rows whose own column is masked give a number that means
    nothing: mask them out of what follows (a product with 0 could meet an infinity). A tie with the
    right column counts as wrong.
    """
    # Written as lse - (1 - eps) * target - eps * mean(valid), so that no masked -inf meets a zero.
    logits_RX = scale * row_RE @ column_XE.T
    lse_R = logits_RX.masked_fill(~mask_X, torch.finfo(logits_RX.dtype).min).logsumexp(1)
    own_R = logits_RX.gather(1, target_R[:, None]).squeeze(1)
    mean_R = logits_RX.masked_fill(~mask_X, 0).sum(1) / mask_X.sum().clamp_min(1)
    loss_R = lse_R - (1 - label_smoothing) * own_R - label_smoothing * mean_R
    right_R = ((logits_RX >= own_R[:, None]) & mask_X).sum(1) == 1
    return RowLosses(loss_R, right_R.to(loss_R.dtype).detach())


def info_nce(
    image_GE: Tensor,
    text_GKE: Tensor,
    mask_GK: Tensor,
    scale: Tensor,
    rows: slice,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Symmetric InfoNCE, every caption slot its own G x G problem (multi-positive).

        L = 1/n sum over present (b, k) of
              1/2 [CE_j(s v_b . t_jk; j = b) + CE_j(s t_bk . v_j; j = b)],   n = present captions

    CLIP, Radford et al. 2021, figure 3, for K = 1; DreamLIP, Zheng et al. 2024, for K > 1, where
    their mean over slots becomes a mean over captions so that ragged captions weigh alike (equal
    where none is absent). Captions of one image in OTHER slots are never its negatives. An absent
    caption is neither row nor column; its image stays a negative for the slot's other captions. A
    slot that nobody fills contributes 0.

    image_GE, text_GKE: L2-normalised, of all processes. mask_GK: which captions exist. scale:
    exp(temperature). rows: this process's images. label_smoothing: in [0, 1).
    Returns this process's share of the loss and, without gradient, of the top-1 accuracy in [0, 1]
    (both directions, ties wrong); their means over processes are the global batch's.
    """
    everyone_G = torch.ones_like(mask_GK[:, 0])
    target_R = torch.arange(rows.start, rows.stop, device=mask_GK.device)

    def both_ways(slot: int) -> tuple[Tensor, Tensor]:
        text_GE, mask_G = text_GKE[:, slot], mask_GK[:, slot]
        images = cross_entropy(image_GE[rows], text_GE, mask_G, target_R, scale, label_smoothing)
        texts = cross_entropy(text_GE[rows], image_GE, everyone_G, target_R, scale, label_smoothing)
        absent_R = ~mask_G[rows]
        loss_R, right_R = images.loss_R + texts.loss_R, images.right_R + texts.right_R
        return loss_R.masked_fill(absent_R, 0).sum() / 2, right_R.masked_fill(absent_R, 0).sum() / 2

    # Several slots make each one's logits again in the backward pass, so that memory stays at one
    # slot's R x G instead of K of them.
    slots = text_GKE.shape[1]
    sums = [both_ways(0)] if slots == 1 else [again_in_backward(both_ways, k) for k in range(slots)]
    loss, right = (torch.stack(part).sum() for part in zip(*sums, strict=True))
    share = image_GE.shape[0] / (rows.stop - rows.start) / mask_GK.sum().clamp_min(1)
    return loss * share, right.detach() * share


class Contrastive(Term):
    """CLIP's loss between images and one caption group, multi-positive where it has several slots.

    Uses the model's own temperature. label_smoothing: in [0, 1); Long-CLIP trains with 0.1.
    Measure: `accuracy`, the in-batch top-1 of both directions.
    """

    def __init__(self, texts: str, weight: float = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__(texts, weight)
        self.label_smoothing = checked_smoothing(label_smoothing)

    def forward(self, embeddings: Embeddings) -> Loss:
        """Raises UserError on a global batch of one image, which has nothing to contrast."""
        image_GE = embeddings.all_images().float()
        check_contrast(image_GE.shape[0])
        value, accuracy = info_nce(
            image_GE,
            embeddings.all_text(self.texts).float(),
            embeddings.all_mask(self.texts),
            embeddings.scale.float(),
            dist.rows(embeddings.image_BE.shape[0]),
            self.label_smoothing,
        )
        return Loss(value, {"accuracy": accuracy})


def again_in_backward(function: Callable[[int], Result], slot: int) -> Result:
    """`function(slot)`, keeping none of its intermediate tensors: the backward pass makes them again."""
    result: Result = checkpoint(function, slot, use_reentrant=False, preserve_rng_state=False)
    return result


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

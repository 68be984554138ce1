"""Negatives that only their own image meets: captions with one thing made wrong (`captions.Swapped`).

In: images, a caption group and the group of its negatives. Out: InfoNCE whose images see those negatives
beside all captions of the batch (`OwnRow`), or a choice between a caption and its negatives (`Choice`).
Negatives stay on their process: nobody else meets them.
Local legend: N negatives of a caption.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from longclip import dist
from longclip.objectives.contrastive import check_contrast, symmetric_cross_entropy
from longclip.objectives.term import Loss, Term
from longclip.objectives.tiles import Pairs
from longclip.types import Embeddings, UserError


class Paired(NamedTuple):
    """This process's captions of a group, each with its negatives."""

    text_BKE: Tensor
    wrong_BKNE: Tensor
    there_BKN: Tensor  # bool: both the caption and the negative exist
    asked: Tensor  # how many captions of the global batch have a negative, at least 1


class Scores(NamedTuple):
    """What a caption's image, or its patches, think of it and of its negatives."""

    own_BK: Tensor
    wrong_BK: Tensor  # log-sum-exp over negatives; the lowest number of the dtype where there is none
    best_BK: Tensor  # the highest negative, no gradient


def paired(embeddings: Embeddings, texts: str, negatives: str) -> Paired:
    """A caption group and that of its negatives, N slots for each of its K.

    Raises:
        UserError: the slots of the two groups do not correspond.
    """
    text_BKE, wrong_BJE = embeddings.text(texts).float(), embeddings.text(negatives).float()
    slots, wrongs = text_BKE.shape[1], wrong_BJE.shape[1]
    if wrongs % slots:
        raise UserError(
            f'"{negatives}" has {wrongs} slots, which are no negatives for the {slots} of "{texts}": fill it '
            f"with longclip.captions.Swapped and of=${{recipe.captions.{texts}}}."
        )
    mask_GKN = (
        embeddings.all_mask(negatives).unflatten(1, (slots, -1)) & embeddings.all_mask(texts)[..., None]
    )
    there_BKN = mask_GKN[dist.rows(len(text_BKE))]
    return Paired(
        text_BKE, wrong_BJE.unflatten(1, (slots, -1)), there_BKN, mask_GKN.any(2).sum().clamp_min(1)
    )


def checked_name(negatives: str, texts: str) -> str:
    """`negatives` itself; raises UserError where that group would draw other texts than `texts` does."""
    if negatives.partition("-")[0] != texts.partition("-")[0]:
        raise UserError(
            f'negatives are of the texts that the group "{texts}" draws, and "{negatives}" draws for itself: '
            f'call that group "{texts}-wrong" (groups that are called the same up to a hyphen draw alike)'
        )
    return negatives


def score(seen_BKE: Tensor, pairs: Paired, scale: Tensor) -> Scores:
    """s seen . caption, and log sum_n exp(s seen . negative n)."""
    own_BK = scale * torch.einsum("bke,bke->bk", seen_BKE, pairs.text_BKE)
    z_BKN = scale * torch.einsum("bke,bkne->bkn", seen_BKE, pairs.wrong_BKNE)
    z_BKN = z_BKN.masked_fill(~pairs.there_BKN, torch.finfo(z_BKN.dtype).min)
    return Scores(own_BK, z_BKN.logsumexp(2), z_BKN.detach().amax(2))


def choice(scores: Scores, pairs: Paired) -> tuple[Tensor, Tensor]:
    """Cross-entropy of a caption among its negatives, and how often it scores above all of them.

        L = 1/n sum over captions with a negative of log(1 + sum_n exp(s x . t-_n - s x . t))

    Count-to-Ten, Paiss et al. 2023, equation 2 (one negative); SVLC, Doveh et al. 2023; FG-CLIP, Xie et al.
    2025, section 3.3 (ten). Returns this process's shares.
    """
    asked_BK = pairs.there_BKN.any(2)
    loss_BK = softplus(scores.wrong_BK - scores.own_BK)
    right_BK = (scores.own_BK > scores.best_BK).to(loss_BK)
    loss, right = (x.masked_fill(~asked_BK, 0).sum() for x in (loss_BK, right_BK))
    return loss * dist.world() / pairs.asked, right * dist.world() / pairs.asked


class Choice(Term):
    """An image chooses between each of its captions and that caption's negatives.

    texts, negatives: the two groups. Uses the model's own temperature; captions without a negative do not
    count. Measure: `chosen`, the share of captions that score above all of their negatives.
    """

    def __init__(self, texts: str, negatives: str, weight: float = 1.0) -> None:
        super().__init__(texts, weight)
        self.groups = texts, checked_name(negatives, texts)

    def forward(self, embeddings: Embeddings) -> Loss:
        """Raises UserError where the slots of the groups do not correspond."""
        pairs = paired(embeddings, *self.groups)
        image_BKE = embeddings.image_BE.float()[:, None].expand_as(pairs.text_BKE)
        value, chosen = choice(score(image_BKE, pairs, embeddings.scale.float()), pairs)
        return Loss(value, {"chosen": chosen})


class OwnRow(Term):
    """InfoNCE in which an image meets the negatives of its own captions beside the captions of all images.

        L = 1/n sum over present (b, k) of 1/2 [CE_j(z_bjk and the z-_bkn; j = b) + CE_j(z_jbk; j = b)]
        z_ijk = s v_i . t_jk,   z-_bkn = s v_b . t-_bkn,   n = present captions

    NegCLIP, Yuksekgonul et al. 2023, section 4, where all images meet all negatives: most of those are wrong
    in more than one thing and soon contribute nothing. A negative looks for no image. Slots and temperature
    are those of `Contrastive`. Measures: `accuracy` in the batch without negatives; `chosen` as in `Choice`.
    """

    def __init__(self, texts: str, negatives: str, weight: float = 1.0) -> None:
        super().__init__(texts, weight)
        self.groups = texts, checked_name(negatives, texts)

    def forward(self, embeddings: Embeddings) -> Loss:
        """Raises UserError on a global batch of one image, and where the slots do not correspond."""
        image_GE, mask_GK = embeddings.all_images().float(), embeddings.all_mask(self.texts)
        check_contrast(len(image_GE))
        pairs, scale = paired(embeddings, *self.groups), embeddings.scale.float()
        own = dist.rows(len(pairs.text_BKE))
        scores = score(image_GE[own][:, None].expand_as(pairs.text_BKE), pairs, scale)
        found = symmetric_cross_entropy(
            image_GE,
            pairs.text_BKE,
            scale,
            Pairs(mask_GK[own], own.start),
            beside_KX=scores.wrong_BK.T,
        )
        absent_KB, captions = ~mask_GK[own].T, mask_GK.sum().clamp_min(1)
        value, accuracy = (
            x.masked_fill(absent_KB, 0).sum() * dist.world() / captions
            for x in (found.loss_KX, found.right_KX)
        )
        return Loss(value, {"accuracy": accuracy, "chosen": choice(scores, pairs)[1]})

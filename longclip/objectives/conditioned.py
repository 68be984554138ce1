"""FLAIR's loss: what a caption finds in an image must look like the caption.

In: patches of this process's images and a caption group. Out: a logistic loss over (image, caption) pairs,
each judged by the patches that the caption attends to, and one over global features. Captions travel,
patches stay where they are, and what captions found in images lives for one tile of pairs.
Local legend: J captions that an image meets, X captions that images of one turn meet.
"""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize

from longclip import dist
from longclip.objectives.imagewise import imagewise
from longclip.objectives.pooling import PoolingHead, Weights, check_heads, pool
from longclip.objectives.sigmoid import pairwise_sigmoid
from longclip.objectives.term import Loss, Term
from longclip.types import Embeddings

CPU_PAIRS = 4096
"""Pairs in one tile; each has about eight vectors of width E while it is worked on."""

CUDA_PAIRS = 16384
"""A GPU wants few, large kernels; 256 MiB at a width of 512."""


class Captions(NamedTuple):
    """Captions as an image meets them; the axes before E are K of B images, or X."""

    query: Tensor  # [..., E], what the pooling head makes of the text
    text: Tensor  # [..., E], L2-normalised


def conditioned_sigmoid(
    patches_BPE: Tensor,
    own: Captions,
    others: Captions,
    valid_BJ: Tensor,
    scale: Tensor,
    bias: Tensor,
    weights: Weights,
    heads: int,
) -> Tensor:
    """Of each image, the logistic loss over its own captions and those of other images, [B].

        L_i = -sum over valid j of log sigmoid(z (s cos(v_ij, t_j) + c)),  v_ij = pool(t_j, patches of i)
        z = 1 for the image's own captions, -1 for others

    FLAIR, Xiao et al. 2025, equation 3, before its mean. own: [B, K, E]; others: [X, E], the same for
    these images; valid_BJ, J = K + X: which of both count, own captions first. Pooled vectors of one tile
    are alive at a time, forward and backward: of some images, or of one and some of the captions.
    """
    most = CUDA_PAIRS if patches_BPE.is_cuda else CPU_PAIRS
    slots, loss_B = own.text.shape[1], patches_BPE.new_zeros(len(patches_BPE), dtype=own.text.dtype)
    tile = partial(_pair_losses, heads)
    for start in range(0, len(others.text), most):
        block = slice(start, start + most)
        kept = slice(slots if start == 0 else 0)  # an image meets its own captions once
        valid_BX = valid_BJ[:, slots:][:, block]
        images = (
            patches_BPE,
            torch.cat([valid_BJ[:, kept], valid_BX], 1),
            own.query[:, kept],
            own.text[:, kept],
        )
        shared = (others.query[block], others.text[block], scale, bias, *weights)
        loss_B = loss_B + imagewise(tile, images, shared, max(1, most // images[1].shape[1]))[0]
    return loss_B


def _pair_losses(
    heads: int,
    patches_bPE: Tensor,
    valid_bJ: Tensor,
    own_query_bKE: Tensor,
    own_text_bKE: Tensor,
    query_XE: Tensor,
    text_XE: Tensor,
    scale: Tensor,
    bias: Tensor,
    *weights: Tensor,
) -> tuple[Tensor]:
    images, slots = own_text_bKE.shape[:2]
    query_bJE = torch.cat([own_query_bKE, query_XE.expand(images, -1, -1)], 1)
    text_bJE = torch.cat([own_text_bKE, text_XE.expand(images, -1, -1)], 1)
    found_bJE = pool(query_bJE, patches_bPE, Weights(*weights), heads).to(text_bJE.dtype)
    logits_bJ = scale * (normalize(found_bJE, dim=-1) * text_bJE).sum(-1) + bias
    sign_J = torch.ones_like(logits_bJ[0])
    sign_J[slots:] = -1
    return (-logsigmoid(sign_J * logits_bJ).masked_fill(~valid_bJ, 0).sum(1),)


def one_of_each(mask_GK: Tensor, turn: int) -> tuple[Tensor, Tensor]:
    """For every image the slot of the caption that some other images meet, and whether it has any, [G] each.

    Image g shows the ((g + turn) mod n)-th of its n captions.
    """
    count_G = mask_GK.sum(1)
    turn_G = (torch.arange(len(mask_GK), device=mask_GK.device) + turn) % count_G.clamp_min(1)
    chosen_GK = mask_GK & (mask_GK.cumsum(1) - 1 == turn_G[:, None])
    return chosen_GK.int().argmax(1), count_G > 0


class TextConditioned(Term):
    """FLAIR's objective on one caption group: half text-conditioned, half global.

        L = (L_tcs + L_mps) / 2
        L_tcs = sum of the pairs' logistic losses / (G + K - 1), the captions that an image meets
        L_mps = sum of SigLIP's losses over all (image, caption) pairs / (G K), the captions there are

    FLAIR, Xiao et al. 2025, section 3.3; both with the same temperature and offset. An image meets its K
    captions and one caption of every other image. The paper draws it anew for every pair; here the captions
    of an image take turns, so that images meet each equally often and processes need agree on nothing. (One
    that all images meet would leave the others without a negative.) Where captions are absent, the divisors
    count those that are there: their mean over images for L_tcs. heads: of the pooling head, which is trained
    and not exported. bias: where the offset starts; the loss starts calm near the logarithm of the share of
    pairs that belong together.
    Measures: `conditioned`, `global`, `scale`, `bias`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"patches"})
    head: PoolingHead

    def __init__(self, texts: str, weight: float = 1.0, heads: int = 8, bias: float = -10.0) -> None:
        super().__init__(texts, weight)
        self.heads = heads
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(float(bias)))

    def build(self, width: int) -> None:
        """Raises UserError where the heads do not divide the width."""
        check_heads(self.heads, width)
        self.head = PoolingHead(width, self.heads)

    def forward(self, embeddings: Embeddings) -> Loss:
        """A global batch of one image is allowed: its captions are then all positive."""
        with torch.autocast(embeddings.image_BE.device.type, enabled=False):
            scale = self.logit_scale.exp()
            conditioned, everywhere = self._conditioned(embeddings, scale), self._global(embeddings, scale)
        measures = {"conditioned": conditioned, "global": everywhere, "scale": scale, "bias": self.logit_bias}
        return Loss((conditioned + everywhere) / 2, {name: x.detach() for name, x in measures.items()})

    def _global(self, embeddings: Embeddings, scale: Tensor) -> Tensor:
        """This process's share of L_mps."""
        image_GE, text_BKE = embeddings.all_images(), embeddings.text(self.texts)
        mask_BK, count = embeddings.mask(self.texts), embeddings.all_mask(self.texts).sum()
        total = pairwise_sigmoid(image_GE, text_BKE, mask_BK, scale, self.logit_bias)
        return total * dist.world() / count.clamp_min(1)

    def _conditioned(self, embeddings: Embeddings, scale: Tensor) -> Tensor:
        """This process's share of L_tcs; image i takes turn i mod K, and images of one turn go together."""
        assert embeddings.patches_BPE is not None, "the towers leave out patches that this term needs"
        text_BKE, mask_GK = embeddings.text(self.texts), embeddings.all_mask(self.texts)
        (images, slots), rows = mask_GK.shape, dist.rows(len(text_BKE))
        text_GKE, weights = embeddings.gather(text_BKE), self.head.weights()
        query_BKE, index_G = self.head.queries(text_BKE), torch.arange(images, device=mask_GK.device)
        total = text_BKE.new_zeros(())
        for first in range(min(slots, len(text_BKE))):
            mine = slice(first, None, slots)
            slot_G, present_G = one_of_each(mask_GK, (rows.start + first) % slots)
            other_GE = text_GKE.take_along_dim(slot_G[:, None, None], 1)[:, 0]
            others_bG = present_G & (index_G[rows][mine, None] != index_G)
            loss_b = conditioned_sigmoid(
                embeddings.patches_BPE[mine],
                Captions(query_BKE[mine], text_BKE[mine]),
                Captions(self.head.queries(other_GE), other_GE),
                torch.cat([mask_GK[rows][mine], others_bG], 1),
                scale,
                self.logit_bias,
                weights,
                self.heads,
            )
            total = total + loss_b.sum()
        pairs = mask_GK.sum() + (images - 1) * mask_GK.any(1).sum()
        return total * dist.world() * images / pairs.clamp_min(1)

"""beta-CLIP's loss: captions, sentences and phrases, each against what it finds in its own image.

In: patches of this process's images and one or two caption groups, of any granularity. Out: a contrast of
every caption with every vector that captions found, where those of one image are neither right nor wrong
but something between, by a factor beta. One vector for each caption travels; patches stay where they are.
Local legend: C captions of this process (B * K), X of all (G * K); y a caption of the same image as x.
"""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from longclip import dist
from longclip.objectives.contrastive import check_contrast
from longclip.objectives.grouping import contrast_over_batch
from longclip.objectives.imagewise import images_at_a_time, imagewise
from longclip.objectives.pooling import PoolingHead, Weights, check_heads, pool
from longclip.objectives.term import Loss, Term
from longclip.objectives.tiled import logistic
from longclip.objectives.tiles import Pairs
from longclip.types import Embeddings, UserError


def beta_softmax(
    text_BKE: Tensor, found_BKE: Tensor, found_GKE: Tensor, mask_GK: Tensor, scale: Tensor, beta: float
) -> Tensor:
    """Cross-entropy, both ways, with targets that captions of one image share.

        L_x = -1/2 sum over y of w_xy [log softmax_z(s v_x . t_z)_y + log softmax_z(s t_x . v_z)_y]
        w_xx = 1 / Z;  w_xy = beta / Z;  Z = 1 + beta (captions of the image - 1);  z: all captions there are

    beta-CLIP, Zohra et al. 2025, the soft form of beta-CAL. v_x is what caption x found in its own image.
    Computed as the loss with w_xx = 1 alone, plus how far own scores exceed those that share their target:
    the softmax over all is the same, so only scores within an image are needed. text_BKE and found_BKE, of
    unit length, are this process's, found_GKE is everybody's. Returns the sum over this process's captions.
    """
    mask_BK = mask_GK[dist.rows(len(text_BKE))]
    score_BKK = scale * text_BKE @ found_BKE.mT
    both_BKK = (score_BKK + score_BKK.mT) / 2
    excess_BKK = both_BKK.diagonal(dim1=1, dim2=2)[:, :, None] - both_BKK
    share_B = beta / (1 + beta * (mask_BK.sum(1) - 1).clamp_min(0))
    shared_B = share_B * (excess_BKK * siblings(mask_BK)).sum((1, 2))
    return contrast_over_batch(text_BKE, found_GKE, mask_GK, scale) + shared_B.sum()


def beta_logistic(
    text_BKE: Tensor, found_BKE: Tensor, found_GKE: Tensor, mask_GK: Tensor, scale: Tensor, beta: float
) -> Tensor:
    """Logistic loss of all pairs, where captions belong to what any of them found in their image.

        L = -sum over x, z of w_xz log sigmoid(+-s v_x . t_z),  + within an image, - across images
        w_xz = beta for two captions of one image, else 1

    beta-CLIP, Zohra et al. 2025, the hard form of beta-CAL, not yet divided by the number of pairs. Arguments
    as for `beta_softmax`. Returns the sum over this process's captions z and all x.
    """
    mask_BK = mask_GK[dist.rows(len(text_BKE))]
    images, slots = mask_GK.shape
    mask_C1, text_C1E = mask_BK.flatten()[:, None], text_BKE.flatten(0, 1)[:, None]
    label_X = torch.arange(images, device=mask_GK.device).repeat_interleave(slots)
    pairs = Pairs(mask_C1, dist.rows(len(mask_C1)).start, mask_GK.flatten()[:, None], label_X)
    across = logistic(found_GKE.flatten(0, 1), text_C1E, scale, torch.zeros_like(scale), pairs)
    within_BKK = softplus(-scale * text_BKE @ found_BKE.mT)
    return across + beta * (within_BKK * siblings(mask_BK)).sum()


def siblings(mask_BK: Tensor) -> Tensor:
    """Pairs of different captions of an image that both exist, [B, K, K]."""
    other_KK = ~torch.eye(mask_BK.shape[1], dtype=torch.bool, device=mask_BK.device)
    return mask_BK[:, :, None] & mask_BK[:, None, :] & other_KK


class Finder(nn.Module):
    """What a caption finds in its image: cross-attention over the patches, then an MLP with a residual.

        x = W_o attention(W_q LN(t), W_k LN(p), W_v LN(p));  v = normalise(x + MLP(LN(x)))

    beta-CLIP, Zohra et al. 2025, section on text-conditioned pooling: no residual around the attention, so
    that nothing of the caption passes but through what it attends to.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.pooling, self.norm = PoolingHead(width, heads, empty=False), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, text_BKE: Tensor, patches_BPE: Tensor) -> Tensor:
        """Unit vectors, [B, K, E]; the attention is made a few images at a time, forward and backward."""
        images = (self.pooling.queries(text_BKE), patches_BPE)
        pool_some, size = partial(_pooled, self.heads), images_at_a_time(patches_BPE)
        (pooled_BKE,) = imagewise(pool_some, images, self.pooling.weights(), size)
        found_BKE = pooled_BKE.to(text_BKE.dtype)
        return normalize(found_BKE + self.mlp(self.norm(found_BKE)), dim=-1)


def _pooled(heads: int, query_bKE: Tensor, patches_bPE: Tensor, *weights: Tensor) -> tuple[Tensor]:
    return (pool(query_bKE, patches_bPE, Weights(*weights), heads, empty=False),)


LOSSES = {"softmax": beta_softmax, "logistic": beta_logistic}


class Beta(Term):
    """beta-CLIP's contextualised alignment of captions and what they find, with a temperature of its own.

    texts, parts: one or two caption groups, such as whole captions and their sentences and phrases; all
    their captions meet. form: "softmax" (CE in the paper: mean over captions) or "logistic" (BCE: mean over
    pairs of captions). beta: 0 tells captions of one image apart as strictly as others, 1 not at all.
    heads: of the pooling head, which is trained and not exported. Measures: `scale`; `own`, the mean cosine
    of captions with what they found; `others`, that with what other captions found in the same image.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"patches"})
    finder: Finder

    def __init__(
        self,
        texts: str,
        parts: str | None = None,
        weight: float = 1.0,
        form: str = "softmax",
        beta: float = 0.5,
        heads: int = 8,
    ) -> None:
        super().__init__(texts, weight)
        if form not in LOSSES:
            raise UserError(f'Beta has form "{form}", but knows {" and ".join(LOSSES)}.')
        if not 0 <= beta <= 1:
            raise UserError(f"Beta has beta {beta}, but needs one from 0 to 1; the paper's is 0.5.")
        self.groups = (texts,) if parts is None else (texts, parts)
        self.parts, self.form, self.beta, self.heads = parts, form, beta, heads
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def build(self, width: int) -> None:
        """Raises UserError where the heads do not divide the width."""
        check_heads(self.heads, width)
        self.finder = Finder(width, self.heads)

    def forward(self, embeddings: Embeddings) -> Loss:
        """Raises UserError on a global batch of one image, which has nothing to contrast."""
        assert embeddings.patches_BPE is not None, "the towers leave out patches that this term needs"
        text_BKE = torch.cat([embeddings.text(group) for group in self.groups], 1)
        mask_GK = torch.cat([embeddings.all_mask(group) for group in self.groups], 1)
        check_contrast(len(mask_GK))
        found_BKE = self.finder(text_BKE, embeddings.patches_BPE)
        scale, count = self.logit_scale.exp(), mask_GK.sum()
        found_GKE = embeddings.gather(found_BKE)
        total = LOSSES[self.form](text_BKE, found_BKE, found_GKE, mask_GK, scale, self.beta)
        among = count if self.form == "softmax" else count**2
        measures = _cosines(text_BKE.detach(), found_BKE.detach(), mask_GK) | {"scale": scale.detach()}
        return Loss(total * dist.world() / among.clamp_min(1), measures)


def _cosines(text_BKE: Tensor, found_BKE: Tensor, mask_GK: Tensor) -> dict[str, Tensor]:
    """This process's share of the mean cosine of captions with what they, and their siblings, found."""
    mask_BK, count_G = mask_GK[dist.rows(len(text_BKE))], mask_GK.sum(1)
    cosine_BKK = text_BKE @ found_BKE.mT
    own = (cosine_BKK.diagonal(dim1=1, dim2=2) * mask_BK).sum() / count_G.sum().clamp_min(1)
    others = (cosine_BKK * siblings(mask_BK)).sum() / (count_G * (count_G - 1)).sum().clamp_min(1)
    return {"own": own * dist.world(), "others": others * dist.world()}

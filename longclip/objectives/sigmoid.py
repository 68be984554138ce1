"""SigLIP's sigmoid loss: every image and caption is a pair that belongs together or does not.

In: Embeddings and a caption group. Out: a logistic loss over all pairs of the global batch, with a
temperature and an offset of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from longclip import dist
from longclip.objectives.contrastive import again_in_backward
from longclip.objectives.term import Loss, Term
from longclip.types import Embeddings


def pairwise_sigmoid(
    image_RE: Tensor, text_GKE: Tensor, mask_GK: Tensor, scale: Tensor, bias: Tensor, rows: slice
) -> Tensor:
    """Sum over this process's images and every present caption of the logistic loss of the pair.

        L = -1/G sum over b, present (j, k) of log sigmoid(z (s v_b . t_jk + c)),  z = 1 if j = b else -1

    SigLIP, Zhai et al. 2023, equation 1 (K = 1), not yet divided by G. Captions of one image are
    positives in every slot; absent ones take no part.
    """
    index_G = torch.arange(len(mask_GK), device=mask_GK.device)
    sign_RG = (index_G[rows, None] == index_G).to(image_RE.dtype) * 2 - 1

    def slot_sum(slot: int) -> Tensor:
        logits_RG = scale * image_RE @ text_GKE[:, slot].T + bias
        return -(logsigmoid(sign_RG * logits_RG) * mask_GK[:, slot]).sum()

    return torch.stack([again_in_backward(slot_sum, k) for k in range(text_GKE.shape[1])]).sum()


class Sigmoid(Term):
    """SigLIP's loss on one caption group; a global batch of one is allowed.

    Measures: `scale`, `bias`.
    """

    def __init__(self, texts: str, weight: float = 1.0) -> None:
        super().__init__(texts, weight)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, embeddings: Embeddings) -> Loss:
        """Divided by the number of images, as SigLIP does: K slots weigh K times as much as one."""
        scale = self.logit_scale.exp()
        local = embeddings.image_BE.shape[0]
        total = pairwise_sigmoid(
            embeddings.image_BE.float(),
            embeddings.all_text(self.texts).float(),
            embeddings.all_mask(self.texts),
            scale,
            self.logit_bias,
            dist.rows(local),
        )
        # The mean over processes of sum / local images is the global sum / global images.
        return Loss(total / local, {"scale": scale.detach(), "bias": self.logit_bias.detach()})

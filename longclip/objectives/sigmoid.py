"""SigLIP's sigmoid loss: every image and caption is a pair that belongs together or does not.

In: Embeddings and a caption group. Out: a logistic loss over all pairs of the global batch, with a
temperature and an offset of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from longclip import dist
from longclip.objectives.term import Loss, Term
from longclip.objectives.tiled import logistic
from longclip.objectives.tiles import Pairs
from longclip.types import Embeddings


def pairwise_sigmoid(
    image_GE: Tensor, text_BKE: Tensor, mask_BK: Tensor, scale: Tensor, bias: Tensor
) -> Tensor:
    """Sum over all images and this process's present captions of the logistic loss of the pair.

        L = -1/G sum over i, present (b, k) of log sigmoid(z (s v_i . t_bk + c)),  z = 1 if i = b else -1

    SigLIP, Zhai et al. 2023, equation 1 (K = 1), not yet divided by G. Captions of one image are
    positives in every slot; absent ones take no part. image_GE: of all processes; text_BKE: of this one.
    """
    return logistic(image_GE, text_BKE, scale, bias, Pairs(mask_BK, dist.rows(len(text_BKE)).start))


class Sigmoid(Term):
    """SigLIP's loss on one caption group; a global batch of one is allowed.

    bias: where the offset starts. Measures: `scale`, `bias`.
    """

    def __init__(self, texts: str, weight: float = 1.0, bias: float = -10.0) -> None:
        super().__init__(texts, weight)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10)))
        self.logit_bias = nn.Parameter(torch.tensor(float(bias)))

    def forward(self, embeddings: Embeddings) -> Loss:
        """Divided by the number of images, as SigLIP does: K slots weigh K times as much as one."""
        scale = self.logit_scale.exp()
        total = pairwise_sigmoid(
            embeddings.all_images().float(),
            embeddings.text(self.texts).float(),
            embeddings.mask(self.texts),
            scale,
            self.logit_bias,
        )
        # The mean over processes of sum / local images is the global sum / global images.
        return Loss(
            total / len(embeddings.image_BE), {"scale": scale.detach(), "bias": self.logit_bias.detach()}
        )

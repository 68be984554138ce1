"""Grouping with partial ground truth: where a caption has a box, its likeness to patches is held against it.

In: projected patches of this process, a caption group, boxes where the data has them. Out: the divergence of
what a caption looks at from its box, for captions that have one; the others are grouped without a teacher,
by `grouping.Grouping` beside this term. Nothing travels but counts.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from longclip import dist
from longclip.objectives.boxes import Expected, cover, grid_of, known
from longclip.objectives.imagewise import images_at_a_time, imagewise
from longclip.objectives.term import Loss, Term
from longclip.types import Embeddings


def ground(text_BKE: Tensor, patches_BPE: Tensor, share_BKP: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """How far captions look past their boxes, and how much of the look falls on these, [B, K] each.

        KL(q || w) = sum_p q_p log(q_p / w_p),   w = softmax_p(s y . p)

    q: how the box spreads over patches (`boxes.cover`). y . p are the cosines that `grouping.group` weighs
    patches by. Their softmax is taken, not those weights: scaled between least and largest and cut off
    below a threshold, they give no gradient to a patch that a caption misses altogether.
    """
    logits_BKP = scale * text_BKE @ normalize(patches_BPE.to(text_BKE.dtype), dim=-1).mT
    log_BKP = logits_BKP.log_softmax(-1)
    apart_BK = (torch.special.xlogy(share_BKP, share_BKP) - share_BKP * log_BKP).sum(-1)
    return apart_BK, (log_BKP.detach().exp() * (share_BKP > 0)).sum(-1)


class Grounding(Term):
    """What captions that have a box look at, against the box, with a temperature of its own.

    Training only. Measures: `boxes`, the share of captions that have one; `inside`, how much of their look
    falls on patches that the box touches; `scale`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"patches"})

    def __init__(self, texts: str, weight: float = 1.0) -> None:
        super().__init__(texts, weight)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self._expected = Expected()

    def forward(self, embeddings: Embeddings) -> Loss:
        """Raises UserError with patch dropout, and where the data prove to have no boxes."""
        assert embeddings.patches_BPE is not None, "the towers leave out patches that this term needs"
        self._expected.check(embeddings)
        boxes_BK4, scale = embeddings.boxes(self.texts), self.logit_scale.exp()
        known_BK = known(boxes_BK4, embeddings.mask(self.texts))
        grid, count = grid_of(embeddings), embeddings.gather(known_BK).sum()

        def tile(
            text_bKE: Tensor, patches_bPE: Tensor, boxes_bK4: Tensor, scale: Tensor
        ) -> tuple[Tensor, Tensor]:
            return ground(text_bKE, patches_bPE, cover(boxes_bK4, grid).to(text_bKE), scale)

        images = (embeddings.text(self.texts), embeddings.patches_BPE, boxes_BK4)
        found = imagewise(tile, images, (scale,), images_at_a_time(embeddings.patches_BPE))
        value, inside = ((x_BK * known_BK).sum() * dist.world() / count.clamp_min(1) for x_BK in found)
        share = count / embeddings.all_mask(self.texts).sum().clamp_min(1)
        return Loss(value, {"boxes": share, "inside": inside.detach(), "scale": scale.detach()})

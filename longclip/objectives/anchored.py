"""Short captions stay what they were: divergence from the frozen weights of the run's start.

In: a group of short captions. Out: how far the batch's similarities have moved from those of the weights
that the run began with, which read short captions as they always did. Costs a forward pass of the frozen
towers; nothing travels but a vector an image and caption.
"""

from __future__ import annotations

from typing import ClassVar

from longclip import dist
from longclip.objectives.contrastive import check_contrast
from longclip.objectives.distilled import View, shared
from longclip.objectives.term import Loss, Term
from longclip.types import Embeddings


class Anchored(Term):
    """Divergence of short captions from the frozen start, as `distilled.divergence` with it for a teacher.

        L = 1/n sum over present (b, k) of 1/2 [KL(p_bk || q_bk) + KL(p'_bk || q'_bk)]

    p of the start at its own temperature, q of the model: the constraint with which LongPO, Chen et al. 2025,
    keeps a language model's short context while it learns a long one, on similarities. It is 0
    at the first step, as far as short captions read alike at both context lengths. Measure: `agreed`, how
    often both find the same one first.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"start"})

    def forward(self, embeddings: Embeddings) -> Loss:
        """Raises UserError on a global batch of one image."""
        start = embeddings.start
        assert start is not None, "the towers leave out the start that this term needs"
        mask_BK = embeddings.mask(self.texts)
        check_contrast(len(mask_BK) * dist.world())
        now, before = (
            View(found.image_BE.float(), found.text(self.texts).float(), found.scale.float())
            for found in (embeddings, start)
        )
        value, agreed, _ = shared(now, before, mask_BK, embeddings)
        return Loss(value, {"agreed": agreed.detach()})

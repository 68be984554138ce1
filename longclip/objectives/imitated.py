"""Texts stay what they were to another text tower: a student learns the features of the run's frozen start.

In: a caption group. Out: how far this model's captions lie from those of the weights that the run began with.
Nothing travels: a caption has its own teacher. Costs a forward pass of the frozen towers.
"""

from __future__ import annotations

from typing import ClassVar

from longclip import dist
from longclip.objectives.term import Loss, Term
from longclip.types import Embeddings


class Imitated(Term):
    """Distance of captions from what the frozen start says of them.

        L = 1/n sum over present (b, k) of [1 - t_bk . t'_bk]

    TULIP, Najdenkoska et al. 2024, arXiv 2410.10034: t of this model, t' of the start, both of unit length, n
    the captions of all processes. The start reads as much of a caption as its weights did, so let this model
    read no more (model.backbone.context_length=null): nothing is learned of what the start does not see.
    Measure: `cosine`, the mean of t . t'.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"start"})

    def forward(self, embeddings: Embeddings) -> Loss:
        start = embeddings.start
        assert start is not None, "the towers leave out the start that this term needs"
        mask_BK = embeddings.mask(self.texts)
        cosine_BK = (embeddings.text(self.texts).float() * start.text(self.texts).float()).sum(-1)
        share = dist.world() / embeddings.all_mask(self.texts).sum().clamp_min(1)
        value = (1 - cosine_BK).masked_fill(~mask_BK, 0).sum() * share
        return Loss(value, {"cosine": (cosine_BK * mask_BK).detach().sum() * share})

"""Local hard negatives: a sub-caption and the same with one thing wrong, before the patches it is about.

In: patches of this process, a group of sub-captions and the group of their negatives. Out: a choice between
them by what the RIGHT sub-caption groups of its image, so that "a blue ball" cannot be excused by something
else that is blue: what must tell the two apart is the place that the sentence speaks of.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import nn

from longclip.objectives.grouping import checked_threshold, group_tiled
from longclip.objectives.own_row import checked_name, choice, paired, score
from longclip.objectives.term import Loss, Term
from longclip.types import Embeddings


class LocalNegatives(Term):
    """Each sub-caption's patches choose between it and its negatives.

        g = group(y, patches of its image)   (`grouping.group`)
        L = 1/n sum over sub-captions with a negative of log(1 + sum_n exp(s g . y-_n - s g . y))

    Ours, out of DreamLIP's grouping and SVLC's negatives. texts, negatives: the two groups. threshold: as in
    `Grouping`. Its temperature is its own. Training only: nothing of it is exported. Measures: `chosen`, the
    share of sub-captions that fit their patches better than all of their negatives; `scale`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"patches"})

    def __init__(
        self, texts: str, negatives: str, weight: float = 1.0, threshold: float | None = None
    ) -> None:
        super().__init__(texts, weight)
        self.groups = texts, checked_name(negatives, texts)
        self.threshold = checked_threshold(threshold)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, embeddings: Embeddings) -> Loss:
        """Raises UserError where the slots of the groups do not correspond."""
        assert embeddings.patches_BPE is not None, "the towers leave out patches that this term needs"
        pairs = paired(embeddings, *self.groups)
        grouped_BKE = group_tiled(pairs.text_BKE, embeddings.patches_BPE, self.threshold).grouped_BKE
        scale = self.logit_scale.exp()
        value, chosen = choice(score(grouped_BKE, pairs, scale), pairs)
        return Loss(value, {"chosen": chosen, "scale": scale.detach()})

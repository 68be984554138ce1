"""FG-CLIP's region losses: a caption with a box against what the image shows there.

In: projected patches of this process and captions with boxes. Out: contrast between each such caption and the
patches that its box covers (`Regions`), or a choice between it and its negatives by these patches
(`RegionChoice`). Patches never leave their process: one vector for each caption travels.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from longclip import dist
from longclip.objectives.boxes import Expected, cover, grid_of, known
from longclip.objectives.contrastive import check_contrast
from longclip.objectives.grouping import contrast_over_batch
from longclip.objectives.imagewise import images_at_a_time, imagewise
from longclip.objectives.own_row import checked_name, choice, paired, score
from longclip.objectives.term import Loss, Term
from longclip.types import Embeddings


def pool_regions(boxes_BK4: Tensor, patches_BPE: Tensor, grid: tuple[int, int]) -> Tensor:
    """What an image shows inside each box, as one unit vector, [B, K, E]; zeros without a box.

        r = normalise(sum_p c_p p),   c as in `boxes.cover`

    FG-CLIP, Xie et al. 2025, section 3.2 (RoIAlign to 1 x 1). Patches are read a few images at a time.
    """

    def tile(boxes_bK4: Tensor, patches_bPE: Tensor) -> tuple[Tensor]:
        return (normalize(cover(boxes_bK4, grid) @ patches_bPE.to(boxes_bK4.dtype), dim=-1),)

    return imagewise(tile, (boxes_BK4, patches_BPE), size=images_at_a_time(patches_BPE))[0]


def contrast_regions(text_BKE: Tensor, region_GKE: Tensor, known_GK: Tensor, scale: Tensor) -> Tensor:
    """Captions against the regions that belong to them, this process's share.

        L = 1/n sum over x with a region of 1/2 [CE_z(s y_x . r_z; z = x) + CE_z(s r_x . y_z; z = x)]

    FG-CLIP, section 3.2. What is not known is neither row nor column; captions of one image are each other's
    negatives. text_BKE: of this process; regions: of all.

    Raises:
        UserError: the global batch holds one image.
    """
    check_contrast(len(known_GK))
    total = contrast_over_batch(text_BKE, region_GKE, known_GK, scale)
    return total * dist.world() / known_GK.sum().clamp_min(1)


class Regions(Term):
    """Captions with a box against what their boxes show, over all such captions of the global batch.

    See `contrast_regions`. own_scale: a temperature of its own, as FG-CLIP has it; or the model's, as GRAIN.
    Training only: nothing of it is exported. Measures: `boxes`, the share of captions that have one; `scale`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"patches"})

    def __init__(self, texts: str, weight: float = 1.0, own_scale: bool = True) -> None:
        super().__init__(texts, weight)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07))) if own_scale else None
        self._expected = Expected()

    def forward(self, embeddings: Embeddings) -> Loss:
        """Raises UserError with patch dropout, and where the data prove to have no boxes."""
        assert embeddings.patches_BPE is not None, "the towers leave out patches that this term needs"
        self._expected.check(embeddings)
        boxes_BK4, mask_BK = embeddings.boxes(self.texts), embeddings.mask(self.texts)
        region_BKE = pool_regions(boxes_BK4, embeddings.patches_BPE, grid_of(embeddings))
        known_GK = embeddings.gather(known(boxes_BK4, mask_BK))
        scale = embeddings.scale.float() if self.logit_scale is None else self.logit_scale.exp()
        value = contrast_regions(embeddings.text(self.texts), embeddings.gather(region_BKE), known_GK, scale)
        share = known_GK.sum() / embeddings.all_mask(self.texts).sum().clamp_min(1)
        return Loss(value, {"boxes": share, "scale": scale.detach()})


class RegionChoice(Term):
    """What a caption's box shows chooses between the caption and its negatives, each with one thing wrong.

        L = 1/n sum over x with a box and a negative of log(1 + sum_n exp(s r_x . y-_xn - s r_x . y_x))

    FG-CLIP, section 3.3, with 10 negatives. texts, negatives: the two groups (`captions.Swapped`). Its
    temperature is its own. Training only. Measures: `chosen`, how often the caption wins; `scale`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"patches"})

    def __init__(self, texts: str, negatives: str, weight: float = 1.0) -> None:
        super().__init__(texts, weight)
        self.groups = texts, checked_name(negatives, texts)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self._expected = Expected()

    def forward(self, embeddings: Embeddings) -> Loss:
        """Raises UserError with patch dropout, without any boxes, and where slots do not correspond."""
        assert embeddings.patches_BPE is not None, "the towers leave out patches that this term needs"
        self._expected.check(embeddings)
        boxes_BK4, pairs = embeddings.boxes(self.texts), paired(embeddings, *self.groups)
        there_BKN = pairs.there_BKN & known(boxes_BK4, embeddings.mask(self.texts))[..., None]
        asked = embeddings.gather(there_BKN.any(2)).sum().clamp_min(1)
        region_BKE = pool_regions(boxes_BK4, embeddings.patches_BPE, grid_of(embeddings))
        scale, pairs = self.logit_scale.exp(), pairs._replace(there_BKN=there_BKN, asked=asked)
        value, chosen = choice(score(region_BKE, pairs, scale), pairs)
        return Loss(value, {"chosen": chosen, "scale": scale.detach()})

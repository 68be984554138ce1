"""Does a sentence say something that can be seen? What does not is drawn to a learned NULL image.

In: captions and images. Out: InfoNCE with one more image among which texts choose, and of every caption how
much of it is visual, which is its weight. Local legend: k slots of all groups together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize

from longclip import dist
from longclip.objectives.contrastive import check_contrast, own_rows
from longclip.objectives.gates import Gates, mean
from longclip.objectives.term import Loss, Term
from longclip.objectives.tiled import contrast
from longclip.objectives.tiles import Pairs
from longclip.objectives.units import names, units
from longclip.types import Embeddings, UserError

HALVINGS = 40
"""Of an interval of 800, four times a score at the highest temperature: float32 knows no finer."""


@torch.no_grad()
def null_share(preferred_Bk: Tensor, preferred_Gk: Tensor, mask_Gk: Tensor, share: float) -> Tensor:
    """How far each caption belongs to NULL, so that on the mean of all captions it is `share`.

        r = sigmoid(x - c),   c such that mean(r) = share,   x = s (t . n - t . v)

    x: how much a caption prefers NULL to its own image, on this process and on all. c is found by halving.
    """
    target = share * mask_Gk.sum()
    low, high = (preferred_Gk.new_full((), bound) for bound in (-400.0, 400.0))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        above = (torch.sigmoid(preferred_Gk - middle) * mask_Gk).sum() > target
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return torch.sigmoid(preferred_Bk - (low + high) / 2)


class Visualness(Term):
    """InfoNCE whose texts may also choose a learned NULL image, as what says nothing visual should.

        L = 1/n sum over present (b, k) of w_bk 1/2 [(1 - r_bk) CE_j(s v_b . t_jk)
            - (1 - r_bk) log p(v_b | t_bk) - r_bk log p(n | t_bk)],   p over all images and n

    Visualness, Verma et al. 2023 (TIP-CLIP), where people say which sentences are visual (r = 0) and which
    are not (r = 1). labelled: so it is here, by `Text.weight` = 1 - r. Otherwise r is what the model thinks
    (`null_share`), the mean being held at `share`: without that hold NULL, which sits among the texts, where
    no image does, draws all of them where they lie close together. w is `Text.weight`, unless that is the
    label, times ALIP's gates where `gated`. Captions that belong to NULL are weighed down by themselves.

    texts: caption groups. NULL is trained and not exported; 1 - t . n scores sentences for a sampler.
    Measures: `visual`, the mean of 1 - r; `null`, the mean of t . n; `weight`, the mean of w (1 - r).
    """

    null_E: nn.Parameter

    def __init__(
        self,
        texts: str | Sequence[str],
        weight: float = 1.0,
        share: float = 0.1,
        labelled: bool = False,
        gated: bool = False,
    ) -> None:
        super().__init__(", ".join(names(texts)), weight)
        self.groups = names(texts)
        if not 0 < share < 1:
            raise UserError(
                f"share is {share}, but must be above 0 and below 1: of captions that show nothing."
            )
        self.share, self.labelled = share, labelled
        self.gates = Gates(len(self.groups)) if gated else None

    def build(self, width: int) -> None:
        self.null_E = nn.Parameter(normalize(torch.randn(width), dim=-1))

    def forward(self, embeddings: Embeddings) -> Loss:
        """Raises UserError on a global batch of one image."""
        image_GE, scale = embeddings.all_images().float(), embeddings.scale.float()
        check_contrast(len(image_GE))
        captions = units(embeddings, self.groups)
        text_BkE, mask_Gk, weights_Bk = captions
        own = dist.rows(len(text_BkE))
        like_Bk = text_BkE @ normalize(self.null_E, dim=-1)
        seen = contrast(image_GE, text_BkE, scale, Pairs(mask_Gk[own], own.start))
        rows_Bk, own_Bk = own_rows(seen, len(text_BkE))[0].T, seen.own_KX.T
        null_Bk = scale * like_Bk
        preferred_Bk = (null_Bk - own_Bk).detach()
        if self.labelled:
            r_Bk, weights_Bk = 1 - weights_Bk.clamp(0, 1), torch.ones_like(weights_Bk)
        else:
            r_Bk = null_share(preferred_Bk, embeddings.gather(preferred_Bk), mask_Gk, self.share)
        if self.gates is not None:
            agreement_Bk, fit_Bk = self.gates(embeddings, self.groups)
            weights_Bk = weights_Bk * agreement_Bk * fit_Bk
        all_Bk = torch.logaddexp(seen.column_negatives_KX.T, torch.logaddexp(own_Bk, null_Bk))
        to_image_Bk = all_Bk - (1 - r_Bk) * own_Bk - r_Bk * null_Bk
        to_text_Bk = -(1 - r_Bk) * logsigmoid(own_Bk - rows_Bk)
        value = mean(weights_Bk * (to_image_Bk + to_text_Bk) / 2, captions)
        measures = {"visual": 1 - r_Bk, "null": like_Bk.detach(), "weight": weights_Bk * (1 - r_Bk)}
        return Loss(value, {name: mean(x, captions) for name, x in measures.items()})

"""GRAIN's matching: queries find regions in an image, and described boxes are matched to what they found.

In: projected patches of this process, captions with boxes. Out: contrast between each such caption and the
query that was matched to its box, and how far the query's own box is from it. The head that queries is
trained and not exported. Patches never leave their process: one vector for each caption travels.
Local legend: N queries of an image.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import normalize

from longclip import dist
from longclip.objectives.assignment import assign
from longclip.objectives.boxes import Expected, centred, corners, grid_of, iou, known, places
from longclip.objectives.imagewise import images_at_a_time, imagewise
from longclip.objectives.pooling import check_heads
from longclip.objectives.regions import contrast_regions
from longclip.objectives.term import Loss, Term
from longclip.types import Embeddings, UserError

L1, GIOU = 5.0, 2.0
"""What matching pays for a wrong box, in DETR (Carion et al. 2020) and GRAIN; losses weigh otherwise."""


class Queries(nn.Module):
    """What is there in an image, and where: unit vectors and boxes, given as centre and size.

    queries: learnt ones, which look at patches through a decoder (GRAIN, after DETR); None: every patch
    is one and looks no further (OWL-ViT, Minderer et al. 2022), its box beginning as the patch itself.
    """

    def __init__(self, width: int, queries: int | None, layers: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query_NE, self.decoder = None, None
        if queries is not None:
            layer = nn.TransformerDecoderLayer(
                width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            self.query_NE = nn.Parameter(torch.randn(queries, width))
            self.decoder = nn.TransformerDecoder(layer, layers, nn.LayerNorm(width))
        self.region = nn.Linear(width, width, bias=False)
        hidden = (nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.box = nn.Sequential(*hidden, nn.Linear(width, 4))

    def forward(self, patches_BPE: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(region_BNE, box_BN4)."""
        seen_BNE = self.norm(patches_BPE.to(self.norm.weight.dtype))
        if self.decoder is None or self.query_NE is None:
            logits_BN4 = self.box(seen_BNE) + places(grid, seen_BNE.device).to(seen_BNE.dtype).logit(1e-6)
        else:
            seen_BNE = self.decoder(self.query_NE.expand(len(seen_BNE), -1, -1), seen_BNE)
            logits_BN4 = self.box(seen_BNE)
        return normalize(self.region(seen_BNE), dim=-1), logits_BN4.sigmoid()


class Matched(NamedTuple):
    """What the query of each caption found; means nothing where the caption has no box."""

    region_BKE: Tensor
    apart_BK: Tensor  # L1 distance of its box from the caption's, in centre and size
    giou_BK: Tensor
    iou_BK: Tensor


def match(region_BNE: Tensor, box_BN4: Tensor, boxes_BK4: Tensor, known_BK: Tensor) -> Matched:
    """To each caption with a box its own query, such that all boxes of an image fit best.

        sigma = argmin sum_k 5 |b_k - b^_sigma(k)|_1 - 2 GIoU(b_k, b^_sigma(k))

    GRAIN, Halbe et al. 2024, section 3.3, after DETR, equations 1 and 3; by boxes alone, so that what a
    description says is not needed to find its region. No gradient through the choice.
    """
    truth_BK4 = centred(boxes_BK4.nan_to_num(0))
    apart_BKN = (truth_BK4[:, :, None] - box_BN4[:, None]).abs().sum(-1)
    overlap_BKN = iou(corners(truth_BK4)[:, :, None], corners(box_BN4)[:, None])[1]
    cost_BKN = (L1 * apart_BKN - GIOU * overlap_BKN).detach()
    # What is not finite has no best match; the loss is not finite then, and the trainer says so.
    query_BK1 = assign(cost_BKN.where(known_BK[..., None] & cost_BKN.isfinite(), 0))[..., None]
    found_BK4 = box_BN4.take_along_dim(query_BK1, 1)
    iou_BK, giou_BK = iou(corners(truth_BK4), corners(found_BK4))
    return Matched(
        region_BNE.take_along_dim(query_BK1, 1),
        (truth_BK4 - found_BK4).abs().sum(-1),
        giou_BK,
        iou_BK.detach(),
    )


class Matching(Term):
    """Captions with boxes against the queries that found them.

        L = L_rd + l1 / n sum |b - b^|_1 + giou / n sum (1 - GIoU(b, b^)),   n = captions with a box

    GRAIN, section 3.3, without its image query: the global feature stays the tower's own, which is what is
    exported. L_rd is `contrast_regions`, both ways and over the batch of all processes. queries: None for
    patches, see `Queries`. Uses the model's own temperature. Measures: `contrast`; `iou` of the matched
    boxes; `boxes`, the share of captions that have one.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"patches"})
    head: Queries

    def __init__(
        self,
        texts: str,
        weight: float = 1.0,
        queries: int | None = 10,
        layers: int = 2,
        heads: int = 8,
        l1: float = 1.0,
        giou: float = 1.0,
    ) -> None:
        super().__init__(texts, weight)
        self.queries, self.layers, self.heads = queries, layers, heads
        self.l1, self.giou = l1, giou
        self._expected = Expected()

    def build(self, width: int) -> None:
        """Raises UserError where the heads do not divide the width."""
        if self.queries is not None:
            check_heads(self.heads, width)
        self.head = Queries(width, self.queries, self.layers, self.heads)

    def forward(self, embeddings: Embeddings) -> Loss:
        """Raises UserError with patch dropout, with more captions than queries, and without any boxes."""
        self._expected.check(embeddings)
        boxes_BK4 = embeddings.boxes(self.texts)
        known_BK = known(boxes_BK4, embeddings.mask(self.texts))
        matched = self._matched(embeddings, boxes_BK4, known_BK)
        known_GK = embeddings.gather(known_BK)
        region_GKE = embeddings.gather(matched.region_BKE)
        scale, count = embeddings.scale.float(), known_GK.sum().clamp_min(1)
        contrast = contrast_regions(embeddings.text(self.texts), region_GKE, known_GK, scale)
        apart, giou, overlap = (
            x_BK.masked_fill(~known_BK, 0).sum() * dist.world() / count
            for x_BK in (matched.apart_BK, 1 - matched.giou_BK, matched.iou_BK)
        )
        share = known_GK.sum() / embeddings.all_mask(self.texts).sum().clamp_min(1)
        measures = {"contrast": contrast.detach(), "iou": overlap.detach(), "boxes": share}
        return Loss(contrast + self.l1 * apart + self.giou * giou, measures)

    def _matched(self, embeddings: Embeddings, boxes_BK4: Tensor, known_BK: Tensor) -> Matched:
        """A few images at a time, forward and backward; parameters are given, for gradient to reach them."""
        assert embeddings.patches_BPE is not None, "the towers leave out patches that this term needs"
        patches_BPE, grid = embeddings.patches_BPE, grid_of(embeddings)
        self._check_queries(boxes_BK4.shape[1], patches_BPE.shape[1])
        names, weights = zip(*self.head.named_parameters(), strict=True)

        def tile(patches_bPE: Tensor, boxes_bK4: Tensor, known_bK: Tensor, *weights: Tensor) -> Matched:
            given = dict(zip(names, weights, strict=True))
            region_bNE, box_bN4 = functional_call(self.head, given, (patches_bPE, grid))
            return match(region_bNE, box_bN4, boxes_bK4, known_bK)

        images = (patches_BPE, boxes_BK4, known_BK)
        return Matched(*imagewise(tile, images, weights, images_at_a_time(patches_BPE)))

    def _check_queries(self, captions: int, patches: int) -> None:
        queries = patches if self.queries is None else self.queries
        if queries < captions:
            raise UserError(
                f'matching has {queries} queries for the {captions} captions that "{self.texts}" may show of '
                f"an image; set the term's queries to {captions} or more, or its policy's count to {queries}"
            )

"""FLAME's loss: an image belongs to every facet that a language model reads from its caption.

In: images, and a side-car's column with several embeddings of each image's caption, made once by a frozen
language model. Out: a logistic loss over all (image, facet) pairs of the batch, with a temperature, an
offset and a projector of its own. Images travel, facets stay where they are.
Local legend: F facets of an image, d the language model's width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from longclip import dist
from longclip.objectives.sigmoid import pairwise_sigmoid
from longclip.objectives.term import Loss, Term
from longclip.types import Embeddings, UserError


class Facets(Term):
    """SigLIP's loss with several positives an image, on embeddings of a frozen language model.

        L = -1/n sum over i, (b, f) shown of log sigmoid(z (s v_i . u_bf + c)),  u = normalise(W x + w)

    FLAME, Cao et al. 2025; z = 1 if i = b else -1, n the pairs that belong together: the mean
    over facets, so that showing more of them is no larger loss.

    column: facets end to end, [facets * width] numbers an image. facets: F. width: d. shown: so many of them
    a step, in turn; None: all. The projector W is trained with the image tower and never exported, so give
    the recipe another term for the text tower. Measures: `known`, the share of images that have facets,
    `scale`, `bias`.
    """

    projector: nn.Linear
    turn: Tensor

    def __init__(
        self,
        column: str,
        facets: int,
        width: int,
        weight: float = 1.0,
        shown: int | None = None,
        bias: float = -10.0,
    ) -> None:
        super().__init__("", weight)
        self.groups = ()  # its texts come from the column
        if facets < 1 or width < 1 or not 1 <= (shown or facets) <= facets:
            raise UserError(
                f"Facets has facets {facets}, width {width} and shown {shown}, but needs whole numbers of at "
                "least 1, and shown up to facets (null: all)."
            )
        self.column, self.facets, self.width, self.shown = column, facets, width, shown or facets
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10)))
        self.logit_bias = nn.Parameter(torch.tensor(float(bias)))
        self.register_buffer("turn", torch.zeros((), dtype=torch.int64))

    @property
    def columns(self) -> dict[str, int | None]:
        return {self.column: self.facets * self.width}

    def build(self, width: int) -> None:
        self.projector = nn.Linear(self.width, width)

    def forward(self, embeddings: Embeddings) -> Loss:
        """Raises UserError where the column is of another length."""
        facet_BFd = self._shown(embeddings)
        known_BF = facet_BFd.isfinite().all(-1)
        text_BFE = normalize(self.projector(facet_BFd.nan_to_num(0)), dim=-1)
        scale, image_GE = self.logit_scale.exp(), embeddings.all_images().float()
        total = pairwise_sigmoid(image_GE, text_BFE, known_BF, scale, self.logit_bias)
        known_GF = embeddings.gather(known_BF)
        measures = {"known": known_GF.float().mean(), "scale": scale, "bias": self.logit_bias}
        value = total * dist.world() / known_GF.sum().clamp_min(1)
        return Loss(value, {name: x.detach() for name, x in measures.items()})

    def _shown(self, embeddings: Embeddings) -> Tensor:
        """The facets of this step; neighbouring images show different ones."""
        given_BX = embeddings.column(self.column).float()
        images, expected = len(given_BX), self.facets * self.width
        if given_BX.shape[1:] != (expected,):
            raise UserError(
                f"the column {self.column!r} holds {list(given_BX.shape[1:])} numbers an image, not the "
                f"{self.facets} facets x {self.width} = {expected} of this recipe: set facets and width of "
                "the term to what it holds"
            )
        row_B = torch.arange(images, device=given_BX.device) + dist.rows(images).start
        place_F = torch.arange(self.shown, device=given_BX.device)
        facet_BF = (self.turn + row_B[:, None] + place_F) % self.facets
        if self.training:
            self.turn += self.shown
        return given_BX.unflatten(1, (self.facets, self.width)).take_along_dim(facet_BF[..., None], 1)

"""Balance: every expert gets its share of the tokens (`towers.experts`).

In: of each block how often its experts were asked, and how probable they were. Out: one number, the smaller
the more evenly tokens are spread. Without it a router soon asks the same few, which learn all the more.

    A  blocks of both towers    N  experts of a block    k  experts that a token asks
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..types import Embeddings
from .term import Loss, Term


def imbalance(routing_A2N: Tensor) -> Tensor:
    """The mean over blocks of Switch Transformers' loss (Fedus et al. 2021, arXiv 2101.03961, eq. 4 to 6)

        N sum_n f_n P_n,   f_n = tokens that asked n / tokens,   P_n = mean of p_n over tokens,

    for k experts a token, so that it is k where all have the same share.
    """
    asked_AN, probability_AN = routing_A2N[:, 0].detach(), routing_A2N[:, 1]
    tokens_A1 = probability_AN.detach().sum(-1, keepdim=True).clamp(min=1)  # a block may see no text
    return (asked_AN / tokens_A1 * probability_AN / tokens_A1).sum(-1).mean() * routing_A2N.shape[-1]


class Balance(Term):
    """`imbalance` of all tokens that the blocks of both towers see in a step of all processes."""

    needs: ClassVar[frozenset[str]] = frozenset({"routing"})

    def __init__(self, weight: float = 0.02) -> None:
        super().__init__("", weight)
        self.groups = ()

    def forward(self, embeddings: Embeddings) -> Loss:
        assert embeddings.routing_A2N is not None, "the towers were not asked for their routing"
        routing_A2N = embeddings.gather(embeddings.routing_A2N[None]).sum(0)
        asked_AN = routing_A2N[:, 0].detach()
        busiest = (asked_AN.amax(-1) / asked_AN.sum(-1).clamp(min=1)).mean()
        return Loss(imbalance(routing_A2N), {"busiest": busiest})

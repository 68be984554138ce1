"""What a loss term is: Embeddings in, one number and a few measures out.

A recipe is named caption groups times a list of terms. The trainer adds `weight * value` over the
terms and logs the measures; it never learns what a term computes.
"""

from __future__ import annotations

import abc
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from longclip.types import Embeddings


class Loss(NamedTuple):
    """What a term returns on one process. The MEAN over processes is the global batch's number."""

    value: Tensor  # scalar with gradient, without the term's weight
    measures: dict[str, Tensor]  # detached scalars to log beside it


class Term(nn.Module, abc.ABC):
    """A loss on one caption group, in float32.

    texts: the caption group it reads. weight: its factor in the total, applied by the trainer.
    A learnable temperature is a scalar parameter called `logit_scale`, a learnable offset
    `logit_bias`: by these names the optimizer spares them weight decay and clamps the temperature.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    """What it asks of the towers beyond global features: a subset of `towers.needs.NEEDS`."""

    def __init__(self, texts: str, weight: float = 1.0) -> None:
        super().__init__()
        self.texts = texts
        self.weight = weight
        self.groups: tuple[str, ...] = (texts,)
        """The caption groups that it reads; a term of other ones says so."""

    @property
    def columns(self) -> dict[str, int | None]:
        """The side-car columns that it reads: numbers in a vector, None where any will do, 0 for a bare one.

        So that what has no data (a plan, a test) can make them up.
        """
        return {}

    def build(self, width: int) -> None:
        """Make what depends on the width E of the embeddings, such as a pooling head.

        Called once, before the optimizer is made. What a term makes is trained, and never exported.
        """

    @abc.abstractmethod
    def forward(self, embeddings: Embeddings) -> Loss:
        """The loss of the global batch, as this process's share of it (see `Loss`)."""

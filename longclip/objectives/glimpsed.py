"""Any term on global features, on images whose patches are mostly hidden.

In: another term. Out: its loss where `masked_BE` stands for the images. How many patches are hidden, and by
what, is the tower's to know (`model.glimpse`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from longclip.objectives.term import Loss, Term
from longclip.types import Embeddings, UserError


class Glimpsed(Term):
    """Fix-CLIP's short branch (Wang et al. 2025, arXiv 2507.10095) where `term` is a contrastive loss:

        L = InfoNCE(f(m * x + (1 - m) * e), t),   m in {0, 1}^P keeps 1 of 4 patches, e is learned

    An image of which little is seen cannot answer for details, so that a short caption, which tells of none,
    does not teach the tower to forget them.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"masked"})

    def __init__(self, term: Term) -> None:
        super().__init__(term.texts, term.weight)
        if term.needs:
            raise UserError(
                f"Glimpsed hides patches from a term on global features, and {type(term).__name__} reads "
                f"{', '.join(sorted(term.needs))}; give it longclip.objectives.Contrastive, say"
            )
        self.term, self.groups = term, term.groups

    @property
    def columns(self) -> dict[str, int | None]:
        return self.term.columns

    def build(self, width: int) -> None:
        self.term.build(width)

    def forward(self, embeddings: Embeddings) -> Loss:
        assert embeddings.masked_BE is not None, "the towers leave out the images that this term needs"
        loss: Loss = self.term(replace(embeddings, image_BE=embeddings.masked_BE))
        return loss

"""LoTLIP's corner features: every caption sums itself up several times, each time against the image.

In: what corner tokens say of a caption group. Out: this process's share of the loss.
Local legend: M corners of a caption.
"""

from __future__ import annotations

from typing import ClassVar

from longclip.objectives.contrastive import check_contrast, checked_smoothing, info_nce
from longclip.objectives.term import Loss, Term
from longclip.types import Embeddings


class Corners(Term):
    """The corners' part of LoTLIP's loss (Wu et al. 2024, arXiv 2410.05249), beside `Contrastive`:

        L = 1/M sum_m InfoNCE(v, c_m),   c_m: what corner m says of the whole caption

    Corners of one caption are never each other's negatives. With the model's own temperature.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"corners"})

    def __init__(self, texts: str, weight: float = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__(texts, weight)
        self.label_smoothing = checked_smoothing(label_smoothing)

    def forward(self, embeddings: Embeddings) -> Loss:
        """Raises UserError on a global batch of one image, which has nothing to contrast."""
        assert embeddings.corners_BKME is not None, "the towers leave out corners that this term needs"
        image_GE = embeddings.all_images().float()
        check_contrast(len(image_GE))
        corners_BKME = embeddings.corners_BKME[:, embeddings.slots[self.texts]]
        value, accuracy = info_nce(
            image_GE,
            corners_BKME.flatten(1, 2).float(),
            embeddings.all_mask(self.texts).repeat_interleave(corners_BKME.shape[2], 1),
            embeddings.scale.float(),
            self.label_smoothing,
            gather=embeddings.gather,
        )
        return Loss(value, {"accuracy": accuracy})

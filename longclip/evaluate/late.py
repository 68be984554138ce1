"""Scores by late interaction: how well patches of images and words of texts find each other (FILIP).

In: the patches and words of a whole set. Out: scores of any images with any texts, for `metrics.placed`.
Nothing here can be indexed: every image meets every text with all its patches and words.
Local legend: Q images, X texts of one call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..metrics import Score, check_finite
from ..objectives.late import interaction, tile_size
from ..objectives.wording import rectangle
from ..towers.image import has_patches
from ..types import UserError
from .features import Features


def check_late(tower: Any) -> None:
    """Raise UserError where these towers give no patches or no words."""
    visual = tower.backbone.visual
    lacks = None if has_patches(visual) else f"the image tower is a {type(visual).__name__} without patches"
    lacks = lacks or tower.padded_because
    if lacks:
        raise UserError(
            f"scoring=late compares patches with words, which this model does not have ({lacks}); "
            "judge it by scoring=global, or take a model such as ViT-B-16"
        )


class Interaction:
    """Late interaction of the set's images and the texts of some slots.

    A text without any word is judged by its end token.
    """

    def __init__(self, found: Features, slot: slice) -> None:
        assert found.patches_NPE is not None, "features were asked for without patches"
        assert found.words_TE is not None, "features were asked for without words"
        self.patches_NPE, self.words_TE = found.patches_NPE, found.words_TE
        check_finite(self.patches_NPE, "image")
        check_finite(self.words_TE, "text")
        lengths_NK = found.lengths_NK.numpy().astype(np.int64)
        starts_NK = lengths_NK.cumsum().reshape(lengths_NK.shape) - lengths_NK
        mask_NK = lengths_NK[:, slot] > 0
        self.starts_M = starts_NK[:, slot][mask_NK] + 1  # beyond the start token
        self.counts_M = np.maximum(lengths_NK[:, slot][mask_NK] - 2, 1)

    def of_images(self, asked_Q: Tensor) -> Score:
        """How well images find their words in texts; query q is image asked_Q[q]."""
        return lambda queries, texts: self._scores(asked_Q[queries], self._numbers(texts))[0]

    def of_texts(self, queries: slice | Tensor, images: slice | Tensor) -> Tensor:
        """How well texts find their patches in images."""
        every_N = torch.arange(len(self.patches_NPE), device=self.patches_NPE.device)
        return self._scores(every_N[images], self._numbers(queries))[1].T

    def _numbers(self, texts: slice | Tensor) -> np.ndarray:
        where = texts if isinstance(texts, slice) else texts.cpu().numpy()
        return np.arange(len(self.starts_M))[where]

    def _scores(self, images_Q: Tensor, texts_X: np.ndarray) -> Tensor:
        """Both directions, [2, Q, X]; made in float64, so that what is equal ties wherever it stands."""
        both_2QX = torch.empty(2, len(images_Q), len(texts_X), device=images_Q.device)
        longest_first_X = np.argsort(-self.counts_M[texts_X], kind="stable")
        counts_X = self.counts_M[texts_X]
        down, across = tile_size(self.patches_NPE, int(counts_X.max(initial=1)))
        for left in range(0, len(texts_X), across):
            at_x = longest_first_X[left : left + across]
            words_xLE, mask_xL = rectangle(self.words_TE, self.starts_M[texts_X[at_x]], counts_X[at_x])
            for top in range(0, len(images_Q), down):
                patches_qPE = self.patches_NPE[images_Q[top : top + down]].double()
                found_qx = interaction(patches_qPE, words_xLE.double(), mask_xL)
                both_2QX[:, top : top + down, torch.from_numpy(at_x)] = torch.stack(found_qx).float()
        return both_2QX

"""Label smoothing without scores: what a pair's score is held against, from means of features.

In: images of all processes and texts of this one. Out: their mean score with everything of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longclip import dist


def mean_score(
    image_GE: Tensor, text_BKE: Tensor, count_K: Tensor, margin: float = 0.0, image_to_text: float = 0.5
) -> Tensor:
    """What label smoothing holds own scores against: lambda mean_j z_bjk + (1 - lambda) mean_j z_jbk, over s.

    The mean of products is the product with a mean, so no score need be made for it. text_BKE: zeros where
    there is no caption; count_K: how many there are on all processes. Returns [K, B].
    """
    image_BE = image_GE[dist.rows(len(text_BKE))]
    texts_KE, images_E = dist.gather(text_BKE.sum(0)[None]).sum(0), image_GE.sum(0)
    per_text_K1, per_image = (
        image_to_text / count_K.to(image_GE).clamp_min(1)[:, None],
        (1 - image_to_text) / len(image_GE),
    )
    mean_KB = texts_KE @ image_BE.T * per_text_K1 + (text_BKE @ images_E).T * per_image
    if margin:
        text_BKE, texts_KE = text_BKE.detach(), texts_KE.detach()
        alike_KB = torch.einsum("bke,bke->kb", text_BKE, texts_KE - text_BKE)
        mean_KB = mean_KB + margin * alike_KB * (per_text_K1 + per_image)
    return mean_KB

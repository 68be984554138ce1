"""How features lie on the sphere: pure functions on tensors, no model.

In: L2-normalised features. Out: plain numbers, computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mean_cosine(feature_NE: Tensor) -> float:
    """Mean cosine of all pairs of different rows; near 1 where features have collapsed, 0 for one row.

    >>> mean_cosine(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    0.3333333333333333
    """
    count = len(feature_NE)
    sum_E, squares = feature_NE.sum(0, dtype=torch.float64), feature_NE.double().square().sum()
    return float((sum_E.square().sum() - squares) / max(count * (count - 1), 1))


def effective_rank(feature_NE: Tensor) -> float:
    """How many dimensions features fill, 1 to E: exp of the entropy of the normalised singular values.

    Roy & Vetterli 2007, "The effective rank"; as a measure of collapse Garrido et al. 2023 (RankMe,
    arXiv 2210.02885). Not above the number of rows.

    >>> round(effective_rank(torch.eye(3)), 6), effective_rank(torch.ones(5, 3))
    (3.0, 1.0)
    """
    gram_EE = sum(chunk.double().T @ chunk.double() for chunk in feature_NE.split(8192))
    assert isinstance(gram_EE, Tensor), "no features"
    singular_E = torch.linalg.eigvalsh(gram_EE).clamp(min=0).sqrt()
    share_E = singular_E / singular_E.sum()
    return float(torch.special.entr(share_E).sum().exp())


def modality_gap(image_NE: Tensor, text_ME: Tensor) -> float:
    """Distance between the mean image and the mean text, 0 to 2 (Liang et al. 2022, arXiv 2203.02053).

    >>> modality_gap(torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]]))
    2.0
    """
    gap_E = image_NE.mean(0, dtype=torch.float64) - text_ME.mean(0, dtype=torch.float64)
    return float(gap_E.norm())


def correlation(x_NK: Tensor, y_NK: Tensor) -> Tensor:
    """Pearson's correlation of each row of x with that of y, [N] float64; 0 where one of them is constant.

    >>> x = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0], [3.0, 2.0, 1.0]])
    >>> correlation(x, torch.tensor([[0.0, 1.0, 2.0]])).round(decimals=6).tolist()
    [1.0, 0.0, -1.0]
    """
    constant_N = (x_NK.amax(1) == x_NK.amin(1)) | (y_NK.amax(1) == y_NK.amin(1))
    x_NK, y_NK = (v.double() - v.double().mean(1, keepdim=True) for v in (x_NK, y_NK))
    found_N = (x_NK * y_NK).sum(1) / (x_NK.norm(dim=1) * y_NK.norm(dim=1))
    return found_N.masked_fill(constant_N, 0)

"""Measures of how features lie: against naive loops, numpy and cases that can be counted by hand."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from longclip.evaluate.diagnostics import geometry


def features(count, width):
    return F.normalize(torch.randn(count, width), dim=-1)


def test_mean_cosine_is_that_of_all_pairs_but_none_with_itself():
    rows = features(7, 5).double().numpy()
    naive = [a @ b for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
    assert geometry.mean_cosine(torch.tensor(rows)) == pytest.approx(np.mean(naive))
    assert geometry.mean_cosine(features(1, 5)) == 0


def test_effective_rank_is_the_exponential_of_the_entropy_of_singular_values():
    rows = features(40, 12)
    singular = np.linalg.svd(rows.numpy().astype(np.float64), compute_uv=False)
    share = singular / singular.sum()
    assert geometry.effective_rank(rows) == pytest.approx(np.exp(-(share * np.log(share)).sum()))


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_effective_rank_counts_the_directions_that_are_used_alike(rank):
    rows = torch.eye(8)[:rank].repeat(5, 1)
    assert geometry.effective_rank(rows) == pytest.approx(rank, abs=1e-6)


def test_the_gap_is_the_distance_of_the_means():
    image, text = features(9, 4), features(6, 4)
    expected = np.linalg.norm(image.numpy().mean(0) - text.numpy().mean(0))
    assert geometry.modality_gap(image, text) == pytest.approx(expected, rel=1e-5)
    assert geometry.modality_gap(image, image) == 0


def test_correlation_is_numpys_and_zero_for_a_constant_row():
    x = torch.cat([torch.randn(4, 6), torch.full((1, 6), 0.1)])
    steps = torch.arange(6)[None]
    expected = [np.corrcoef(row, np.arange(6))[0, 1] for row in x[:4].double().numpy()]
    assert geometry.correlation(x, steps).tolist() == pytest.approx([*expected, 0.0])

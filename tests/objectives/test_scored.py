"""Contrast over scores that a function makes: against all scores at once, whatever the tiles."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from longclip.objectives.scored import Columns, contrast, info_nce

IMAGES, LENGTHS = 6, np.array([5, 4, 4, 2, 1])
OWN = torch.tensor([3, 0, 5, 1, 4])  # in the order of lengths; image 2 has no caption


def score(row_RE, column_XLE, mask_XL, scale):
    """Not a dot product, nor the same both ways."""
    like_RXL = torch.einsum("re,xle->rxl", row_RE, column_XLE).masked_fill(~mask_XL, 0)
    return scale * like_RXL.sin().sum(2), scale * like_RXL.square().sum(2) / mask_XL.sum(1)


def inputs(dtype=torch.float64):
    random = torch.Generator().manual_seed(0)
    row = torch.randn(IMAGES, 3, generator=random, dtype=dtype).requires_grad_()
    column = torch.randn(len(LENGTHS), LENGTHS[0], 3, generator=random, dtype=dtype).requires_grad_()
    mask = torch.arange(LENGTHS[0]) < torch.from_numpy(LENGTHS)[:, None]
    scale = torch.tensor(0.7, dtype=dtype, requires_grad=True)
    return row, column, mask, scale


def columns(column, mask):
    return Columns((column, mask), OWN, LENGTHS)


@pytest.mark.parametrize("size", [(4, 2), (1, 3), (100, 100)])
def test_loss_accuracy_and_gradients_are_those_of_all_scores_at_once(size):
    row, column, mask, scale = inputs()
    a_RX, c_RX = score(row, column, mask, scale)
    # An image without a caption is no row of a softmax, though a negative of every caption.
    by_row, by_column = cross_entropy(a_RX[OWN], torch.arange(5)), cross_entropy(c_RX.T, OWN)
    right = (a_RX[OWN].argmax(1) == torch.arange(5)).sum() + (c_RX.argmax(0) == OWN).sum()
    present = torch.zeros(IMAGES, 1, dtype=torch.bool)
    present[OWN] = True
    loss, accuracy = info_nce(score, (row,), [columns(column, mask)], present, scale, size)
    torch.testing.assert_close(loss, (by_row + by_column) / 2)
    torch.testing.assert_close(accuracy, right / 10, check_dtype=False)
    leaves = row, column, scale
    got, want = (torch.autograd.grad(x, leaves) for x in (loss, (by_row + by_column) / 2))
    torch.testing.assert_close(got, want)
    assert got[1][~mask].abs().max() == 0


def test_every_result_has_the_gradient_of_its_differences():
    row, column, mask, scale = inputs()

    def seen(row, column, scale):
        return contrast(score, (row,), columns(column, mask), scale, (4, 2))[:3]

    assert torch.autograd.gradcheck(seen, (row, column, scale))


def test_what_wants_no_gradient_gets_none():
    row, column, mask, scale = inputs()
    seen = contrast(score, (row.detach(),), columns(column, mask), scale.detach(), (4, 2))
    seen.column_negatives_X.sum().backward()
    assert column.grad.abs().max() > 0
    assert row.grad is None


def test_a_slot_without_captions_gives_zero():
    row, column, _, scale = inputs()
    none = Columns((column[:0],), OWN[:0])
    loss, accuracy = info_nce(score, (row,), [none], torch.zeros(IMAGES, 1, dtype=torch.bool), scale, (2, 2))
    loss.backward()
    assert (loss, accuracy) == (0, 0)
    assert row.grad.abs().max() == 0


def test_scores_that_are_all_alike_are_all_wrong():
    row, column, mask, scale = inputs(torch.float32)
    alike = torch.ones_like(row), torch.ones_like(column)
    present = torch.zeros(IMAGES, 1, dtype=torch.bool)
    present[OWN] = True
    same = Columns((alike[1], torch.ones_like(mask)), OWN)
    assert info_nce(score, (alike[0],), [same], present, scale.detach(), (4, 2))[1] == 0

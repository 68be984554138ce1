"""Boxes over patches: against counting points, against torchvision, and who says that there are none."""

import dataclasses
import math

import pytest
import torch
from torchvision.ops import box_convert, generalized_box_iou

from longclip import dist
from longclip.objectives import boxes
from longclip.objectives.boxes import Expected, centred, corners, cover, grid_of, iou, known, places
from longclip.types import UserError

NOWHERE = [math.nan] * 4


def some_boxes(count, seed=0, dtype=torch.float64):
    """Left, top, right, bottom in any place, of any size."""
    random = torch.Generator().manual_seed(seed)
    points = torch.rand(count, 2, 2, generator=random, dtype=dtype).sort(1).values
    return points.flatten(1)


def test_a_patch_covers_the_share_of_points_that_fall_into_it():
    rows, columns, fine = 3, 4, 240
    across = (torch.arange(fine) + 0.5) / fine
    for left, top, right, bottom in some_boxes(5).tolist():
        inside = ((across >= top) & (across <= bottom))[:, None] & ((across >= left) & (across <= right))
        counts = inside.double().reshape(rows, fine // rows, columns, fine // columns).sum((1, 3)).flatten()
        shares = cover(torch.tensor([[[left, top, right, bottom]]], dtype=torch.float64), (rows, columns))
        torch.testing.assert_close(shares[0, 0], counts / counts.sum(), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("box", "patches"),
    [
        ([0.0, 0.0, 1.0, 1.0], [1 / 6] * 6),
        ([0.7, 0.1, 0.9, 0.4], [0, 0, 1, 0, 0, 0]),  # across before down
        ([0.0, 0.5, 2 / 3, 1.0], [0, 0, 0, 1 / 2, 1 / 2, 0]),
        ([1 / 6, 0.0, 1 / 2, 0.5], [1 / 2, 1 / 2, 0, 0, 0, 0]),
        ([0.4, 0.6, 0.4 + 1e-6, 0.6 + 1e-6], [0, 0, 0, 0, 1, 0]),  # much smaller than a patch
        (NOWHERE, [0] * 6),
    ],
)
def test_shares_follow_the_grid_row_by_row(box, patches):
    shares = cover(torch.tensor([[box]]), (2, 3))
    torch.testing.assert_close(shares[0, 0], torch.tensor(patches, dtype=torch.float32), atol=1e-6, rtol=0)


def test_only_present_captions_with_an_area_are_known():
    given = [[0.1, 0.1, 0.2, 0.2], [0.1, 0.1, 0.2, 0.2], NOWHERE, [0.3, 0.1, 0.3, 0.9], [0.2, 0.2, 0.1, 0.3]]
    mask = torch.tensor([[True, False, True, True, True]])
    assert known(torch.tensor([given]), mask).tolist() == [[True, False, False, False, False]]


def test_overlaps_are_those_of_torchvision():
    one, other = some_boxes(6), some_boxes(7, seed=1)
    plain, general = iou(one[:, None], other[None])
    torch.testing.assert_close(general, generalized_box_iou(one, other))
    assert plain.min() == 0
    assert plain.max() > 0.1
    assert (general <= plain).all()
    assert general.min() < -0.2


def test_overlap_of_boxes_with_themselves_is_one_and_of_nothing_is_zero():
    one = some_boxes(3)
    torch.testing.assert_close(iou(one, one)[1], torch.ones(3, dtype=torch.float64))
    assert iou(torch.zeros(1, 4), torch.zeros(1, 4)) == (0, 0)


def test_overlap_has_the_gradient_of_differences():
    one, other = some_boxes(4).requires_grad_(), some_boxes(4, seed=1)
    assert torch.autograd.gradcheck(lambda x: iou(x, other)[1], (one,))


def test_corners_and_centres_are_two_ways_to_write_a_box():
    given = some_boxes(4)
    torch.testing.assert_close(centred(given), box_convert(given, "xyxy", "cxcywh"))
    torch.testing.assert_close(corners(centred(given)), given)


def test_a_patch_lies_where_its_own_box_covers_it_alone():
    grid = (2, 3)
    shares = cover(corners(places(grid, torch.device("cpu")))[None], grid)
    torch.testing.assert_close(shares[0], torch.eye(6), atol=1e-5, rtol=0)


def test_patches_without_places_are_refused(embed):
    e = embed()
    assert grid_of(dataclasses.replace(e, grid=(1, 5))) == (1, 5)
    with pytest.raises(UserError, match=r"patch_dropout=0 curriculum\.patch_dropout=null"):
        grid_of(dataclasses.replace(e, grid=None))


def test_data_without_any_box_are_named_soon_and_refused_after_a_while(embed, monkeypatch, caplog):
    monkeypatch.setattr(boxes, "EARLY", 5)  # batches of six images
    monkeypatch.setattr(boxes, "PATIENCE", 13)
    without, with_some = embed(), dataclasses.replace(embed(), boxes_BK4=torch.rand(6, 3, 4))
    expected = Expected()
    for _ in range(2):
        expected.check(without)
    (record,) = caplog.records
    assert "no caption of the first 6 images has a box" in record.getMessage()
    with pytest.raises(UserError, match="no caption of the first 13 images has one"):
        expected.check(without)
    expected = Expected()
    expected.check(without)
    expected.check(with_some)
    for _ in range(9):
        expected.check(without)


def test_processes_agree_on_whether_there_are_boxes(embed, monkeypatch):
    asked = []
    monkeypatch.setattr(boxes, "PATIENCE", 1)
    monkeypatch.setattr(dist, "anywhere", lambda flag, device: asked.append(flag) or True)
    expected = Expected()
    for _ in range(3):
        expected.check(embed())
    assert asked == [False], "another process has seen one, and nobody asks again"

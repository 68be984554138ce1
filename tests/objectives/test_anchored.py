"""Short captions anchored to the start: the start is a teacher of its own temperature, and learns nothing."""

import dataclasses

import pytest
import torch

from longclip.objectives.anchored import Anchored
from longclip.objectives.distilled import Distilled, Teacher
from longclip.types import UserError


def test_the_start_is_a_teacher(embed):
    now, start = embed(), dataclasses.replace(embed(seed=2), scale=torch.tensor(11.0))
    start = dataclasses.replace(start, mask_BK=now.mask_BK)
    got = Anchored("sub")(dataclasses.replace(now, start=start))
    columns = {"image": start.image_BE, **{f"text{k}": start.text_BKE[:, k] for k in range(3)}}
    # The start has no caption there either, but a column of zeros would count as known.
    columns |= {f"text{k}": columns[f"text{k}"] + 1 * ~now.mask_BK[:, k, None] for k in range(3)}
    teacher = Teacher("image", ["text0", "text1", "text2"], 11.0)
    want = Distilled("sub", {"start": teacher})(dataclasses.replace(now, columns=columns))
    torch.testing.assert_close(got.value, want.value)
    assert got.value > 0.1


def test_it_is_zero_where_nothing_has_moved_and_pulls_back_where_something_has(embed):
    start = embed()
    assert Anchored("sub")(dataclasses.replace(start, start=start)).value.abs() < 1e-6
    image_BE = (start.image_BE + 0.1 * embed(seed=3).image_BE).requires_grad_()
    before = start.image_BE.clone().requires_grad_()
    moved = dataclasses.replace(start, image_BE=image_BE, start=dataclasses.replace(start, image_BE=before))
    loss = Anchored("sub")(moved).value
    loss.backward()
    assert loss > 0
    assert before.grad is None
    back = dataclasses.replace(moved, image_BE=image_BE.detach() - 0.01 * image_BE.grad)
    assert Anchored("sub")(back).value < loss


def test_one_image_is_refused(embed):
    one = embed(images=1)
    with pytest.raises(UserError, match="batch_size to 2"):
        Anchored("sub")(dataclasses.replace(one, start=one))

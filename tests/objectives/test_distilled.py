"""Distillation: against loops, with the teacher's own temperature, blind to what no teacher knows."""

import dataclasses
import math

import pytest
import torch
from torch.nn.functional import normalize

from longclip.objectives import distilled
from longclip.objectives.distilled import Distilled, Teacher, View, divergence
from longclip.types import UserError

FIRST = Teacher(image="a", text=["a0", "a1", "a2"], scale=5.0)
SECOND = Teacher(image="b", text=["b0", "b1", "b2"], scale=30.0)


@pytest.fixture
def taught(embed):
    """Embeddings with two teachers' columns, 4 and 6 wide; each misses another image."""
    random = torch.Generator().manual_seed(1)
    columns = {}
    for teacher, width, missing in ((FIRST, 4, 1), (SECOND, 6, 3)):
        for name in (teacher.image, *teacher.texts):
            columns[name] = torch.randn(6, width, generator=random)
            columns[name][missing] = torch.nan
    columns["a1"][4] = torch.nan  # a caption that the teacher did not see
    return dataclasses.replace(embed(), columns=columns)


def kl_by_loop(student, teacher, scales, valid):
    """Sum over valid pairs of the mean of both directions' KL, one slot; lists of unit vectors."""
    total = 0.0
    for here, there in ((0, 1), (1, 0)):
        for i in valid:
            z = torch.stack([scales[0] * student[here][i] @ student[there][j] for j in valid])
            t = torch.stack([scales[1] * teacher[here][i] @ teacher[there][j] for j in valid])
            p, q = t.exp() / t.exp().sum(), z.exp() / z.exp().sum()
            total = total + sum(p[n] * (p[n].log() - q[n].log()) for n in range(len(valid))) / 2
    return total


def loss_by_loop(e, teacher, image_BE, text_BKE, scale):
    total, pairs = 0.0, 0
    their_image = normalize(e.columns[teacher.image].double(), dim=-1)
    for k, name in enumerate(teacher.texts):
        their_text = normalize(e.columns[name].double(), dim=-1)
        known = [b for b in range(6) if math.isfinite((their_image[b].sum() + their_text[b].sum()).item())]
        valid = [b for b in known if e.mask_BK[b, k]]
        student, theirs = (image_BE, text_BKE[:, k]), (their_image, their_text)
        total = total + kl_by_loop(student, theirs, (scale, teacher.scale), valid)
        pairs += len(valid)
    return total / pairs


def leaves(e):
    return [x.double().requires_grad_() for x in (e.image_BE, e.text_BKE, e.scale)]


@pytest.mark.parametrize("tile", [None, 12, 1])
def test_value_and_gradient_of_an_ensemble_equal_loops(taught, monkeypatch, tile):
    if tile:
        monkeypatch.setattr(distilled, "CPU_TILE", tile)
    ours, theirs = leaves(taught), leaves(taught)
    e = dataclasses.replace(taught, image_BE=ours[0], text_BKE=ours[1], scale=ours[2])
    # The term works in float32, so the pure function is compared, in float64.
    student, value = View(*ours), 0
    for teacher in (FIRST, SECOND):
        view, known = teacher.view(e, 3)
        valid = known & e.mask_BK
        value = (
            value
            + divergence(student, View(*(x.double() for x in view)), valid, e.gather).total / valid.sum()
        )
    want = sum(loss_by_loop(e, teacher, *theirs) for teacher in (FIRST, SECOND))
    torch.testing.assert_close(value, want, rtol=1e-6, atol=0)
    got = torch.autograd.grad(value, ours)
    torch.testing.assert_close(got, torch.autograd.grad(want, theirs), rtol=1e-5, atol=1e-7)
    term = Distilled("sub", {"first": FIRST, "second": SECOND})(taught)
    torch.testing.assert_close(term.value.double(), want.detach() / 2, rtol=1e-5, atol=0)


def test_gradient_is_that_of_differences(taught):
    view, known = FIRST.view(taught, 3)
    teacher = View(*(x.double() for x in view))

    def total(*student):
        return divergence(View(*student), teacher, known & taught.mask_BK, taught.gather).total

    assert torch.autograd.gradcheck(total, leaves(taught))


def test_what_the_teacher_does_not_know_changes_nothing(taught):
    term = Distilled("sub", {"first": FIRST})
    want = term(taught).value
    _, known = FIRST.view(taught, 3)
    image, text = taught.image_BE.clone(), taught.text_BKE.clone()
    image[1], text[~(known & taught.mask_BK)] = 50.0, 50.0
    poisoned = dataclasses.replace(taught, image_BE=image, text_BKE=text)
    torch.testing.assert_close(term(poisoned).value, want)
    image[0] = 50.0
    assert not torch.isclose(term(dataclasses.replace(taught, image_BE=image)).value, want)


def test_a_teacher_that_agrees_costs_nothing_at_our_temperature_alone(embed):
    e = embed()
    columns = {"a": e.image_BE, **{f"a{k}": 3 * e.text_BKE[:, k] for k in range(3)}}
    e = dataclasses.replace(e, columns=columns)
    values = {}
    for scale in (6.0, 7.0, 8.0):  # ours is 7
        loss = Distilled("sub", {"it": dataclasses.replace(FIRST, scale=scale)})(e)
        values[scale] = loss.value.item()
        assert loss.measures["agreed"] == 1
        assert loss.measures["taught"] == 1
    assert abs(values[7.0]) < 1e-6
    assert min(values[6.0], values[8.0]) > 1e-3


def test_a_batch_that_no_teacher_knows_is_a_zero_that_says_so(taught):
    columns = {name: torch.full_like(x, torch.nan) for name, x in taught.columns.items()}
    image_BE = taught.image_BE.clone().requires_grad_()
    e = dataclasses.replace(taught, columns=columns, image_BE=image_BE)
    loss = Distilled("sub", {"first": FIRST})(e)
    loss.value.backward()
    assert loss.value == 0
    assert loss.measures["taught"] == 0
    assert image_BE.grad.abs().max() == 0


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (Teacher("a", "a0", 5.0), r"1 columns of caption embeddings \(a0\) for a group of 3 slots"),
        (Teacher("a", ["a0", "a1", "b2"], 5.0), r"not vectors of one length \(a \[4\], .*b2 \[6\]\)"),
        (Teacher("n", ["n", "n", "n"], 5.0), r"not vectors of one length \(n \[\]\)"),
        (Teacher("c", ["a0", "a1", "a2"], 5.0), r"reads the column 'c' of the training data, and it has a,"),
    ],
)  # fmt: skip
def test_columns_that_do_not_fit_are_one_sentence(taught, teacher, message):
    e = dataclasses.replace(taught, columns={**taught.columns, "n": torch.rand(6)})
    with pytest.raises(UserError, match=message):
        Distilled("sub", {"it": teacher})(e)


def test_a_term_names_its_columns_and_wants_a_teacher():
    assert set(Distilled("sub", {"one": FIRST, "two": SECOND}).columns) == {
        "a", "a0", "a1", "a2", "b", "b0", "b1", "b2"
    }  # fmt: skip
    with pytest.raises(UserError, match="has no teachers"):
        Distilled("sub", {})
    with pytest.raises(UserError, match="scale is 0"):
        Teacher("a", "b", 0)

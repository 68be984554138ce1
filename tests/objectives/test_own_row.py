"""Negatives in their image's own row: against loops over single captions, and nobody else meets them."""

import dataclasses
import math

import pytest
import torch
from torch.nn.functional import normalize

from longclip.objectives.contrastive import Contrastive
from longclip.objectives.grouping import group
from longclip.objectives.local import LocalNegatives
from longclip.objectives.own_row import Choice, OwnRow
from longclip.objectives.regions import RegionChoice
from longclip.types import UserError

SLOTS, NEGATIVES = 2, 3


@pytest.fixture
def paired(embed):
    """Embeddings of six images with two captions of three negatives each, raggedly; float64 leaves."""

    def make(images=6):
        e = embed(images=images, slots=SLOTS * (1 + NEGATIVES))
        slots = {"sub": slice(0, SLOTS), "sub-wrong": slice(SLOTS, SLOTS * (1 + NEGATIVES))}
        mask = e.mask_BK.clone()
        mask[1, SLOTS : SLOTS + NEGATIVES] = False  # a caption without negatives
        mask[2, 0] = False  # negatives without their caption
        mask[2, SLOTS : SLOTS + NEGATIVES] = True
        mask[3] = False
        text = normalize(torch.randn(e.text_BKE.shape), dim=-1) * mask[..., None]
        return dataclasses.replace(
            e,
            image_BE=e.image_BE.clone().requires_grad_(),
            text_BKE=text.requires_grad_(),
            patches_BPE=e.patches_BPE.clone().requires_grad_(),
            mask_BK=mask,
            slots=slots,
            scale=torch.tensor(7.0, requires_grad=True),
        )

    return make


def units(e):
    """(image, slot, its negatives) of every caption there is."""
    for b, k in e.mask("sub").nonzero().tolist():
        there = e.mask("sub-wrong")[b, k * NEGATIVES : (k + 1) * NEGATIVES]
        wrong = e.text("sub-wrong")[b, k * NEGATIVES : (k + 1) * NEGATIVES][there]
        yield b, k, list(wrong.double())


def choice_by_loop(e, seen, scale):
    losses, chosen = [], []
    for b, k, wrong in units(e):
        if wrong:
            x, text = seen(b, k), e.text("sub")[b, k].double()
            z = torch.stack([scale * (x @ text), *(scale * (x @ w) for w in wrong)])
            losses.append(-z.log_softmax(0)[0])
            chosen.append(float(z[0] > z[1:].max()))
    return sum(losses) / len(losses), sum(chosen) / len(chosen)


def own_row_by_loop(e):
    """Each slot its own problem, negatives in one row of it."""
    scale, losses = e.scale.double(), []
    image, text, mask = e.image_BE.double(), e.text("sub").double(), e.mask("sub")
    for b, k, wrong in units(e):
        others = [j for j in range(len(image)) if j != b and mask[j, k]]
        own = scale * (image[b] @ text[b, k])
        row = [
            own,
            *(scale * (image[b] @ text[j, k]) for j in others),
            *(scale * (image[b] @ w) for w in wrong),
        ]
        column = [own, *(scale * (image[i] @ text[b, k]) for i in range(len(image)) if i != b)]
        losses.append(-(torch.stack(row).log_softmax(0)[0] + torch.stack(column).log_softmax(0)[0]) / 2)
    return sum(losses) / len(losses)


def agree(e, got, want, *more):
    leaves = [e.image_BE, e.text_BKE, e.patches_BPE, e.scale, *more]
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-6)
    ours, theirs = (
        torch.autograd.grad(x, leaves, retain_graph=True, materialize_grads=True, allow_unused=True)
        for x in (got, want)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert any(grad.abs().max() > 1e-3 for grad in ours)


def test_a_choice_equals_a_loop(paired):
    e = paired()
    loss = Choice("sub", "sub-wrong")(e)
    want, chosen = choice_by_loop(e, lambda b, k: e.image_BE[b].double(), e.scale.double())
    agree(e, loss.value, want)
    assert loss.measures["chosen"] == pytest.approx(chosen)
    assert 0 < chosen < 1


def test_own_rows_equal_a_loop(paired):
    e = paired()
    loss = OwnRow("sub", "sub-wrong")(e)
    agree(e, loss.value, own_row_by_loop(e))
    assert loss.measures["chosen"] == Choice("sub", "sub-wrong")(e).measures["chosen"]


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_patches_choose_as_a_loop_does(paired, monkeypatch, threshold):
    monkeypatch.setattr("longclip.objectives.imagewise.CPU_TILE", 2 * 5 * 8)  # two images at a time
    e, term = paired(), LocalNegatives("sub", "sub-wrong", threshold=threshold)
    patches = e.patches_BPE.double()
    grouped, _ = group(e.text("sub").double(), patches, threshold)
    want, chosen = choice_by_loop(e, lambda b, k: grouped[b, k], term.logit_scale.double().exp())
    loss = term(e)
    agree(e, loss.value, want, term.logit_scale)
    assert loss.measures["chosen"] == pytest.approx(chosen)


def test_without_negatives_own_rows_are_plain_contrast(paired):
    e = paired()
    bare = dataclasses.replace(e, mask_BK=e.mask_BK & (torch.arange(e.mask_BK.shape[1]) < SLOTS))
    got, want = OwnRow("sub", "sub-wrong")(bare), Contrastive("sub")(bare)
    torch.testing.assert_close(got.value, want.value)
    assert got.measures["accuracy"] == want.measures["accuracy"]
    assert got.measures["chosen"] == 0
    assert Choice("sub", "sub-wrong")(bare).value == 0


@pytest.mark.parametrize("term", [OwnRow, Choice, LocalNegatives])
def test_no_other_image_meets_a_negative(paired, term):
    """Image 0's negatives change; what reaches other images' gradients must not."""
    e = paired()
    poison = e.text_BKE.detach().clone()
    poison[0, SLOTS:] = normalize(torch.randn(poison[0, SLOTS:].shape), dim=-1)
    other = dataclasses.replace(e, text_BKE=poison.requires_grad_())
    made = term("sub", "sub-wrong")
    grads = [
        torch.autograd.grad(
            made(x).value, [x.image_BE, x.patches_BPE], allow_unused=True, materialize_grads=True
        )
        for x in (e, other)
    ]
    for before, after in zip(*grads, strict=True):
        torch.testing.assert_close(before[1:], after[1:], rtol=1e-5, atol=1e-7)
    assert any(not torch.allclose(before[0], after[0]) for before, after in zip(*grads, strict=True))


@pytest.mark.parametrize("term", [OwnRow, Choice, LocalNegatives])
def test_absent_captions_and_negatives_change_nothing(paired, term):
    e, made = paired(), term("sub", "sub-wrong")
    poisoned = dataclasses.replace(e, text_BKE=torch.where(e.mask_BK[..., None], e.text_BKE, 50.0))
    torch.testing.assert_close(made(e).value, made(poisoned).value)


def test_a_batch_without_any_caption_is_zero(paired):
    e = paired()
    nothing = dataclasses.replace(e, mask_BK=torch.zeros_like(e.mask_BK))
    for term in (OwnRow, Choice, LocalNegatives):
        value = term("sub", "sub-wrong")(nothing).value
        assert value == 0
        assert all(
            grad is None or grad.isfinite().all()
            for grad in torch.autograd.grad(value, [e.image_BE, e.text_BKE, e.patches_BPE], allow_unused=True)
        )


def test_groups_that_do_not_correspond_are_refused(embed):
    e = dataclasses.replace(embed(slots=5), slots={"sub": slice(0, 2), "sub-wrong": slice(2, 5)})
    with pytest.raises(
        UserError, match=r'"sub-wrong" has 3 slots, .* the 2 of "sub": .*recipe\.captions\.sub'
    ):
        Choice("sub", "sub-wrong")(e)
    assert Choice("sub", "sub-wrong").groups == ("sub", "sub-wrong")
    with pytest.raises(UserError, match="threshold 2"):
        LocalNegatives("sub", "sub-wrong", threshold=2)


@pytest.mark.parametrize("term", [OwnRow, Choice, LocalNegatives, RegionChoice])
def test_negatives_of_other_texts_are_refused(term):
    """Groups of other names draw other sentences, whose negatives would be learned as these ones'."""
    with pytest.raises(UserError, match='"wrong" draws for itself: call that group "sub-wrong"'):
        term("sub", "wrong")


def test_the_choice_of_a_caption_and_nine_of_its_like_costs_log_ten(embed):
    e = embed(slots=10)
    same = dataclasses.replace(
        e,
        text_BKE=e.text_BKE[:, :1].expand(-1, 10, -1),
        mask_BK=torch.ones(6, 10, dtype=torch.bool),
        slots={"a": slice(0, 1), "a-wrong": slice(1, 10)},
    )
    loss = Choice("a", "a-wrong")(same)
    assert loss.value.item() == pytest.approx(math.log(10))
    assert loss.measures["chosen"] == 0  # a tie is no choice

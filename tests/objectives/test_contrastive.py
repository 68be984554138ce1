"""InfoNCE over slots: against a loop, against open_clip, and what absent captions may not do."""

import dataclasses

import pytest
import torch
from open_clip.loss import ClipLoss
from torch.nn.functional import cross_entropy, normalize

from longclip.objectives import Contrastive
from longclip.objectives.contrastive import info_nce
from longclip.types import UserError


def loop(image_BE, text_BKE, mask_BK, scale, smoothing):
    """One caption at a time, on the columns that exist."""
    losses = []
    for b, k in mask_BK.nonzero().tolist():
        present = mask_BK[:, k].nonzero().flatten()
        own = present.tolist().index(b)
        to_texts = scale * image_BE[b] @ text_BKE[present, k].T
        to_images = scale * text_BKE[b, k] @ image_BE.T
        pair = [(to_texts, own), (to_images, b)]
        losses += [cross_entropy(x, torch.tensor(y), label_smoothing=smoothing) for x, y in pair]
    return torch.stack(losses).mean()


def inputs(embed, **sizes):
    e = embed(**sizes)
    return [e.image_BE.double().requires_grad_(), e.text_BKE.double().requires_grad_(), e.mask_BK]


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_a_loop_over_captions(embed, slots, smoothing):
    image, text, mask = inputs(embed, slots=slots)
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    got, _ = info_nce(image, text, mask, scale, slice(0, 6), smoothing)
    want = loop(image, text, mask, scale, smoothing)
    torch.testing.assert_close(got, want)
    leaves = (image, text, scale)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))


def test_equals_open_clip_for_one_caption(embed):
    e = embed(slots=1)
    text = normalize(torch.randn(6, 1, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    e = dataclasses.replace(e, text_BKE=text, mask_BK=torch.ones(6, 1, dtype=torch.bool))
    torch.testing.assert_close(Contrastive("sub")(e).value, ClipLoss()(e.image_BE, text[:, 0], e.scale))


def test_captions_in_other_slots_are_no_negatives(embed):
    image, text, _ = inputs(embed, slots=1)
    full = torch.ones(6, 3, dtype=torch.bool)
    once, _ = info_nce(image, text, full[:, :1], torch.tensor(7.0), slice(0, 6))
    thrice, _ = info_nce(image, text.expand(-1, 3, -1), full, torch.tensor(7.0), slice(0, 6))
    torch.testing.assert_close(once, thrice)


def test_absent_captions_change_nothing_and_get_no_gradient(embed):
    image, text, mask = inputs(embed)
    poison = torch.where(mask[..., None], text, 1e3).detach().requires_grad_()
    clean, poisoned = (
        info_nce(image, t, mask, torch.tensor(7.0), slice(0, 6), 0.1)[0] for t in (text, poison)
    )
    torch.testing.assert_close(clean, poisoned)
    (grad,) = torch.autograd.grad(poisoned, poison)
    assert grad[~mask].abs().max() == 0


def test_an_image_without_caption_is_still_a_negative(embed):
    image, text, mask = inputs(embed)
    mask[3] = False
    loss, _ = info_nce(image, text, mask, torch.tensor(7.0), slice(0, 6))
    assert torch.autograd.grad(loss, image)[0][3].abs().sum() > 1e-6


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_slots_that_nobody_fills_give_zero_and_never_nan(embed, smoothing):
    image, text, mask = inputs(embed)
    leaves, scale = (image, text), torch.tensor(100.0)
    mask[:, 1] = False
    partly, _ = info_nce(image, text, mask, scale, slice(0, 6), smoothing)
    torch.testing.assert_close(partly, loop(image, text, mask, scale, smoothing))
    empty, accuracy = info_nce(image, text, torch.zeros_like(mask), scale, slice(0, 6), smoothing)
    assert (empty.item(), accuracy.item()) == (0, 0)
    assert all(grad.abs().max() == 0 for grad in torch.autograd.grad(empty, leaves))


def test_shares_of_two_processes_average_to_the_whole(embed):
    image, text, mask = inputs(embed)
    parts = [info_nce(image, text, mask, torch.tensor(7.0), rows) for rows in (slice(0, 3), slice(3, 6))]
    whole = info_nce(image, text, mask, torch.tensor(7.0), slice(0, 6))
    for i in (0, 1):
        torch.testing.assert_close((parts[0][i] + parts[1][i]) / 2, whole[i])


def test_accuracy_counts_ties_as_wrong(embed):
    image = torch.eye(6)
    full = torch.ones(6, 2, dtype=torch.bool)
    right = info_nce(image, image[:, None].expand(-1, 2, -1), full, torch.tensor(9.0), slice(0, 6))
    constant = info_nce(image, torch.ones(6, 2, 6), full, torch.tensor(9.0), slice(0, 6))
    assert right[1] == 1
    assert constant[1] == 0


def test_a_batch_of_one_is_refused(embed):
    with pytest.raises(UserError, match=r"global batch holds 1.*batch_size"):
        Contrastive("sub")(embed(images=1))


def test_label_smoothing_outside_its_range_is_refused():
    with pytest.raises(UserError, match="label_smoothing is 1"):
        Contrastive("sub", label_smoothing=1.0)

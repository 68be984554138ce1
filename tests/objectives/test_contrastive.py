"""InfoNCE over slots: against a loop, against open_clip, and what absent captions may not do."""

import dataclasses

import pytest
import torch
from open_clip.loss import ClipLoss
from torch.nn.functional import cross_entropy, normalize
from torch.utils.checkpoint import checkpoint

from longclip.objectives import Contrastive
from longclip.objectives.contrastive import info_nce
from longclip.types import UserError


def loop(image_BE, text_BKE, mask_BK, scale, smoothing=0.0, margin=0.0):
    """One caption at a time, on the columns that exist."""
    losses, exists = [], mask_BK[..., None]
    for b, k in mask_BK.nonzero().tolist():
        present = mask_BK[:, k].nonzero().flatten()
        own = present.tolist().index(b)
        caption = (text_BKE * exists)[:, k].detach()
        raised = margin * (caption @ caption[b]).index_fill(0, torch.tensor(b), 0)
        to_texts = scale * (text_BKE[present, k] @ image_BE[b] + raised[present])
        to_images = scale * (image_BE @ text_BKE[b, k] + raised)
        pair = [(to_texts, own), (to_images, b)]
        losses += [cross_entropy(x, torch.tensor(y), label_smoothing=smoothing) for x, y in pair]
    return torch.stack(losses).mean()


def inputs(embed, **sizes):
    e = embed(**sizes)
    return [e.image_BE.double().requires_grad_(), e.text_BKE.double().requires_grad_(), e.mask_BK]


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_equals_a_loop_over_captions(embed, slots, smoothing, margin):
    image, text, mask = inputs(embed, slots=slots)
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    got, _ = info_nce(image, text, mask, scale, smoothing, margin)
    want = loop(image, text, mask, scale, smoothing, margin)
    leaves = (image, text, scale)
    pairs = [(got, want), (torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_equals_open_clip_for_one_caption(embed):
    e = embed(slots=1)
    text = normalize(torch.randn(6, 1, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    e = dataclasses.replace(e, text_BKE=text, mask_BK=torch.ones(6, 1, dtype=torch.bool))
    torch.testing.assert_close(Contrastive("sub")(e).value, ClipLoss()(e.image_BE, text[:, 0], e.scale))


def test_captions_in_other_slots_are_no_negatives(embed):
    image, text, _ = inputs(embed, slots=1)
    full = torch.ones(6, 3, dtype=torch.bool)
    once, _ = info_nce(image, text, full[:, :1], torch.tensor(7.0))
    thrice, _ = info_nce(image, text.expand(-1, 3, -1), full, torch.tensor(7.0))
    torch.testing.assert_close(once, thrice)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_absent_captions_change_nothing_and_get_no_gradient(embed, margin):
    image, text, mask = inputs(embed)
    poison = torch.where(mask[..., None], text, 1e3).detach().requires_grad_()
    clean, poisoned = (info_nce(image, t, mask, torch.tensor(7.0), 0.1, margin)[0] for t in (text, poison))
    torch.testing.assert_close(clean, poisoned)
    (grad,) = torch.autograd.grad(poisoned, poison)
    assert grad[~mask].abs().max() == 0


def test_an_image_without_caption_is_still_a_negative(embed):
    image, text, mask = inputs(embed)
    mask[3] = False
    loss, _ = info_nce(image, text, mask, torch.tensor(7.0))
    assert torch.autograd.grad(loss, image)[0][3].abs().sum() > 1e-6


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_slots_that_nobody_fills_give_zero_and_never_nan(embed, smoothing):
    image, text, mask = inputs(embed)
    leaves, scale = (image, text), torch.tensor(100.0)
    mask[:, 1] = False
    partly, _ = info_nce(image, text, mask, scale, smoothing)
    torch.testing.assert_close(partly, loop(image, text, mask, scale, smoothing))
    empty, accuracy = info_nce(image, text, torch.zeros_like(mask), scale, smoothing)
    assert (empty.item(), accuracy.item()) == (0, 0)
    assert all(grad.abs().max() == 0 for grad in torch.autograd.grad(empty, leaves))


def test_accuracy_counts_ties_as_wrong(embed):
    image = torch.eye(6)
    full = torch.ones(6, 2, dtype=torch.bool)
    right = info_nce(image, image[:, None].expand(-1, 2, -1), full, torch.tensor(9.0))
    assert right[1] == 1
    rounded = torch.tensor([[1.0, 0], [1 - 1.2e-7, 0]])  # the first image's own caption is a rounding ahead
    assert info_nce(rounded[[0, 0]], rounded[:, None], full[:2, :1], torch.tensor(100.0))[1] == 0
    # Collapsed features, some of a length and count for which a product's rounding depends on the place.
    random = torch.Generator().manual_seed(0)
    for images, width in ((6, 6), (37, 500), (600, 67)):
        one = normalize(torch.randn(2, width, generator=random), dim=-1)
        text = one[0].expand(images, 2, width).contiguous()
        mask = torch.ones(images, 2, dtype=torch.bool)
        assert info_nce(one[1].repeat(images, 1), text, mask, torch.tensor(100.0))[1] == 0


def test_a_batch_of_one_is_refused(embed):
    with pytest.raises(UserError, match=r"global batch holds 1.*batch_size"):
        Contrastive("sub")(embed(images=1))


def test_label_smoothing_and_margins_outside_their_range_are_refused():
    with pytest.raises(UserError, match="label_smoothing is 1"):
        Contrastive("sub", label_smoothing=1.0)
    with pytest.raises(UserError, match="margin is -1"):
        Contrastive("sub", margin=-1.0)


def test_a_margin_makes_twins_hard_and_leaves_accuracy_alone(embed):
    e = embed(slots=1)
    text = e.image_BE[:, None].clone()
    twins = normalize(text[0] + 0.3 * text[1], dim=-1)
    e = dataclasses.replace(e, text_BKE=text.index_copy(0, torch.tensor([0]), twins[None]))
    e = dataclasses.replace(e, mask_BK=torch.ones(6, 1, dtype=torch.bool))
    plain, hard = (Contrastive("sub", margin=margin)(e) for margin in (0.0, 0.5))
    assert hard.value > plain.value + 0.01
    assert hard.measures["accuracy"] == plain.measures["accuracy"] == 1


def test_half_precision_around_the_loss_does_not_coarsen_it(embed):
    e = embed()
    image, text = e.image_BE.requires_grad_(), e.text_BKE.requires_grad_()

    def step():
        value = info_nce(image, text, e.mask_BK, e.scale, margin=0.5)[0]
        return value, *torch.autograd.grad(value, (image, text))

    outside = step()
    with torch.autocast("cpu", torch.bfloat16):
        inside = step()
    assert all(torch.equal(*pair) for pair in zip(outside, inside, strict=True))


def test_inputs_made_again_in_backward_give_the_same_gradients(embed):
    e = embed()
    weight = torch.eye(8).requires_grad_()

    def towers(weight):
        return normalize(e.image_BE @ weight, dim=-1), normalize(e.text_BKE @ weight + 1, dim=-1)

    grads = []
    for again in (False, True):
        image, text = checkpoint(towers, weight, use_reentrant=False) if again else towers(weight)
        grads += torch.autograd.grad(info_nce(image, text, e.mask_BK, e.scale)[0], weight)
    assert torch.equal(*grads)


def test_a_plan_may_pretend_that_there_are_more_processes(embed):
    """Nothing but shapes: a gather that repeats its argument stands for three processes."""
    e = dataclasses.replace(embed(), gather=lambda x: x.repeat(3, *[1] * (x.ndim - 1)))
    assert Contrastive("sub", label_smoothing=0.1, margin=0.5)(e).value.isfinite()

"""Regions: against a loop over captions with boxes, and that a box shows its own image alone."""

import dataclasses

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from longclip.objectives.boxes import cover, known
from longclip.objectives.regions import RegionChoice, Regions, pool_regions
from longclip.types import UserError


def region_by_loop(box, patches_PE, grid):
    """A mean over points of the box, each of which lies in one patch."""
    rows, columns = grid
    left, top, right, bottom = box.tolist()
    total = torch.zeros(patches_PE.shape[1], dtype=torch.float64)
    steps = 60
    for i in range(steps):
        for j in range(steps):
            y, x = top + (i + 0.5) / steps * (bottom - top), left + (j + 0.5) / steps * (right - left)
            total += patches_PE[min(int(y * rows), rows - 1) * columns + min(int(x * columns), columns - 1)]
    return total / total.norm()


def loss_by_loop(e, scale):
    """Exact regions of captions with boxes, dense cross-entropies both ways, in float64."""
    pairs = known(e.boxes("sub"), e.mask_BK).nonzero().tolist()
    shares = cover(e.boxes("sub"), e.grid)
    text = torch.stack([e.text_BKE[b, k] for b, k in pairs])
    region = torch.stack([shares[b, k] @ e.patches_BPE[b] for b, k in pairs])
    logits = scale * text @ normalize(region, dim=-1).T
    own = torch.arange(len(pairs))
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


def test_regions_are_means_over_the_box(boxed):
    e = boxed(torch.float64)
    found = pool_regions(e.boxes("sub"), e.patches_BPE, e.grid)
    there = known(e.boxes("sub"), e.mask_BK)
    assert 3 < there.sum() < e.mask_BK.sum()
    for b, k in there.nonzero().tolist()[:4]:
        want = region_by_loop(e.boxes_BK4[b, k], e.patches_BPE[b].detach(), e.grid)
        torch.testing.assert_close(found[b, k].detach(), want, rtol=0, atol=0.03)
    assert (found[e.boxes("sub").isnan().any(-1)] == 0).all()


@pytest.mark.parametrize("own_scale", [True, False])
def test_loss_and_gradients_equal_a_loop(boxed, own_scale):
    e = boxed(torch.float64)
    term = Regions("sub", own_scale=own_scale).double()
    scale = term.logit_scale.exp() if own_scale else e.scale
    leaves = [e.text_BKE, e.patches_BPE, *term.parameters()]
    got, want = term(e), loss_by_loop(e, scale)
    torch.testing.assert_close(got.value, want)
    torch.testing.assert_close(torch.autograd.grad(got.value, leaves), torch.autograd.grad(want, leaves))
    there = known(e.boxes("sub"), e.mask_BK).sum() / e.mask_BK.sum()
    torch.testing.assert_close(got.measures["boxes"], there)


def test_a_few_images_at_a_time_equal_all(boxed, monkeypatch):
    e, term = boxed(torch.float64), Regions("sub").double()
    whole = torch.autograd.grad(term(e).value, e.patches_BPE)
    monkeypatch.setattr("longclip.objectives.imagewise.CPU_TILE", 2 * e.patches_BPE[0].numel())
    torch.testing.assert_close(torch.autograd.grad(term(e).value, e.patches_BPE), whole)


def test_a_box_shows_patches_of_its_own_image_that_it_touches(boxed):
    e = boxed(torch.float64)
    poisoned = e.patches_BPE.detach().clone()
    poisoned[2] += 1
    before, after = (pool_regions(e.boxes("sub"), p, e.grid) for p in (e.patches_BPE, poisoned))
    assert not (before != after).any(-1)[[0, 1, 3, 4, 5]].any()
    before[0, 0].sum().backward()
    touched = cover(e.boxes("sub"), e.grid)[0, 0] > 0
    assert torch.equal(e.patches_BPE.grad.abs().sum(-1)[0] > 0, touched)


def test_captions_without_a_box_are_on_neither_axis(boxed):
    e, term = boxed(torch.float64), Regions("sub").double()
    there = known(e.boxes("sub"), e.mask_BK)
    text = torch.where(there[..., None], e.text_BKE, 100.0)
    torch.testing.assert_close(term(dataclasses.replace(e, text_BKE=text)).value, term(e).value)


@pytest.mark.parametrize("left", [0, 1])
def test_one_box_or_none_in_the_whole_batch_teaches_nothing_and_breaks_nothing(boxed, left):
    e, term = boxed(torch.float64), Regions("sub").double()
    boxes = torch.full_like(e.boxes_BK4, torch.nan)
    boxes[0, :left] = torch.tensor([0.1, 0.1, 0.6, 0.6])
    loss = term(dataclasses.replace(e, boxes_BK4=boxes)).value
    assert loss == 0
    loss.backward()
    for leaf in (e.text_BKE, e.patches_BPE, term.logit_scale):
        assert leaf.grad.abs().max() < 1e-12


def negatives(e, count=2):
    """The same with `count` negatives for every caption, some of them absent."""
    random = torch.Generator().manual_seed(3)
    wrong = normalize(torch.randn(6, 3 * count, 8, generator=random, dtype=e.text_BKE.dtype), dim=-1)
    mask = torch.rand(6, 3 * count, generator=random) < 0.6
    return dataclasses.replace(
        e,
        text_BKE=torch.cat([e.text_BKE, wrong * mask[..., None]], 1),
        mask_BK=torch.cat([e.mask_BK, mask], 1),
        boxes_BK4=torch.cat([e.boxes_BK4, torch.full((6, 3 * count, 4), torch.nan).to(e.boxes_BK4)], 1),
        slots={"sub": slice(0, 3), "sub-wrong": slice(3, 3 + 3 * count)},
    )


def test_the_choice_between_a_caption_and_its_negatives_equals_a_loop(boxed):
    plain = boxed()
    e, term = negatives(plain), RegionChoice("sub", "sub-wrong")
    shares, scale, losses = cover(e.boxes("sub"), e.grid), term.logit_scale.exp(), []
    for b, k in known(e.boxes("sub"), e.mask("sub")).nonzero().tolist():
        slots = [3 + 2 * k + n for n in range(2) if e.mask_BK[b, 3 + 2 * k + n]]
        if slots:
            region = normalize(shares[b, k] @ e.patches_BPE[b], dim=0)
            logits = scale * e.text_BKE[b, [k, *slots]] @ region
            losses.append(cross_entropy(logits[None], torch.tensor([0])))
    leaves = [plain.text_BKE, plain.patches_BPE, term.logit_scale]
    got, want = term(e).value, torch.stack(losses).mean()
    assert len(losses) > 4
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))


def test_what_cannot_work_is_refused(boxed):
    with pytest.raises(UserError, match="patch dropout"):
        Regions("sub")(dataclasses.replace(boxed(), grid=None))
    with pytest.raises(UserError, match="global batch holds 1"):
        Regions("sub")(boxed(images=1))


def test_patches_may_come_in_the_compute_dtype(boxed):
    e = boxed()
    low = e.patches_BPE.detach().bfloat16().requires_grad_()
    term = Regions("sub")
    got = term(dataclasses.replace(e, patches_BPE=low)).value
    torch.testing.assert_close(got, term(dataclasses.replace(e, patches_BPE=low.float())).value)
    got.backward()
    assert low.grad.dtype == torch.bfloat16
    assert low.grad.abs().max() > 0

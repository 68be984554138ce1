"""Grounding: against a loop, 0 at the truth, and for every caption that has a box but no other."""

import dataclasses
import math

import pytest
import torch
from torch.nn.functional import normalize

from longclip.objectives.boxes import cover, known
from longclip.objectives.grounding import Grounding, ground
from longclip.objectives.grouping import group
from longclip.types import UserError


def loss_by_loop(e, scale):
    pairs, shares = known(e.boxes("sub"), e.mask_BK).nonzero().tolist(), cover(e.boxes("sub"), e.grid)
    total, inside = 0.0, 0.0
    for b, k in pairs:
        z = [scale * e.text_BKE[b, k] @ p / p.norm() for p in e.patches_BPE[b]]
        all_of_them = sum(x.exp() for x in z)
        for x, q in zip(z, shares[b, k], strict=True):
            if q > 0:
                total = total + q * (q.log() - (x.exp() / all_of_them).log())
                inside += float((x.exp() / all_of_them).detach())
    return total / len(pairs), inside / len(pairs)


def test_loss_and_gradients_equal_a_loop(boxed):
    e, term = boxed(torch.float64), Grounding("sub").double()
    leaves = [e.text_BKE, e.patches_BPE, term.logit_scale]
    got, (want, inside) = term(e), loss_by_loop(e, term.logit_scale.exp())
    torch.testing.assert_close(got.value, want)
    torch.testing.assert_close(torch.autograd.grad(got.value, leaves), torch.autograd.grad(want, leaves))
    assert math.isclose(got.measures["inside"], inside)


def test_a_few_images_at_a_time_equal_all(boxed, monkeypatch):
    e, term = boxed(torch.float64), Grounding("sub").double()
    leaves = [e.patches_BPE, term.logit_scale]
    whole = torch.autograd.grad(term(e).value, leaves)
    monkeypatch.setattr("longclip.objectives.imagewise.CPU_TILE", 2 * e.patches_BPE[0].numel())
    torch.testing.assert_close(torch.autograd.grad(term(e).value, leaves), whole)


def test_it_is_zero_where_the_look_is_the_box():
    text, patches = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[2.0, 0.0], [3.0, 0.0], [-1.0, 0.0]]])
    apart, inside = ground(text, patches, torch.tensor([[[0.5, 0.5, 0.0]]]), torch.tensor(20.0))
    assert apart.abs().max() < 1e-6
    assert inside == 1
    assert ground(text, patches, torch.tensor([[[0.0, 0.0, 1.0]]]), torch.tensor(20.0))[0] > 39


def test_learning_it_puts_the_look_and_the_groups_into_the_box(boxed):
    e, term = boxed(grid=(4, 5)), Grounding("sub")
    patches = e.patches_BPE.detach().clone().requires_grad_()
    shares, there = cover(e.boxes("sub"), e.grid), known(e.boxes("sub"), e.mask_BK)

    def grouped_inside():
        weights = group(e.text_BKE, patches, threshold=0.5)[1]
        return float((weights * (shares > 0)).sum(-1)[there].mean().detach())

    adam = torch.optim.Adam([patches], lr=0.1)
    before, measured = grouped_inside(), []
    for _ in range(60):
        loss = term(dataclasses.replace(e, patches_BPE=patches))
        adam.zero_grad()
        loss.value.backward()
        adam.step()
        measured.append(float(loss.measures["inside"]))
    assert measured[0] < 0.6
    assert measured[-1] > 0.95
    assert grouped_inside() > before + 0.15


def test_every_caption_with_a_box_learns_and_no_other(boxed):
    e, term = boxed(torch.float64), Grounding("sub").double()
    there = known(e.boxes("sub"), e.mask_BK)
    assert there.any()
    assert not there.all()
    term(e).value.backward()
    assert torch.equal(e.text_BKE.grad.abs().sum(-1) > 0, there)
    assert torch.equal(e.patches_BPE.grad.abs().sum((1, 2)) > 0, there.any(1))


def test_a_caption_that_looks_elsewhere_altogether_learns_most(boxed):
    """Grouping weights would not teach it: what is cut off below a threshold has no gradient."""
    e, term = boxed(torch.float64, grid=(1, 5)), Grounding("sub").double()
    boxes = torch.full_like(e.boxes_BK4, torch.nan)
    boxes[0, 0] = torch.tensor([0.0, 0.0, 0.2, 1.0])  # the first of five patches
    patches = normalize(e.patches_BPE.detach(), dim=-1)
    found = []
    for likeness in (-0.9, 0.9):
        patches[0, 0] = likeness * e.text_BKE[0, 0].detach()
        leaf = patches.clone().requires_grad_()
        term(dataclasses.replace(e, patches_BPE=leaf, boxes_BK4=boxes)).value.backward()
        found.append(float(leaf.grad[0, 1:].norm()))
    assert found[0] > 2 * found[1] > 0


def test_no_box_in_a_batch_gives_zero(boxed):
    e = boxed()
    loss = Grounding("sub")(dataclasses.replace(e, boxes_BK4=e.boxes_BK4 * torch.nan))
    assert loss.value == loss.measures["boxes"] == 0
    loss.value.backward()
    assert (e.patches_BPE.grad == 0).all()


def test_patch_dropout_is_refused(boxed):
    with pytest.raises(UserError, match="patch dropout"):
        Grounding("sub")(dataclasses.replace(boxed(), grid=None))

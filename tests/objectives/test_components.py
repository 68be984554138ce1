"""Primary component matching: against an SVD, and where it would change nothing."""

import dataclasses
import warnings

import pytest
import torch
from torch.nn.functional import normalize

from longclip.objectives import Contrastive, PrimaryComponents
from longclip.objectives.components import principal
from longclip.types import UserError


def features(rows, width, seed=0):
    """Unit rows with a strong common mean, as image features have."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return normalize(x + 3 * torch.ones(width) / width**0.5, dim=-1)


def svd(x_NE):
    x = x_NE.detach().double()
    _, s, vt = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    return s, vt


@pytest.mark.parametrize(("rows", "width"), [(10, 16), (40, 16)])
@pytest.mark.parametrize("k", [1, 4])
def test_equals_an_svd_in_value_and_gradient(rows, width, k):
    x = features(rows, width).requires_grad_()
    _, vt = svd(x)
    fixed = (vt[:k].T @ vt[:k]).float()
    want = (x - x.mean(0)) @ fixed + x.mean(0)
    got = principal(x, k=k)
    torch.testing.assert_close(got.projected_NE, want, rtol=1e-5, atol=1e-6)
    along = torch.randn_like(want)
    grads = [torch.autograd.grad((y * along).sum(), x)[0] for y in (got.projected_NE, want)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    assert got.kept == k


@pytest.mark.parametrize("rows", [10, 40])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_variance_chooses_the_fewest_directions_that_explain_it(rows, share):
    x = features(rows, 16)
    s, _ = svd(x)
    explained = (s**2).cumsum(0) / (s**2).sum()
    m = int((explained < share).sum()) + 1
    got = principal(x, explained=share)
    assert got.kept == m
    torch.testing.assert_close(got.explained.double(), explained[m - 1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.projected_NE, principal(x, k=m).projected_NE)


@pytest.mark.parametrize("rows", [12, 40])
@pytest.mark.parametrize("distinct", [1, 2, 3])
def test_repeated_rows_give_no_nan(rows, distinct):
    x = features(distinct, 16).repeat(rows // distinct, 1).requires_grad_()
    got = principal(x, k=5)
    got.projected_NE.square().sum().backward()
    torch.testing.assert_close(got.projected_NE, x, rtol=1e-5, atol=1e-6)
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() < 100


def test_autocast_does_not_coarsen_it():
    x = features(20, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = principal(x, k=4)
    assert torch.equal(inside.projected_NE, principal(x, k=4).projected_NE)


def test_a_part_of_the_batch_gives_something_else(embed):
    """Why rows are gathered first: the released code's result depends on the number of devices."""
    x = features(20, 16)
    parts = torch.cat([principal(half, k=4).projected_NE for half in x.split(10)])
    assert (parts - principal(x, k=4).projected_NE).abs().max() > 0.01


def test_term_contrasts_projected_images(embed):
    e = embed(images=10)
    projected = principal(e.image_BE, k=3).projected_NE
    for renormalise in (False, True):
        got = PrimaryComponents("sub", k=3, renormalise=renormalise, label_smoothing=0.1)(e)
        image = normalize(projected, dim=-1) if renormalise else projected
        want = Contrastive("sub", label_smoothing=0.1)(dataclasses.replace(e, image_BE=image))
        torch.testing.assert_close(got.value, want.value)
        assert got.measures["kept"] == 3
        assert 0 < got.measures["explained"] < 1


def test_warns_once_where_it_is_the_identity(embed):
    e, term = embed(images=6), PrimaryComponents("sub", k=5)
    with pytest.warns(UserWarning, match=r"k=5 changes nothing.*6 images spans 5 directions"):
        loss = term(e)
    torch.testing.assert_close(loss.value, Contrastive("sub")(e).value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        term(e)


@pytest.mark.parametrize("sizes", [{"images": 6, "width": 16}, {"images": 16, "width": 6}])
def test_k_that_leaves_nothing_out_is_refused(embed, sizes):
    with pytest.raises(UserError, match=r"k=6 directions of \d+ images .* k below 5|k below 6"):
        PrimaryComponents("sub", k=6)(embed(**sizes))


@pytest.mark.parametrize("choice", [{}, {"k": 4, "explained": 0.9}, {"k": 0}, {"explained": 1.0}])
def test_a_choice_that_makes_no_sense_is_refused(choice):
    with pytest.raises(UserError, match="Component matching"):
        PrimaryComponents("sub", **choice)


def test_a_batch_of_one_is_refused(embed):
    with pytest.raises(UserError, match="global batch holds 1"):
        PrimaryComponents("sub", k=4)(embed(images=1))


def test_absent_rows_change_nothing_and_project_to_the_mean():
    x, present = features(12, 16), torch.rand(12, generator=torch.Generator().manual_seed(1)) < 0.7
    poisoned = torch.where(present[:, None], x, 1e3).requires_grad_()
    got, want = principal(poisoned, explained=0.8, present_N=present), principal(x[present], explained=0.8)
    torch.testing.assert_close(got.projected_NE[present], want.projected_NE)
    torch.testing.assert_close(
        got.projected_NE[~present], x[present].mean(0).expand(int((~present).sum()), -1)
    )
    assert (got.kept, got.explained) == (want.kept, want.explained)
    got.projected_NE.square().sum().backward()
    assert poisoned.grad[~present].abs().max() == 0


def test_himo_contrasts_images_with_projected_captions(embed):
    """Against an SVD of the captions that exist, in float64, gradient too: the projector is a constant."""
    e = embed(images=9)
    image, text = (x.detach().requires_grad_() for x in (e.image_BE, e.text_BKE))
    e = dataclasses.replace(e, image_BE=image, text_BKE=text)
    got = PrimaryComponents("sub", of="texts", explained=0.8, label_smoothing=0.1)(e)
    there = text[e.mask_BK]
    s, vt = svd(there)
    m = int(((s**2).cumsum(0) / (s**2).sum() < 0.8).sum()) + 1
    projector = (vt[:m].T @ vt[:m]).float()
    projected = (text - there.mean(0)) @ projector + there.mean(0)
    want = Contrastive("sub", label_smoothing=0.1)(dataclasses.replace(e, text_BKE=projected))
    torch.testing.assert_close(got.value, want.value)
    assert got.measures["kept"] == m
    grads = [torch.autograd.grad(loss.value, (image, text)) for loss in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_a_side_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match=r'of "both", but knows images and texts'):
        PrimaryComponents("sub", of="both", k=4)

"""Grouping: against a loop, and that no caption ever meets the patches of another image."""

import dataclasses
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from longclip.objectives import Grouping
from longclip.objectives.grouping import contrast_over_batch, entropy, group, group_tiled
from longclip.types import UserError


def grouped_by_loop(text_E, patches_PE, threshold):
    """Plain lists of float64 numbers, one caption."""
    unit = [p / p.norm() for p in patches_PE.double()]
    similarity = [float(text_E.double() @ p) for p in unit]
    low, high = min(similarity), max(similarity)
    scaled = [(s - low) / (high - low) for s in similarity]
    kept = [a if a >= threshold else 0.0 for a in scaled]
    total = sum(w / sum(kept) * p for w, p in zip(kept, unit, strict=True))
    return total / total.norm(), [w / sum(kept) for w in kept]


def loss_by_loop(e, scale, negatives):
    """Every present caption against every present caption, or those of its image."""
    pairs = e.mask_BK.nonzero().tolist()
    text = {(b, k): e.text_BKE[b, k].double() for b, k in pairs}
    found = {(b, k): grouped_by_loop(text[b, k], e.patches_BPE[b], 1 / 5)[0] for b, k in pairs}
    total = 0.0
    for x in text:
        others = [z for z in text if negatives == "batch" or z[0] == x[0]]
        for one, other in ((text, found), (found, text)):
            lse = torch.tensor([scale * float(one[x] @ other[z]) for z in others]).double().logsumexp(0)
            total += float(lse) - scale * float(text[x] @ found[x])
    return total / 2 / len(text)


@pytest.mark.parametrize("threshold", [None, 0.0, 0.6])
def test_groups_equal_a_loop(embed, threshold):
    e = embed()
    grouped, weights = group(e.text_BKE, e.patches_BPE, threshold)
    for b, k in e.mask_BK.nonzero().tolist():
        want, w = grouped_by_loop(
            e.text_BKE[b, k], e.patches_BPE[b], 1 / 5 if threshold is None else threshold
        )
        torch.testing.assert_close(grouped[b, k].double(), want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weights[b, k].tolist(), w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threshold", [None, 0.6])
def test_groups_of_a_few_images_at_a_time_equal_those_of_all(embed, monkeypatch, threshold):
    monkeypatch.setattr("longclip.objectives.imagewise.CPU_TILE", 2 * 5 * 8)  # two images
    for e in (embed(), embed(images=5)):
        leaves = [x.double().requires_grad_() for x in (e.text_BKE, e.patches_BPE)]
        grouped, weights = group(*leaves, threshold)
        tiled = group_tiled(*leaves, threshold)
        exact = {"rtol": 1e-10, "atol": 1e-10}
        torch.testing.assert_close(tiled.grouped_BKE, grouped, **exact)
        torch.testing.assert_close(tiled.entropy_BK, entropy(weights).detach(), **exact)
        pull = torch.randn(grouped.shape, dtype=torch.float64)
        got, want = (torch.autograd.grad((x * pull).sum(), leaves) for x in (tiled.grouped_BKE, grouped))
        torch.testing.assert_close(got, want, **exact)


def test_patches_may_come_in_the_compute_dtype(embed):
    e = embed()
    low = e.patches_BPE.bfloat16().requires_grad_()
    term = Grouping("sub")
    got = term(dataclasses.replace(e, patches_BPE=low)).value
    torch.testing.assert_close(got, term(dataclasses.replace(e, patches_BPE=low.float())).value)
    got.backward()
    assert low.grad.dtype == torch.bfloat16
    assert low.grad.abs().max() > 0


@pytest.mark.parametrize("negatives", ["batch", "image"])
def test_loss_equals_a_loop(embed, negatives):
    e = embed()
    got = Grouping("sub", negatives=negatives)(e).value.item()
    assert math.isclose(got, loss_by_loop(e, 1 / 0.07, negatives), rel_tol=1e-5)


def test_contrast_over_the_batch_equals_the_dense_one_gradients_too(embed):
    e = embed()
    grouped = torch.randn(6, 3, 8).double().requires_grad_()
    text, scale = e.text_BKE.double().requires_grad_(), torch.tensor(7.0).double().requires_grad_()
    logits = scale * text[e.mask_BK] @ grouped[e.mask_BK].T
    own = torch.arange(len(logits))
    dense = (cross_entropy(logits, own, reduction="sum") + cross_entropy(logits.T, own, reduction="sum")) / 2
    tiled = contrast_over_batch(text, grouped, e.mask_BK, scale)
    exact, leaves = {"rtol": 1e-10, "atol": 1e-10}, (text, grouped, scale)
    torch.testing.assert_close(tiled, dense, **exact)
    got, want = (torch.autograd.grad(x, leaves) for x in (tiled, dense))
    torch.testing.assert_close(got, want, **exact)


def test_patches_of_an_image_reach_its_own_captions_only(embed):
    e = embed()
    before, _ = group(e.text_BKE, e.patches_BPE)
    poisoned = e.patches_BPE.clone()
    poisoned[2] = torch.randn(5, 8, generator=torch.Generator().manual_seed(9))
    after, _ = group(e.text_BKE, poisoned)
    changed = (before != after).any(-1)
    assert not changed[[0, 1, 3, 4, 5]].any()
    assert torch.equal(changed[2], e.mask_BK[2])


@pytest.mark.parametrize("negatives", ["batch", "image"])
def test_absent_captions_are_on_neither_axis(embed, negatives):
    e = embed()
    text = torch.where(e.mask_BK[..., None], e.text_BKE, torch.ones(8)).requires_grad_()
    term = Grouping("sub", negatives=negatives)
    poisoned = term(dataclasses.replace(e, text_BKE=text)).value
    torch.testing.assert_close(poisoned, term(e).value)
    (grad,) = torch.autograd.grad(poisoned, text)
    assert grad[~e.mask_BK].abs().max() == 0


@pytest.mark.parametrize("threshold", [None, 0.0, 1.0])
@pytest.mark.parametrize("negatives", ["batch", "image"])
def test_patches_that_are_all_alike_give_no_nan_and_no_explosion(embed, threshold, negatives):
    e = embed()
    patches = torch.ones_like(e.patches_BPE).requires_grad_()
    text = e.text_BKE.clone().requires_grad_()
    term = Grouping("sub", threshold=threshold, negatives=negatives)
    loss = term(dataclasses.replace(e, text_BKE=text, patches_BPE=patches))
    loss.value.backward()
    for x in (loss.value, patches.grad, text.grad, term.logit_scale.grad, *loss.measures.values()):
        assert x.isfinite().all()
        assert x.abs().max() < 100


@pytest.mark.parametrize("negatives", ["batch", "image"])
def test_no_caption_at_all_gives_zero(embed, negatives):
    e = embed()
    e = dataclasses.replace(e, text_BKE=e.text_BKE * 0, mask_BK=torch.zeros_like(e.mask_BK))
    assert Grouping("sub", negatives=negatives)(e).value == 0


def test_weights_carry_gradient_to_the_text(embed):
    e = embed()
    text = e.text_BKE.clone().requires_grad_()
    grouped, _ = group(text, e.patches_BPE)
    grouped[0, 0, 0].backward()
    assert text.grad[0, 0].abs().sum() > 1e-4
    assert text.grad[1:].abs().sum() == 0


def test_entropy_runs_from_one_patch_to_all(embed):
    one, alike = torch.eye(4)[0], torch.full((4,), 0.25)
    torch.testing.assert_close(entropy(torch.stack([one, alike])[None]), torch.tensor([[0.0, 1.0]]))


def test_what_cannot_be_contrasted_is_refused(embed):
    with pytest.raises(UserError, match="several captions"):
        Grouping("sub", negatives="image")(embed(slots=1))
    with pytest.raises(UserError, match="global batch holds one"):
        Grouping("sub")(embed(images=1, slots=1))
    with pytest.raises(UserError, match='knows "batch" and "image"'):
        Grouping("sub", negatives="all")
    with pytest.raises(UserError, match="threshold 2"):
        Grouping("sub", threshold=2)


def test_asks_for_patches(embed):
    assert Grouping.needs == {"patches"}
    with pytest.raises(AssertionError, match="patches"):
        Grouping("sub")(dataclasses.replace(embed(), patches_BPE=None))

"""beta-CLIP's objective: against loops over captions, both forms, and who is whose negative."""

import dataclasses
import math

import pytest
import torch
from test_pooling import pooled_by_loop
from torch.nn.functional import logsigmoid, normalize

from longclip import dist
from longclip.objectives.beta import Beta, beta_logistic, beta_softmax
from longclip.types import UserError

WIDTH, HEADS = 12, 3
FORMS = pytest.mark.parametrize("form", ["softmax", "logistic"])


def built(form="softmax", beta=0.3, dtype=torch.float64, parts="parts"):
    term = Beta("long", parts, form=form, beta=beta, heads=HEADS)
    term.build(WIDTH)
    for parameter in term.finder.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    torch.nn.init.constant_(term.logit_scale, 1.0)
    return term.to(dtype)


@pytest.fixture
def batch(embed):
    """Slot 1 is the group "long", slots 2 and 3 are "parts"; slot 0 is nobody's.

    Image 1 has a caption without siblings, image 2 none of these groups.
    """

    def make(dtype=torch.float64, **sizes):
        e = embed(width=WIDTH, slots=4, **sizes)
        e.mask_BK[1:2, 2:] = e.mask_BK[2:3, 1:] = False
        e.text_BKE[~e.mask_BK] = 0
        leaves = {n: getattr(e, n).to(dtype).requires_grad_() for n in ("text_BKE", "patches_BPE")}
        return dataclasses.replace(e, **leaves, slots={"long": slice(1, 2), "parts": slice(2, 4)})

    return make


def found_by_loop(term, text_E, patches_PE):
    """`pooled_by_loop` without the empty slot: a patch that all attend to with exp(0) and find nothing in."""
    finder = term.finder
    a, d = finder.pooling.attention, WIDTH // HEADS
    query = finder.pooling.queries(text_E)
    keys, values = (
        [
            a.in_proj_weight.split(WIDTH)[kind] @ norm(p) + a.in_proj_bias.split(WIDTH)[kind]
            for p in patches_PE
        ]
        for kind, norm in ((1, finder.pooling.key_norm), (2, finder.pooling.value_norm))
    )
    heads = []
    for h in range(HEADS):
        own = slice(h * d, (h + 1) * d)
        factors = torch.stack([query[own] @ key[own] / math.sqrt(d) for key in keys]).softmax(0)
        heads.append(sum(f * v[own] for f, v in zip(factors, values, strict=True)))
    x = a.out_proj.weight @ torch.cat(heads) + a.out_proj.bias
    first, _, second = finder.mlp
    inner = torch.nn.functional.gelu(first.weight @ finder.norm(x) + first.bias)
    return normalize(x + second.weight @ inner + second.bias, dim=0)


def loss_by_loop(term, e):
    """Every pair of captions that exist, one after the other."""
    own = [(b, k) for b in range(len(e.mask_BK)) for k in (1, 2, 3) if e.mask_BK[b, k]]
    found = {(b, k): found_by_loop(term, e.text_BKE[b, k], e.patches_BPE[b]) for b, k in own}
    scale, beta, total = term.logit_scale.exp(), term.beta, 0.0
    for x in own:
        siblings = [y for y in own if y[0] == x[0] and y != x]
        if term.form == "logistic":
            for y in own:
                score = scale * found[x] @ e.text_BKE[y]
                weight = beta if y in siblings else 1
                total -= weight * logsigmoid(score if y[0] == x[0] else -score)
            continue
        for scores in (
            torch.stack([scale * found[x] @ e.text_BKE[z] for z in own]),
            torch.stack([scale * e.text_BKE[x] @ found[z] for z in own]),
        ):
            weights = torch.tensor([1.0 if z == x else beta if z in siblings else 0.0 for z in own])
            total -= (weights / weights.sum() * scores.log_softmax(0)).sum() / 2
    return total / (len(own) if term.form == "softmax" else len(own) ** 2)


def learnt(term, e):
    return [e.text_BKE, e.patches_BPE, *term.parameters()]


def agree(got, want, leaves, **exact):
    torch.testing.assert_close(got, want, **exact)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), **exact)


@FORMS
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_equals_a_loop_over_pairs_of_captions(batch, form, beta):
    term, e = built(form, beta), batch(images=4, patches=3)
    assert e.mask_BK[:, 1:].sum(1).tolist() == [3, 1, 0, 3]
    agree(term(e).value, loss_by_loop(term, e), learnt(term, e))


def test_the_finder_is_one_cross_attention_without_an_empty_slot(batch):
    term, e = built(), batch(images=2)
    got = term.finder(e.text_BKE, e.patches_BPE)
    for b, k in ((0, 0), (1, 3)):
        torch.testing.assert_close(got[b, k], found_by_loop(term, e.text_BKE[b, k], e.patches_BPE[b]))
    with_slot = pooled_by_loop(term.finder.pooling, e.text_BKE[0, 0], e.patches_BPE[0])
    assert (normalize(with_slot, dim=0) - got[0, 0]).abs().max() > 0.01


@FORMS
def test_gradients_of_the_pure_losses_are_right(form):
    random = torch.Generator().manual_seed(1)
    text, found = (
        torch.randn(3, 2, 4, generator=random, dtype=torch.float64).requires_grad_() for _ in range(2)
    )
    scale, mask = torch.tensor(2.0, dtype=torch.float64).requires_grad_(), torch.ones(3, 2).bool()
    mask[2, 1] = False
    loss = beta_softmax if form == "softmax" else beta_logistic
    assert torch.autograd.gradcheck(lambda t, f, s: loss(t, f, f, mask, s, 0.4), (text, found, scale))


def test_softmax_without_sharing_is_plain_cross_entropy(batch):
    """beta = 0 with one caption an image is InfoNCE between texts and what they found."""
    term, e = built(beta=0.0, parts=None), batch()
    e = dataclasses.replace(e, mask_BK=torch.ones_like(e.mask_BK), text_BKE=torch.randn_like(e.text_BKE))
    text = e.text(term.texts)
    scores = term.logit_scale.exp() * term.finder(text, e.patches_BPE)[:, 0] @ text[:, 0].T
    target = torch.arange(len(scores))
    want = sum(torch.nn.functional.cross_entropy(s, target) for s in (scores, scores.T)) / 2
    torch.testing.assert_close(term(e).value, want)


@FORMS
def test_absent_captions_change_nothing_and_get_no_gradient(batch, form):
    """Padding that stays in the denominator of the softmax is a negative."""
    term, e = built(form), batch()
    poison = torch.where(e.mask_BK[..., None], e.text_BKE, 1e3).detach().requires_grad_()
    poisoned = term(dataclasses.replace(e, text_BKE=poison)).value
    torch.testing.assert_close(poisoned, term(e).value)
    (grad,) = torch.autograd.grad(poisoned, poison)
    assert grad[~e.mask_BK].abs().max() == 0


def test_a_caption_looks_at_its_own_image_alone(batch):
    term, e = built(), batch()
    poisoned = e.patches_BPE.detach().clone()
    poisoned[2] = torch.randn(5, WIDTH)
    before, after = (term.finder(e.text_BKE, patches) for patches in (e.patches_BPE, poisoned))
    assert (before != after).flatten(1).any(1).tolist() == [False, False, True, False, False, False]


@FORMS
def test_tiles_of_images_equal_the_whole(batch, form, monkeypatch):
    term, e = built(form), batch()
    whole = term(e).value
    monkeypatch.setattr("longclip.objectives.imagewise.CPU_TILE", 2 * 5 * WIDTH)  # two images
    agree(term(e).value, whole, learnt(term, e), rtol=1e-10, atol=1e-10)


@FORMS
def test_everything_that_takes_part_learns(batch, form):
    term, e = built(form), batch()
    names = ["text", "patches", *dict(term.named_parameters())]
    grads = torch.autograd.grad(term(e).value, learnt(term, e))
    silent = [n for n, grad in zip(names, grads, strict=True) if not grad.abs().max() > 1e-6]
    assert silent == []


@FORMS
def test_no_caption_at_all_gives_zero(batch, form):
    term, e = built(form), batch()
    empty = dataclasses.replace(e, text_BKE=e.text_BKE * 0, mask_BK=torch.zeros_like(e.mask_BK))
    assert term(empty).value == 0


def test_measures_are_cosines_within_images(batch):
    term, e = built(), batch()
    own, others = [], []
    found = term.finder(e.text_BKE, e.patches_BPE)
    for b in range(len(e.mask_BK)):
        present = [k for k in (1, 2, 3) if e.mask_BK[b, k]]
        own += [e.text_BKE[b, k] @ found[b, k] for k in present]
        others += [e.text_BKE[b, k] @ found[b, j] for k in present for j in present if j != k]
    measures = term(e).measures
    torch.testing.assert_close(measures["own"], torch.stack(own).mean().detach())
    torch.testing.assert_close(measures["others"], torch.stack(others).mean().detach())


def test_patches_in_half_precision_give_float32_gradients_of_the_head(batch):
    term, e = built(dtype=torch.float32), batch(torch.float32)
    low = dataclasses.replace(e, patches_BPE=e.patches_BPE.detach().bfloat16().requires_grad_())
    loss = term(low).value
    loss.backward()
    torch.testing.assert_close(loss, term(e).value, rtol=0.03, atol=0)
    assert low.patches_BPE.grad.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in term.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"form": "bce"}, 'form "bce".*softmax and logistic'), ({"beta": 1.5}, "beta 1.5.*0 to 1")],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Beta("long", **settings)


def test_a_batch_of_one_and_heads_that_do_not_divide_are_refused(batch):
    with pytest.raises(UserError, match="global batch holds 1"):
        built()(batch(images=1))
    with pytest.raises(UserError, match=r"8 heads.*12 values"):
        Beta("long").build(12)


def test_the_finder_learns_to_find_what_captions_ask_for():
    """Each caption hides in one patch, turned; captions of an image are told apart only by looking."""
    term, turn = Beta("sub", beta=0.0, heads=4), torch.linalg.qr(torch.randn(16, 16))[0]
    term.build(16)
    optimizer = torch.optim.Adam(term.parameters(), lr=0.01)
    mask = torch.ones(16, 2, dtype=torch.bool)
    for _ in range(60):
        text = normalize(torch.randn(16, 2, 16), dim=-1)
        patches = 0.3 * torch.randn(16, 6, 16)
        patches[:, :2] += 4 * text @ turn
        found = term.finder(text, patches)
        loss = beta_softmax(text, found, found, mask, term.logit_scale.exp(), 0.0) / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert dist.world() == 1
    assert loss < 1

"""FLAIR's objective: against a loop over pairs, tiles against the whole, and who meets whom."""

import dataclasses
import math

import pytest
import torch
from test_pooling import pooled_by_loop
from torch.nn.functional import normalize

from benchmarks.measures import peak_bytes
from longclip import dist
from longclip.objectives import TextConditioned, conditioned
from longclip.objectives.conditioned import Captions, conditioned_sigmoid, one_of_each
from longclip.types import Embeddings, UserError

WIDTH, HEADS = 12, 3


def built(dtype=torch.float64):
    term = TextConditioned("sub", heads=HEADS, bias=-2.0)  # so that positives and negatives weigh alike
    term.build(WIDTH)
    for parameter in term.head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return term.to(dtype)


@pytest.fixture
def batch(embed):
    def make(dtype=torch.float64, **sizes):
        e = embed(width=WIDTH, **sizes)
        names = ("image_BE", "text_BKE", "patches_BPE")
        return dataclasses.replace(e, **{n: getattr(e, n).to(dtype).requires_grad_() for n in names})

    return make


def loss_by_loop(term, e):
    """Both halves, pair by pair, with plain numbers for what divides them."""
    images, slots = e.mask_BK.shape
    own = [[k for k in range(slots) if e.mask_BK[b, k]] for b in range(images)]
    scale, bias = term.logit_scale.exp(), term.logit_bias

    def pair(feature_E, text_E, sign):
        return -torch.nn.functional.logsigmoid(sign * (scale * feature_E @ text_E + bias))

    conditioned, globally, met = 0.0, 0.0, 0
    for i in range(images):
        shown = [(j, own[j][(j + i % slots) % len(own[j])], -1) for j in range(images) if own[j] and j != i]
        meets = [(i, k, 1) for k in own[i]] + shown
        met += len(meets)
        for j, k, sign in meets:
            text_E = e.text_BKE[j, k]
            found_E = pooled_by_loop(term.head, text_E, e.patches_BPE[i])
            conditioned += pair(normalize(found_E, dim=0), text_E, sign)
        for j in range(images):
            for k in own[j]:
                globally += pair(e.image_BE[i], e.text_BKE[j, k], 1 if i == j else -1)
    return (conditioned * images / met + globally / sum(map(len, own))) / 2


def learnt(term, e):
    return [e.image_BE, e.text_BKE, e.patches_BPE, *term.parameters()]


def agree(got, want, leaves, **exact):
    torch.testing.assert_close(got, want, **exact)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), **exact)


def test_equals_a_loop_over_pairs(batch):
    term, e = built(), batch(images=4)
    assert not e.mask_BK.all()
    agree(term(e).value, loss_by_loop(term, e), learnt(term, e))


@pytest.mark.parametrize("pairs", [1, 4, 20])
def test_tiles_of_images_and_of_captions_equal_the_whole(batch, monkeypatch, pairs):
    term, e = built(), batch()
    whole = term(e).value
    monkeypatch.setattr(conditioned, "CPU_PAIRS", pairs)  # blocks of captions, single images, two images
    agree(term(e).value, whole, learnt(term, e), rtol=1e-10, atol=1e-10)


def test_everything_that_takes_part_learns(batch):
    term, e = built(), batch()
    names = ["image", "text", "patches", *dict(term.named_parameters())]
    grads = torch.autograd.grad(term(e).value, learnt(term, e))
    assert [n for n, grad in zip(names, grads, strict=True) if not grad.abs().max() > 1e-4] == []


def test_divisors_are_the_papers_where_no_caption_is_absent(batch):
    """FLAIR's L_tcs is a sum over B + K - 1 captions for each image, divided by their number."""
    term, e = built(), batch()
    e = dataclasses.replace(e, mask_BK=torch.ones_like(e.mask_BK))
    with torch.no_grad():
        term.logit_scale.fill_(-1e9)  # every logit is the offset
    images, slots = e.mask_BK.shape
    right, wrong = (math.log1p(math.exp(-sign * -2.0)) for sign in (1, -1))
    found = term(e).measures
    want = images * (slots * right + (images - 1) * wrong) / (images + slots - 1)
    assert math.isclose(found["conditioned"], want)
    assert math.isclose(found["global"], right + (images - 1) * wrong)


def test_patches_of_an_image_meet_only_its_own_row(batch):
    term, e = built(), batch()
    others = Captions(term.head.queries(e.text_BKE[:, 0]), e.text_BKE[:, 0])
    own = Captions(term.head.queries(e.text_BKE), e.text_BKE)
    valid = torch.ones(6, 3 + 6, dtype=torch.bool)
    rest = (own, others, valid, term.logit_scale.exp(), term.logit_bias, term.head.weights(), HEADS)
    poisoned = e.patches_BPE.detach().clone()
    poisoned[2] = torch.randn(5, WIDTH)
    before, after = (conditioned_sigmoid(p, *rest) for p in (e.patches_BPE, poisoned))
    assert (before != after).tolist() == [False, False, True, False, False, False]


def test_absent_captions_change_nothing_and_get_no_gradient(batch):
    term, e = built(), batch()
    poison = torch.where(e.mask_BK[..., None], e.text_BKE, 1e3).detach().requires_grad_()
    poisoned = term(dataclasses.replace(e, text_BKE=poison)).value
    torch.testing.assert_close(poisoned, term(e).value)
    (grad,) = torch.autograd.grad(poisoned, poison)
    assert grad[~e.mask_BK].abs().max() == 0


def test_other_images_meet_one_caption_of_each_in_turn():
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1], [1, 0, 1]]).bool()
    slot, present = one_of_each(mask, turn=0)
    assert slot[present].tolist() == [0, 2, 1, 1, 2]
    assert present.tolist() == [True, True, False, True, True, True]
    assert one_of_each(mask, turn=1)[0][present].tolist() == [1, 0, 1, 2, 0]


def test_no_caption_is_without_a_negative(batch):
    """One that all images met would be pushed away by all of them, and its siblings by none."""
    term, e = built(), batch(images=9)
    text = torch.randn_like(e.text_BKE)
    alike = dataclasses.replace(e, text_BKE=text, mask_BK=torch.ones_like(e.mask_BK))
    met = torch.zeros(9, 3)
    original = conditioned.conditioned_sigmoid

    def counting(patches, own, others, valid, *rest):
        same = (others.text[:, None] == text).all(-1)  # [X, K]
        met.add_(same * valid[:, own.text.shape[1] :].sum(0)[:, None])
        return original(patches, own, others, valid, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conditioned, "conditioned_sigmoid", counting)
        term(alike)
    assert met.sum() == 9 * 8
    assert met.min() >= 2
    assert met.max() <= 3


def test_no_caption_at_all_gives_zero_and_one_image_is_enough(batch):
    term, e = built(), batch()
    empty = dataclasses.replace(e, text_BKE=e.text_BKE * 0, mask_BK=torch.zeros_like(e.mask_BK))
    assert term(empty).value == 0
    alone = batch(images=1)
    agree(term(alone).value, loss_by_loop(term, alone), learnt(term, alone))


def test_patches_that_are_all_alike_give_finite_gradients(batch):
    term, e = built(torch.float32), batch(torch.float32)
    patches = torch.zeros_like(e.patches_BPE).requires_grad_()
    term(dataclasses.replace(e, patches_BPE=patches)).value.backward()
    for x in (patches.grad, e.text_BKE.grad, *(p.grad for p in term.parameters())):
        assert x.isfinite().all()


def test_an_autocast_around_the_term_is_harmless(batch):
    term, e = built(torch.float32), batch(torch.float32)
    low = dataclasses.replace(e, patches_BPE=e.patches_BPE.detach().bfloat16().requires_grad_())
    plain, half = term(e).value, term(low).value
    with torch.autocast("cpu", torch.bfloat16):
        around = term(low)
        around.value.backward()
    assert torch.equal(around.value, half)
    torch.testing.assert_close(half, plain, rtol=0.02, atol=0)
    assert low.patches_BPE.grad.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in term.parameters())
    exact = torch.autograd.grad(plain, term.head.attention.out_proj.weight)[0]
    rounded = term.head.attention.out_proj.weight.grad
    assert (exact - rounded).norm() < 0.05 * exact.norm()


def test_pooled_vectors_of_all_pairs_never_exist(batch, monkeypatch):
    monkeypatch.setattr(conditioned, "CPU_PAIRS", 256)
    term = built(torch.float32)

    def most(images):
        e = batch(torch.float32, images=images, slots=2, patches=3)
        return peak_bytes(lambda: torch.autograd.grad(term(e).value, learnt(term, e)))

    pooled = 4 * WIDTH * (96**2 - 32**2)  # of the pairs that the larger batch has more
    assert most(96) - most(32) < pooled / 3


def test_the_head_learns_to_find_what_captions_ask_for():
    """Each caption hides in one patch, turned. A head that cannot look ends at 5.8, whatever its offset."""
    term, turn = TextConditioned("sub", heads=4, bias=-3), torch.linalg.qr(torch.randn(16, 16))[0]
    term.build(16)
    optimizer = torch.optim.Adam(term.parameters(), lr=0.02)
    mask = torch.ones(16, 2, dtype=torch.bool)
    for _ in range(60):
        text = normalize(torch.randn(16, 2, 16), dim=-1)
        patches = 0.3 * torch.randn(16, 6, 16)
        patches[:, :2] += 4 * text @ turn
        loss = term(Embeddings(text[:, 0], text, mask, {"sub": slice(2)}, text.sum(), dist.Gather(), patches))
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
    assert loss.measures["conditioned"] < 4


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UserError, match=r"8 heads.*12 values.*heads"):
        TextConditioned("sub").build(12)

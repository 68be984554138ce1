"""SmartCLIP's masks: against a loop over pairs, and that masks give no pair away."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from longclip.objectives import masked
from longclip.objectives.masked import Masked, binary, masked_cosine
from longclip.types import UserError, Words

WIDTH, SLOTS = 8, 2
LENGTHS = np.array([[5, 3], [0, 4], [7, 2], [3, 3], [4, 0], [0, 0]], np.int32)


def built(dtype=torch.float64, **options):
    torch.manual_seed(0)
    term = Masked("sub", heads=2, **options)
    term.build(WIDTH)
    torch.nn.init.zeros_(term.head.open.bias)  # so that about half is open
    return term.to(dtype)


@pytest.fixture
def batch(embed):
    def make(dtype=torch.float64):
        e = embed(slots=SLOTS, width=WIDTH)
        states = torch.randn(int(LENGTHS.sum()), WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
        mask = torch.from_numpy(LENGTHS > 0)
        text = normalize(torch.randn(6, SLOTS, WIDTH, generator=torch.Generator().manual_seed(2)), dim=-1)
        return dataclasses.replace(
            e,
            image_BE=e.image_BE.to(dtype).requires_grad_(),
            text_BKE=(text * mask[..., None]).to(dtype).requires_grad_(),
            mask_BK=mask,
            words=Words(states.requires_grad_(), LENGTHS),
        )

    return make


def masks_by_loop(term, e):
    """Each caption alone through the network: nothing to pad."""
    ends, found = LENGTHS.cumsum().reshape(LENGTHS.shape), {}
    for (b, k), n in np.ndenumerate(LENGTHS):
        if n:
            words = e.words.states_TE[ends[b, k] - n : ends[b, k]].to(term.head.open.weight)
            logits = term.head(words[None], torch.ones(1, n, dtype=torch.bool))[0]
            found[b, k] = (logits > 0) + (logits.sigmoid() - logits.sigmoid().detach())
    return found


def loss_by_loop(term, e):
    masks, total = masks_by_loop(term, e), 0.0
    for k in range(SLOTS):
        owners = [b for b, slot in masks if slot == k]
        seen = [[v * masks[b, k] for b in owners] for v in e.image_BE]
        rows = [[x @ e.text_BKE[b, k] / x.norm() for x, b in zip(row, owners, strict=True)] for row in seen]
        scores, own = e.scale * torch.stack([torch.stack(row) for row in rows]), torch.tensor(owners)
        total += cross_entropy(scores[own], torch.arange(len(own)), reduction="sum") / 2
        total += cross_entropy(scores.T, own, reduction="sum") / 2
    return (total + term.sparsity * sum(mask.mean() for mask in masks.values())) / len(masks)


@pytest.mark.parametrize("tile", [(1, 1), (4, 2), (100, 100)])
def test_loss_and_gradients_equal_a_loop_over_pairs_whatever_the_tiles(batch, monkeypatch, tile):
    monkeypatch.setattr(masked, "CPU_TILE", tile)
    monkeypatch.setattr(masked, "CPU_WORDS", 9)
    term, e = built(torch.float32), batch(torch.float32)
    got, want = term(e).value, loss_by_loop(term, e)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(got, want, **close)
    leaves = e.image_BE, e.text_BKE, e.words.states_TE, *term.parameters()
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), **close)


def test_scores_are_cosines_of_masked_images_and_have_their_gradient():
    random = torch.Generator().manual_seed(0)
    image, text = (
        normalize(torch.randn(n, 5, generator=random).double(), dim=-1).requires_grad_() for n in (4, 3)
    )
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).double().requires_grad_()
    scale = torch.tensor(3.0).double().requires_grad_()
    score, same = masked_cosine(image, mask, text, scale)
    assert same is score
    for i in range(4):
        for j in range(3):
            torch.testing.assert_close(score[i, j], 3 * cosine_similarity(image[i] * mask[j], text[j], dim=0))
    assert torch.autograd.gradcheck(masked_cosine, (image, mask, text, scale))


def test_a_mask_is_binary_and_learns_as_if_it_were_soft():
    logits = torch.tensor([-2.0, 0.5, 3.0], requires_grad=True)
    mask = binary(logits)
    assert mask.tolist() == [0, 1, 1]
    mask.sum().backward()
    soft = logits.detach().sigmoid()
    torch.testing.assert_close(logits.grad, soft * (1 - soft))


def test_masks_alone_give_no_pair_away():
    """Equal images and equal texts under different masks: a caption cannot tell its image from others."""
    image, text = normalize(torch.ones(4, 6), dim=-1), normalize(torch.arange(1.0, 7).expand(4, 6), dim=-1)
    mask = (torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    score, _ = masked_cosine(image, mask, text, torch.tensor(9.0))
    assert score.std(1).min() > 0.1
    assert score.std(0).max() == 0


def test_half_precision_words_and_closed_masks_are_finite(batch):
    term, e = built(torch.float32), batch(torch.float32)
    torch.nn.init.constant_(term.head.open.bias, -50)
    words = e.words.states_TE.detach().bfloat16().requires_grad_()
    loss = term(dataclasses.replace(e, words=Words(words, LENGTHS)))
    loss.value.backward()
    assert loss.measures["open"] == 0
    for x in (loss.value, words.grad, e.image_BE.grad, *(p.grad for p in term.parameters())):
        assert x.isfinite().all()


def test_open_masks_are_the_plain_contrast_and_cost_their_price(batch):
    term, e = built(torch.float32, sparsity=0.25), batch(torch.float32)
    torch.nn.init.constant_(term.head.open.bias, 50)
    found = term(e)
    assert found.measures["open"] == 1
    masks = {pair: torch.ones(WIDTH) for pair in masks_by_loop(term, e)}
    total = 0.0
    for k in range(SLOTS):
        own = torch.tensor([b for b, slot in masks if slot == k])
        scores = e.scale * e.image_BE @ e.text_BKE[own, k].T
        total += cross_entropy(scores[own], torch.arange(len(own)), reduction="sum") / 2
        total += cross_entropy(scores.T, own, reduction="sum") / 2
    torch.testing.assert_close(found.value, total / len(masks) + 0.25)


def test_no_caption_at_all_gives_zero(batch):
    term, e = built(torch.float32), batch(torch.float32)
    none = Words(e.words.states_TE[:0], LENGTHS * 0)
    loss = term(dataclasses.replace(e, words=none, mask_BK=e.mask_BK & False)).value
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None for p in term.parameters()), "every process has them all"


def test_what_cannot_be_is_refused(batch):
    with pytest.raises(UserError, match=r"3 heads.*8 values"):
        Masked("sub", heads=3).build(WIDTH)
    with pytest.raises(UserError, match="sparsity -1"):
        Masked("sub", sparsity=-1)

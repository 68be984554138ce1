"""The NULL image: what goes to it, how much, and what is left for the images."""

import dataclasses

import pytest
import torch
from torch.nn.functional import normalize

from longclip.objectives.gates import Gates
from longclip.objectives.visualness import Visualness, null_share
from longclip.types import Embeddings, UserError


def made(**options):
    torch.manual_seed(0)
    term = Visualness("sub", **options)
    term.build(8)
    return term


def loop(e, null, r, weights):
    """One caption at a time, in float64; the text's choice as the likelihood of image or NULL."""
    image, text, scale = e.image_BE.double(), e.text_BKE.double(), e.scale.double()
    null, losses = null.double() / null.double().norm(), []
    for b, k in e.mask_BK.nonzero().tolist():
        texts = scale * text[e.mask_BK[:, k], k] @ image[b]
        own, images = scale * text[b, k] @ image[b], scale * image @ text[b, k]
        to_null = scale * null @ text[b, k]
        total = torch.cat([images, to_null[None]]).logsumexp(0)
        by_text = (1 - r[b, k]) * (total - own) + r[b, k] * (total - to_null)
        by_image = (1 - r[b, k]) * (texts.logsumexp(0) - own)
        losses.append(weights[b, k] * (by_text + by_image) / 2)
    return torch.stack(losses).mean()


def share_by_search(e, null, share):
    x = e.scale * (e.text_BKE @ normalize(null, dim=-1) - (e.text_BKE * e.image_BE[:, None]).sum(-1))
    x = x.detach().double()

    best = torch.tensor(0.0, dtype=torch.float64)
    for width in (60, 0.1, 1e-4):
        c = best + torch.linspace(-width, width, 2001, dtype=torch.float64)
        best = c[(torch.sigmoid(x[e.mask_BK][:, None] - c).mean(0) - share).abs().argmin()]
    return torch.sigmoid(x - best)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_value_and_gradient_equal_a_loop(embed, labelled, gated):
    e = embed()
    e = dataclasses.replace(
        e,
        image_BE=e.image_BE.requires_grad_(),
        text_BKE=e.text_BKE.requires_grad_(),
        weights_BK=torch.rand(6, 3, generator=torch.Generator().manual_seed(2)),
    )
    term = made(share=0.3, labelled=labelled, gated=gated)
    r = 1 - e.weights_BK if labelled else share_by_search(e, term.null_E, 0.3)
    weights = torch.ones(6, 3) if labelled else e.weights_BK
    if gated:
        agree, pair = Gates(1)(e, ("sub",))
        weights = weights * agree * pair
    got, want = term(e).value, loop(e, term.null_E, r.double(), weights.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    for leaf in (e.image_BE, e.text_BKE, term.null_E):
        grads = [torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
@pytest.mark.parametrize("spread", [0.01, 5.0, 100.0])
def test_the_mean_that_belongs_to_null_is_held(share, spread):
    x = spread * torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(40, 3, generator=torch.Generator().manual_seed(1)) < 0.7
    found = null_share(x, torch.where(mask, x, 1e4), mask, share)
    assert found[mask].mean().item() == pytest.approx(share, abs=1e-3)


def test_captions_that_say_the_same_of_all_images_go_to_null():
    """Half of the second captions are one empty phrase; NULL alone is trained."""
    random = torch.Generator().manual_seed(0)
    image = normalize(torch.randn(40, 32, generator=random), dim=-1)
    cone, phrase = torch.randn(32, generator=random), torch.randn(32, generator=random)
    text = normalize(image[:, None] + 0.1 * cone + 0.05 * torch.randn(40, 2, 32, generator=random), dim=-1)
    text[:20, 1] = normalize(0.1 * cone + phrase, dim=-1)
    term = Visualness("sub", share=0.25)
    term.build(32)
    optimizer = torch.optim.Adam([term.null_E], lr=0.05)
    e = Embeddings(
        image,
        text,
        torch.ones(40, 2, dtype=torch.bool),
        {"sub": slice(0, 2)},
        torch.tensor(20.0),
        lambda x: x,
    )
    for _ in range(60):
        optimizer.zero_grad()
        term(e).value.backward()
        optimizer.step()
    like = text @ normalize(term.null_E.detach(), dim=-1)
    assert like[:20, 1].min() > 0.8
    assert like[20:].max() < 0.5
    assert like[:20, 0].max() < 0.5


def test_what_is_labelled_visual_does_not_move_to_null(embed):
    e = embed()
    term = made(labelled=True)
    (grad,) = torch.autograd.grad(term(e).value, term.null_E)  # all weights are 1: NULL is only a negative
    assert grad @ e.text_BKE[e.mask_BK].mean(0) > 0


def test_impossible_shares_are_refused():
    with pytest.raises(UserError, match="share is 1"):
        Visualness("sub", share=1.0)

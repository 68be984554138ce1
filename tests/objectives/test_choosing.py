"""Which negatives count, in which direction, and how much captions do: against lists sorted by hand."""

import dataclasses

import pytest
import torch
from torch.nn.functional import normalize

from longclip.objectives import Contrastive
from longclip.objectives.choosing import Negatives, window
from longclip.objectives.contrastive import info_nce
from longclip.objectives.tiles import Pairs
from longclip.types import UserError

TILE = (4, 3)


def loop(image, text, mask, scale, share, negatives, weights):
    """One caption at a time: its image's negatives and its own, each a plain list."""
    losses = []
    for b, k in mask.nonzero().tolist():
        own = scale * image[b] @ text[b, k]
        others = [j for j in range(len(image)) if j != b]
        texts = [scale * image[b] @ text[j, k] for j in others if mask[j, k]]
        images = [scale * image[j] @ text[b, k] for j in others]
        sides = [torch.stack([own, *kept(z, own, scale, negatives)]).logsumexp(0) for z in (texts, images)]
        losses.append(weights[b, k] * (share * sides[0] + (1 - share) * sides[1] - own))
    return torch.stack(losses).mean()


def kept(scores, own, scale, negatives):
    above, hardest = negatives
    left = [z for z in scores if above is None or z <= own + scale * above]
    return sorted(left, key=lambda z: -z.item())[:hardest]


def inputs(embed, **sizes):
    e = embed(images=9, **sizes)
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    return e.image_BE.double().requires_grad_(), e.text_BKE.double().requires_grad_(), e.mask_BK, scale


@pytest.mark.parametrize("share", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("above", [None, 0.0, 0.1])
@pytest.mark.parametrize("hardest", [None, 1, 3, 50])
def test_equals_a_loop_over_sorted_lists(embed, monkeypatch, share, above, hardest):
    monkeypatch.setattr("longclip.objectives.tiles.CPU_TILE", TILE)
    image, text, mask, scale = inputs(embed)
    weights = torch.rand(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    negatives = Negatives(above, hardest)
    got, _ = info_nce(
        image, text, mask, scale, 0, 0, weights_BK=weights, image_to_text=share, negatives=negatives
    )
    want = loop(image, text, mask, scale, share, negatives, weights)
    leaves = (image, text, scale)
    for found, expected in [
        (got, want),
        (torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves)),
    ]:
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_smoothing_leans_with_the_loss(embed):
    """One direction alone is cross-entropy with smoothed labels, as torch has it."""
    image, text, mask, scale = inputs(embed, slots=1)
    mask = torch.ones_like(mask)
    text = normalize(text + 0.1, dim=-1)
    logits = scale * image @ text[:, 0].T
    for share, scores in ((1.0, logits), (0.0, logits.T)):
        want = torch.nn.functional.cross_entropy(scores, torch.arange(9), label_smoothing=0.1)
        torch.testing.assert_close(info_nce(image, text, mask, scale, 0.1, image_to_text=share)[0], want)


def test_a_margin_does_not_change_which_negatives_count(embed):
    """Those are chosen by what the model says; the margin then raises them."""
    image, text, mask, scale = inputs(embed, slots=1)
    text, mask = image[:, None].detach(), torch.ones_like(mask)
    none = info_nce(image, text, mask, scale, margin=0.5, negatives=Negatives(false_above=0.0))[0]
    plain = info_nce(image, text, mask, scale, margin=0.5)[0]
    torch.testing.assert_close(none, plain)  # no cosine is above that of a vector with itself
    assert info_nce(image, text, mask, scale, negatives=Negatives(false_above=0.0))[0] < plain


def test_a_true_negative_that_is_marked_false_gets_no_gradient(embed):
    e = embed(images=4, slots=1)
    image = torch.eye(4, 8)
    text = image[:, None].clone()
    text[1] = normalize(image[0] + 0.2 * image[1], dim=-1)  # looks more like image 0 than like its own
    text[0] = normalize(image[0] + 2 * image[2], dim=-1)
    e = dataclasses.replace(
        e, image_BE=image, text_BKE=text.requires_grad_(), mask_BK=torch.ones(4, 1).bool()
    )
    row = {}
    for name, options in {"all": {}, "some": {"false_above": 0.1}}.items():
        (grad,) = torch.autograd.grad(Contrastive("sub", image_to_text=1.0, **options)(e).value, text)
        row[name] = grad[1, 0] @ image[0]
    assert row["all"] > 1e-2  # pushed away from image 0, whose own caption fits less
    assert row["some"].abs() < 1e-6


def test_all_negatives_count_by_themselves(embed):
    image, text, mask, scale = inputs(embed)
    assert window(image, text, scale, Pairs(mask), Negatives()) is None


def test_weights_are_relative_and_may_all_be_alike_or_nothing(embed):
    e = embed()
    plain = Contrastive("sub")(e).value
    weighted = Contrastive("sub", weighted=True)
    for weight, want in ((1.0, plain), (0.2, plain), (0.0, plain * 0)):
        given = dataclasses.replace(e, weights_BK=torch.full(e.mask_BK.shape, weight))
        torch.testing.assert_close(weighted(given).value, want)
    torch.testing.assert_close(weighted(e).value, plain)


def test_a_caption_of_weight_zero_teaches_only_as_a_negative(embed):
    e = embed(slots=1)
    e = dataclasses.replace(e, mask_BK=torch.ones(6, 1).bool(), text_BKE=normalize(e.text_BKE + 0.1, dim=-1))
    weights = torch.ones(6, 1).index_fill(0, torch.tensor(2), 0.0)
    image, text = e.image_BE.double(), e.text_BKE.double()
    want = loop(image, text, e.mask_BK, e.scale.double(), 0.5, Negatives(), weights * 6 / 5)
    got = Contrastive("sub", weighted=True)(dataclasses.replace(e, weights_BK=weights)).value
    torch.testing.assert_close(got, want.float())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"false_above": -0.1}, "false_above is -0.1"),
        ({"hardest": 0}, "hardest is 0"),
        ({"hardest": 8, "label_smoothing": 0.1}, "label_smoothing=0.1 holds a pair against all"),
        ({"image_to_text": 1.5}, "image_to_text is 1.5"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Contrastive("sub", **options)


def test_a_plan_may_pretend_that_there_are_more_processes(embed):
    e = dataclasses.replace(embed(), gather=lambda x: x.repeat(3, *[1] * (x.ndim - 1)))
    assert Contrastive("sub", false_above=0.1, hardest=2, weighted=True)(e).value.isfinite()

"""GRAIN's matching: against all ways to match, what the head sees, and what reaches whom."""

import dataclasses
from itertools import permutations

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize
from torchvision.ops import box_convert, generalized_box_iou

from longclip.objectives.boxes import centred, known, places
from longclip.objectives.matching import Matching, Queries, match
from longclip.types import UserError


def built(queries=4, dtype=torch.float64, **options):
    torch.manual_seed(0)
    term = Matching("sub", queries=queries, heads=2, layers=1, **options)
    term.build(8)
    return term.to(dtype)


def loss_by_permutations(term, e):
    """Every image's best matching by trying all, then plain losses of pairs."""
    there = known(e.boxes("sub"), e.mask_BK)
    regions, found = term.head(e.patches_BPE, e.grid)
    texts, matched, apart, general = [], [], [], []
    for b in range(len(there)):
        captions = there[b].nonzero().flatten().tolist()
        truth = e.boxes_BK4[b, captions]
        l1 = torch.cdist(box_convert(truth, "xyxy", "cxcywh"), found[b], p=1)
        giou = generalized_box_iou(truth, box_convert(found[b], "cxcywh", "xyxy"))
        cost = (5 * l1 - 2 * giou).tolist()
        ways = permutations(range(len(found[b])), len(captions))
        best = min(ways, key=lambda way: sum(cost[i][n] for i, n in enumerate(way)))
        for i, (k, n) in enumerate(zip(captions, best, strict=True)):
            texts.append(e.text_BKE[b, k])
            matched.append(regions[b, n])
            apart.append(l1[i, n])
            general.append(1 - giou[i, n])
    logits = e.scale * torch.stack(texts) @ torch.stack(matched).T
    own = torch.arange(len(texts))
    contrast = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
    return contrast + term.l1 * torch.stack(apart).mean() + term.giou * torch.stack(general).mean()


@pytest.mark.parametrize("queries", [4, None])
def test_loss_and_gradients_equal_trying_all_ways_to_match(boxed, queries):
    e, term = boxed(torch.float64), built(queries, l1=0.7, giou=0.4)
    leaves = [e.text_BKE, e.patches_BPE, *term.parameters()]
    got, want = term(e).value, loss_by_permutations(term, e)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))


def test_a_few_images_at_a_time_equal_all(boxed, monkeypatch):
    e, term = boxed(torch.float64), built()
    leaves = [e.patches_BPE, *term.parameters()]
    whole = torch.autograd.grad(term(e).value, leaves)
    monkeypatch.setattr("longclip.objectives.imagewise.CPU_TILE", 2 * e.patches_BPE[0].numel())
    torch.testing.assert_close(torch.autograd.grad(term(e).value, leaves), whole)


def test_everything_that_takes_part_learns(boxed):
    for term in (built(), built(None)):
        e = boxed(torch.float64)
        names = ["text", "patches", *dict(term.named_parameters())]
        grads = torch.autograd.grad(term(e).value, [e.text_BKE, e.patches_BPE, *term.parameters()])
        assert [n for n, grad in zip(names, grads, strict=True) if not grad.abs().max() > 1e-4] == []


def test_each_caption_finds_the_query_that_has_its_box(boxed):
    e = boxed()
    there = known(e.boxes("sub"), e.mask_BK)
    shuffle = torch.tensor([3, 0, 2, 1])
    far = torch.tensor([[0.9, 0.9, 0.01, 0.01]]).expand(6, 1, 4)
    queries = torch.cat([centred(e.boxes("sub").nan_to_num(0.5)), far], 1)[:, shuffle]
    regions = normalize(torch.randn(6, 4, 8), dim=-1)
    found = match(regions, queries, e.boxes("sub"), there)
    torch.testing.assert_close(found.iou_BK[there], torch.ones(int(there.sum())))
    assert found.apart_BK[there].max() < 1e-5
    place_K = shuffle.argsort()[:3]
    assert torch.equal(found.region_BKE[there], regions[:, place_K][there])


def test_the_order_of_captions_does_not_matter(boxed):
    e, term = boxed(torch.float64), built()
    turned = {name: getattr(e, name).flip(1) for name in ("text_BKE", "mask_BK", "boxes_BK4")}
    torch.testing.assert_close(term(dataclasses.replace(e, **turned)).value, term(e).value)


def test_patches_as_queries_begin_with_their_own_boxes():
    head = Queries(8, None, layers=1, heads=2)
    torch.nn.init.zeros_(head.box[-1].weight)
    torch.nn.init.zeros_(head.box[-1].bias)
    _, boxes = head(torch.randn(2, 6, 8), (2, 3))
    torch.testing.assert_close(boxes[0], places((2, 3), torch.device("cpu")), atol=1e-5, rtol=0)


def test_captions_without_a_box_change_nothing(boxed):
    e, term = boxed(torch.float64), built()
    there = known(e.boxes("sub"), e.mask_BK)
    text = torch.where(there[..., None], e.text_BKE, 100.0)
    torch.testing.assert_close(term(dataclasses.replace(e, text_BKE=text)).value, term(e).value)


def test_no_box_in_a_batch_gives_zero_to_every_parameter(boxed):
    e, term = boxed(), built(dtype=torch.float32)
    loss = term(dataclasses.replace(e, boxes_BK4=e.boxes_BK4 * torch.nan))
    assert loss.value == loss.measures["boxes"] == 0
    loss.value.backward()
    assert all((p.grad == 0).all() for p in term.parameters()), (
        "none is left out: processes agree on who has one"
    )


def test_what_cannot_work_is_refused(boxed):
    with pytest.raises(UserError, match='2 queries for the 3 captions that "sub"'):
        built(2, dtype=torch.float32)(boxed())
    with pytest.raises(UserError, match="3 heads, which do not divide the 8"):
        Matching("sub", heads=3).build(8)
    with pytest.raises(UserError, match="patch dropout"):
        built(dtype=torch.float32)(dataclasses.replace(boxed(), grid=None))

"""Facets: against a loop, shown in turn, and of the length that the column holds."""

import dataclasses
import math

import pytest
import torch
from torch.nn.functional import normalize

from longclip.objectives.facets import Facets
from longclip.types import UserError

FACETS, WIDTH = 4, 3


@pytest.fixture
def faceted(embed):
    column_BX = torch.randn(6, FACETS * WIDTH, generator=torch.Generator().manual_seed(1))
    column_BX[2] = torch.nan
    return dataclasses.replace(embed(), columns={"facets": column_BX})


def term_of(**options):
    term = Facets("facets", FACETS, WIDTH, bias=-2.0, **options)
    term.build(8)
    return term


def shown_by_loop(term, step):
    """The facets of each image in a step."""
    return {b: [(step * term.shown + b + n) % FACETS for n in range(term.shown)] for b in range(6)}


def loss_by_loop(e, term, step=0):
    total, pairs = torch.zeros((), dtype=torch.float64), 0
    weight, shift = term.projector.weight.double(), term.projector.bias.double()
    scale, bias = term.logit_scale.double().exp(), term.logit_bias.double()
    for b, facets in shown_by_loop(term, step).items():
        for f in facets if b != 2 else ():
            text = normalize(weight @ e.columns["facets"][b].double().view(FACETS, WIDTH)[f] + shift, dim=-1)
            for i in range(6):
                logit = scale * (e.image_BE[i].double() @ text) + bias
                total = total + torch.log1p(torch.exp(-logit if i == b else logit))
            pairs += 1
    return total / pairs


@pytest.mark.parametrize("shown", [None, 1, 3])
def test_values_and_gradients_of_steps_equal_loops(faceted, shown):
    term = term_of(shown=shown)
    for step in range(3):
        loss, want = term(faceted).value, loss_by_loop(faceted, term, step)
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
        got = torch.autograd.grad(loss, list(term.parameters()))
        theirs = torch.autograd.grad(want, list(term.parameters()))
        torch.testing.assert_close(got, theirs, rtol=1e-4, atol=1e-6)


def test_every_facet_has_its_turn_and_the_turn_is_kept(faceted):
    term = term_of(shown=1)
    seen = [shown_by_loop(term, step)[0][0] for step in range(FACETS)]
    assert sorted(seen) == list(range(FACETS))
    first = [term(faceted).value.item() for _ in range(2)]
    again = term_of(shown=1)
    again.load_state_dict(term.state_dict())
    assert again(faceted).value.item() == term(faceted).value.item() not in first
    again.eval()
    assert again(faceted).value.item() == again(faceted).value.item(), "judging turns nothing"


def test_images_without_facets_say_so(faceted):
    assert math.isclose(term_of()(faceted).measures["known"].item(), 5 / 6, rel_tol=1e-6)


def test_it_reads_a_column_and_no_captions():
    assert term_of().groups == ()
    assert term_of().columns == {"facets": FACETS * WIDTH}


def test_another_length_is_one_sentence(faceted):
    term = Facets("facets", FACETS, WIDTH + 1)
    term.build(8)
    with pytest.raises(UserError, match=r"holds \[12\] numbers an image, not the 4 facets x 4 = 16"):
        term(faceted)
    with pytest.raises(UserError, match="shown 5"):
        Facets("facets", FACETS, WIDTH, shown=5)

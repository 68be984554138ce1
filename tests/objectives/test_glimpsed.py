"""A term on images with hidden patches is that term, on those images."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from longclip.objectives import Contrastive, Grouping, Sigmoid
from longclip.objectives.glimpsed import Glimpsed
from longclip.types import UserError


@pytest.mark.parametrize(
    "make", [lambda: Contrastive("sub", 0.3, label_smoothing=0.1), lambda: Sigmoid("sub", 0.3)]
)
def test_it_is_the_terms_loss_on_masked_images(embed, make):
    whole = embed()
    masked = normalize(torch.randn_like(whole.image_BE), dim=-1)
    found = Glimpsed(make())(replace(whole, masked_BE=masked))
    wanted = make()(replace(whole, image_BE=masked))
    assert torch.equal(found.value, wanted.value)
    assert found.measures.keys() == wanted.measures.keys()
    assert not torch.equal(found.value, make()(whole).value)


def test_weight_groups_and_parameters_are_the_terms(embed):
    term = Glimpsed(Sigmoid("sub", 0.3))
    assert (term.weight, term.groups, term.columns) == (0.3, ("sub",), {})
    assert {name for name, _ in term.named_parameters()} == {"term.logit_scale", "term.logit_bias"}


def test_terms_that_read_more_are_refused():
    with pytest.raises(UserError, match="Grouping reads patches"):
        Glimpsed(Grouping("sub"))

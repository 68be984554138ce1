"""What holds for every term there is, on the batch of `test_dist`."""

import importlib
import inspect
import pkgutil

import pytest
import torch
from test_dist import IMAGES, embed, leaves, terms

from longclip import objectives
from longclip.objectives import Balance, Facets, Term

WITHOUT_CAPTIONS = (Balance, Facets)
"""What reads no captions has a loss without them."""


def classes() -> set[type[Term]]:
    modules = [
        importlib.import_module(m.name)
        for m in pkgutil.iter_modules(objectives.__path__, "longclip.objectives.")
    ]
    members = [member for module in modules for _, member in inspect.getmembers(module, inspect.isclass)]
    return {member for member in members if issubclass(member, Term) and member is not Term}


def test_each_is_offered_by_the_package_and_judged_on_several_processes():
    assert {getattr(objectives, name) for name in objectives.__all__} >= classes()
    assert {type(term) for term in terms().values()} == classes()


@pytest.mark.parametrize("name", terms())
def test_a_batch_without_captions_is_zero_and_leaves_no_parameter_out(name):
    """Processes must agree on which parameters have a gradient, whatever captions they have."""
    term, (features, mask_BK) = terms()[name], leaves()
    loss = term(embed(features, mask_BK & False)[0])
    assert loss.value.dtype == torch.float32
    assert isinstance(term, WITHOUT_CAPTIONS) or loss.value == 0
    loss.value.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in term.parameters())
    assert all(x.isfinite() and not x.requires_grad for x in loss.measures.values())


@pytest.mark.parametrize("name", terms())
def test_features_that_are_all_alike_give_numbers(name):
    """As of a model that has collapsed: no ranges, no spread, no direction."""
    features, mask_BK = leaves()
    alike = {key: x[:1].expand(IMAGES, *x.shape[1:]) for key, x in features.items()}
    embeddings, local = embed(alike, mask_BK)
    term = terms()[name]
    term(embeddings).value.backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in (*local.values(), *term.parameters()))


@pytest.mark.parametrize("name", terms())
def test_features_that_are_no_numbers_are_left_for_the_trainer_to_report(name):
    features, mask_BK = leaves()
    terms()[name](embed({key: x * torch.nan for key, x in features.items()}, mask_BK)[0])

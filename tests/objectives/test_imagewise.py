"""Tiles of images: the same numbers and gradients as all at once, and memory of one tile."""

import pytest
import torch

from benchmarks.measures import peak_bytes, saved_bytes
from longclip.objectives.imagewise import imagewise


def scores(query_bE, patches_bPE, weight_EE):
    """Two results for each image, the second without gradient."""
    best_b = torch.einsum("be,ef,bpf->bp", query_bE, weight_EE, patches_bPE.to(query_bE.dtype)).logsumexp(1)
    return best_b, patches_bPE.detach().mean((1, 2))


def inputs(images=7, patches=5):
    random = torch.Generator().manual_seed(0)
    shapes = (images, 4), (images, patches, 4), (4, 4)
    return [torch.randn(*s, generator=random, dtype=torch.float64).requires_grad_() for s in shapes]


@pytest.mark.parametrize("size", [1, 3, 7, 50])
def test_equals_all_images_at_once(size):
    query, patches, weight = inputs()
    want, told = scores(query, patches, weight)
    got, told_too = imagewise(scores, (query, patches), (weight,), size)
    torch.testing.assert_close((got, told_too), (want, told))
    factor_B = torch.arange(7.0, dtype=torch.float64)
    leaves = (query, patches, weight)
    torch.testing.assert_close(
        torch.autograd.grad((got * factor_B).sum(), leaves),
        torch.autograd.grad((want * factor_B).sum(), leaves),
    )


def test_what_wants_no_gradient_gets_none():
    query, patches, weight = inputs()
    imagewise(scores, (query, patches.detach()), (weight.detach(),), 2)[0].sum().backward()
    assert query.grad is not None
    assert weight.grad is None


def test_gradient_comes_back_in_the_precision_of_what_went_in():
    query, patches, weight = inputs()
    low = patches.detach().bfloat16().requires_grad_()
    imagewise(scores, (query, low), (weight,), 2)[0].sum().backward()
    assert low.grad.dtype == torch.bfloat16
    assert low.grad.abs().max() > 0


def measured(images):
    """Bytes that the forward pass keeps beyond its inputs, bytes that both passes need beyond gradients."""
    leaves = inputs(images, patches=1000)
    own = sum(x.nbytes for x in leaves)

    def forward():
        return imagewise(scores, leaves[:2], leaves[2:], size=2)[0].sum()

    return saved_bytes(forward) - own, peak_bytes(lambda: torch.autograd.grad(forward(), leaves)) - own


def test_beside_inputs_and_gradients_memory_is_that_of_one_tile():
    (_, small), (kept, large) = measured(8), measured(64)
    assert kept == 0
    assert large - small <= 4096  # a few numbers for each image

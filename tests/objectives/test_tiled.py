"""Contrast by tiles: equal to dense autograd for any shape, mask and tile, in the memory of two tiles."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid, normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measures import peak_bytes
from longclip.objectives.choosing import Negatives
from longclip.objectives.contrastive import info_nce
from longclip.objectives.sigmoid import pairwise_sigmoid
from longclip.objectives.tiled import contrast, logistic
from longclip.objectives.tiles import Pairs


@dataclasses.dataclass
class Problem:
    """Rows, columns and who meets whom; rows, columns, scale and bias are leaves."""

    row_RE: torch.Tensor
    column_XKE: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    pairs: Pairs
    kin_RKE: torch.Tensor | None
    tile: tuple[int, int]

    def leaves(self):
        return self.row_RE, self.column_XKE, self.scale, self.bias


@st.composite
def problems(draw):
    columns, slots = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    start = draw(st.integers(0, 5))
    rows = start + columns + draw(st.integers(0, 4))
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    def some(*shape):
        return torch.rand(*shape, generator=random) < draw(st.sampled_from([0.0, 0.6, 1.0]))

    return Problem(
        normal(rows, 4).requires_grad_(),
        normal(columns, slots, 4).requires_grad_(),
        normal(()).exp().requires_grad_(),
        normal(()).requires_grad_(),
        Pairs(
            some(columns, slots),
            start,
            draw(st.sampled_from([None, some(rows, slots)])),
            draw(st.sampled_from([None, torch.randint(0, 4, (rows,), generator=random)])),
        ),
        draw(st.sampled_from([None, normal(rows, slots, 4)])),
        draw(st.sampled_from([(2, 3), (3, 2), (5, 5), (64, 64)])),
    )


def dense(p):
    """Scores of all pairs, and which of them are negatives: [K, R, X]."""
    z_KRX = torch.einsum("re,xke->krx", p.row_RE, p.column_XKE)
    own_RX = torch.arange(len(p.row_RE))[:, None] == torch.arange(len(p.column_XKE)) + p.pairs.start
    if p.kin_RKE is not None:
        z_KRX = z_KRX + ~own_RX * torch.einsum("rke,xke->krx", p.kin_RKE, p.column_XKE).detach()
    exist_KRX = p.pairs.mask_XK.T[:, None] & torch.ones(len(p.row_RE), 1, dtype=torch.bool)
    if p.pairs.row_mask_RK is not None:
        exist_KRX = exist_KRX & p.pairs.row_mask_RK.T[:, :, None]
    alike_RX = own_RX
    if (label_R := p.pairs.label_R) is not None:
        own_label_X = label_R[p.pairs.start : p.pairs.start + len(p.column_XKE)]
        alike_RX = label_R[:, None] == own_label_X
    return p.scale * z_KRX, own_RX, exist_KRX, exist_KRX & ~alike_RX & ~own_RX


def same(got, want, leaves):
    """Values and gradients, these through random weights, where `want` is a number at all."""
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)
        along = torch.randn(w.shape, generator=torch.Generator().manual_seed(0), dtype=w.dtype)
        along = along * (w.detach().abs() < 1e9)
        grads = [
            torch.autograd.grad((along * x).sum(), leaves, retain_graph=True, materialize_grads=True)
            for x in (g, w)
        ]
        torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-8)


@settings(deadline=None, max_examples=60)
@given(problems())
def test_what_rows_and_columns_see_equals_dense_autograd(p):
    z_KRX, own_RX, _, negative_KRX = dense(p)
    lowest = torch.finfo(torch.float64).min
    masked = z_KRX.masked_fill(~negative_KRX, -torch.inf)
    want = [
        torch.where(negative_KRX.any(axis), masked.masked_fill(~negative_KRX, -1e300).logsumexp(axis), lowest)
        for axis in (2, 1)
    ]
    own_KX = (z_KRX * own_RX).sum(1)
    got = contrast(p.row_RE, p.column_XKE, p.scale, p.pairs, p.kin_RKE, p.tile)
    same(got[:3], (own_KX, *want), p.leaves()[:3])
    if p.kin_RKE is None:
        torch.testing.assert_close(got.row_best_KR, masked.amax(2).clamp_min(lowest))
        torch.testing.assert_close(got.column_best_KX, masked.amax(1).clamp_min(lowest))


@settings(deadline=None, max_examples=40)
@given(problems())
def test_the_logistic_loss_equals_dense_autograd(p):
    p = dataclasses.replace(p, kin_RKE=None)
    z_KRX, own_RX, exist_KRX, negative_KRX = dense(p)
    z_KRX = z_KRX + p.bias
    losses = torch.where(own_RX, -logsigmoid(z_KRX), -logsigmoid(-z_KRX))
    want = (losses * (negative_KRX | (own_RX & exist_KRX))).sum()
    got = logistic(p.row_RE, p.column_XKE, p.scale, p.bias, p.pairs, p.tile)
    same([got], [want], p.leaves())


def test_gradients_equal_finite_differences():
    random = torch.Generator().manual_seed(0)
    row, column = (
        torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((7, 3), (4, 2, 3))
    )
    scale, bias = torch.tensor(1.5, dtype=torch.float64), torch.tensor(-0.5, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (row, column, scale, bias)]
    mask = torch.rand(4, 2, generator=random) < 0.8
    pairs = Pairs(mask, 2, None, torch.tensor([0, 1, 2, 3, 4, 2, 6]))
    assert torch.autograd.gradcheck(lambda *x: contrast(*x, pairs, None, (3, 2))[:3], leaves[:3])
    assert torch.autograd.gradcheck(lambda *x: logistic(*x, pairs, (3, 2)), leaves)


def test_a_second_derivative_is_refused():
    row, column = torch.randn(4, 3, requires_grad=True), torch.randn(4, 1, 3, requires_grad=True)
    pairs = Pairs(torch.ones(4, 1, dtype=torch.bool))
    seen = contrast(row, column, torch.tensor(1.0), pairs).row_negatives_KR.square().sum()
    (grad,) = torch.autograd.grad(seen, row, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("scale", [1e-3, 100.0, 1e4])
def test_no_scale_overflows(scale):
    """In float32, where exp leaves the range at 88: the losses of far-off pairs stay finite and right."""
    random = torch.Generator().manual_seed(0)
    image, text = (normalize(torch.randn(20, *n, 8, generator=random), dim=-1) for n in ((), (2,)))
    mask = torch.ones(20, 2, dtype=torch.bool)
    values = []
    for dtype in (torch.float32, torch.float64):
        leaves = image.to(dtype).requires_grad_(), text.to(dtype).requires_grad_()
        loss, _ = info_nce(*leaves, mask, torch.tensor(scale, dtype=dtype), margin=0.5)
        values.append((loss.double(), *(g.double() for g in torch.autograd.grad(loss, leaves))))
    torch.testing.assert_close(*values, rtol=1e-3, atol=1e-4 * scale)


class Largest(TorchDispatchMode):
    """The most elements in one tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(result)]
        self.elements = max(self.elements, *sizes)
        return result


def softmax_step(images, slots, width):
    image = torch.randn(images, width, requires_grad=True)
    text, mask = torch.randn(images, slots, width, requires_grad=True), torch.rand(images, slots) < 0.7
    return lambda: info_nce(image, text, mask, torch.tensor(9.0), 0.1, 0.5)[0].backward()


def chosen_step(images, slots, width):
    image = torch.randn(images, width, requires_grad=True)
    text, mask = torch.randn(images, slots, width, requires_grad=True), torch.rand(images, slots) < 0.7
    negatives = Negatives(false_above=0.1, hardest=3)
    return lambda: info_nce(image, text, mask, torch.tensor(9.0), negatives=negatives)[0].backward()


def sigmoid_step(images, slots, width):
    image = torch.randn(images, width, requires_grad=True)
    text, mask = torch.randn(images, slots, width, requires_grad=True), torch.rand(images, slots) < 0.7
    scale, bias = torch.tensor(9.0), torch.tensor(-9.0)
    return lambda: pairwise_sigmoid(image, text, mask, scale, bias).backward()


@pytest.mark.parametrize("make", [softmax_step, chosen_step, sigmoid_step])
def test_never_all_scores_at_one_time(make, monkeypatch):
    monkeypatch.setattr("longclip.objectives.tiles.CPU_TILE", (16, 32))
    with Largest() as largest:
        make(100, 3, 4)()
    assert largest.elements <= 100 * 3 * 4  # features, where one slot has 10,000 scores and all have 30,000


@pytest.mark.parametrize("make", [softmax_step, chosen_step, sigmoid_step])
def test_memory_grows_with_features_and_not_with_their_square(make, monkeypatch):
    monkeypatch.setattr("longclip.objectives.tiles.CPU_TILE", (16, 32))
    once, twice = peak_bytes(make(48, 2, 64)), peak_bytes(make(96, 2, 64))
    assert twice < 2.1 * once

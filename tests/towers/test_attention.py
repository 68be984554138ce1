"""Packed attention: every fast path against the dense block-diagonal oracle."""

import pytest
import torch

from longclip.towers.attention import Layout, dense_attention, end_attention, packed_attention

LENGTHS = [[5], [3, 3, 3], [2, 40, 7, 7, 19, 1, 33], list(range(1, 30)), [248, 2, 90, 3]]


def qkv(total, seed=0, heads=2, width=8):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(total, heads, width, generator=generator, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_buckets_equal_the_dense_oracle_forward_and_backward(lengths):
    layout = Layout(torch.tensor(lengths), max(lengths))
    q, k, v = qkv(sum(lengths))
    ours, oracle = packed_attention(q, k, v, layout), dense_attention(q, k, v, layout)
    torch.testing.assert_close(ours, oracle, atol=1e-6, rtol=1e-5)
    weight = torch.randn_like(ours)
    for mine, theirs in zip(
        torch.autograd.grad((ours * weight).sum(), (q, k, v)),
        torch.autograd.grad((oracle * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_end_attention_is_the_end_rows_of_the_whole(lengths):
    layout = Layout(torch.tensor(lengths), max(lengths))
    q, k, v = qkv(sum(lengths))
    whole = dense_attention(q, k, v, layout)[layout.ends_S]
    torch.testing.assert_close(end_attention(q[layout.ends_S], k, v, layout), whole, atol=1e-6, rtol=1e-5)


def test_a_caption_never_sees_another():
    lengths = [4, 9, 6]
    layout = Layout(torch.tensor(lengths), 9)
    q, k, v = qkv(19)
    poisoned = [x.detach().clone() for x in (q, k, v)]
    for x in poisoned:
        x[4:13] = 1e3
    before, after = packed_attention(q, k, v, layout), packed_attention(*poisoned, layout)
    assert torch.equal(before[:4], after[:4])
    assert torch.equal(before[13:], after[13:])


def test_positions_restart_at_every_caption():
    layout = Layout(torch.tensor([2, 3, 1]), 3)
    assert layout.positions_T.tolist() == [0, 1, 0, 1, 2, 0]
    assert layout.ends_S.tolist() == [1, 4, 5]
    assert layout.captions_T.tolist() == [0, 0, 1, 1, 1, 2]

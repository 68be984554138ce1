"""Packed attention: every fast path against the dense block-diagonal oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longclip.towers.attention import (
    BUCKET_SLACK,
    Buckets,
    Layout,
    dense_attention,
    end_attention,
    packed_attention,
)

ANY = settings(max_examples=25, deadline=None, database=None)
RAGGED = st.lists(st.integers(1, 60), min_size=1, max_size=24)


def layout_of(lengths):
    return Layout(np.array(lengths, np.int32), torch.device("cpu"))


def qkv(total, seed=0, heads=2, width=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(total, 3, heads, width, generator=generator, requires_grad=True)


def assert_same_with_gradients(ours, oracle, leaf):
    torch.testing.assert_close(ours, oracle, atol=1e-6, rtol=1e-5)
    weight = torch.randn_like(ours)
    found, expected = (
        torch.autograd.grad((out * weight).sum(), leaf, retain_graph=True) for out in (ours, oracle)
    )
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-4)


@ANY
@given(RAGGED)
def test_buckets_equal_the_dense_oracle_forward_and_backward(lengths):
    layout, x = layout_of(lengths), qkv(sum(lengths))
    assert_same_with_gradients(packed_attention(x, layout), dense_attention(x, layout), x)


@ANY
@given(RAGGED)
def test_end_attention_is_the_end_rows_of_the_whole(lengths):
    layout, x = layout_of(lengths), qkv(sum(lengths))
    ends = end_attention(x[layout.ends_S, 0], x[:, 1:], layout)
    assert_same_with_gradients(ends, dense_attention(x, layout)[layout.ends_S], x)


@pytest.mark.parametrize("lengths", [[5], [248, 2, 90, 3], [1] * 9])
def test_lengths_at_the_edges(lengths):
    layout, x = layout_of(lengths), qkv(sum(lengths))
    assert_same_with_gradients(packed_attention(x, layout), dense_attention(x, layout), x)


@ANY
@given(RAGGED)
def test_every_token_has_its_own_place_in_rectangles_that_are_nearly_full(lengths):
    buckets = Buckets(np.array(lengths), torch.device("cpu"))
    places = sum(captions * tokens for captions, tokens in buckets.shapes)
    assert len(buckets.rows_P) == places
    assert sorted(buckets.captions_S.tolist()) == list(range(len(lengths)))
    assert buckets.rows_P[buckets.places_T].tolist() == list(range(sum(lengths)))
    assert int(buckets.own_P.sum()) == sum(lengths) >= BUCKET_SLACK * places


def test_a_caption_never_sees_another():
    layout, x = layout_of([4, 9, 6]), qkv(19)
    poisoned = x.detach().clone()
    poisoned[4:13] = 1e3
    before, after = packed_attention(x, layout), packed_attention(poisoned, layout)
    assert torch.equal(before[:4], after[:4])
    assert torch.equal(before[13:], after[13:])


def test_positions_restart_at_every_caption():
    layout = layout_of([2, 3, 1])
    assert layout.positions_T.tolist() == [0, 1, 0, 1, 2, 0]
    assert layout.ends_S.tolist() == [1, 4, 5]
    assert layout.captions_T.tolist() == [0, 0, 1, 1, 1, 2]

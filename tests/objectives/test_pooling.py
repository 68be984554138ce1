"""Text-conditioned pooling: against loops over heads and patches, and against torch's own attention."""

import math

import torch
from torch.nn.functional import layer_norm, normalize

from longclip.objectives.pooling import PoolingHead, pool

IMAGES, CAPTIONS, PATCHES, WIDTH, HEADS = 3, 4, 5, 12, 3


def inputs(dtype=torch.float64):
    random = torch.Generator().manual_seed(0)
    text = normalize(torch.randn(IMAGES, CAPTIONS, WIDTH, generator=random), dim=-1).to(dtype)
    patches = 3 * torch.randn(IMAGES, PATCHES, WIDTH, generator=random).to(dtype)
    return text.requires_grad_(), patches.requires_grad_()


def trained_head(dtype=torch.float64):
    """One whose every parameter matters: a fresh one has gains of 1 and shifts of 0."""
    head = PoolingHead(WIDTH, HEADS).to(dtype)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return head


def pooled_by_loop(head, text_E, patches_PE):
    """One caption, one image, in plain loops over heads and patches; the empty slot comes first."""
    a, d = head.attention, WIDTH // HEADS
    norms = (head.query_norm, head.key_norm, head.value_norm)
    weights, shifts = a.in_proj_weight.split(WIDTH), a.in_proj_bias.split(WIDTH)

    def projected(kind, x_E):
        x_E = layer_norm(x_E, (WIDTH,), norms[kind].weight, norms[kind].bias)
        return weights[kind] @ x_E + shifts[kind]

    query = projected(0, text_E * math.sqrt(WIDTH))
    keys, values = ([projected(kind, p) for p in patches_PE] for kind in (1, 2))
    found = []
    for h in range(HEADS):
        own = slice(h * d, (h + 1) * d)
        factors = [1.0] + [(query[own] @ key[own] / math.sqrt(d)).exp() for key in keys]
        found.append(sum(f * v[own] for f, v in zip(factors[1:], values, strict=True)) / sum(factors))
    return a.out_proj.weight @ torch.cat(found) + a.out_proj.bias


def test_equals_loops_over_heads_and_patches():
    (text, patches), head = inputs(), trained_head()
    got = pool(head.queries(text), patches, head.weights(), HEADS)
    for b in range(IMAGES):
        for j in range(CAPTIONS):
            torch.testing.assert_close(got[b, j], pooled_by_loop(head, text[b, j], patches[b]))


def test_equals_torchs_attention_with_a_zero_slot_gradients_too():
    (text, patches), head = inputs(), trained_head()
    got = pool(head.queries(text), patches, head.weights(), HEADS)
    query, key, value = (
        head.query_norm(text * math.sqrt(WIDTH)), head.key_norm(patches), head.value_norm(patches)
    )  # fmt: skip
    want, _ = head.attention(query, key, value, need_weights=False)
    torch.testing.assert_close(got, want)
    leaves = (text, patches, *head.parameters())
    pull = torch.randn_like(got)
    torch.testing.assert_close(
        torch.autograd.grad((got * pull).sum(), leaves), torch.autograd.grad((want * pull).sum(), leaves)
    )


def test_a_caption_may_find_nothing():
    (text, patches), head = inputs(), trained_head()
    query = head.queries(text)
    against = 1e4 * torch.ones_like(query)
    weights = head.weights()._replace(key_EE=torch.zeros(WIDTH, WIDTH).double(), key_E=-against[0, 0])
    found = pool(against, patches, weights, HEADS)
    torch.testing.assert_close(found, weights.out_E.expand_as(found))


def test_the_length_of_texts_and_patches_does_not_matter():
    (text, patches), head = inputs(), trained_head()
    once, more = (pool(head.queries(f * text), f * patches, head.weights(), HEADS) for f in (1.0, 50.0))
    torch.testing.assert_close(once, more, rtol=1e-3, atol=1e-3)  # but for the epsilon of the norms


def test_patches_decide_the_precision_and_not_the_autocast_around():
    (text, patches), head = inputs(torch.float32), trained_head(torch.float32)
    query, low = head.queries(text), patches.bfloat16()
    plain = pool(query, patches, head.weights(), HEADS)
    half = pool(query, low, head.weights(), HEADS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pool(query, patches, head.weights(), HEADS), plain)
        assert torch.equal(pool(query, low, head.weights(), HEADS), half)
    assert (plain.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(half.float(), plain, rtol=0.1, atol=0.1)

"""Rotary positions turn queries and keys by how far they lie apart, in every path of the packed tower."""

import cmath
import json

import pytest
import torch
from test_chunks import made_up
from torch.nn import functional as F

from longclip.models import backbone_of
from longclip.towers import configs
from longclip.towers.clip import DualTower
from longclip.towers.pretrained import build
from longclip.towers.rotary import Turns, extended, frequencies
from longclip.towers.text import encode_packed, encode_words, laid_out
from longclip.types import UserError

THETA = 100.0
SLOTS = {"long": slice(0, 1), "sub": slice(1, 4)}
LENGTHS = [3, 9, 9, 2, 17]


@pytest.fixture
def backbone(tiny):
    return build(tiny, None, 32, rotary=THETA)


def naive(model, ids):
    """One caption through the text tower, head by head, pair by pair, in complex numbers."""
    x = model.token_embedding.weight[ids]
    for block in model.transformer.resblocks:
        heads, width = block.attn.num_heads, block.attn.head_dim
        qkv = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
        q, k, v = qkv.unflatten(1, (3, heads, width)).unbind(1)
        unit = torch.tensor([cmath.exp(1j * THETA ** (-2 * f / width)) for f in range(width // 2)])
        turns = torch.stack([unit.to(torch.complex128) ** m for m in range(len(ids))])[:, None]
        q, k = (torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * turns for y in (q, k))
        rows = []
        for m in range(len(ids)):
            z = torch.stack([(q[m] * k[n].conj()).real.sum(-1) for n in range(m + 1)]) / width**0.5
            rows.append((z.softmax(0)[..., None] * v[: m + 1]).sum(0).flatten())
        x = x + block.attn.out_proj(torch.stack(rows))
        x = x + block.mlp(block.ln_2(x))
    return model.ln_final(x) @ model.text_projection


def test_every_path_is_that_of_complex_numbers_with_its_gradient(backbone):
    model = backbone.model.double()
    ids = [torch.randint(1, 40000, (length,)) for length in LENGTHS]
    tokens_T, lengths_S = torch.cat(ids).int(), torch.tensor(LENGTHS, dtype=torch.int32).numpy()
    layout = laid_out(model, lengths_S, tokens_T.device)
    wanted_TE = torch.cat([naive(model, caption) for caption in ids])
    torch.testing.assert_close(encode_words(model, tokens_T, layout), wanted_TE, atol=1e-5, rtol=0)
    found_SE, wanted_SE = encode_packed(model, tokens_T, layout), wanted_TE[layout.ends_S]
    torch.testing.assert_close(found_SE, wanted_SE, atol=1e-5, rtol=0)
    weights = [*model.transformer.parameters(), model.token_embedding.weight]
    direction = torch.randn_like(found_SE)
    ours, theirs = (torch.autograd.grad((x * direction).sum(), weights) for x in (found_SE, wanted_SE))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_only_distances_count(backbone):
    frequencies_F = frequencies(backbone.model).double()
    q, k = torch.randn(2, 1, 1, 2, 2 * len(frequencies_F), dtype=torch.float64)

    def product(m, n):
        at = [Turns.at(torch.tensor([place]), frequencies_F) for place in (m, n)]
        return (at[0](q[None]) * at[1](k[None])).sum()

    torch.testing.assert_close(product(7, 3), product(107, 103))
    assert (product(7, 3) - product(7, 4)).abs() > 1e-3


def test_bfloat16_stays_and_is_turned_in_float32():
    turns = Turns.at(torch.arange(200), torch.tensor([1.0, 0.1]))
    x = torch.randn(200, 1, 2, 4).bfloat16()
    torch.testing.assert_close(turns(x), turns(x.float()).bfloat16(), atol=0, rtol=0)


def test_a_longer_context_slows_the_slowest_turn_and_leaves_the_fastest():
    width, theta = 64, 1e4
    longer = extended(theta, width, 77, 248)
    slowest = [t ** (-(width - 2) / width) for t in (theta, longer)]
    assert slowest[0] / slowest[1] == pytest.approx(2 * 248 / 77 - 1)
    assert extended(theta, width, 77, 77) == theta
    assert extended(theta, width, 77, 40) == theta


def test_corners_see_what_they_see_of_a_table_that_says_nothing(tiny):
    """A caption with a corner is that caption with one more token, here as everywhere."""
    tower = DualTower(build(tiny, None, 32, rotary=THETA)).double()
    tower.check_needs(frozenset({"corners"}))
    batch = made_up()
    found = tower(batch, SLOTS, frozenset({"corners"}))
    model, (b, k) = tower.backbone, batch.lengths_BK.nonzero()[0]
    ids = batch.tokens_T[: batch.lengths_BK[b, k]].long()
    with torch.no_grad():
        model.token_embedding.weight[49405] = tower.corners_MD[1].detach()
        wanted_E = naive(model, torch.cat([ids, torch.tensor([49405])]))[-1]
    torch.testing.assert_close(
        found.corners_BKME[b, k, 1].double(), F.normalize(wanted_E, dim=0), atol=1e-5, rtol=0
    )


def test_the_table_is_still_and_the_start_keeps_its_own(tiny):
    torch.manual_seed(0)
    plain = DualTower(build(tiny, None, 32))
    torch.manual_seed(0)
    tower = DualTower(build(tiny, None, 32, rotary=THETA, freeze_positions=True))
    table_LD = tower.backbone.positional_embedding
    assert not table_LD.any()
    assert not table_LD.requires_grad
    tower.check_needs(frozenset({"start"}))
    found = tower(made_up(), SLOTS, frozenset({"start"}))
    wanted = plain(made_up(), SLOTS)
    torch.testing.assert_close(found.start.text_BKE, wanted.text_BKE)
    assert (found.text_BKE - wanted.text_BKE).abs().max() > 1e-3


def content_of(tower):
    state = {f"tower.{name}": x for name, x in tower.state_dict().items()}
    described = {"model_cfg": tower.model_cfg, "preprocess_cfg": tower.preprocess_cfg}
    return {"longclip": json.loads(json.dumps(described)), "state_dict": state}


def test_a_checkpoint_opens_as_it_was_and_longer(backbone):
    tower = DualTower(backbone).eval()
    again = backbone_of(content_of(tower), "a run")
    captions = ["a red cup on a table", "word " * 20]
    torch.testing.assert_close(
        DualTower(again).eval().encode_captions(captions), tower.encode_captions(captions)
    )
    longer = backbone_of(content_of(tower), "a run", 100)
    width = longer.model.transformer.resblocks[0].attn.head_dim
    theta = extended(THETA, width, 32, 100)
    assert longer.model_cfg["rotary_theta"] == pytest.approx(theta)
    assert float(longer.model.rotary_theta) == pytest.approx(theta)
    assert (len(longer.model.positional_embedding), longer.tokenizer.context_length) == (100, 100)
    assert longer.model.token_embedding.weight.equal(backbone.model.token_embedding.weight)
    longer = DualTower(longer)
    longer.check_needs(frozenset({"start"}))
    start = longer.start[0].eval()
    torch.testing.assert_close(start.encode_captions(captions), tower.encode_captions(captions))


def test_weights_do_not_pass_for_those_of_a_table(backbone, tiny):
    content = content_of(DualTower(backbone))
    del content["longclip"]["model_cfg"]["rotary_theta"]
    with pytest.raises(UserError, match="left over: rotary_theta"):
        backbone_of(content, "a run")
    assert configs.differences(backbone.model_cfg, build(tiny, None, 32).model_cfg)


def test_what_cannot_turn_is_refused(tiny, monkeypatch):
    with pytest.raises(UserError, match=r"model\.backbone\.rotary is 0"):
        build(tiny, None, 32, rotary=0)
    monkeypatch.setattr("longclip.towers.pretrained.why_padded", lambda model: "this test says so")
    with pytest.raises(UserError, match="this test says so"):
        build(tiny, None, 32, rotary=THETA)

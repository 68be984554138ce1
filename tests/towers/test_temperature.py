"""Sharper attention is the equation's, and lies in the weights."""

import math

import open_clip
import pytest
import torch

from longclip.towers.pretrained import build
from longclip.towers.temperature import scale_attention
from longclip.types import UserError

WIDTH, HEADS = 16, 2
VISION = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 32, "layers": 1}
TEXT = {"context_length": 9, "vocab_size": 20, "width": WIDTH, "heads": HEADS, "layers": 1}
IDS = [18, 3, 4, 5, 7, 2, 19]


def by_hand(model, temperature):
    """The text feature of IDS by plain loops: one block, one token at a time."""
    block = model.transformer.resblocks[0]
    rows = [
        model.token_embedding.weight[i] + p for i, p in zip(IDS, model.positional_embedding, strict=False)
    ]
    normed = [block.ln_1(row) for row in rows]
    q, k, v = (
        [(block.attn.in_proj_weight @ row + block.attn.in_proj_bias).split(WIDTH)[part] for row in normed]
        for part in range(3)
    )
    heads = []
    for h in range(HEADS):
        own = slice(h * WIDTH // HEADS, (h + 1) * WIDTH // HEADS)
        scores = [q[-1][own] @ key[own] / (temperature * math.sqrt(WIDTH / HEADS)) for key in k]
        whole = sum(score.exp() for score in scores)
        heads.append(sum(score.exp() / whole * value[own] for score, value in zip(scores, v, strict=True)))
    x = rows[-1] + block.attn.out_proj(torch.cat(heads))
    x = x + block.mlp(block.ln_2(x))
    return model.ln_final(x) @ model.text_projection


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.5])
def test_the_softmax_has_the_temperature(temperature):
    torch.manual_seed(0)
    model = open_clip.CLIP(8, VISION, TEXT).double()
    with torch.no_grad():
        model.transformer.resblocks[0].attn.in_proj_weight.mul_(5)  # attention far from uniform
        model.transformer.resblocks[0].attn.in_proj_bias.normal_()
        wanted, plain = by_hand(model, temperature), by_hand(model, 1)
        names = list(model.state_dict())
        scale_attention(model, temperature)
        found = model.encode_text(torch.tensor([[*IDS, 0, 0]]))[0]
    torch.testing.assert_close(found, wanted)
    assert torch.allclose(wanted, plain) == (temperature == 1)
    assert list(model.state_dict()) == names


def test_models_are_built_with_it(tiny):
    torch.manual_seed(0)
    plain = build(tiny, None, 248).model.state_dict()
    torch.manual_seed(0)
    sharp = build(tiny, None, 248, attention_temperature=0.5).model.state_dict()
    changed = {name for name in plain if not torch.equal(plain[name], sharp[name])}
    # A query's bias starts at zero, which divides to zero.
    assert changed == {f"transformer.resblocks.{i}.attn.in_proj_weight" for i in range(2)}
    name = "transformer.resblocks.1.attn.in_proj_weight"
    assert torch.equal(sharp[name][:32], 2 * plain[name][:32])
    assert torch.equal(sharp[name][32:], plain[name][32:])


def test_no_temperature_and_other_blocks_are_refused():
    model = open_clip.CustomTextCLIP(8, VISION, {**TEXT, "qk_norm": True})
    with pytest.raises(UserError, match="must be above 0"):
        scale_attention(model, 0.0)
    with pytest.raises(UserError, match="leave it at 1"):
        scale_attention(model, 0.9)
    scale_attention(model, 1.0)

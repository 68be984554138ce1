"""The packed text tower against open_clip's own padded forward."""

import copy

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP

from longclip.towers.attention import Layout
from longclip.towers.text import encode_packed, encode_padded, text_module, why_padded

VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 64, "vocab_size": 1000, "width": 64, "heads": 4, "layers": 3}
LENGTHS = [2, 64, 17, 3, 40, 40, 9]
END = 999


def make(kind=CLIP, **text):
    torch.manual_seed(0)
    return kind(embed_dim=32, vision_cfg=VISION, text_cfg={**TEXT, **text})


def captions():
    """Packed and padded forms of the same captions. Token 0, open_clip's padding, is among the words."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 900, (n,), generator=generator) for n in LENGTHS]
    padded = torch.zeros(len(rows), TEXT["context_length"], dtype=torch.long)
    for row, out in zip(rows, padded, strict=True):
        row[0], row[-1] = 998, END
        out[: len(row)] = row
    return torch.cat(rows).int(), np.array(LENGTHS, np.int32), padded


@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
@pytest.mark.parametrize("text", [{}, {"ls_init_value": 0.1}, {"mlp_ratio": 2.0}])
def test_packed_equals_padded(kind, text):
    model = make(kind, **text)
    other = copy.deepcopy(model)
    tokens_T, lengths_S, padded = captions()
    packed_SE = encode_packed(model, tokens_T, Layout(lengths_S, tokens_T.device))
    padded_SE = other.encode_text(padded)
    assert (packed_SE - padded_SE).abs().max() < 2e-6
    weight = torch.randn_like(packed_SE)
    (packed_SE * weight).sum().backward()
    (padded_SE * weight).sum().backward()
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if theirs[name].grad is not None:
            scale = theirs[name].grad.abs().max() + 1e-12
            assert (parameter.grad - theirs[name].grad).abs().max() / scale < 1e-4, name


def test_recomputed_blocks_give_the_same_gradients():
    tokens_T, lengths_S, _ = captions()
    grads = []
    for recompute in (False, True):
        model = make()
        model.set_grad_checkpointing(recompute)
        encode_packed(model, tokens_T, Layout(lengths_S, tokens_T.device)).square().sum().backward()
        grads.append(model.token_embedding.weight.grad)
    assert torch.equal(*grads)


def test_padded_path_is_open_clips_own():
    model = make()
    tokens_T, lengths_S, padded = captions()
    assert torch.equal(encode_padded(model, tokens_T, lengths_S, 64, 0), model.encode_text(padded))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ({"no_causal_mask": True}, "bidirectional"),
        ({"pool_type": "last"}, "pools its text by 'last'"),
        ({"embed_cls": True}, "class token"),
        ({"qk_norm": True}, "CustomResidualAttentionBlock"),
    ],
)
def test_towers_that_cannot_be_packed_say_why(text, reason):
    assert reason in why_padded(make(CustomTextCLIP, **text))


def test_every_builtin_clip_is_packed():
    for name in ("ViT-B-32", "ViT-B-16-quickgelu", "RN50"):
        config = open_clip.get_model_config(name)
        config["text_cfg"]["layers"] = 1
        if isinstance(config["vision_cfg"]["layers"], int):
            config["vision_cfg"]["layers"] = 1
        assert why_padded(CLIP(**config)) is None
    assert text_module(make()) is not None

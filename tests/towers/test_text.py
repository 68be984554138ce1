"""The packed text tower against open_clip's own padded forward."""

import copy

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.model import CLIP, CustomTextCLIP

from longclip.towers.attention import Layout
from longclip.towers.positions import freeze_head
from longclip.towers.text import encode_packed, encode_padded, text_module, why_padded

VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 64, "vocab_size": 1000, "width": 64, "heads": 4, "layers": 3}
LENGTHS = [2, 64, 17, 3, 40, 40, 9]
END = 999


def make(kind=CLIP, **text):
    torch.manual_seed(0)
    return kind(embed_dim=32, vision_cfg=VISION, text_cfg={**TEXT, **text})


def captions(lengths=LENGTHS):
    """Packed and padded forms of the same captions. Token 0, open_clip's padding, is among the words."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 900, (n,), generator=generator) for n in lengths]
    padded = torch.zeros(len(rows), TEXT["context_length"], dtype=torch.long)
    for row, out in zip(rows, padded, strict=True):
        row[0], row[-1] = 998, END
        out[: len(row)] = row
    return torch.cat(rows).int(), torch.tensor(lengths, dtype=torch.int32), padded


def packed(model, tokens_T, lengths_S):
    return encode_packed(model, tokens_T, Layout(lengths_S.numpy(), tokens_T.device))


def gradients(model, features_SE):
    torch.manual_seed(2)
    model.zero_grad()
    (features_SE * torch.randn_like(features_SE)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def apart(found, expected):
    """The largest difference, as a share of the largest number."""
    return float((found - expected).detach().abs().max() / (expected.detach().abs().max() + 1e-12))


def assert_packed_equals_padded(model, other, lengths):
    tokens_T, lengths_S, padded = captions(lengths)
    features_SE, expected_SE = packed(model, tokens_T, lengths_S), other.encode_text(padded)
    assert apart(features_SE, expected_SE) < 2e-6
    ours, theirs = gradients(model, features_SE), gradients(other, expected_SE)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert apart(ours[name], theirs[name]) < 1e-4, name


@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
@pytest.mark.parametrize("text", [{}, {"ls_init_value": 0.1}, {"mlp_ratio": 2.0}])
def test_packed_equals_padded(kind, text):
    model = make(kind, **text)
    assert_packed_equals_padded(model, copy.deepcopy(model), LENGTHS)


MODEL = make()


@settings(max_examples=15, deadline=None, database=None)
@given(st.lists(st.integers(2, 64), min_size=1, max_size=12))
def test_packed_equals_padded_whatever_the_lengths(lengths):
    assert_packed_equals_padded(MODEL, copy.deepcopy(MODEL), lengths)


@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
@pytest.mark.parametrize(
    "prepare",
    [
        lambda model: model.set_grad_checkpointing(True),
        lambda model: freeze_head(text_module(model), 20),
        lambda model: model.lock_text_tower(unlocked_layers=2),
    ],
    ids=["checkpointed", "frozen-head", "locked"],
)
def test_packed_equals_padded_however_it_is_trained(kind, prepare):
    model = make(kind)
    prepare(model)
    assert_packed_equals_padded(model, copy.deepcopy(model), LENGTHS)


def test_packed_is_as_near_to_float32_as_padded_under_bfloat16():
    model = make()
    tokens_T, lengths_S, padded = captions()

    def both(encode):
        features_SE = encode()
        return [features_SE.float(), *gradients(model, features_SE).values()]

    exact = both(lambda: model.encode_text(padded))
    with torch.autocast("cpu", torch.bfloat16):
        ours = both(lambda: packed(model, tokens_T, lengths_S))
        theirs = both(lambda: model.encode_text(padded))
    for mine, other, right in zip(ours, theirs, exact, strict=True):
        assert (mine - right).norm() <= 1.25 * (other - right).norm() + 1e-7 * right.norm()


def test_recomputed_blocks_give_the_same_gradients():
    tokens_T, lengths_S, _ = captions()
    found = []
    for recompute in (False, True):
        model = make()
        model.set_grad_checkpointing(recompute)
        found.append(gradients(model, packed(model, tokens_T, lengths_S)))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


@pytest.mark.long
def test_compiled_once_for_batches_of_any_size():
    torch._dynamo.reset()
    model = make()
    compiled = torch.compile(encode_packed, dynamic=True, backend="aot_eager")
    for lengths in ([5, 5, 5], [30, 31, 9, 8], [60, 20, 20, 19, 4], [40, 18, 17]):
        tokens_T, lengths_S, _ = captions(lengths)
        layout = Layout(lengths_S.numpy(), tokens_T.device)
        with torch._dynamo.config.patch(error_on_recompile=lengths != [5, 5, 5]):
            ours = gradients(model, compiled(model, tokens_T, layout))
        eager = gradients(model, encode_packed(model, tokens_T, layout))
        for name in eager:
            assert apart(ours[name], eager[name]) < 1e-4, name


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

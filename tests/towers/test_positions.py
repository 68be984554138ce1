"""Position tables: the closed form, its lengths, and rows that never move."""

from __future__ import annotations

import copy

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from longclip.towers import positions
from longclip.towers.merging import merged_state_dict
from longclip.types import UserError


def table(length: int, width: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(length, width, generator=torch.Generator().manual_seed(seed))


def naive_stretch(table_LD: Tensor, keep: int, ratio: int) -> np.ndarray:
    """Long-CLIP's rule row by row in float64."""
    rows = table_LD.double().numpy()
    last = len(rows) - 1
    out = list(rows[:keep])
    for i in range(keep, len(rows)):
        for k in range(ratio):
            share = k / ratio
            if i < last:
                out.append((1 - share) * rows[i] + share * rows[i + 1])
            else:
                out.append(rows[last] + share * (rows[last] - rows[last - 1]))
    return np.stack(out)


@pytest.mark.parametrize(
    ("length", "keep", "ratio"), [(77, 20, 4), (77, 20, 1), (64, 20, 3), (10, 0, 7), (5, 4, 2), (2, 1, 5)]
)
def test_stretch_equals_the_rule_row_by_row(length: int, keep: int, ratio: int) -> None:
    table_LD = table(length)
    stretched = positions.stretch(table_LD, keep, ratio)
    assert stretched.shape == (keep + ratio * (length - keep), 5)
    np.testing.assert_allclose(stretched.numpy(), naive_stretch(table_LD, keep, ratio), atol=2e-6)
    assert torch.equal(stretched[:keep], table_LD[:keep])
    assert torch.equal(stretched[keep::ratio], table_LD[keep:])


@pytest.mark.parametrize(("length", "keep"), [(248, 0), (248, 20), (100, 1), (78, 76), (154, 0)])
def test_rows_that_were_trained_are_picked_as_the_rule_says(length: int, keep: int) -> None:
    table_LD = table(77)
    grouped, repeated = (positions.resize(table_LD, length, name, keep) for name in ("group", "repeat"))
    assert grouped.shape == repeated.shape == (length, 5)
    for p in range(length):
        i = (p - keep) * (77 - keep) // (length - keep)
        assert torch.equal(grouped[p], table_LD[p if p < keep else keep + i])
        assert torch.equal(repeated[p], table_LD[p if p < 77 else keep + (p - keep) % (77 - keep)])


def test_77_rows_become_248() -> None:
    assert positions.resize(table(77), 248).shape == (248, 5)


def test_half_precision_is_stretched_in_float32() -> None:
    table_LD = table(77).half()
    assert torch.equal(positions.stretch(table_LD, 20, 4), positions.stretch(table_LD.float(), 20, 4))


def test_interpolation_is_open_clips() -> None:
    from open_clip.model import resize_text_pos_embed

    table_LD = table(77, 32)
    longer = open_clip.CustomTextCLIP(
        8,
        {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1},
        {"context_length": 248, "vocab_size": 9, "width": 32, "heads": 1, "layers": 1},
    )
    state = {"text.positional_embedding": table_LD}
    resize_text_pos_embed(state, longer)
    assert torch.equal(positions.resize(table_LD, 248, "interpolate"), state["text.positional_embedding"])


@pytest.mark.parametrize("method", positions.METHODS)
def test_own_length_is_the_identity(method: str) -> None:
    table_LD = table(77)
    assert torch.equal(positions.resize(table_LD, 77, method), table_LD)


def test_a_length_the_formula_does_not_give_names_its_neighbours() -> None:
    with pytest.raises(UserError, match=r"context_length 250 .* 248 \(ratio 4\) and 305 \(ratio 5\)"):
        positions.resize(table(77), 250)
    assert positions.resize(table(77), 250, "interpolate").shape == (250, 5)


@pytest.mark.parametrize("method", positions.METHODS)
def test_positions_are_never_cut(method: str) -> None:
    with pytest.raises(UserError, match="never cut: use context_length=248"):
        positions.resize(table(248), 77, method)


def test_unknown_method_and_keep_are_refused() -> None:
    with pytest.raises(UserError, match="stretch, interpolate"):
        positions.resize(table(77), 248, "cubic")
    with pytest.raises(UserError, match="use 0 to 76"):
        positions.resize(table(77), 248, keep=77)


@pytest.fixture(params=[open_clip.CLIP, open_clip.CustomTextCLIP], ids=["CLIP", "CustomTextCLIP"])
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 32, "layers": 1}
    text = {"context_length": 24, "vocab_size": 50, "width": 32, "heads": 1, "layers": 1}
    return request.param(8, vision, text)


def train(model: torch.nn.Module, steps: int = 4) -> None:
    # All parameters go in, frozen ones too: nothing but their lack of a gradient protects them.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.3)
    ids_SL = torch.randint(1, 50, (6, 24))
    for _ in range(steps):
        optimizer.zero_grad()
        normalize(model.encode_text(ids_SL), dim=-1)[:, 0].sum().backward()
        optimizer.step()


def test_frozen_rows_are_bit_identical_after_adamw_with_decay(model: torch.nn.Module) -> None:
    owner = positions.text_module(model)
    before_LD = owner.positional_embedding.detach().clone()
    positions.freeze_head(owner, 10)
    assert torch.equal(owner.positional_embedding, before_LD)
    train(model)
    after_LD = owner.positional_embedding
    assert torch.equal(after_LD[:10], before_LD[:10])
    assert (after_LD[10:] != before_LD[10:]).any(dim=1).all()


def test_splitting_changes_no_feature_and_no_gradient(model: torch.nn.Module) -> None:
    ids_SL = torch.randint(1, 50, (3, 24))
    whole = copy.deepcopy(model)
    positions.freeze_head(positions.text_module(model), 10)
    assert torch.equal(model.encode_text(ids_SL), whole.encode_text(ids_SL))
    for each in (model, whole):
        each.encode_text(ids_SL)[:, 0].sum().backward()
    whole_gradient = positions.text_module(whole).positional_embedding.grad
    tail = positions.text_module(model).parametrizations.positional_embedding.original1
    torch.testing.assert_close(tail.grad, whole_gradient[10:])


def test_merged_state_has_exactly_open_clips_names(model: torch.nn.Module) -> None:
    plain = copy.deepcopy(model)
    positions.freeze_head(positions.text_module(model), 10)
    train(model)
    merged = merged_state_dict(model)
    assert merged.keys() == plain.state_dict().keys()
    plain.load_state_dict(merged)
    ids_SL = torch.randint(1, 50, (3, 24))
    assert torch.equal(plain.encode_text(ids_SL), model.encode_text(ids_SL))


def test_copies_train_the_same_rows(model: torch.nn.Module) -> None:
    positions.freeze_head(positions.text_module(model), 10)
    other = copy.deepcopy(model)
    other.load_state_dict(model.state_dict())
    frozen = [name for name, parameter in other.named_parameters() if not parameter.requires_grad]
    assert [name.split(".")[-1] for name in frozen] == ["original0"]


def test_freezing_nothing_or_everything_is_refused(model: torch.nn.Module) -> None:
    for keep in (0, 24):
        with pytest.raises(UserError, match="use 1 to 23"):
            positions.freeze_head(positions.text_module(model), keep)

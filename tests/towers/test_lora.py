"""Adapted matrices: the same model at first, a plain model in the end, and nothing else moves in between."""

import copy
import math

import pytest
import torch

from longclip.models import backbone_of
from longclip.towers.clip import DualTower
from longclip.towers.freezing import Freeze
from longclip.towers.lora import Lora, LowRank, adapt, merge_matrices
from longclip.towers.merging import merged_state_dict
from longclip.towers.pretrained import build
from longclip.types import UserError

CAPTIONS = ["a red square left of a blue disc", "two", "a green ring, and below it nothing at all"]


def features(tower):
    pixels = torch.randint(0, 256, (3, 3, 24, 24), generator=torch.Generator().manual_seed(1))
    return torch.cat([tower.encode_image(pixels.to(torch.uint8)), tower.encode_captions(CAPTIONS)])


def adapted(tiny, **options):
    """A model and its adapted copy."""
    torch.manual_seed(0)
    backbone = build(tiny, None, 248, freeze_positions=True)
    plain = build(tiny, None, 248).model
    plain.load_state_dict(merged_state_dict(backbone.model))
    return DualTower(backbone._replace(model=plain)), DualTower(backbone, lora=Lora(4, alpha=8), **options)


def train(tower, steps=3):
    parameters = [p for p in tower.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(tower.parameters(), lr=1e-2, weight_decay=0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        features(tower)[:, 0].sum().backward()
        optimizer.step()
    return parameters


def of_blocks(model):
    """Matrices of attention and MLPs, by open_clip's names."""
    ends = ("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight")
    return [name for name in model.state_dict() if "resblocks" in name and name.endswith(ends)]


def test_at_first_it_is_the_same_model_bit_by_bit(tiny):
    plain, low = adapted(tiny)
    assert torch.equal(features(low), features(plain))


def test_only_differences_of_the_blocks_matrices_train_and_all_else_as_before(tiny):
    plain, low = adapted(tiny)
    before = copy.deepcopy(low.backbone.state_dict())
    train(low)
    after, matrices = low.backbone.state_dict(), of_blocks(plain.backbone)
    assert len(matrices) == 4 * (2 + 2), "two blocks in each tower"
    originals = [name for name in after if name.endswith(".original")]
    assert len(originals) == len(matrices)
    still = {name for name in after if torch.equal(after[name], before[name])}
    factors = {name for name in after if name.endswith("factor")}
    assert still == {*originals, *factors, "parametrizations.positional_embedding.original0", "logit_scale"}


def test_merged_it_is_a_plain_model_that_computes_the_same(tiny):
    plain, low = adapted(tiny)
    train(low)
    merged = merged_state_dict(low.backbone)
    assert list(merged.keys() ^ plain.backbone.state_dict().keys()) == []
    assert not torch.allclose(features(low), features(plain), atol=1e-3)
    plain.backbone.load_state_dict(merged)
    torch.testing.assert_close(features(low), features(plain), atol=1e-6, rtol=0)
    low.padded_because = "this test says so"
    torch.testing.assert_close(features(low), features(plain), atol=2e-6, rtol=0)


def test_checkpoints_are_read_as_plain_models(tiny):
    plain, low = adapted(tiny)
    train(low)
    content = {
        "longclip": {"model_cfg": low.model_cfg, "preprocess_cfg": low.preprocess_cfg},
        "state_dict": {f"tower.{name}": value for name, value in low.state_dict().items()},
    }
    read = DualTower(backbone_of(content, "this test"))
    assert [name for name, _ in read.backbone.named_parameters()] == [
        name for name, _ in plain.backbone.named_parameters()
    ]
    torch.testing.assert_close(features(read), features(low), atol=1e-6, rtol=0)


def test_gradients_are_those_of_the_equation(tiny):
    """dL/dB = alpha/r dL/dW' A^T and dL/dA = alpha/r B^T dL/dW', W' being the plain model's matrix."""
    plain, low = adapted(tiny)
    train(low, steps=1)  # so that B is not zero
    plain.backbone.load_state_dict(merged_state_dict(low.backbone))
    for tower in (plain, low):
        tower.zero_grad()
        features(tower)[:, 1].sum().backward()
    of_plain, of_low = (dict(tower.backbone.named_parameters()) for tower in (plain, low))
    for name in of_blocks(plain.backbone):
        head, _, last = name.rpartition(".")
        up, down = (of_low[f"{head}.parametrizations.{last}.0.{part}"] for part in ("up", "down"))
        grad = of_plain[name].grad
        torch.testing.assert_close(up.grad, 2 * grad @ down.T, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(down.grad, 2 * up.T @ grad, atol=1e-5, rtol=1e-4)


def test_small_differences_survive_autocast():
    low = LowRank(torch.ones(4, 4), rank=1, alpha=1)
    with torch.no_grad():
        low.up.fill_(1e-2)
        low.down.fill_(1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        found = low(torch.ones(4, 4))
    torch.testing.assert_close(found, torch.full((4, 4), 1.0001), atol=1e-7, rtol=0)


def test_merging_by_hand():
    generator = torch.Generator().manual_seed(3)
    matrix, up, down = (torch.randn(shape, generator=generator) for shape in ((5, 3), (5, 2), (2, 3)))
    at = "a.0.parametrizations.weight"
    state = {f"{at}.original": matrix, f"{at}.0.up": up, f"{at}.0.down": down}
    merged = merge_matrices({**state, f"{at}.0.factor": torch.tensor([0.25]), "b": up})
    assert merged.keys() == {"a.0.weight", "b"}
    for i in range(5):
        for j in range(3):
            wanted = matrix[i, j] + 0.25 * sum(up[i, r] * down[r, j] for r in range(2))
            assert math.isclose(merged["a.0.weight"][i, j], wanted, abs_tol=1e-6)


def test_what_is_locked_is_not_adapted(tiny):
    _, low = adapted(tiny, freeze=Freeze(text=True))
    names = [name for name, _ in low.backbone.named_parameters() if name.endswith(".up")]
    assert names
    assert all(name.startswith("visual.") for name in names)


def test_ranks_that_make_no_sense_are_refused(tiny):
    model = build(tiny, None, 248).model
    with pytest.raises(UserError, match=r"model\.lora\.rank is -1"):
        adapt(model, Lora(-1))
    with pytest.raises(UserError, match=r"set model\.lora\.rank=0"):
        adapt(model.requires_grad_(False), Lora(4))
    adapt(model, Lora())
    assert not any("parametrizations" in name for name in model.state_dict())

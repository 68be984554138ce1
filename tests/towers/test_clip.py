"""DualTower: a batch in, Embeddings out; what is locked stays locked."""

import copy

import pytest
import torch
from torch.nn import functional as F

from longclip.captions import Groups, Sentences, Whole
from longclip.data.images import EvalTransform
from longclip.data.module import DataModule
from longclip.data.plans.plan import Plan
from longclip.optim import AdamW
from longclip.towers.clip import DualTower
from longclip.towers.freezing import Freeze
from longclip.towers.pretrained import build
from longclip.types import UserError


@pytest.fixture
def backbone(tiny):
    return build(tiny, None, 248)


def batch_of(scenes, backbone, groups, count=6):
    data = DataModule(
        root=scenes, train="train", judge=["heldout"], plan=Plan(64, 8), groups=groups,
        tokenizer=backbone.tokenizer, preprocess=backbone.preprocess_cfg,
    )  # fmt: skip
    return data.probe(count)


@pytest.fixture
def groups():
    return Groups({"long": Whole(), "sub": Sentences(12)}, seed=0)


def test_embeddings_are_open_clips_features_slot_by_slot(scenes, backbone, groups):
    tower = DualTower(backbone).eval()
    batch = batch_of(scenes, backbone, groups)
    found = tower(batch, groups.slots)
    mean, std = (torch.tensor(backbone.preprocess_cfg[k])[:, None, None] for k in ("mean", "std"))
    pixels = (batch.pixels_BCHW.float() / 255 - mean) / std
    torch.testing.assert_close(found.image_BE, F.normalize(backbone.model.encode_image(pixels), dim=-1))
    assert found.text("long").shape[1] == 1
    assert found.text("sub").shape[1] == 12
    assert not found.mask("sub").all(), "these scenes have fewer than 12 sentences: some slots are empty"
    assert found.text_BKE[~found.mask_BK].abs().sum() == 0
    start = 0
    for b, k in batch.lengths_BK.nonzero().tolist():
        length = int(batch.lengths_BK[b, k])
        row = torch.zeros(1, 248, dtype=torch.long)
        row[0, :length] = batch.tokens_T[start : start + length]
        start += length
        theirs = F.normalize(backbone.model.encode_text(row), dim=-1)[0]
        torch.testing.assert_close(found.text_BKE[b, k], theirs, atol=2e-6, rtol=0)


def test_patches_live_in_the_joint_space(scenes, backbone, groups):
    tower = DualTower(backbone).eval()
    batch = batch_of(scenes, backbone, groups)
    with_patches = tower(batch, groups.slots, frozenset({"patches"}))
    assert with_patches.patches_BPE.shape == (6, 4, 32)
    assert with_patches.grid == (2, 2)
    torch.testing.assert_close(with_patches.image_BE, tower(batch, groups.slots).image_BE)
    visual = backbone.model.visual
    hidden = visual.forward_intermediates(tower.normalise(batch.pixels_BCHW), indices=1, output_fmt="NLC")
    oracle = visual.ln_post(hidden["image_intermediates"][-1]) @ visual.proj
    torch.testing.assert_close(with_patches.patches_BPE, oracle, atol=1e-5, rtol=1e-4)


def test_compiled_equals_eager(scenes, backbone, groups):
    batch = batch_of(scenes, backbone, groups)
    eager = DualTower(backbone)(batch, groups.slots)
    compiled = DualTower(backbone, compile=True)(batch, groups.slots)
    torch.testing.assert_close(compiled.text_BKE, eager.text_BKE, atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(compiled.image_BE, eager.image_BE, atol=2e-6, rtol=1e-4)


test_compiled_equals_eager = pytest.mark.long(test_compiled_equals_eager)


def step(tower, batch, slots):
    optimizer = AdamW(lr=1e-2, warmup=0, samples=10, weight_decay=0.5).build(tower)
    found = tower(batch, slots)
    (found.image_BE @ found.text("long")[:, 0].T).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("tower_name", ["image", "text"])
def test_a_locked_tower_does_not_move(scenes, backbone, groups, tower_name):
    tower = DualTower(backbone, Freeze(**{tower_name: True}))
    before = copy.deepcopy(tower.state_dict())
    step(tower, batch_of(scenes, backbone, groups), groups.slots)
    for name, value in tower.state_dict().items():
        is_image = name.startswith("backbone.visual.")
        if name != "backbone.logit_scale" and is_image == (tower_name == "image"):
            assert torch.equal(value, before[name]), name
    assert any(not torch.equal(value, before[name]) for name, value in tower.state_dict().items())


def test_frozen_positions_survive_a_text_lock_and_adam(scenes, tiny, groups):
    backbone = build(tiny, None, 248, freeze_positions=True)
    tower = DualTower(backbone)
    before = backbone.model.positional_embedding.detach().clone()
    for _ in range(3):
        step(tower, batch_of(scenes, backbone, groups), groups.slots)
    after = backbone.model.positional_embedding.detach()
    assert torch.equal(before[:20], after[:20])
    assert not torch.equal(before[20:60], after[20:60])
    locked = DualTower(build(tiny, None, 248, freeze_positions=True), Freeze(text=True))
    rows = [p for n, p in locked.named_parameters() if "positional" in n and "visual" not in n]
    assert len(rows) == 2
    assert not any(p.requires_grad for p in rows)


def test_freezing_everything_is_refused(backbone):
    with pytest.raises(UserError, match="nothing would train"):
        DualTower(backbone, Freeze(image=True, text=True))


def test_convolutional_towers_have_no_patches(scenes):
    backbone = build("RN50", None, 77)
    with pytest.raises(UserError, match="patch"):
        DualTower(backbone).check_needs(frozenset({"patches"}))


def test_eval_transform_is_the_models(backbone):
    assert EvalTransform(24).size == backbone.preprocess_cfg["size"]


def test_every_word_is_in_the_joint_space_and_the_end_token_is_the_caption(scenes, backbone, groups):
    tower = DualTower(backbone).eval()
    batch = batch_of(scenes, backbone, groups)
    plain, found = tower(batch, groups.slots), tower(batch, groups.slots, frozenset({"words"}))
    torch.testing.assert_close(found.text_BKE, plain.text_BKE, atol=2e-6, rtol=0)
    words = found.words
    assert words.lengths_BK.tolist() == batch.lengths_BK.tolist()
    ends_S = torch.from_numpy(words.lengths_BK[words.lengths_BK > 0]).cumsum(0) - 1
    torch.testing.assert_close(
        F.normalize(words.states_TE[ends_S], dim=-1), plain.text_BKE[plain.mask_BK], atol=2e-6, rtol=0
    )
    row = torch.zeros(1, 248, dtype=torch.long)
    length = int(batch.lengths_BK[0, 0])
    row[0, :length] = batch.tokens_T[:length]
    backbone.model.text_pool_type = "none"  # open_clip then projects all tokens
    theirs = backbone.model.encode_text(row)[0, :length]
    torch.testing.assert_close(words.states_TE[:length], theirs, atol=5e-6, rtol=0)
    parts = tower(batch, groups.slots, frozenset({"words"}), micro_batch=4)
    torch.testing.assert_close(parts.words.states_TE, words.states_TE, atol=2e-6, rtol=0)


def test_the_start_stays_what_it_was_and_is_neither_trained_nor_saved(scenes, backbone, groups):
    tower = DualTower(backbone)
    tower.check_needs(frozenset({"start"}))
    batch = batch_of(scenes, backbone, groups)
    before = tower(batch, groups.slots)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for micro_batch in (None, 4):
        found = tower(batch, groups.slots, frozenset({"start"}), micro_batch)
        assert not torch.allclose(found.image_BE, before.image_BE, atol=1e-3)
        torch.testing.assert_close(found.start.image_BE, before.image_BE, atol=2e-6, rtol=0)
        torch.testing.assert_close(found.start.text_BKE, before.text_BKE, atol=2e-6, rtol=0)
        assert not found.start.image_BE.requires_grad
    assert not any("start" in name for name in (*dict(tower.named_parameters()), *tower.state_dict()))

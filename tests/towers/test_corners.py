"""Corner tokens: each reads its whole caption and itself, and nothing reads it."""

import copy

import open_clip
import pytest
import torch

from longclip.captions import Groups, Whole
from longclip.data.loading import blank
from longclip.tokens import pack
from longclip.towers.attention import Layout
from longclip.towers.clip import DualTower
from longclip.towers.corners import cornered, encode_corners
from longclip.towers.pretrained import build
from longclip.towers.text import encode_words, through
from longclip.types import Text, UserError

LENGTHS = torch.tensor([5, 2, 31, 8, 8], dtype=torch.int32)
CORNERS = 3
NEEDS = frozenset({"corners"})


@pytest.fixture
def model():
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 40, "vocab_size": 90, "width": 32, "heads": 4, "layers": 3}
    return open_clip.CLIP(16, vision, text).double()


def captions():
    random = torch.Generator().manual_seed(1)
    tokens_T = torch.randint(1, 89, (int(LENGTHS.sum()),), generator=random)
    return tokens_T, torch.randn(CORNERS, 32, generator=random, dtype=torch.float64)


def encode(model, tokens_T, corners_MD):
    return encode_corners(model, tokens_T, corners_MD, cornered(Layout(LENGTHS.numpy(), tokens_T.device)))


def by_hand(model, tokens_N, corner_D):
    """One corner behind one caption, by open_clip's blocks under a causal mask; its last row."""
    x_ND = model.token_embedding(tokens_N) + model.positional_embedding[: len(tokens_N)]
    x_1ND = torch.cat([x_ND, corner_D[None]])[None]
    rows = x_1ND.shape[1]
    mask = torch.full((rows, rows), float("-inf"), dtype=x_1ND.dtype).triu(1)
    for block in model.transformer.resblocks:
        x_1ND = block(x_1ND, attn_mask=mask)
    return model.ln_final(x_1ND[0, -1]) @ model.text_projection


def test_a_corner_is_one_more_token_of_its_caption_without_a_position(model):
    tokens_T, corners_MD = captions()
    corners_MD.requires_grad_()
    _, found_SME = encode(model, tokens_T, corners_MD)
    wanted_SME = torch.stack([
        torch.stack([by_hand(model, tokens_N, corner_D) for corner_D in corners_MD])
        for tokens_N in tokens_T.split(LENGTHS.tolist())
    ])  # fmt: skip
    torch.testing.assert_close(found_SME, wanted_SME)
    leaves = [corners_MD, *model.transformer.parameters(), model.token_embedding.weight]
    direction = torch.randn_like(found_SME)
    ours, theirs = (torch.autograd.grad((x * direction).sum(), leaves) for x in (found_SME, wanted_SME))
    torch.testing.assert_close(ours, theirs)


def test_tokens_and_other_corners_do_not_notice_a_corner(model):
    tokens_T, corners_MD = captions()
    layout = Layout(LENGTHS.numpy(), tokens_T.device)
    words_TE, corners_SME = encode(model, tokens_T, corners_MD)
    torch.testing.assert_close(words_TE, encode_words(model, tokens_T, layout))
    poisoned_MD = corners_MD.clone()
    poisoned_MD[1] = 100
    again_TE, poisoned_SME = encode(model, tokens_T, poisoned_MD)
    assert torch.equal(again_TE, words_TE)
    assert torch.equal(poisoned_SME[:, [0, 2]], corners_SME[:, [0, 2]])
    assert not torch.allclose(poisoned_SME[:, 1], corners_SME[:, 1])


def test_recomputed_blocks_give_the_same_gradients(model):
    tokens_T, corners_MD = captions()
    found = []
    for recompute in (False, True):
        each = copy.deepcopy(model)
        each.set_grad_checkpointing(recompute)
        encode(each, tokens_T, corners_MD)[1].square().sum().backward()
        found.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert found[0]
    torch.testing.assert_close(found[0], found[1])


def test_a_tower_gives_them_slot_by_slot(tiny):
    torch.manual_seed(0)
    tower = DualTower(build(tiny, None, 248), corners=CORNERS)
    tower.check_needs(NEEDS)
    groups = Groups({"long": Whole(), "short": Whole()}, seed=0)
    ids = [tower.tokenizer.ids(text) for text in ("a red disc", "two rings left of a square", "dots")]
    slots = [[Text(ids[0]), None], [None, None], [Text(ids[1]), Text(ids[2])]]
    packed = pack(slots, tower.tokenizer)
    batch = blank(3, 2, 24, tower.tokenizer)
    batch = batch._replace(tokens_T=packed.tokens_T, lengths_BK=packed.lengths_BK)
    found = tower(batch, groups.slots, NEEDS)
    plain = tower(batch, groups.slots)
    assert found.corners_BKME.shape == (3, 2, CORNERS, 32)
    assert plain.corners_BKME is None
    torch.testing.assert_close(found.text_BKE, plain.text_BKE, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        found.corners_BKME.norm(dim=-1), found.mask_BK[..., None].expand(3, 2, CORNERS).float()
    )
    parts = tower(batch, groups.slots, NEEDS | {"words"}, micro_batch=1)
    torch.testing.assert_close(parts.corners_BKME, found.corners_BKME)
    assert len(parts.words.states_TE) == len(packed.tokens_T)


def test_corners_train_and_are_not_exported(tiny):
    tower = DualTower(build(tiny, None, 248))
    tower.check_needs(NEEDS)
    assert tower.corners_MD.shape == (2, 32)
    assert tower.corners_MD.requires_grad
    assert not torch.equal(tower.corners_MD[0], tower.corners_MD[1]), "equal corners would stay equal"
    assert not any("corner" in name for name in tower.backbone.state_dict())


def test_towers_and_counts_that_cannot_be_are_refused(tiny):
    with pytest.raises(UserError, match=r"model\.corners is 0"):
        DualTower(build(tiny, None, 248), corners=0).check_needs(NEEDS)
    tower = DualTower(build(tiny, None, 248))
    tower.padded_because = "this test says so"
    with pytest.raises(UserError, match="this test says so"):
        tower.check_needs(NEEDS)


def test_blocks_look_as_they_are_told():
    """`through` is what both kinds of attention share: with none, rows stay among themselves."""
    torch.manual_seed(0)
    block = open_clip.transformer.ResidualAttentionBlock(8, 2)
    x_TD = torch.randn(5, 8)
    found_TD = through(block, x_TD, None, lambda qkv_T3HD, _: 0 * qkv_T3HD[:, 2])
    x_TD = x_TD + block.attn.out_proj.bias
    torch.testing.assert_close(found_TD, x_TD + block.mlp(block.ln_2(x_TD)))

"""The image tower at smaller sides and with fewer patches: open_clip's arithmetic, nothing of it exported."""

import copy
import json

import open_clip
import pytest
import torch
from open_clip.model import resize_pos_embed
from torch import nn

from longclip.captions import Groups, Whole
from longclip.data.loading import blank
from longclip.towers.clip import DualTower
from longclip.towers.image import check_sizes, encode_patches, grid, patch_dropout, positions, take_any_side
from longclip.towers.pretrained import build
from longclip.types import UserError


@pytest.fixture
def visual(tiny):
    """Patches of 12 in 72 pixels: 6 x 6."""
    visual = build(tiny, None, 77, image_size=72).model.visual
    take_any_side(visual)
    return visual


@pytest.fixture(scope="session")
def towers(tmp_path_factory):
    """Names of towers of other kinds: average pooling, and timm's with and without positions."""
    folder = tmp_path_factory.mktemp("towers")
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vit = {"image_size": 72, "layers": 1, "width": 32, "head_width": 16, "patch_size": 12, "pool_type": "avg"}
    timm = {"timm_pool": "avg", "timm_proj": "linear", "image_size": 64}
    kinds = {
        "average": vit,
        "late-norm": {**vit, "pool_type": "tok", "final_ln_after_pool": True},
        "timm-convolutions": {**timm, "timm_model_name": "test_convnext"},
        "timm-transformer": {**timm, "timm_model_name": "test_vit", "timm_pool": "", "image_size": 160},
    }
    for name, vision in kinds.items():
        config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
        (folder / f"longclip-{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)

    def named(name):
        visual = build(f"longclip-{name}", None, 77).model.visual
        take_any_side(visual)
        return visual

    return named


@pytest.mark.parametrize("grid", [1, 2, 4, 5])
def test_positions_of_a_smaller_grid_are_open_clips_own(visual, tiny, grid):
    small = build(tiny, None, 77, image_size=12 * grid).model
    state = {f"visual.{name}": value for name, value in visual.state_dict().items()}
    resize_pos_embed(state, small)
    found = positions(visual.positional_embedding, visual.grid_size, (grid, grid))
    assert torch.equal(found, state["visual.positional_embedding"])
    small.visual.load_state_dict({name.removeprefix("visual."): value for name, value in state.items()})
    pixels = torch.randn(3, 3, 12 * grid, 12 * grid)
    torch.testing.assert_close(visual(pixels), small.visual(pixels), atol=1e-6, rtol=1e-5)
    image_BE, patches_BPE = encode_patches(visual, pixels)
    torch.testing.assert_close(image_BE, small.visual(pixels), atol=1e-6, rtol=1e-5)
    assert patches_BPE.shape == (3, grid**2, 32)


def test_the_whole_table_learns_from_small_images_and_stays_itself(visual):
    table, names = visual.positional_embedding, list(visual.state_dict())
    visual(torch.randn(2, 3, 48, 48)).sum().backward()
    assert visual.positional_embedding is table
    assert isinstance(table, nn.Parameter)
    assert list(visual.state_dict()) == names
    assert (table.grad.abs().sum(1) > 0).all(), "bicubic resampling reaches every row"


def test_at_its_own_side_the_tower_is_open_clips(tiny):
    visual, pixels = build(tiny, None, 77, image_size=72).model.visual, torch.randn(2, 3, 72, 72)
    theirs = visual(pixels)
    take_any_side(visual)
    assert torch.equal(visual(pixels), theirs)
    assert torch.equal(copy.deepcopy(visual)(pixels[..., :48, :48]), visual(pixels[..., :48, :48]))


@pytest.mark.parametrize("kind", ["average", "late-norm"])
@pytest.mark.parametrize(("share", "kept"), [(0.5, 8), (0.75, 4), (0.99, 1), (0.0, 16)])
def test_dropped_patches_leave_the_class_token_and_a_fixed_number(towers, kind, share, kept):
    visual = towers(kind)
    before = list(visual.state_dict())
    patch_dropout(visual).prob = share
    seen = []
    visual.ln_pre.register_forward_pre_hook(lambda module, tokens: seen.append(tokens[0]))
    pixels = torch.randn(5, 3, 48, 48)
    _, patches_BPE = encode_patches(visual, pixels)
    assert patches_BPE.shape == (5, kept, 32)
    first_D = visual.class_embedding + visual.positional_embedding[0]
    torch.testing.assert_close(seen[0][:, 0], first_D.expand(5, -1))
    assert list(visual.state_dict()) == before
    visual.eval()
    assert encode_patches(visual, pixels)[1].shape == (5, 16, 32), "judging sees all patches"


def test_patches_know_the_grid_that_they_lie_in_unless_some_were_dropped(visual):
    patch_dropout(visual).prob = 0.75
    pixels = torch.randn(2, 3, 48, 48)
    kept_BPE = encode_patches(visual, pixels)[1]
    assert kept_BPE.shape[1] == 4, "a square number all the same"
    assert grid(visual, pixels, kept_BPE) is None
    visual.eval()
    for down, across in [(72, 72), (48, 48), (24, 60)]:
        pixels = torch.randn(2, 3, down, across)
        assert grid(visual, pixels, encode_patches(visual, pixels)[1]) == (down // 12, across // 12)


def test_the_share_may_change_on_the_way(visual):
    pixels = torch.randn(2, 3, 72, 72)
    for share, kept in ((0.0, 36), (0.5, 18), (0.75, 9), (0.0, 36)):
        patch_dropout(visual).prob = share
        assert encode_patches(visual, pixels)[1].shape[1] == kept
    assert not any("dropout" in name for name in visual.state_dict())


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_chunks_and_recomputation_drop_the_same_patches_as_the_whole(tiny, share, grad_checkpointing):
    tower = DualTower(build(tiny, None, 77, image_size=72), grad_checkpointing=grad_checkpointing)
    groups = Groups({"long": Whole()}, seed=0)
    batch = blank(6, 1, 48, tower.tokenizer)
    pixels_BCHW = torch.randint(0, 256, batch.pixels_BCHW.shape, dtype=torch.uint8)
    batch = batch._replace(pixels_BCHW=pixels_BCHW, draws_B=torch.arange(6))
    patch_dropout(tower.backbone.visual).prob = share
    direction_BE = torch.randn(6, 32)

    def gradient(micro_batch):
        tower.zero_grad()
        (tower(batch, groups.slots, micro_batch=micro_batch).image_BE * direction_BE).sum().backward()
        return {name: p.grad.clone() for name, p in tower.backbone.visual.named_parameters()}

    whole, again = gradient(None), gradient(2)
    for name, expected in whole.items():
        torch.testing.assert_close(again[name], expected, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.long
def test_a_compiled_tower_is_compiled_once_a_stage(visual):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    eager = {side: visual(torch.ones(2, 3, side, side)) for side in (72, 48)}
    visual.compile(backend=backend)
    for _ in range(3):
        for side, expected in eager.items():
            torch.testing.assert_close(visual(torch.ones(2, 3, side, side)), expected)
    assert len(graphs) <= 2


def test_convolutions_take_any_side_and_others_are_refused(towers):
    convolutions = towers("timm-convolutions")
    check_sizes(convolutions, [48])
    assert convolutions(torch.randn(2, 3, 48, 48)).shape == (2, 32)
    for visual in (towers("timm-transformer"), build("RN50", None, 77).model.visual):
        with pytest.raises(UserError, match="positions of one size"):
            check_sizes(visual, [48])
        check_sizes(visual, [])
        with pytest.raises(UserError, match="patch_dropout=null"):
            patch_dropout(visual)


def test_sides_that_patches_do_not_divide_are_refused(visual):
    check_sizes(visual, [12, 48, 72])
    with pytest.raises(UserError, match=r"50 pixels.*patches of 12; take 48"):
        check_sizes(visual, [48, 50])
